"""Exponentials by arithmetic, for processors on which MLX calls the mathematics library one number at a time.

On Linux MLX's CPU backend takes some 9 ns for an exponential on one core; the same number from multiplications that the
compiler can put side by side takes about 2. Two thirds of a training step there were exponentials. On Apple silicon and
on GPUs nothing here is used.
"""

import platform
import sys
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import activations

from mlx_dpo.models.fused import fused
from mlx_dpo.models.load import on_cpu

_ROUND = 1.5 * 2**23  # added to a float32 it leaves no room for a fraction
_LEAST = -87.0  # e to this is the smallest that float32 holds in full
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Cephes, expf: e^r - 1 - r for |r| ≤ ln 2 / 2, as r² times a polynomial, to 2e-7 of e^r.
_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_FEW = 2**14  # numbers, for which a call costs more than their exponentials
_NEVER = -1e9  # the score of what is not to be looked at


def slow_here() -> bool:
    """Whether exponentials cost so much on the device in use."""
    return on_cpu() and sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64")


def exp(x: mx.array) -> mx.array:
    """e^x for float32 x ≤ 88, elementwise, to 2 units in the last place; e^-87 for what is lower. Not differentiable.

    Cephes' expf (Moshier 1992): x = n ln 2 + r, a polynomial in r, n put into the exponent's bits.
    """
    return _power(x) if slow_here() else mx.exp(x)


@fused
def _power(x: mx.array) -> mx.array:
    return _by_arithmetic(x)


def _by_arithmetic(x: mx.array) -> mx.array:
    x = mx.maximum(x, _LEAST)
    shifted = x * 1.4426950408889634 + _ROUND  # n, rounded to whole numbers within _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    series = mx.array(_TERMS[0])
    for term in _TERMS[1:]:
        series = series * r + term
    series = series * r * r + r + 1.0
    return (series.view(mx.int32) + (shifted.view(mx.int32) << 23)).view(mx.float32)


def softmax(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Softmax over the last axis, float32, differentiable by the scores; of those alone that a bool mask leaves."""
    stream = mx.default_stream(mx.default_device())
    left = [] if mask is None else [mask]

    @mx.custom_function
    def forward(scores: mx.array) -> mx.array:
        return _shares(scores, *left)

    @forward.vjp
    def backward(_: Any, cotangent: mx.array, shares: mx.array) -> mx.array:
        with mx.stream(stream):
            return _slope_of_shares(shares, cotangent)

    return cast("mx.array", forward(scores))


@fused
def _shares(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    if mask is not None:
        scores = mx.where(mask, scores, _NEVER)
    powers = _by_arithmetic(scores - scores.max(axis=-1, keepdims=True))
    return powers * mx.reciprocal(powers.sum(axis=-1, keepdims=True))


@fused
def _slope_of_shares(shares: mx.array, cotangent: mx.array) -> mx.array:
    return shares * (cotangent - (shares * cotangent).sum(axis=-1, keepdims=True))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, as mlx-lm's function of the name, which is quicker for a few numbers."""
    if gate.dtype != mx.float32 or gate.size < _FEW:
        return activations.swiglu(gate, up)
    stream = mx.default_stream(mx.default_device())

    @mx.custom_function
    def forward(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
        return _gated(gate, up)

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        with mx.stream(stream):
            return _slopes_of_gated(primals[0], primals[1], cotangents[0], outputs[1])

    return cast("tuple[mx.array, mx.array]", forward(gate, up))[0]


@fused
def _gated(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """The product, and σ(gate) by e^-|gate|."""
    power = _by_arithmetic(-mx.abs(gate))
    share = mx.where(gate > 0, 1.0, power) / (1.0 + power)
    return gate * share * up, share


@fused
def _slopes_of_gated(gate: mx.array, up: mx.array, cotangent: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    silu = gate * share
    return cotangent * up * (share + silu * (1.0 - share)), cotangent * silu
