"""Files and folders that are there whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_dpo.refusal import Refusal

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MLX_WRITING = ("[write]", "[save_safetensors]")  # how mlx begins the RuntimeError of whatever it could not write


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a staging folder beside `out`, renamed to `out` when the block ends well, removed otherwise.

    Raises Refusal where `out` already holds something, so that nothing of another run is overwritten, and where
    nothing (more) can be written there.
    """
    refuse_occupied(out)
    if os.path.ismount(out):
        raise Refusal(f"{out} is a disk of its own, which cannot be replaced as a whole: choose a folder below it.")
    place = out.resolve()
    with writing(out), _parents(place):
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
        try:
            yield staging
            staging.chmod(0o755)
            if place.exists():
                place.rmdir()
            staging.rename(place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def writing(out: Path, advice: str = "make room there, or choose another --out") -> Iterator[None]:
    """Raise Refusal, naming `out`, where the block cannot write at, below or beside it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not _on_the_way(error.filename, out):
            raise
        raise Refusal(f"{out} cannot be written ({error.strerror}): {advice}.") from error
    except RuntimeError as error:
        if not str(error).startswith(_MLX_WRITING):
            raise
        raise Refusal(f"{out} cannot be written ({str(error).rstrip('.')}): {advice}.") from error


def _on_the_way(name: object, out: Path) -> bool:
    """Whether a file's name is `out`, below it, above it or a part of it that is being written."""
    if not isinstance(name, str):
        return False
    path, place = Path(name).resolve(), out.resolve()
    part = path.parent == place.parent and path.name.startswith(f".{place.name}.part-")
    return part or path.is_relative_to(place) or place.is_relative_to(path)


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Make the folders above `place`, and take those that were made away again where the block fails."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def refuse_occupied(out: Path) -> None:
    """Raise Refusal unless `out` is absent or an empty folder."""
    if out.is_symlink() and not out.exists():
        raise Refusal(f"{out} is a link to nothing: remove it or choose another --out.")
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file, and a folder is to be written there: choose another --out.")
    if out.exists() and any(out.iterdir()):
        raise Refusal(f"{out} already holds files: choose another --out, or remove that folder first.")


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably: readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        put_in_place(Path(name), path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a written file to `path`, in the same folder: a loss of power leaves the old file or the new one.

    Raises OSError, which names `path`, where the disk fails.
    """
    with partial.open("rb+") as file:
        _sync(file.fileno(), path)
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk itself holds the names in `folder`, as renaming and removing left them.

    Where a folder cannot be opened, or its file system knows no such wish, there is nothing to wait for.
    Raises OSError, which names `folder`, where the disk fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _sync(descriptor, folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    """Wait until the disk itself holds a file; on macOS fsync alone stops at the drive's cache (fsync(2) there)."""
    complete = getattr(fcntl, "F_FULLFSYNC", None)
    try:
        if complete is not None:
            with contextlib.suppress(OSError):  # some network drives do not know it
                fcntl.fcntl(descriptor, complete)
                return
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder and keep others of this program out of it for as long as the block, or the process, lasts.

    Raises Refusal where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"Another run is writing into {folder}: wait for it, or choose another --out.") from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(handle)


def refuse_unwritable(out: Path) -> None:
    """Raise Refusal now, not after hours of work, where nothing could be written below `out`."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
    except OSError as error:
        raise Refusal(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
