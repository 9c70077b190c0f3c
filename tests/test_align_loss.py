"""From batches to losses: accumulation, sums by place, weights, and what evaluation makes of the same numbers."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import runs
from mlx.utils import tree_unflatten

from mlx_dpo.align.evaluation import evaluated
from mlx_dpo.align.events import Phase
from mlx_dpo.align.intervals import bootstrap, wilson
from mlx_dpo.align.objectives import TERMS
from mlx_dpo.align.scores import OPENING, Scores, Sums, batch_of, batch_scores, mismatched, scored
from mlx_dpo.align.trainer import Trainer
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, load

Folder = Callable[[str], Path]
# Large enough steps to matter, β small enough that no loss is flat; two batches of two against one of four.
LEARNS: dict[str, Any] = {"learning_rate": 2e-3, "max_grad_norm": 0.7}
LOSSES = [name for name in TERMS if name != "sft"]


def trainer_of(loaded: Loaded, steps: int = 2, **options: Any) -> Trainer:
    """A trainer; coupled pairs have answers of one length, lest margins lie too far apart for any rank to change."""
    trainer = runs.trainer(loaded, steps, **options)
    if trainer.loss.terms.is_coupled:
        shorter = [min(len(pair.chosen), len(pair.rejected)) for pair in trainer.pairs]
        trainer.pairs = [
            pair._replace(chosen=pair.chosen[:length], rejected=pair.rejected[:length])
            for pair, length in zip(trainer.pairs, shorter, strict=True)
        ]
        trainer.loss = replace(trainer.loss, reference=runs.reference(loaded, trainer.pairs, trainer.loss))
    return trainer


def taken(folder: Path, steps: int = 2, **options: Any) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    loaded = runs.adapted(folder, seed=6)
    trainer = trainer_of(loaded, steps, **(LEARNS | options))
    return [trainer.step() for _ in range(steps)], runs.weights(loaded)


@pytest.mark.parametrize("loss", [*LOSSES, "0.7*aot+0.3*sigmoid+sft"])
def test_accumulated_batches_are_one_large_batch(tiny_folder: Folder, loss: str):
    smoothing: dict[str, Any] = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust", "aot") else {}
    small, weights = taken(tiny_folder("llama"), loss=loss, batch_size=2, grad_accumulation=2, **smoothing)
    large, expected = taken(tiny_folder("llama"), loss=loss, batch_size=4, **smoothing)
    for mine, yours in zip(small, large, strict=True):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(yours["grad_norm"], rel=1e-3)
        assert mine["logps/chosen"] == pytest.approx(yours["logps/chosen"], rel=1e-5)
    # Adam moves even a weight whose gradient is all rounding: one in a thousand may end elsewhere.
    off = np.concatenate([(value - expected[name]).ravel() for name, value in weights.items()])
    assert np.quantile(np.abs(off), 0.999) < 2e-5


@pytest.mark.parametrize(("loss", "is_coupled"), [("sigmoid", False), ("aot", True), ("aot_unpaired", True)])
def test_only_coupled_pairs_learn_otherwise_in_batches_apart(tiny_folder: Folder, loss: str, is_coupled: bool):
    loaded = runs.adapted(tiny_folder("llama"), seed=6)
    still: dict[str, Any] = {"loss": loss, "batch_size": 2, "learning_rate": 1e-30, "max_grad_norm": 0.0}

    def moments(trainer: Trainer) -> np.ndarray:
        """Adam's first moments after one more step, each a tenth of the gradient and nine tenths of what it was."""
        trainer.step()
        arrays = trainer.checkpoint().arrays
        return np.concatenate([np.array(arrays[name]).ravel() for name in sorted(arrays) if name.endswith(".m")])

    together = 10 * moments(trainer_of(loaded, grad_accumulation=2, **still))
    alone = trainer_of(loaded, **still)
    first, second = moments(alone), moments(alone)
    apart = 10 * (first + second - 0.9 * first) / 2
    difference = np.linalg.norm(apart - together) / np.linalg.norm(together)
    assert difference > 0.05 if is_coupled else difference < 1e-4


@pytest.mark.parametrize("loss", [*LOSSES, "0.5*hinge+2*sft"])
def test_the_gradient_of_a_step_is_that_of_finite_differences(tiny_folder: Folder, loss: str):
    name, place, width = "model.layers.1.self_attn.v_proj.lora_b", (2, 5), 0.02
    loaded = runs.adapted(tiny_folder("llama"), targets=("v_proj",), layers=1, seed=2)
    start = runs.weights(loaded)[name]
    beta: dict[str, Any] = {"beta": 0.02} if loss in ("sppo_hard", "hinge") else {}

    def step_from(shift: float) -> tuple[float, Any]:
        moved = start.copy()
        moved[place] += shift
        loaded.model.update(tree_unflatten([(name, mx.array(moved))]))
        trainer = runs.trainer(loaded, loss=loss, learning_rate=1e-30, batch_size=4, max_grad_norm=0.0, **beta)
        if loss == "kto":  # whose reference point is taken as it is, without a gradient of its own
            trainer._divergence = lambda window: 0.5
        return trainer.step()["loss"], trainer

    slope = (step_from(width)[0] - step_from(-width)[0]) / (2 * width)
    # After one step Adam's first moment is a tenth of the gradient.
    moment = step_from(0.0)[1].checkpoint().arrays[f"optimizer.{name}.m"]
    assert 10 * np.array(moment)[place] == pytest.approx(slope, rel=0.03, abs=2e-4)


def test_sums_by_place_are_those_of_a_plain_loop(tiny_folder: Folder):
    loaded = load(tiny_folder("llama"))
    pairs, forward = runs.pairs(loaded, 4), Forward.of(loaded.model)
    found = batch_scores(
        forward,
        batch_of(forward, pairs, Sums(ld_alpha=0.3, whole=True, confidence=True)),
        Sums(ld_alpha=0.3, whole=True, confidence=True),
    )
    for side in Scores._fields:
        numbers = getattr(found, side)
        for place, pair in enumerate(pairs):
            answer = getattr(pair, side)
            token = [
                runs.naive_log_p(loaded.model, pair.prompt + answer[:n], answer[n : n + 1]) for n in range(len(answer))
            ]
            shared = min(len(pair.chosen), len(pair.rejected))
            weighed = sum(token[:shared]) + 0.3 * sum(token[shared:])
            assert float(numbers.plain[place]) == pytest.approx(sum(token), rel=1e-5)
            assert float(numbers.logps[place]) == pytest.approx(weighed, rel=1e-5)
            assert float(numbers.opening[place]) == pytest.approx(sum(token[:OPENING]), rel=1e-5)
    whole = [runs.naive_log_p(loaded.model, pair.prompt[:1], pair.prompt[1:] + pair.chosen) for pair in pairs]
    assert np.array(found.chosen.whole) == pytest.approx(np.array(whole), rel=1e-5)


def test_confidence_is_the_mean_odds_against_the_expected_probability(tiny_folder: Folder):
    loaded = load(tiny_folder("llama"))
    pairs, forward = runs.pairs(loaded, 3), Forward.of(loaded.model)
    found = batch_scores(forward, batch_of(forward, pairs, Sums(confidence=True)), Sums(confidence=True))
    pair = pairs[1]
    logits = np.array(loaded.model(mx.array([pair.prompt + pair.rejected])))[0].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[len(pair.prompt) - 1 : -1]
    picked = p[np.arange(len(pair.rejected)), pair.rejected]
    expected = np.exp(np.mean(np.log(picked) - np.log((p**2).sum(-1))))
    assert float(found.rejected.confidence[1]) == pytest.approx(expected, rel=1e-4)


def test_a_batch_or_a_data_set_gives_the_same_numbers(tiny_folder: Folder):
    loaded = load(tiny_folder("llama"))
    pairs, forward, sums = runs.pairs(loaded), Forward.of(loaded.model), Sums(ld_alpha=0.5, whole=True)
    *_, data_set = scored(forward, pairs, 3, sums)
    together = batch_scores(forward, batch_of(forward, pairs, sums), sums)
    assert isinstance(data_set, Scores)
    for side in Scores._fields:
        for mine, yours in zip(getattr(data_set, side), getattr(together, side), strict=True):
            assert mine == pytest.approx(np.array(yours), rel=1e-5, abs=1e-5)


def test_singles_give_the_numbers_of_their_pairs(tiny_folder: Folder):
    loaded = load(tiny_folder("llama"))
    pairs, forward = runs.pairs(loaded, 4), Forward.of(loaded.model)
    paired = batch_scores(forward, batch_of(forward, pairs, Sums()), Sums())
    *_, single = scored(forward, runs.singles(pairs), 3, Sums())
    assert isinstance(single, Scores)
    assert single.chosen.logps[:4] == pytest.approx(np.array(paired.chosen.logps), rel=1e-5)
    assert single.rejected.logps[4:] == pytest.approx(np.array(paired.rejected.logps), rel=1e-5)
    assert not single.chosen.logps[4:].any()


def test_strangers_pair_each_prompt_with_the_answer_before_it_in_its_block(tiny_folder: Folder):
    singles = runs.singles(runs.pairs(load(tiny_folder("llama")), 3))
    found = mismatched(singles, block=4)
    answers = [single.chosen or single.rejected for single in singles]
    assert [pair.prompt for pair in found] == [single.prompt for single in singles]
    assert [pair.chosen for pair in found] == [answers[place] for place in (3, 0, 1, 2, 5, 4)]


@pytest.mark.parametrize(
    ("count", "block", "before"),
    [(5, 4, [4, 0, 1, 2, 3]), (5, 2, [1, 0, 4, 2, 3]), (6, 5, [5, 0, 1, 2, 3, 4]), (3, 8, [2, 0, 1]), (1, 4, [0])],
)
def test_a_lone_last_example_joins_the_block_before_it(count: int, block: int, before: list[int]):
    singles = [TokenisedPair([place], [100 + place], [], f"row {place}") for place in range(count)]
    found = mismatched(singles, block)
    assert [pair.prompt for pair in found] == [[place] for place in range(count)]
    assert [pair.chosen for pair in found] == [[100 + place] for place in before]


def test_the_point_of_reference_is_the_mean_ratio_of_strangers_and_never_negative(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"), seed=3)
    trainer = runs.trainer(loaded, loss="kto", learning_rate=1e-30)
    assert trainer.loss.strangers is not None
    assert trainer.loss.strangers_reference is not None
    policy = [runs.naive_log_p(loaded.model, pair.prompt, pair.chosen) for pair in trainer.loss.strangers[:4]]
    expected = float(np.mean(np.array(policy) - trainer.loss.strangers_reference[:4]))
    assert trainer.step()["kl"] == pytest.approx(max(0.0, expected), rel=1e-3, abs=1e-3)
    assert trainer.loss.divergence(trainer.loss.strangers_reference[[0, 1]] - 3, [0, 1]) == 0.0


@pytest.mark.parametrize("loss", ["sigmoid+sft", "orpo", "kto", "aot"])
def test_evaluation_is_the_loss_of_all_pairs_at_once(tiny_folder: Folder, loss: str):
    loaded = runs.adapted(tiny_folder("llama"), seed=6)
    trainer = runs.trainer(loaded, loss=loss, batch_size=16, learning_rate=1e-30)
    *_, policy = scored(Forward.of(loaded.model), trainer.pairs, 3, trainer.loss.sums)
    assert isinstance(policy, Scores)
    start = trainer.loss.reference or policy
    kl = trainer._divergence(trainer.loss.window(trainer.pairs, list(range(len(trainer.pairs)))))
    found = evaluated(policy, start, trainer.pairs, trainer.loss, kl)
    row = trainer.step()
    assert found["eval_loss"] == pytest.approx(row["loss"], rel=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert found[f"eval_{name}"] == pytest.approx(row[name], rel=1e-3, abs=1e-3)
    if loss in ("sigmoid+sft", "orpo"):
        assert found["eval_loss_low"] <= found["eval_loss"] <= found["eval_loss_high"]
    if loss != "kto":
        assert found["eval_rewards/accuracies"] == row["rewards/accuracies"]
        better = [
            policy.chosen.plain[i] / len(pair.chosen) > policy.rejected.plain[i] / len(pair.rejected)
            for i, pair in enumerate(trainer.pairs)
        ]
        assert found["eval_logps/preferred_per_token"] == np.mean(better)


def test_answers_alone_are_evaluated_by_their_change_and_have_no_rewards(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"), seed=6)
    trainer = runs.trainer(loaded, method="sft")
    start = runs.reference(loaded, trainer.pairs, trainer.loss)
    *_, policy = scored(Forward.of(loaded.model), trainer.pairs, 3, trainer.loss.sums)
    assert isinstance(policy, Scores)
    found = evaluated(policy, start, trainer.pairs, trainer.loss)
    change = found["eval_logps/chosen"] - found["eval_logps/chosen_reference"]
    assert found["eval_logps/chosen_shift"] == pytest.approx(change, abs=1e-3)
    assert abs(change) > 0.1
    for name in ("logps/chosen_shift", "loss"):
        assert found[f"eval_{name}_low"] < found[f"eval_{name}"] < found[f"eval_{name}_high"]
    assert not [name for name in found if "rewards" in name or "rejected" in name]


def test_losses_without_a_reference_score_no_reference(tiny_folder: Folder, tmp_path: Path):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    for loss, scored_first in (("simpo", 0), ("orpo", 0), ("cpo", 0), ("sigmoid", 8), ("kto", 16)):
        events = runs.run(runs.options(tiny_folder("llama"), data, tmp_path / loss, loss=loss, steps=1))
        passes = {event.name: event.total for event in events if isinstance(event, Phase)}
        assert passes.get("Scoring the reference", 0) == scored_first, loss


def test_wilson_by_hand():
    # With z = 1.96 (1.959964): z² = 3.841459. 8 of 10: (0.8 + 0.192073 ± 1.959964·√(0.016 + 0.00960365)) / 1.3841459
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # 20 of 20: the lower end is 20 / (20 + z²).
    assert wilson(20, 20) == pytest.approx((20 / 23.841459, 1.0), abs=1e-6)
    assert wilson(0, 20) == pytest.approx((0.0, 3.841459 / 23.841459), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_is_symmetric_and_narrows():
    low, high = wilson(7, 31)
    assert wilson(24, 31) == pytest.approx((1 - high, 1 - low))
    spans = [high - low for low, high in (wilson(n // 2, n) for n in (2, 10, 50, 1000))]
    assert spans == sorted(spans, reverse=True)


def test_the_bootstrap_of_a_mean_is_close_to_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.5, 400)
    low, high = bootstrap(lambda drawn: values[drawn].mean(axis=1), len(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(lambda drawn: values[drawn].mean(axis=1), len(values)) == (low, high)


def test_the_bootstrap_is_that_of_all_draws_at_once_in_little_memory():
    values, tokens = np.random.default_rng(5).normal(2.0, 1.5, 20_000), np.random.default_rng(6).integers(1, 90, 20_000)

    def ratio(drawn: np.ndarray) -> np.ndarray:
        return values[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)

    for count in (1, 7, 2000):
        at_once = np.random.default_rng(0).integers(0, count, (1000, count))
        assert bootstrap(ratio, count) == tuple(np.percentile(ratio(at_once), [2.5, 97.5]))
    tracemalloc.start()
    bootstrap(ratio, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all at once it would be 480 MB
