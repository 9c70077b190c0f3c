"""Attention and activations for the CPU of Linux, in the place of MLX's while a model is at work."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models.exponentials import slow_here, softmax, swiglu
from mlx_dpo.models.prompts import Fed

_AT_ONCE = 128  # queries whose scores are computed together, of which half of the square is for nothing


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Scaled dot-product attention, as mlx-lm's function of the name.

    Where no query looks ahead, no scores are computed for what comes after the last of a few queries. One query alone,
    as each token of an answer has, is MLX's, which is quicker there.
    """
    if sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32 or queries.shape[2] == 1:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    rows, heads, length, width = queries.shape
    groups, places = keys.shape[1], keys.shape[2]
    causal = isinstance(mask, str) or isinstance(cache, Fed)
    mask = _spread(mask, groups, length, places)
    split = (queries * scale).reshape(rows, groups, heads // groups, length, width)
    keys, values = keys[:, :, None].swapaxes(-1, -2), values[:, :, None]
    found = []
    for first, end in _parts(length) if causal and mask is not None and mask.shape[-2] == length else [(0, length)]:
        seen = places - (length - end)
        left = None if mask is None else mask[..., first:end, :seen]
        found.append(_attended(split[..., first:end, :], keys[..., :seen], values[..., :seen, :], left))
    return mx.concatenate(found, axis=-2).reshape(rows, heads, length, values.shape[-1])


def _spread(mask: Any, groups: int, length: int, places: int) -> mx.array | None:
    """A mask with places for (rows, groups, heads of a group) before its queries and keys, or for none of them."""
    if isinstance(mask, str):
        return mx.arange(places - length, places)[:, None] >= mx.arange(places)[None]
    if mask is None or mask.ndim == 2:
        return mask
    mask = mask if mask.ndim == 4 else mask[None]
    return mx.expand_dims(mask, 2) if mask.shape[1] == 1 else mx.unflatten(mask, 1, (groups, -1))


def _parts(length: int) -> list[tuple[int, int]]:
    count = max(1, round(length / _AT_ONCE))
    return [(number * length // count, (number + 1) * length // count) for number in range(count)]


def scores_of(length: int, before: int = 0) -> int:
    """How many scores a head computes for a text of `length` places that goes on from `before` others."""
    return sum((end - first) * (before + end) for first, end in _parts(length))


def _attended(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    scores = queries @ keys
    if mask is not None and mask.dtype != mx.bool_:
        scores, mask = scores + mask, None
    return softmax(scores, mask) @ values


_OURS: dict[str, Callable[..., Any]] = {"swiglu": swiglu, "scaled_dot_product_attention": attention}


@contextlib.contextmanager
def by_arithmetic(model: nn.Module) -> Iterator[None]:
    """Where exponentials are slow, let the modules that define `model` call the functions above while the block lasts.

    mlx-lm's models look both names up in their own module; other activations stay as they are.
    """
    if not slow_here():
        yield
        return
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    before = [(home, name, vars(home)[name]) for home in homes for name in _OURS if _is_mlx_lms(vars(home).get(name))]
    for home, name, _ in before:
        setattr(home, name, _OURS[name])
    try:
        yield
    finally:
        for home, name, function in before:
            setattr(home, name, function)


def _is_mlx_lms(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("mlx_lm.models.")
