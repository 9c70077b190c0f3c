"""MLX's trees and files as plain dictionaries of arrays, with their types."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dpo.storage import put_in_place


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree (a model's parameters, an optimiser's state) by their dotted path."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the metadata of a safetensors file, which has to be checked before."""
    arrays, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    return arrays, metadata  # type: ignore[return-value]


def write_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically and durably: readers see the old file or the new one."""
    partial = path.with_name(f".part-{path.name}")
    try:
        mx.save_safetensors(str(partial), dict(arrays), metadata=dict(metadata))
        put_in_place(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
