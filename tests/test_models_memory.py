"""What a run is going to take, and gradient checkpointing, which takes less."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import runs
import tiny
from mlx_lm.models.llama import Model, ModelArgs

from mlx_dpo.align.demands import resolved
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.scores import empty_scores
from mlx_dpo.align.trainer import Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import adapters, memory
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import blocks, on_cpu

Folder = Callable[[str], Path]


@dataclass(frozen=True)
class Case:
    hidden: int
    inner: int
    depth: int
    heads: int
    vocabulary: int
    pairs: int
    prompt: int
    response: int


CASES = [
    Case(192, 512, 4, 4, 8000, pairs=4, prompt=30, response=90),
    Case(256, 512, 3, 4, 500, pairs=2, prompt=300, response=100),
    Case(128, 256, 8, 2, 1000, pairs=8, prompt=20, response=60),
]


def config(case: Case) -> dict[str, Any]:
    return tiny.FAMILIES["llama"] | {
        "hidden_size": case.hidden,
        "intermediate_size": case.inner,
        "num_hidden_layers": case.depth,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads // 2,
        "vocab_size": case.vocabulary,
        "torch_dtype": "float32",
    }


def measured(case: Case, grad_checkpoint: bool, dropout: float, layers: int | None = None) -> float:
    """The peak of a real step, in bytes."""
    model = Model(ModelArgs.from_dict(config(case)))
    keys = adapters.chosen_keys(model, ())
    adapters.attach(model, adapters.AdapterShape(8, 2.0, dropout, keys, layers or case.depth), seed=0)
    answers = [list(range(5 + case.pairs, 5 + case.pairs + case.response)) for _ in range(2)]
    pair = TokenisedPair(list(range(case.prompt)), answers[0], answers[1], "row")
    options = resolved(
        TrainOptions(
            model=Path(),
            data=Path(),
            out=Path(),
            learning_rate=1e-4,
            grad_checkpoint=grad_checkpoint,
            batch_size=case.pairs,
        )  # fmt: skip
    )
    order = Order(case.pairs, case.pairs, 1, 0, shuffle=False)
    loss = replace(Loss.of(options), reference=empty_scores(case.pairs))
    trainer = Trainer(Forward.of(model), [pair] * case.pairs, order, loss, options, 2)
    trainer.step()
    return trainer.step()["peak_memory_gb"] * 1e9


@pytest.mark.skipif(not on_cpu(), reason="the estimate was fitted on the CPU; a GPU keeps other things")
@pytest.mark.parametrize(("grad_checkpoint", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.1)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(case: Case, grad_checkpoint: bool, dropout: float):
    mx.clear_cache()
    before = mx.get_active_memory()
    peak = measured(case, grad_checkpoint, dropout) - before
    rows = 2 * case.pairs
    load = memory.Load(rows, case.prompt + case.response, rows * case.response, 8, grad_checkpoint, dropout > 0)
    assert memory.peak_bytes(config(case), 0, load, on_cpu=True) == pytest.approx(peak, rel=0.25)


@pytest.mark.skipif(not on_cpu(), reason="the estimate was fitted on the CPU; a GPU keeps other things")
def test_blocks_below_the_lowest_adapter_cost_nothing_in_the_backward_pass():
    case = CASES[2]
    mx.clear_cache()
    before = mx.get_active_memory()
    peak = measured(case, False, 0.0, layers=3) - before
    rows = 2 * case.pairs
    load = memory.Load(rows, case.prompt + case.response, rows * case.response, 8, False, layers=3)
    estimate = memory.peak_bytes(config(case), 0, load, on_cpu=True)
    assert estimate == pytest.approx(peak, rel=0.25)
    assert estimate < 0.7 * memory.peak_bytes(config(case), 0, load._replace(layers=None), on_cpu=True)


def test_a_deep_model_needs_less_by_recomputing_and_more_text_needs_more():
    shape = config(CASES[0]) | {"num_hidden_layers": 24}
    kept = memory.Load(rows=8, length=256, responses=1000, rank=8, grad_checkpoint=False)
    loads = (kept._replace(grad_checkpoint=True), kept, kept._replace(length=512), kept._replace(rows=32))
    estimates = [memory.peak_bytes(shape, 1000, given, on_cpu=False) for given in loads]
    assert estimates == sorted(estimates)
    assert memory.peak_bytes(shape, 5000, kept, on_cpu=False) == estimates[1] + 4000


def test_recomputing_leaves_models_of_the_same_kind_and_itself_as_they_were(tiny_folder: Folder):
    one, other = runs.adapted(tiny_folder("llama"), seed=1), runs.adapted(tiny_folder("llama"), seed=1)
    kind = type(blocks(one.model)[0])
    tokens = mx.array([[5, 6, 7]])
    with memory.recomputed_blocks(one.model):
        assert all(type(block) is not kind for block in blocks(one.model))
        assert all(type(block) is kind for block in blocks(other.model))
        assert mx.array_equal(one.model(tokens), other.model(tokens))
        kept = runs.weights(one)
    assert all(np.array_equal(value, kept[name]) for name, value in runs.weights(other).items())
    with pytest.raises(KeyError), memory.recomputed_blocks(one.model):
        raise KeyError
    assert all(type(block) is kind for block in blocks(one.model))


def test_recomputing_gives_the_gradient_of_every_block(tiny_folder: Folder):
    def gradients(recompute: bool) -> list[tuple[str, mx.array]]:
        loaded = runs.adapted(tiny_folder("mistral"), seed=1)

        def loss() -> mx.array:
            return loaded.model(mx.array([[5, 6, 7, 8]])).square().mean()

        if not recompute:
            return runs.named(nn.value_and_grad(loaded.model, loss)()[1])
        with memory.recomputed_blocks(loaded.model):
            return runs.named(nn.value_and_grad(loaded.model, loss)()[1])

    for (name, kept), (_, again) in zip(gradients(False), gradients(True), strict=True):
        assert np.abs(np.array(kept)).max() > 1e-4, name
        assert np.array(again) == pytest.approx(np.array(kept), rel=1e-5, abs=1e-8), name
