"""Gradient checkpointing: a part of the model keeps its input alone, and is computed again when its turn comes."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_dpo.models.load import blocks
from mlx_dpo.models.prompts import Fed, Taken
from mlx_dpo.models.standing_in import called_as

_Arrays = Sequence[mx.array]


def computed_again(function: Callable[[_Arrays], list[mx.array]]) -> Callable[[_Arrays], list[mx.array]]:
    """`function`, from arrays to arrays, whose inner values are computed a second time for its gradient.

    Unlike mx.checkpoint the second time waits for the gradient of its outputs: otherwise all parts of a model are
    ready for theirs at once, and together take what was to be saved. `function` is computed in the stream that it is
    called in, and has to be pure: what it does beside has no gradient.
    """
    stream = mx.default_stream(mx.default_device())

    @mx.custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        return function(arrays)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, _: Any) -> Any:
        given, wanted = _listed(primals), _listed(cotangents)
        with mx.stream(stream):
            waiting = mx.depends(given, wanted)
            _, slopes = mx.vjp(lambda *arrays: function(arrays), waiting, wanted)
            # All at once, or what the parameters' gradients need would be kept until everything else is done.
            slopes = mx.depends(slopes, slopes)
        return slopes[0] if len(slopes) == 1 else tuple(slopes)

    return lambda arrays: _listed(forward(*arrays))


def _listed(arrays: Any) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def recomputed_blocks(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradient checkpointing for as long as the block lasts: only the input of each block of `model` is kept.

    With it, where a prompt is shared, its keys and values: they go through the recomputed function as inputs and
    outputs, since what it did to a cache beside would have no gradient.
    """
    return called_as(blocks(model), _recomputed)


def _recomputed(kind: type[nn.Module], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Taken | Fed)]
    before = [cache.arrays for cache in caches]
    inputs = [block.trainable_parameters(), before, list(args), kwargs]
    high, low = np.array(mx.random.state).ravel().tolist()
    outputs: list[Any] = []

    def inner(arrays: _Arrays) -> list[mx.array]:
        # Dropout has to draw the same the second time, or the gradient belongs to another network.
        mx.random.seed(high << 32 | low)
        parameters, given, own, named = _filled(inputs, arrays)
        block.update(parameters)
        for cache, array in zip(caches, given, strict=True):
            cache.arrays = tuple(array)
        outputs[:] = kind.__call__(block, *own, **named), [cache.kept for cache in caches]
        return _arrays_in(outputs)

    found = computed_again(inner)(_arrays_in(inputs))
    block.update(inputs[0])
    result, kept = _filled(outputs, found)
    for cache, arrays, taken in zip(caches, before, kept, strict=True):
        cache.arrays, cache.kept = arrays, tuple(taken)
    return result


def _arrays_in(tree: Any) -> list[mx.array]:
    """The arrays that a gradient may go through, wherever they are in tuples, lists and dictionaries."""
    found: list[mx.array] = []
    tree_map(lambda leaf: found.append(leaf) if _is_floating(leaf) else None, tree)
    return found


def _filled(tree: Any, arrays: _Arrays) -> Any:
    """The same tree with those arrays in their places."""
    rest = iter(arrays)
    return tree_map(lambda leaf: next(rest) if _is_floating(leaf) else leaf, tree)


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
