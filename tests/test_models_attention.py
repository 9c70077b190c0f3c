"""Attention on the CPU of Linux is attention, and stands where mlx-lm's functions did for a while alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base, llama
from test_models_exponentials import assert_learns_as, assert_same, normal

from mlx_dpo.models import attention, exponentials
from mlx_dpo.models.load import load
from mlx_dpo.models.prompts import Fed

Folder = Callable[[str], Path]
needs_arithmetic = pytest.mark.skipif(not exponentials.slow_here(), reason="MLX's own exponentials are used here")

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
        return attention.attention(queries, keys, values, None, 0.3, kept)

    def theirs(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return base.scaled_dot_product_attention(queries, keys, values, None, 0.3, kept)

    assert_learns_as(ours, theirs, given)


@pytest.mark.parametrize("length", [2, 129, 320, 450])
@pytest.mark.parametrize("window", [None, 40])
def test_many_queries_are_taken_a_few_at_a_time(length: int, window: int | None):
    before = 30  # keys of prompts, of which the second row has fewer
    cache = Fed([normal(2, 2, before, 8, seed=seed) for seed in (1, 2)], mx.array([before, 12]), before)
    mask = cache.make_mask(length, window_size=window)
    fresh = [normal(2, heads, length, 8, seed=seed) for heads, seed in ((4, 3), (2, 4), (2, 5))]

    def by(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda queries, keys, values: function(queries, *cache.update_and_fetch(keys, values), cache, 0.3, mask)

    assert_learns_as(by(attention.attention), by(base.scaled_dot_product_attention), fresh, 5e-6)


def test_scores_of_what_comes_after_are_not_computed():
    queries, keys, values = (normal(1, 2, 512, 8, seed=seed) for seed in (1, 2, 3))

    def peak(mask: Any) -> int:
        mx.reset_peak_memory()
        mx.eval(attention.attention(queries, keys, values, None, 0.3, mask))
        return mx.get_peak_memory() - mx.get_active_memory()

    square = 2 * 512 * 512 * 4
    assert peak(None) - peak("causal") > 0.4 * square


def test_attention_gives_a_mask_that_is_added_its_slope():
    queries, keys, values = (normal(2, 4, 5, 8, seed=seed) for seed in (1, 2, 3))

    def by(function: Callable[..., mx.array]) -> Callable[[mx.array], mx.array]:
        return lambda mask: function(queries, keys, values, None, 0.3, mask)

    added = [normal(2, 4, 5, 5, seed=4)]
    assert_learns_as(by(attention.attention), by(base.scaled_dot_product_attention), added)


def test_attention_with_sinks_is_mlxs():
    queries, keys, values, sinks = *(normal(2, 4, 5, 8, seed=seed) for seed in (1, 2, 3)), normal(4, seed=4)
    found, expected = (
        function(queries, keys, values, None, 0.3, MASKS["causal"], sinks=sinks)
        for function in (attention.attention, base.scaled_dot_product_attention)
    )
    assert mx.array_equal(found, expected)


@needs_arithmetic
def test_the_functions_stand_in_for_as_long_as_the_block_lasts(tiny_folder: Folder):
    model = load(tiny_folder("llama")).model

    def called() -> tuple[object, object]:
        return vars(llama)["swiglu"], vars(llama)["scaled_dot_product_attention"]

    before, ours = called(), (exponentials.swiglu, attention.attention)
    with attention.by_arithmetic(model):
        assert called() == ours
        with attention.by_arithmetic(model):
            pass
        assert called() == ours
    assert called() == before
    with pytest.raises(KeyError), attention.by_arithmetic(model):
        raise KeyError
    assert called() == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_a_model_says_the_same_by_arithmetic(tiny_folder: Folder, family: str):
    model = load(tiny_folder(family)).model
    tokens = mx.array([[5, 6, 7, 8, 9] * 6])
    expected = model(tokens)
    with attention.by_arithmetic(model):
        assert_same(model(tokens), expected, 1e-5)
