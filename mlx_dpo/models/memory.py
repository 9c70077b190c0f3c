"""Memory: what a run will take, and the exchange of time for it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing for as long as the block lasts: only the input of each block of `model` is kept.

    Works on the instances, not on their class, so that another model of the same kind is left alone.
    """
    kinds = [type(block) for block in model.layers]
    for block, kind in zip(model.layers, kinds, strict=True):
        block.__class__ = _recomputing(kind)
    try:
        yield
    finally:
        for block, kind in zip(model.layers, kinds, strict=True):
            block.__class__ = kind


def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outside = self.trainable_parameters()

        def inner(parameters: dict, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        result = mx.checkpoint(inner)(outside, *args, **kwargs)
        self.update(outside)
        return result

    return type(kind.__name__, (kind,), {"__call__": call})


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))
