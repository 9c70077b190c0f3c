"""Files and folders that are there whole or not at all."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_dpo.refusal import Refusal


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a staging folder beside `out`, renamed to `out` when the block ends well, removed otherwise.

    Raises Refusal where `out` already holds something, so that nothing of another run is overwritten.
    """
    refuse_occupied(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unwritable(out: Path) -> None:
    """Raise OSError now, not after hours of work, where nothing could be written below `out`."""
    nearest = next(folder for folder in (out, *out.parents) if folder.exists())
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(b"\0")
