"""MLX's trees and files as plain dictionaries of arrays, with their types."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree (a model's parameters, an optimiser's state) by their dotted path."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the metadata of a safetensors file, which has to be checked before."""
    arrays, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    return arrays, metadata  # type: ignore[return-value]
