"""Exponentials by arithmetic are exponentials, with their slopes."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations

from mlx_dpo.models import exponentials

needs_arithmetic = pytest.mark.skipif(not exponentials.slow_here(), reason="MLX's own exponentials are used here")


def normal(*shape: int, seed: int, scale: float = 1.0) -> mx.array:
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def assert_same(found: mx.array, expected: mx.array, tolerance: float = 1e-6) -> None:
    """Within the tolerance of the largest number expected."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float(mx.abs(found - expected).max()) <= tolerance * float(mx.abs(expected).max())


def assert_learns_as(
    ours: Callable[..., mx.array], theirs: Callable[..., mx.array], given: Sequence[mx.array], tolerance: float = 1e-6
) -> None:
    """Values and all gradients of two functions, for a random cotangent."""
    expected = theirs(*given)
    cotangent = normal(*expected.shape, seed=99).astype(expected.dtype)
    assert_same(ours(*given), expected, tolerance)
    slopes = [mx.vjp(function, list(given), [cotangent])[1] for function in (ours, theirs)]
    for found, wanted in zip(*slopes, strict=True):
        assert_same(found, wanted, tolerance)


def test_powers_are_those_of_float64():
    x = np.concatenate([np.linspace(-87, 88, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    found = np.array(exponentials.exp(mx.array(x)))
    expected = np.exp(x.astype(np.float64))
    assert found.dtype == np.float32
    assert np.abs(found / expected - 1).max() <= 2.5e-7
    assert exponentials.exp(mx.array([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_powers_grow():
    x = mx.array(np.linspace(-20, 20, 200_001).astype(np.float32))
    assert np.diff(np.array(exponentials.exp(x), dtype=np.float64)).min() >= 0


@needs_arithmetic
def test_what_is_too_small_for_float32_is_its_least_number():
    least = float(exponentials.exp(mx.array([-87.0])))
    assert exponentials.exp(mx.array([-88.0, -1e4, -1e9, -3e38, -mx.inf])).tolist() == [least] * 5
    assert 0 < least < 2e-38


def test_powers_of_what_is_not_a_number_are_none():
    assert mx.isnan(exponentials.exp(mx.array([mx.nan]))).all().item()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_softmax_and_its_slope(scale: float):
    assert_learns_as(exponentials.softmax, lambda x: mx.softmax(x, axis=-1), [normal(3, 5, 67, seed=1, scale=scale)])


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_swiglu_and_its_slopes(scale: float):
    given = [normal(3, 90, 67, seed=3, scale=scale), normal(3, 90, 67, seed=4)]
    assert_learns_as(exponentials.swiglu, activations.swiglu, given)


def test_softmax_of_what_a_mask_leaves():
    mask = mx.arange(67) % mx.arange(2, 7)[:, None] == 0
    given = [normal(3, 5, 67, seed=1, scale=3.0)]

    def theirs(scores: mx.array) -> mx.array:
        return mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1)

    assert_learns_as(lambda scores: exponentials.softmax(scores, mask), theirs, given)


def test_swiglu_of_16_bits_stays_of_16_bits():
    gate, up = (normal(3, 9, seed=seed).astype(mx.bfloat16) for seed in (3, 4))
    assert_same(exponentials.swiglu(gate, up), activations.swiglu(gate, up), 1e-2)
