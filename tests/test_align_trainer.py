"""One step: its gradient, its window, its dropout, its optimiser, and when it refuses to be taken."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import runs
from mlx.utils import tree_unflatten

from mlx_dpo.align.trainer import Trainer
from mlx_dpo.models.load import Loaded
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
STILL: dict[str, Any] = {"learning_rate": 1e-30}  # a step that changes nothing


def taken(loaded: Loaded, steps: int = 3, **options: Any) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The numbers of a few steps and the adapter after them."""
    trainer = runs.trainer(loaded, steps, **options)
    rows = [trainer.step() for _ in range(steps)]
    return [{k: v for k, v in row.items() if k not in runs.TIMES} for row in rows], runs.weights(loaded)


def assert_same(one: tuple, other: tuple, rel: float) -> None:
    for mine, yours in zip(one[0], other[0], strict=True):
        # The shift is a small difference of sums of some hundred nats.
        for row in (mine, yours):
            row["logps/chosen_shift"] = row.get("logps/chosen_shift", 0.0) / 100
            if abs(row.get("rewards/margins", 1.0)) < 1e-4:  # before anything is learnt its sign is all rounding
                row["rewards/accuracies"] = 0.0
        assert mine == pytest.approx(yours, rel=rel, abs=1e-5)
    for name, value in one[1].items():
        # Adam moves even a weight whose gradient is all rounding: hence a fiftieth of a step.
        assert value == pytest.approx(other[1][name], rel=rel, abs=1e-4), name


def test_the_first_step_costs_ln_2_and_has_no_rewards(tiny_folder: Folder):
    row = runs.trainer(runs.adapted(tiny_folder("llama"))).step()
    assert row["loss"] == pytest.approx(math.log(2), abs=5e-6)  # sums of some 400 nats, rounded to 3e-5
    assert row["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.5}, {"beta": 0.5, "sft_weight": 0.7, "label_smoothing": 0.1}, {"method": "sft"}],
    ids=str,
)
def test_the_gradient_of_a_step_is_that_of_finite_differences(tiny_folder: Folder, options: dict[str, Any]):
    name, place, width = "model.layers.1.self_attn.v_proj.lora_b", (2, 5), 0.02
    loaded = runs.adapted(tiny_folder("llama"), targets=("v_proj",), layers=1, seed=2)
    start = runs.weights(loaded)[name]

    def step_from(shift: float) -> tuple[float, Trainer]:
        moved = start.copy()
        moved[place] += shift
        loaded.model.update(tree_unflatten([(name, mx.array(moved))]))
        more = {"batch_size": 2, "grad_accumulation": 2, "max_grad_norm": 0.0} | STILL | options
        trainer = runs.trainer(loaded, **more)
        return trainer.step()["loss"], trainer

    slope = (step_from(width)[0] - step_from(-width)[0]) / (2 * width)
    # After one step Adam's first moment is a tenth of the gradient.
    moment = step_from(0.0)[1].checkpoint().arrays[f"optimizer.{name}.m"]
    assert abs(slope) > 1e-3
    assert 10 * np.array(moment)[place] == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("options", [{"sft_weight": 0.5}, {"method": "sft"}], ids=str)
def test_accumulated_batches_are_one_large_batch(tiny_folder: Folder, options: dict[str, Any]):
    # Seven pairs: the second window is smaller, and its last batch is smaller still.
    small = taken(runs.adapted(tiny_folder("llama")), 4, count=7, batch_size=2, grad_accumulation=2, **options)
    large = taken(runs.adapted(tiny_folder("llama")), 4, count=7, batch_size=4, **options)
    assert_same(small, large, 1e-4)
    assert [row["num_tokens"] for row in small[0]] == [row["num_tokens"] for row in large[0]]


def test_the_mean_is_over_pairs_not_over_batches(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"), seed=3)
    together = runs.trainer(loaded, count=5, batch_size=4, grad_accumulation=2, **STILL).step()
    one_by_one = runs.trainer(loaded, count=5, batch_size=1, **STILL)
    rows = [one_by_one.step() for _ in range(5)]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert together[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-4, abs=1e-5), name
    assert together["num_tokens"] == rows[-1]["num_tokens"]


def test_the_likelihood_part_is_a_mean_over_tokens_not_over_pairs(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"))
    trainer = runs.trainer(loaded, count=5, batch_size=2, grad_accumulation=3, sft_weight=0.5, **STILL)
    log_p = sum(runs.naive_log_p(loaded.model, pair.prompt, pair.chosen) for pair in trainer.pairs)
    tokens = sum(len(pair.chosen) for pair in trainer.pairs)
    assert trainer.step()["loss"] == pytest.approx(math.log(2) - 0.5 * log_p / tokens, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recomputed_blocks_give_the_same_step_dropout_included(tiny_folder: Folder, family: str):
    kept = taken(runs.adapted(tiny_folder(family)), dropout=0.3)
    again = taken(runs.adapted(tiny_folder(family)), dropout=0.3, grad_checkpoint=True)
    assert_same(again, kept, 1e-5)


def test_dropout_comes_from_the_seed_and_differs_from_step_to_step(tiny_folder: Folder):
    def losses(seed: int, dropout: float) -> list[float]:
        loaded = runs.adapted(tiny_folder("llama"), seed=4)
        rows, _ = taken(loaded, batch_size=8, dropout=dropout, seed=seed, **STILL)
        return [row["loss"] for row in rows]

    assert losses(1, 0.4) == losses(1, 0.4)
    assert losses(1, 0.4) != losses(2, 0.4)
    assert len(set(losses(1, 0.4))) == 3
    assert len(set(losses(1, 0.0))) == 1


def test_dropout_leaves_the_reference_alone(tiny_folder: Folder):
    plain, dropping = (runs.trainer(runs.adapted(tiny_folder("llama"), seed=4), dropout=p) for p in (0.0, 0.5))
    assert plain.loss.reference
    assert dropping.loss.reference
    assert plain.loss.reference.chosen.logps.tolist() == dropping.loss.reference.chosen.logps.tolist()


def test_the_optimiser_is_adamw_as_pytorch_has_it(tiny_folder: Folder):
    rate, first, second, small = 5e-3, 0.9, 0.999, 1e-8
    optimizer = runs.trainer(runs.adapted(tiny_folder("llama"))).optimizer
    optimizer.learning_rate = mx.array(rate)
    gradients = [np.array([0.3, -2.0, 1e-4]), np.array([0.1, 1.0, -3e-4]), np.array([-0.2, 0.5, 2e-4])]
    value, mean, square = np.array([1.0, -1.0, 0.5]), np.zeros(3), np.zeros(3)
    parameters = {"w": mx.array(value, dtype=mx.float32)}
    optimizer.init(parameters)
    for step, gradient in enumerate(gradients, start=1):
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        value = value - rate * (mean / (1 - first**step)) / (np.sqrt(square / (1 - second**step)) + small)
        parameters = optimizer.apply_gradients({"w": mx.array(gradient, dtype=mx.float32)}, parameters)
        assert np.array(parameters["w"]) == pytest.approx(value, abs=1e-6)


def test_the_first_step_moves_each_weight_by_the_rate(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"))
    runs.trainer(loaded, learning_rate=2e-3).step()
    for name, value in runs.weights(loaded).items():
        if name.endswith("lora_b"):  # zero before; only where the gradient is no larger than Adam's ε is less moved
            assert np.median(np.abs(value)) == pytest.approx(2e-3, rel=1e-3), name
            assert np.abs(value).max() <= 2.0001e-3, name


def test_clipping_bounds_the_gradient_and_logs_what_it_was(tiny_folder: Folder):
    free = runs.trainer(runs.adapted(tiny_folder("llama")), max_grad_norm=0.0)
    norm = free.step()["grad_norm"]
    clipped = runs.trainer(runs.adapted(tiny_folder("llama")), max_grad_norm=norm / 4)
    assert clipped.step()["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for name, moment in free.checkpoint().arrays.items():
        if name.endswith(".m"):
            expected = np.array(moment) / 4
            assert np.array(clipped.checkpoint().arrays[name]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_loss_that_is_not_finite_stops_the_step_before_the_adapter_is_touched(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"))
    trainer = runs.trainer(loaded)
    before = runs.weights(loaded)
    head = loaded.model["model"]["norm"]
    head.weight = head.weight * mx.array(math.nan)
    with pytest.raises(Refusal, match="Step 1 gave a loss of nan"):
        trainer.step()
    for name, value in runs.weights(loaded).items():
        assert np.array_equal(value, before[name]), name


def test_the_start_is_checked_against_the_reference(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"))
    trainer = runs.trainer(loaded)
    trainer.check_start()
    assert trainer.loss.reference
    trainer.loss.reference.rejected.plain[1] += 0.2
    with pytest.raises(Refusal, match=r"differs from its reference by 0\.2 nats"):
        trainer.check_start()


def test_an_adapter_that_does_something_is_no_start_from_the_base(tiny_folder: Folder):
    with pytest.raises(Refusal, match="differs from its reference"):
        runs.trainer(runs.adapted(tiny_folder("llama"), seed=5)).check_start()


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_base_that_gives_no_numbers_is_refused_by_its_first_row(tiny_folder: Folder, method: str):
    loaded = runs.adapted(tiny_folder("llama"))
    embedding = loaded.model["model"]["embed_tokens"]
    embedding.weight = embedding.weight * mx.array(math.inf)
    with pytest.raises(Refusal, match="not finite .near row 0.: convert it again"):
        runs.trainer(loaded, method=method).check_start()
