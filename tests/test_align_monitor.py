"""The monitor: what it says of a run's numbers, when it first says it, and when it holds its tongue."""

from collections.abc import Sequence
from typing import Any

import pytest

from mlx_dpo.align.monitor import Facts, Finding, Monitor

FACTS = Facts(kl_budget=0.5, beta=0.1, chosen_tokens=150.0, has_likelihood=False)


def step(number: int, shift: float = 0.0, margin: float = 0.0, **more: float) -> dict[str, Any]:
    """A step's row: the chosen answers' shift in nats a token, the margin in units of reward."""
    return {
        "step": number,
        "loss": 0.5,
        "logps/chosen_shift": 150 * shift,
        "logps/chosen_shift_per_token": shift,
        "rewards/margins": margin,
        "grad_norm": 1.0,
    } | more


def found(rows: Sequence[dict[str, Any]], facts: Facts = FACTS) -> dict[int, list[str]]:
    """The kinds of what is found, by step."""
    monitor = Monitor(facts)
    return {row["step"]: kinds for row in rows if (kinds := [finding.kind for finding in monitor.step(row)])}


def evaluation(**more: float) -> dict[str, Any]:
    return {"eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "eval_rewards/margins": 0.4} | more


def of_evaluations(*rows: tuple[dict[str, Any], dict[str, Any]]) -> list[list[Finding]]:
    monitor = Monitor(FACTS)
    return [monitor.evaluation(row, sample) for row, sample in rows]


def test_displacement_is_found_as_soon_as_three_steps_show_it():
    falling = [step(n, shift=-0.04 * n, margin=0.3 * n) for n in range(1, 9)]
    assert found(falling) == {3: ["displacement"]}  # the mean of the first three is -0.08


def test_a_single_bad_batch_is_no_displacement():
    assert found([step(n, shift=-0.1 if n == 4 else 0.0, margin=1.0) for n in range(1, 9)]) == {}


def test_chosen_answers_that_gain_or_hold_are_no_displacement():
    for shift in (0.3, 0.0, -0.04):
        assert found([step(n, shift=shift, margin=n * 1.0) for n in range(1, 12)]) == {}


def test_a_fall_without_a_margin_is_not_called_displacement():
    assert found([step(n, shift=-0.2, margin=-0.1) for n in range(1, 9)]) == {}


def test_it_says_it_once_and_again_after_a_recovery():
    shifts = [-0.1] * 6 + [0.1] * 6 + [-0.1] * 6
    rows = [step(n, shift, margin=1.0) for n, shift in enumerate(shifts, start=1)]
    assert found(rows) == {3: ["displacement"], 15: ["displacement"]}


def test_the_words_give_the_numbers_and_what_to_change():
    monitor = Monitor(FACTS)
    rows = [step(n, shift=-0.2, margin=1.5) for n in (1, 2, 3)]
    (finding,) = [finding for row in rows for finding in monitor.step(row)]
    assert "-30 nats, -0.20 a token" in finding.text
    assert "+1.50" in finding.text
    assert "--sft-weight 1" in finding.text
    already = Monitor(FACTS._replace(has_likelihood=True))
    (finding,) = [finding for row in rows for finding in already.step(row)]
    assert "Lower --learning-rate by half" in finding.text


def test_health_is_stricter_than_the_alarm():
    monitor = Monitor(FACTS)
    health = []
    for number in range(1, 5):
        monitor.step(step(number, shift=-0.015 * number, margin=1.0))
        health.append(monitor.is_healthy())
    assert health == [True, False, False, False]  # means -0.015, -0.0225, -0.03, -0.045


def test_a_step_is_healthy_once_three_steps_after_it_were_well():
    monitor, healthy = Monitor(FACTS), []
    for number, shift in enumerate([0.0, 0.1, 0.1, 0.1, 0.1, -0.3, -0.3, 0.4, 0.4, 0.4], start=1):
        monitor.step(step(number, shift))
        healthy.append(monitor.healthy)
    assert healthy == [0, 0, 0, 1, 2, 2, 2, 2, 6, 7]  # means from the fourth on: .1 .1 -.03 -.17 -.07 .17 .4
    assert Monitor(FACTS, healthy=5).healthy == 5


def test_a_margin_from_the_first_five_tokens_is_a_shortcut():
    rows = [step(n, margin=0.5, **{"margins/opening_share": 0.7}) for n in range(1, 6)]  # 5 nats of margin
    assert found(rows) == {3: ["shortcut"]}
    small = [step(n, margin=0.1, **{"margins/opening_share": 0.7}) for n in range(1, 6)]
    assert found(small) == {}
    spread = [step(n, margin=0.5, **{"margins/opening_share": 0.3}) for n in range(1, 6)]
    assert found(spread) == {}


def test_of_short_answers_the_opening_is_most_anyhow():
    rows = [step(n, margin=0.5, **{"margins/opening_share": 0.7}) for n in range(1, 6)]
    assert found(rows, FACTS._replace(chosen_tokens=12.0)) == {}


def test_a_gradient_far_above_its_like_is_a_spike():
    norms = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.0, 1.3, 1.0, 1.1, 5.4, 1.0]
    rows = [step(n, **{"grad_norm": norm}) for n, norm in enumerate(norms, start=1)]
    assert found(rows) == {11: ["gradient_spike"]}
    assert found(rows[5:]) == {}  # too few steps to know what is usual
    assert found([row | {"grad_norm": row["grad_norm"] / 100} for row in rows]) == {}  # all of them are small


def test_saturation_needs_many_pairs_two_evaluations_and_a_growing_margin():
    def at(margin: float, low: float = 0.84) -> tuple[dict[str, Any], dict[str, Any]]:
        right = {"eval_rewards/accuracies": 1.0, "eval_rewards/accuracies_low": low, "eval_rewards/margins": margin}
        return evaluation(**right), {}

    assert [[f.kind for f in fs] for fs in of_evaluations(at(1.0), at(1.5), at(2.0))] == [[], ["saturation"], []]
    assert of_evaluations(at(1.0), at(0.9)) == [[], []]
    assert of_evaluations(at(1.0, low=0.4), at(1.5, low=0.4)) == [[], []]


def test_held_out_displacement_needs_an_interval_below_zero():
    def at(shift: float, high: float) -> tuple[dict[str, Any], dict[str, Any]]:
        names = {"shift": 150 * shift, "shift_low": 200 * shift, "shift_high": high, "shift_per_token": shift}
        return evaluation(**{f"eval_logps/chosen_{name}": value for name, value in names.items()}), {}

    assert [f.kind for f in of_evaluations(at(-0.2, high=-8.0))[0]] == ["displacement"]
    assert of_evaluations(at(-0.2, high=2.0), at(-0.01, high=-1.0)) == [[], []]


@pytest.mark.parametrize(
    ("before", "now", "drifts"),
    [(100, 40, True), (100, 110, False), (60, 120, False), (100, 0.5, True), (100, 400, True)],
)
def test_length_drift_is_away_from_the_chosen_answers(before: float, now: float, drifts: bool):
    _, second = of_evaluations((evaluation(), {"tokens": before}), (evaluation(), {"tokens": now}))
    assert [finding.kind for finding in second] == ["length_drift"] * drifts


def test_a_budget_is_a_budget():
    within, beyond = of_evaluations((evaluation(), {"kl": 0.4}), (evaluation(), {"kl": 0.61}))
    assert within == []
    assert [finding.kind for finding in beyond] == ["kl"]
    assert "0.61 nats a token" in beyond[0].text


def test_rows_that_lack_a_number_are_no_alarm():
    monitor = Monitor(FACTS._replace(beta=None))
    for number in range(1, 15):
        assert monitor.step({"step": number, "loss": 1.0, "grad_norm": 0.5}) == []
    assert monitor.evaluation({"eval_loss": 1.0}, {}) == []
    assert monitor.evaluation({}, {"tokens": 30.0, "kl": None}) == []
    assert monitor.is_healthy()
