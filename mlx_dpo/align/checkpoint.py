"""The state of a run in one file, replaced whole, that knows when it has been damaged."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.models.arrays import read_arrays, write_arrays
from mlx_dpo.models.weights import check_safetensors
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sync_folder

_VERSION = "2"
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})\.safetensors")


class Checkpoint(NamedTuple):
    """Everything that the next step depends on: arrays by name, and plain numbers."""

    arrays: dict[str, mx.array]
    numbers: dict[str, Any]


class Found(NamedTuple):
    """The newest whole checkpoint, its file, and the newer ones that cannot be used and were passed over."""

    state: Checkpoint
    path: Path
    damaged: list[Path]


def save(folder: Path, step: int, state: Checkpoint, keep: int = 2, pinned: Collection[int] = ()) -> Path:
    """Write the checkpoint of `step`, durably, and drop the older ones.

    The newest `keep` (at least one) up to `step` stay, and so do those of the steps in `pinned`; later steps' files
    are not touched. Raises OSError or RuntimeError, which `storage.writing` words, where it cannot be written:
    nothing was dropped then.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, and the checkpoint just written has to stay")
    _make(folder)
    for killed_while_writing in folder.glob(".part-step-*"):
        killed_while_writing.unlink()
    path = _path(folder, step)
    numbers = json.dumps(state.numbers)
    digest = _digest(step, numbers, state.arrays)
    write_arrays(path, state.arrays, {"version": _VERSION, "numbers": numbers, "sha256": digest})
    # Damaged files of later steps must not take the place of whole ones.
    older = [number for number in steps(folder) if number <= step][keep:]
    for number in set(older) - set(pinned):
        _path(folder, number).unlink()
    return path


def newest(folder: Path) -> Found | None:
    """The newest whole checkpoint; None where there is none.

    Raises Refusal where all that are there are damaged, or of another version.
    """
    passed_over: list[Path] = []
    for step in steps(folder):
        path = _path(folder, step)
        state = _read(path, step)
        if isinstance(state, Checkpoint):
            return Found(state, path, passed_over)
        passed_over.append(path)
    if passed_over:
        raise Refusal(_hopeless(passed_over[0]))
    return None


def at(folder: Path, step: int) -> Checkpoint | None:
    """The checkpoint of `step`; None where there is none or it cannot be used."""
    return _read(_path(folder, step), step)


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that are there, damaged ones too, the newest first."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("step-*.safetensors")]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of all later steps, durably, the newest first."""
    later = [number for number in steps(folder) if number > step]
    for number in later:
        _path(folder, number).unlink()
    if later:
        sync_folder(folder)


def keep_only(folder: Path, step: int) -> None:
    """Remove every checkpoint but that of one step."""
    for number in steps(folder):
        if number != step:
            _path(folder, number).unlink()


def _make(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in made:
        sync_folder(place.parent)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def _read(path: Path, step: int) -> Checkpoint | None:
    try:
        check_safetensors(path)
        arrays, metadata = read_arrays(path)
        numbers = metadata["numbers"]
        if metadata["version"] != _VERSION or metadata["sha256"] != _digest(step, numbers, arrays):
            return None
        return Checkpoint(arrays, json.loads(numbers))
    except (Refusal, OSError, RuntimeError, ValueError, KeyError):
        return None


def _hopeless(path: Path) -> str:
    """Why neither `path`, the newest, nor any older checkpoint can be used, and what to do."""
    version = _version(path)
    if version in (None, _VERSION):
        return f"{path} and every older checkpoint is damaged: start anew with another --out."
    return (
        f"{path} has the format {version}, this mlx_dpo reads format {_VERSION}, and no older checkpoint can be read "
        "either: go on with the version that wrote it, or start anew with another --out."
    )


def _version(path: Path) -> str | None:
    """The format that a checkpoint says it has, which the first one did not say; None where it cannot be read."""
    try:
        check_safetensors(path)
        return read_arrays(path)[1].get("version", "1")
    except (Refusal, OSError, RuntimeError, ValueError):
        return None


def _digest(step: int, numbers: str, arrays: dict[str, mx.array]) -> str:
    """SHA-256 of all that a checkpoint says; each part is led by its length, so that no two run together."""
    digest = hashlib.sha256()
    for part in _parts(step, numbers, arrays):
        digest.update(f"{len(part)} ".encode())
        digest.update(part)
    return digest.hexdigest()


def _parts(step: int, numbers: str, arrays: dict[str, mx.array]) -> Iterator[bytes | memoryview]:
    yield from (_VERSION.encode(), str(step).encode(), numbers.encode())
    for name, value in sorted(arrays.items()):
        yield json.dumps([name, str(value.dtype), value.shape]).encode()
        yield np.array(value.reshape(-1).view(mx.uint8)).data
