"""log p: what a plain loop in float64 gives, whatever stands beside, behind or around a response."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import runs
from mlx_lm.utils import quantize_model

from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.models.rows import Rows, row_sums, rows_of
from mlx_dpo.models.scoring import LOGIT_BYTES, parts

Folder = Callable[[str], Path]
TEXTS = [
    ([5, 6, 7], [8, 9, 10, 11]),
    ([20], [21]),
    ([30, 31, 32, 33, 34, 35], [36, 37]),
    ([40, 41], [42, 43, 44, 45, 46, 47, 48, 49, 50]),
]


def sums(loaded: Loaded, texts: list[tuple[list[int], list[int]]]) -> np.ndarray:
    rows = rows_of(texts)
    return np.array(row_sums(Forward.of(loaded.model).token_logps(rows)[0], rows))


@pytest.fixture(params=["llama", "llama-untied", "gemma3"])
def loaded(request: pytest.FixtureRequest, tiny_folder: Folder) -> Loaded:
    return load(tiny_folder(request.param))


def test_sums_are_those_of_a_plain_loop(loaded: Loaded):
    expected = [runs.naive_log_p(loaded.model, prompt, response) for prompt, response in TEXTS]
    assert sums(loaded, TEXTS) == pytest.approx(expected, rel=1e-5)


def test_the_whole_model_gives_what_its_two_parts_give(loaded: Loaded):
    rows = rows_of(TEXTS)
    halves = Forward.of(loaded.model).token_logps(rows)
    assert np.array(Forward.plain(loaded.model).token_logps(rows)) == pytest.approx(np.array(halves), rel=1e-5)


def test_neither_batch_nor_padding_moves_a_sum(loaded: Loaded):
    alone = np.concatenate([sums(loaded, [text]) for text in TEXTS])
    assert sums(loaded, TEXTS) == pytest.approx(alone, rel=1e-5)
    assert sums(loaded, TEXTS[::-1])[::-1] == pytest.approx(alone, rel=1e-5)


def test_what_neighbours_and_padding_say_moves_no_bit(loaded: Loaded):
    rows, forward = rows_of([TEXTS[3], TEXTS[3], ([40], [5] * 9)], shared=False), Forward.of(loaded.model)
    block, (piece,) = rows.blocks[0], rows.blocks[0].pieces
    others = np.array(piece.tokens)
    others[1:] = 300
    changed = rows._replace(blocks=[block._replace(pieces=[piece._replace(tokens=mx.array(others))])])
    before, after = (forward.token_logps(given)[0] for given in (rows, changed))
    first = rows.row_of == 0
    assert mx.array_equal(mx.where(first, before, 0.0), mx.where(first, after, 0.0))
    assert not mx.array_equal(before, after)


def gradients(loaded: Loaded, rows: Rows, logit_bytes: int = LOGIT_BYTES) -> tuple[float, dict[str, np.ndarray]]:
    forward = replace(Forward.of(loaded.model), logit_bytes=logit_bytes)
    value, found = nn.value_and_grad(loaded.model, lambda: forward.token_logps(rows, learning=True).sum())()
    return float(value), {name: np.array(gradient) for name, gradient in named_arrays(found).items()}


@pytest.mark.parametrize("at_once", [1, 3, 16])
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("lm_head",)])
def test_chunks_of_the_head_change_neither_value_nor_gradient(
    tiny_folder: Folder, targets: tuple[str, ...], at_once: int
):
    loaded = load(tiny_folder("llama-untied"))
    keys = targets if targets == ("lm_head",) else adapters.chosen_keys(loaded.model, targets)
    runs.attach(loaded, adapters.AdapterShape(4, 2.0, 0.0, keys, 2), seed=1)
    whole, expected = gradients(loaded, rows_of(TEXTS))
    value, found = gradients(loaded, rows_of(TEXTS), 4 * loaded.config["vocab_size"] * at_once)
    assert value == pytest.approx(whole, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert all(np.abs(gradient).max() > 0.01 for name, gradient in found.items())


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 32, "affine"), (8, 64, "affine"), (4, 32, "mxfp4")])
def test_a_quantised_base_scores_and_learns(tiny_folder: Folder, bits: int, group_size: int, mode: str):
    loaded = load(tiny_folder("llama"))
    quantize_model(loaded.model, loaded.config, group_size, bits, mode=mode)
    assert any(isinstance(module, nn.QuantizedLinear) for module in loaded.model.modules())
    expected = [runs.naive_log_p(loaded.model, prompt, response) for prompt, response in TEXTS]
    assert sums(loaded, TEXTS) == pytest.approx(expected, rel=1e-5)
    runs.attach(loaded, adapters.AdapterShape(4, 2.0, 0.0, adapters.chosen_keys(loaded.model, ()), 2), seed=None)
    trainer = runs.trainer(loaded, batch_size=8)
    trainer.check_start()
    losses = [trainer.step()["loss"] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(2), abs=5e-6)  # sums of some 400 nats, rounded to 3e-5
    assert losses[2] < losses[1] < losses[0]


class Capped(nn.Module):
    """A model that caps its logits after the head."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model, self.lm_head, self.layers = inner.model, inner.lm_head, inner.layers

    def __call__(self, tokens: mx.array) -> mx.array:
        return 0.5 * mx.tanh(self.lm_head(self.model(tokens)))


def test_what_a_model_does_after_its_head_is_part_of_the_head(tiny_folder: Folder):
    capped = Capped(load(tiny_folder("llama-untied")).model)
    rows = rows_of(TEXTS)
    assert parts(capped).head is not None
    found = np.array(row_sums(Forward.of(capped).token_logps(rows)[0], rows))
    assert found == pytest.approx([runs.naive_log_p(capped, *text) for text in TEXTS], rel=1e-5)
