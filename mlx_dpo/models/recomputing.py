"""Gradient checkpointing: a part of the model keeps its input alone, and is computed again when its turn comes."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dpo.models.arrays import named_arrays
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
    outside = block.trainable_parameters()
    names = list(named_arrays(outside))
    given = [*args, *kwargs.values()]
    caches = [value for value in given if isinstance(value, Taken | Fed)]
    places = [place for place, value in enumerate(given) if _is_floating(value)]
    before = [cache.arrays for cache in caches]
    high, low = np.array(mx.random.state).ravel().tolist()
    is_single = True

    def inner(arrays: _Arrays) -> list[mx.array]:
        nonlocal is_single
        # Dropout has to draw the same the second time, or the gradient belongs to another network.
        mx.random.seed(high << 32 | low)
        rest = iter(arrays)
        block.update(tree_unflatten([(name, next(rest)) for name in names]))
        for cache, array in zip(caches, before, strict=True):
            cache.arrays = tuple(next(rest) for _ in array)
        own = {place: next(rest) for place in places}
        now = [own.get(place, value) for place, value in enumerate(given)]
        result = kind.__call__(block, *now[: len(args)], **dict(zip(kwargs, now[len(args) :], strict=True)))
        is_single = isinstance(result, mx.array)
        return [*([result] if is_single else result), *(array for cache in caches for array in cache.kept)]

    flat = [*named_arrays(outside).values(), *(a for arrays in before for a in arrays), *(given[p] for p in places)]
    outputs = computed_again(inner)(flat)
    block.update(outside)
    rest = outputs[len(outputs) - sum(len(cache.kept) for cache in caches) :]
    kept = iter(rest)
    for cache, arrays in zip(caches, before, strict=True):
        cache.arrays, cache.kept = arrays, tuple(next(kept) for _ in cache.kept)
    return outputs[0] if is_single else tuple(outputs[: len(outputs) - len(rest)])


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
