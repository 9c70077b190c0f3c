"""The state of a run in one file, replaced whole, that knows when it has been damaged."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.models.arrays import read_arrays, write_arrays
from mlx_dpo.models.weights import check_safetensors
from mlx_dpo.refusal import Refusal

_KEPT = 2


class Checkpoint(NamedTuple):
    """Everything that the next step depends on: arrays by name, and plain numbers."""

    arrays: dict[str, mx.array]
    numbers: dict[str, Any]


class Found(NamedTuple):
    """The newest whole checkpoint, its file, and the newer ones that are damaged and were passed over."""

    state: Checkpoint
    path: Path
    damaged: list[Path]


def save(folder: Path, step: int, state: Checkpoint) -> Path:
    """Write the checkpoint of `step`, durably, and drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    write_arrays(path, state.arrays, {"numbers": json.dumps(state.numbers), "sha256": _digest(state.arrays)})
    killed_while_writing = list(folder.glob(".part-step-*"))
    for old in _newest_first(folder)[_KEPT:] + killed_while_writing:
        old.unlink()
    return path


def newest(folder: Path) -> Found | None:
    """The newest whole checkpoint; None where there is none.

    Raises Refusal where all that are there are damaged.
    """
    damaged: list[Path] = []
    for path in _newest_first(folder):
        state = _read(path)
        if state is not None:
            return Found(state, path, damaged)
        damaged.append(path)
    if damaged:
        raise Refusal(f"{damaged[0]} and every older checkpoint is damaged: start anew with another --out.")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    try:
        check_safetensors(path)
        arrays, metadata = read_arrays(path)
        if _digest(arrays) != metadata["sha256"]:
            return None
        return Checkpoint(arrays, json.loads(metadata["numbers"]))
    except (Refusal, RuntimeError, ValueError, KeyError):
        return None


def _digest(arrays: dict[str, mx.array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.array(arrays[name])
        digest.update(f"{name} {value.dtype} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
