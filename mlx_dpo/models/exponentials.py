"""Exponentials by arithmetic, for processors on which MLX calls the mathematics library one number at a time.

On Linux MLX's CPU backend takes some 9 ns for an exponential on one core; the same number from multiplications that the
compiler can put side by side takes about 2. Two thirds of a training step there were exponentials. On Apple silicon and
on GPUs nothing here is used.
"""

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models.load import on_cpu

_ROUND = 1.5 * 2**23  # added to a float32 it leaves no room for a fraction
_LEAST = -87.0  # e to this is the smallest that float32 holds in full
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Cephes, expf: e^r - 1 - r for |r| ≤ ln 2 / 2, as r² times a polynomial, to 2e-7 of e^r.
_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def slow_here() -> bool:
    """Whether exponentials cost so much on the device in use."""
    return on_cpu() and sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64")


@mx.compile
def _reduced(x: mx.array) -> tuple[mx.array, mx.array]:
    """n, rounded to whole numbers within `_ROUND`, and r with x = n ln 2 + r."""
    shifted = mx.maximum(x, _LEAST) * 1.4426950408889634 + _ROUND
    n = shifted - _ROUND
    return shifted, mx.maximum(x, _LEAST) - n * _LN2_HIGH - n * _LN2_LOW


@mx.compile
def _series(r: mx.array) -> mx.array:
    total = _TERMS[0]
    for term in _TERMS[1:]:
        total = total * r + term
    return total * r * r + r + 1.0


@mx.compile
def _scaled(bits: mx.array, shifted: mx.array) -> mx.array:
    return bits + (shifted << 23)  # n into the exponent


def exp(x: mx.array) -> mx.array:
    """e^x for float32 x ≤ 88, elementwise, to 2 units in the last place; e^-87 for what is lower. Not differentiable.

    Cephes' expf (Moshier 1992): x = n ln 2 + r, a polynomial in r, n put into the exponent's bits.
    """
    if not slow_here():
        return mx.exp(x)
    shifted, r = _reduced(x)
    return _scaled(_series(r).view(mx.int32), shifted.view(mx.int32)).view(mx.float32)


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, float32, differentiable."""
    stream = mx.default_stream(mx.default_device())

    @mx.custom_function
    def forward(scores: mx.array) -> mx.array:
        powers = exp(scores - scores.max(axis=-1, keepdims=True))
        return powers * mx.reciprocal(powers.sum(axis=-1, keepdims=True))

    @forward.vjp
    def backward(_: Any, cotangent: mx.array, shares: mx.array) -> mx.array:
        with mx.stream(stream):
            return _softmax_slope(shares, cotangent, (shares * cotangent).sum(axis=-1, keepdims=True))

    return cast("mx.array", forward(scores))


@mx.compile
def _softmax_slope(shares: mx.array, cotangent: mx.array, mean: mx.array) -> mx.array:
    return shares * (cotangent - mean)


def logsumexp(logits: mx.array) -> mx.array:
    """log Σ e^x over the last axis, float32; not differentiable."""
    highest = logits.max(axis=-1, keepdims=True)
    return (highest + mx.log(exp(logits - highest).sum(axis=-1, keepdims=True)))[..., 0]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, as mlx-lm's function of the name."""
    if gate.dtype != mx.float32:
        return nn.silu(gate) * up
    stream = mx.default_stream(mx.default_device())

    @mx.custom_function
    def forward(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
        share = _sigmoid(exp(-mx.abs(gate)), gate)
        return gate * share * up, share

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        with mx.stream(stream):
            return _swiglu_slopes(primals[0], primals[1], cotangents[0], outputs[1])

    return cast("tuple[mx.array, mx.array]", forward(gate, up))[0]


@mx.compile
def _sigmoid(power: mx.array, gate: mx.array) -> mx.array:
    """σ(gate) from e^-|gate|."""
    return mx.where(gate > 0, 1.0, power) / (1.0 + power)


@mx.compile
def _swiglu_slopes(gate: mx.array, up: mx.array, cotangent: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    silu = gate * share
    return cotangent * up * (share + silu * (1.0 - share)), cotangent * silu


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Scaled dot-product attention, as mlx-lm's function of the name."""
    if sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    rows, heads, length, width = queries.shape
    groups, places = keys.shape[1], keys.shape[2]
    split = (queries * scale).reshape(rows, groups, heads // groups, length, width)
    scores = split @ keys[:, :, None].swapaxes(-1, -2)
    if mask is not None:
        if isinstance(mask, str):
            mask = mx.arange(places - length, places)[:, None] >= mx.arange(places)[None]
        if mask.ndim > 2:
            mask = mask if mask.ndim == 4 else mask[None]
            mask = mx.expand_dims(mask, 2) if mask.shape[1] == 1 else mx.unflatten(mask, 1, (groups, -1))
        scores = mx.where(mask, scores, _NEVER) if mask.dtype == mx.bool_ else scores + mask
    return (softmax(scores) @ values[:, :, None]).reshape(rows, heads, length, values.shape[-1])


_NEVER = -1e9
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
