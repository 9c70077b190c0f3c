"""What is measured of a merge is what one finds by computing it anew from the two folders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import runs
from test_fuse_merge import adapter, fused
from test_models_adapters import KINDS, moved

from mlx_dpo import fuse
from mlx_dpo.convert import merge
from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.fidelity import Held, Yardstick, slope
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import adapters
from mlx_dpo.models.adapters import switched_off
from mlx_dpo.models.load import Loaded, load

Folder = Callable[[str], Path]


def held(pairs: Sequence[TokenisedPair]) -> list[Held]:
    return [Held(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def log_p(model: Any, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """Log-probabilities of all tokens at each place of a response, (response, vocabulary) float64."""
    logits = np.array(model(mx.array([[*prompt, *response]])).astype(mx.float32)).astype(np.float64)
    rows = logits[0, len(prompt) - 1 : -1]
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def margin(model: Any, pair: Held) -> float:
    return runs.naive_log_p(model, pair.prompt, pair.chosen) - runs.naive_log_p(model, pair.prompt, pair.rejected)


@pytest.fixture(params=KINDS)
def adapted(request: pytest.FixtureRequest, tiny_folder: Folder) -> Loaded:
    loaded = load(tiny_folder("llama-untied"))
    shape = adapters.AdapterShape(4, 2.0, 0.0, adapters.chosen_keys(loaded.model, ()), 2, request.param)
    adapters.attach(loaded.model, shape, seed=7)
    return moved(loaded, 2)


def test_layers_merged_exactly_lose_nothing(adapted: Loaded):
    layers = merge.layers(adapted.model, dict.fromkeys(merge.adapted(adapted.model), merge.FLOATING))
    found = Yardstick(adapted.model, held(runs.pairs(adapted))).measured(layers)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.survived == pytest.approx(1, abs=1e-4)
    assert found.agreement == 1
    assert found.pairs == 8
    assert found.tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in runs.pairs(adapted))


def test_layers_without_the_adapter_lose_all(adapted: Loaded):
    layers = merge.layers(adapted.model, dict.fromkeys(merge.adapted(adapted.model), merge.FLOATING))
    pairs = held(runs.pairs(adapted))
    found = Yardstick(adapted.model, pairs).measured(layers._replace(merged=layers.plain))
    assert found.survived == pytest.approx(0, abs=1e-6)
    with switched_off(adapted.model):
        base = [log_p(adapted.model, pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    own = [log_p(adapted.model, pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    a, b = np.concatenate(own), np.concatenate(base)
    assert found.kl == pytest.approx((np.exp(a) * (a - b)).sum(-1).mean(), rel=1e-4)
    assert found.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
    assert 0 < found.agreement < 1


def test_measuring_leaves_the_model_as_it_was(adapted: Loaded):
    tokens = mx.array([[5, 6, 7, 8]])
    before = adapted.model(tokens)
    layers = merge.layers(adapted.model, dict.fromkeys(merge.adapted(adapted.model), merge.Format(4, 32)))
    Yardstick(adapted.model, held(runs.pairs(adapted))).measured(layers)
    assert mx.array_equal(adapted.model(tokens), before)


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_divergence_is_that_of_the_folders_the_head_included(tiny_folder: Folder, tmp_path: Path, family: str):
    base = tiny_folder(family)
    given = adapter(base, tmp_path / "adapter", size=0.5 if family == "llama" else 1.0, targets=("v_proj",), layers=1)
    *_, end = fused(base, given, tmp_path / "out", quantize="4", pairs=8)
    assert isinstance(end, fuse.Fused)
    own, tokenizer, *_ = mlx_lm.load(str(base), adapter_path=str(given))
    other, *_ = mlx_lm.load(str(tmp_path / "out"))
    pairs = runs.pairs(Loaded(own, tokenizer, {}, base))  # type: ignore[arg-type]
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    a, b = (np.concatenate([log_p(model, *text) for text in texts]) for model in (own, other))
    assert end.fidelity.kl == pytest.approx((np.exp(a) * (a - b)).sum(-1).mean(), rel=1e-2)
    assert end.fidelity.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean(), abs=0.01)


def test_what_survives_in_the_base_s_own_blocks_is_the_slope_of_the_effects(tiny_folder: Folder, tmp_path: Path):
    base = tmp_path / "packed"
    list(convert(str(tiny_folder("llama")), base, quantize="4", dtype="keep"))
    given = adapter(base, tmp_path / "adapter", size=0.5)
    events = fused(base, given, tmp_path / "out", pairs=8)
    first = next(event for event in events if isinstance(event, fuse.Measured))
    assert first.format == "4 bit"
    plain, tokenizer, *_ = mlx_lm.load(str(base))
    own, *_ = mlx_lm.load(str(base), adapter_path=str(given))
    merged, *_ = mlx_lm.load(str(tmp_path / "out"))
    pairs = held(runs.pairs(Loaded(plain, tokenizer, {}, base)))  # type: ignore[arg-type]
    before = np.array([margin(own, pair) - margin(plain, pair) for pair in pairs])
    after = np.array([margin(merged, pair) - margin(plain, pair) for pair in pairs])
    assert first.fidelity.survived == pytest.approx((before @ after) / (before @ before), abs=0.01)


def test_slope_by_hand():
    assert slope(np.array([1.0, 2.0]), np.array([0.5, 1.0])) == 0.5
    assert slope(np.array([1.0, -1.0]), np.array([1.0, 1.0])) == 0.0
    assert slope(np.zeros(2), np.zeros(2)) == 1.0
