"""Every way of computing log p gives the value and the gradient of the plain one, on every kind of architecture."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import runs
import tiny
from mlx.utils import tree_unflatten
from mlx_lm.models import llama

from mlx_dpo.models import adapters, lanes
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward, States
from mlx_dpo.models.load import Loaded, blocks, load
from mlx_dpo.models.recomputing import recomputed_blocks
from mlx_dpo.models.rows import Rows, Said, row_sums, rows_of

Folder = Callable[[str], Path]
SHARES = dict.fromkeys((*tiny.FAMILIES, *tiny.MORE_FAMILIES), True) | {
    "gemma2": False,  # its grouped heads take a mask for one row at a time
    "gemma3n": False,  # its upper layers read the keys of a cache below
    "gemma4_text": False,  # likewise
    "llama4": False,  # its chunks are counted by a cache of its own
    "internlm3": False,  # its rotation wants the length as a number
    "lfm2": False,  # a state goes on besides keys
    "mamba": False,  # a state goes on alone
}


def said(length: int, answer: int, first: int = 5) -> Said:
    """A prompt and an answer of so many tokens; prompts of one `first` and length are equal."""
    prompt = [first + (7 * i) % 190 for i in range(length)]
    return Said(prompt, [200 + (11 * i + answer) % 190 for i in range(answer)])


# Prompts longer and shorter than every window here (8 and 24), one with three answers, one of one token, one twice.
TEXTS = [said(30, 13), said(30, 2), said(30, 1), said(5, 27), said(5, 9), said(1, 6), said(1, 1), said(5, 9)]
TEXTS.append(said(11, 4, first=9)._replace(lead=6))
WEIGHTS = mx.array([1.0, -1.0, 0.5, -0.8, 1.2, 0.7, -1.3, 0.9, 0.4])  # of the answers in the loss


class Way(NamedTuple):
    """How a pass is computed besides what the model allows."""

    lanes: int
    recomputed: bool
    arithmetic: bool
    at_once: int = 1000  # places in a chunk of the head


WAYS = {
    "one lane": Way(lanes=1, recomputed=False, arithmetic=False),
    "at work": Way(lanes=2, recomputed=False, arithmetic=True, at_once=7),
    "recomputed": Way(lanes=2, recomputed=True, arithmetic=False, at_once=7),
    "recomputed at work": Way(lanes=1, recomputed=True, arithmetic=True),
}


class Found(NamedTuple):
    """A weighed sum of log p and its gradient by the adapter."""

    value: float
    gradients: dict[str, np.ndarray]


def learnt(
    forward: Forward,
    rows: Rows,
    *,
    weights: mx.array = WEIGHTS,
    states: States | None = None,
    recomputed: bool = False,
) -> Found:
    """Value and gradient at a pass's own pace."""

    def loss() -> mx.array:
        return (row_sums(forward.token_logps(rows, states, learning=True)[0], rows) * weights).sum()

    with recomputed_blocks(forward.model) if recomputed else contextlib.nullcontext():
        value, gradients = nn.value_and_grad(forward.model, loss)()
        mx.eval(value, gradients)
    return Found(float(value), {name: np.array(gradient) for name, gradient in named_arrays(gradients).items()})


def by(forward: Forward, way: Way, texts: Sequence[Said]) -> Found:
    vocabulary = forward.model(mx.array([[1]])).shape[-1]
    chunked = replace(forward, logit_bytes=4 * vocabulary * way.at_once)
    rows = rows_of(texts, shared=forward.shares, lanes=way.lanes)
    with chunked.at_work() if way.arithmetic else lanes.open_to_all():
        return learnt(chunked, rows, recomputed=way.recomputed)


def assert_same(found: Found, expected: Found) -> None:
    """Within 1e-5 of the value, and 5e-5 of the largest number of each gradient; none of them is zero.

    Measured are at most 3e-5, with Gemma 4, else 1e-5: float32 sums in another order.
    """
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 1e-5, name
        assert np.abs(found.gradients[name] - gradient).max() < 5e-5 * largest, name


def adapted(folder: Path, family: str, layers: int | None = None) -> Loaded:
    """A model whose norms, biases and sinks are random too; a random adapter is on all linear layers of its blocks.

    Or of its top `layers` alone.
    """
    loaded = load(folder)
    keys = mx.random.split(mx.random.key(3), 500)
    vectors = [(name, value) for name, value in runs.named(loaded.model.parameters()) if value.ndim == 1]
    shaken = [
        (name, 0.5 * value + 0.1 * mx.random.normal(value.shape, key=keys[i]))
        for i, (name, value) in enumerate(vectors)
    ]
    loaded.model.update(tree_unflatten(shaken))
    # AltUp reads the weights of its linear layers itself.
    targets = ("self_attn.*", "mlp.*") if family == "gemma3n" else ()
    chosen = adapters.chosen_keys(loaded.model, targets)
    runs.attach(loaded, adapters.AdapterShape(4, 2.0, 0.0, chosen, layers or len(blocks(loaded.model))), seed=1)
    return loaded


@pytest.fixture(scope="module", params=SHARES)
def plain(request: pytest.FixtureRequest, tiny_folder: Folder) -> tuple[str, Loaded, Found]:
    loaded = adapted(tiny_folder(request.param), request.param)
    return request.param, loaded, learnt(Forward.plain(loaded.model), rows_of(TEXTS))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_value_and_the_gradient_of_the_plain_one(plain: tuple[str, Loaded, Found], way: str):
    family, loaded, expected = plain
    forward = Forward.of(loaded.model)
    assert forward.shares == SHARES[family]
    assert_same(by(forward, WAYS[way], TEXTS), expected)


NOT_KEPT = ("gemma3n", "gemma4_text")  # what goes from block to block is more than one state


@pytest.mark.parametrize("family", SHARES)
def test_what_lies_below_the_adapters_is_computed_beforehand(tiny_folder: Folder, family: str):
    loaded = adapted(tiny_folder(family), family, layers=1)
    forward = Forward.of(loaded.model)
    assert forward.depth == (0 if family in NOT_KEPT else len(blocks(loaded.model)) - 1)
    expected = learnt(Forward.plain(loaded.model), rows_of(TEXTS))
    rows = rows_of(TEXTS, shared=forward.shares, lanes=2)
    with forward.at_work():
        assert_same(learnt(forward, rows, states=forward.states(rows), recomputed=True), expected)


def test_a_prompt_learns_through_recomputed_blocks_what_finite_differences_say(tiny_folder: Folder):
    # Only what the prompt's keys carry: what a block does to a cache beside its recomputed inputs has no gradient.
    loaded = runs.adapted(tiny_folder("llama"), targets=("k_proj",), seed=1)
    forward, texts = Forward.of(loaded.model), [said(12, 5), said(12, 2)]
    assert forward.shares
    rows, name = rows_of(texts, shared=True), "model.layers.0.self_attn.k_proj.lora_b"
    before = dict(runs.named(loaded.model.parameters()))[name]
    way = np.random.default_rng(0).standard_normal(before.shape).astype(np.float32)

    def moved(by: float) -> float:
        loaded.model.update(tree_unflatten([(name, before + by * mx.array(way))]))
        return float(row_sums(forward.token_logps(rows)[0], rows).sum())

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    moved(0.0)
    found = learnt(forward, rows, recomputed=True, weights=mx.ones(2))
    assert abs(slope) > 1.0
    assert (found.gradients[name] * way).sum() == pytest.approx(slope, rel=1e-2)


PLACES = 16  # in a chunk of the head
VOCABULARY = 16_000


def wide_headed(kind: str) -> llama.Model:
    """A tiny model with a large vocabulary, its blocks adapted; of its head `kind` says what it is."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs.from_dict(tiny.FAMILIES["llama"] | sizes | {"tie_word_embeddings": "tied" in kind})
    )
    if "packed" in kind:
        nn.quantize(model, 32, 4, class_predicate=lambda path, _: "embed" in path or "head" in path)
    keys = ("self_attn.q_proj", *(("lm_head",) if "learning" in kind else ()))
    adapters.attach(model, adapters.AdapterShape(4, 2.0, 0.0, keys, 1), seed=7)
    named = [item for item in runs.named(adapters.adapter_weights(model)) if item[0].endswith("lora_b")]
    model.update(tree_unflatten([(name, 0.1 * mx.random.normal(value.shape)) for name, value in named]))
    return model


def peak(forward: Forward, texts: Sequence[Said]) -> int:
    """Bytes at the peak of a value and its gradient, without what is there before."""
    rows = forward.rows_of(texts)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with forward.at_work():
        learnt(forward, rows, weights=mx.ones(len(texts)))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kind", ["untied", "tied", "packed", "tied packed"])
def test_the_head_takes_no_more_memory_for_more_places(kind: str):
    model = wide_headed(kind)
    chunk = 4 * VOCABULARY * PLACES
    forward = replace(Forward.of(model), logit_bytes=chunk)
    few, many = ([said(3, 33)] * count for count in (16, 64))  # 33 and 132 chunks
    assert peak(forward, many) < peak(forward, few) + 6 * chunk


@pytest.mark.parametrize("kind", ["untied", "tied", "packed", "tied packed", "learning", "packed learning"])
def test_every_kind_of_head_learns_as_the_plain_one(kind: str):
    model, texts = wide_headed(kind), [said(4, 20), said(4, 7), said(2, 1)]
    weights = mx.array([1.0, -1.0, 0.5])
    forward = replace(Forward.of(model), logit_bytes=4 * VOCABULARY * 5)
    assert forward.cut.head_learns == ("learning" in kind)
    rows = rows_of(texts, shared=True, lanes=2)
    expected = learnt(Forward.plain(model), rows_of(texts), weights=weights)
    assert_same(learnt(forward, rows, weights=weights), expected)
    assert_same(learnt(forward, rows, weights=weights, recomputed=True), expected)
