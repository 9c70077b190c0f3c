"""Exponentials by arithmetic are exponentials, and stand where mlx-lm's functions did for a while alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, base, llama

from mlx_dpo.models import exponentials
from mlx_dpo.models.load import load

Folder = Callable[[str], Path]
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


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_logsumexp(scale: float):
    logits = normal(7, 501, seed=2, scale=scale)
    assert_same(exponentials.logsumexp(logits), mx.logsumexp(logits, axis=-1))


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_swiglu_and_its_slopes(scale: float):
    given = [normal(3, 9, 33, seed=3, scale=scale), normal(3, 9, 33, seed=4)]
    assert_learns_as(exponentials.swiglu, activations.swiglu, given)


def test_swiglu_of_16_bits_stays_of_16_bits():
    gate, up = (normal(3, 9, seed=seed).astype(mx.bfloat16) for seed in (3, 4))
    assert_same(exponentials.swiglu(gate, up), activations.swiglu(gate, up), 1e-2)


LENGTH, PLACES = 6, 11  # of queries, and of keys: some stand before
CAUSAL = mx.arange(PLACES - LENGTH, PLACES)[:, None] >= mx.arange(PLACES)[None]
ROWS = mx.stack([CAUSAL, CAUSAL & (mx.arange(PLACES)[None] > 2)])[:, None]  # (rows, 1, length, places)
HEADS = CAUSAL & (mx.arange(PLACES) >= mx.arange(4)[:, None, None])[None]  # (1, heads, length, places)
MASKS: dict[str, Any] = {
    "none": None,
    "causal": "causal",
    "bool": CAUSAL,
    "row by row": ROWS,
    "added": mx.where(CAUSAL, 0.0, -1e9),
    "added head by head": mx.where(ROWS, normal(2, 4, LENGTH, PLACES, seed=8), mx.finfo(mx.float32).min),
    "head by head": mx.broadcast_to(ROWS, (2, 4, LENGTH, PLACES)),
    "of heads alone": HEADS[0],
    "of heads, for every row": HEADS,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_and_its_slopes(mask: str, groups: int):
    given = [
        normal(2, 4, LENGTH, 16, seed=5),
        normal(2, groups, PLACES, 16, seed=6),
        normal(2, groups, PLACES, 12, seed=7),
    ]
    kept = MASKS[mask]

    def ours(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return exponentials.attention(queries, keys, values, None, 0.3, kept)

    def theirs(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return base.scaled_dot_product_attention(queries, keys, values, None, 0.3, kept)

    assert_learns_as(ours, theirs, given)


def test_attention_gives_a_mask_that_is_added_its_slope():
    queries, keys, values = (normal(2, 4, 5, 8, seed=seed) for seed in (1, 2, 3))

    def by(attention: Callable[..., mx.array]) -> Callable[[mx.array], mx.array]:
        return lambda mask: attention(queries, keys, values, None, 0.3, mask)

    added = [normal(2, 4, 5, 5, seed=4)]
    assert_learns_as(by(exponentials.attention), by(base.scaled_dot_product_attention), added)


def test_attention_with_sinks_is_mlxs():
    queries, keys, values, sinks = *(normal(2, 4, 5, 8, seed=seed) for seed in (1, 2, 3)), normal(4, seed=4)
    found, expected = (
        attention(queries, keys, values, None, 0.3, MASKS["causal"], sinks=sinks)
        for attention in (exponentials.attention, base.scaled_dot_product_attention)
    )
    assert mx.array_equal(found, expected)


@needs_arithmetic
def test_the_functions_stand_in_for_as_long_as_the_block_lasts(tiny_folder: Folder):
    model = load(tiny_folder("llama")).model

    def called() -> tuple[object, object]:
        return vars(llama)["swiglu"], vars(llama)["scaled_dot_product_attention"]

    before, ours = called(), (exponentials.swiglu, exponentials.attention)
    with exponentials.by_arithmetic(model):
        assert called() == ours
        with exponentials.by_arithmetic(model):
            pass
        assert called() == ours
    assert called() == before
    with pytest.raises(KeyError), exponentials.by_arithmetic(model):
        raise KeyError
    assert called() == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_a_model_says_the_same_by_arithmetic(tiny_folder: Folder, family: str):
    model = load(tiny_folder(family)).model
    tokens = mx.array([[5, 6, 7, 8, 9] * 6])
    expected = model(tokens)
    with exponentials.by_arithmetic(model):
        assert_same(model(tokens), expected, 1e-5)
