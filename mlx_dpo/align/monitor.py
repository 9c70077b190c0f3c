"""Watches a run's numbers and says, in words, what is going wrong and what to change.

It knows nothing but the rows of metrics.jsonl and samples.jsonl: a resumed run is watched as one that never stopped.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

SHIFT = 0.05  # nats a token that the chosen answers may lose
HEALTHY_SHIFT = 0.02  # nats a token that they lose in a run that is still well
PROBATION = 3  # steps that a number is averaged over before it is believed
_LEAST_MARGIN = 2.0  # nats of margin before it is asked where they come from
_OPENING_SHARE = 0.5  # of the margin in the first five tokens
_SATURATED, _SURELY = 0.99, 0.8  # held-out accuracy, and the lower end of its interval
_SPIKE, _SPIKE_STEPS = 5.0, 10  # times the median gradient norm of so many steps
_LEAST_SPIKE = 1.0  # below it no step is large, however small the others were
_DRIFT = 1.5  # times longer or shorter than the answers were before


class Finding(NamedTuple):
    """What is wrong, and what to do about it; `kind` names the check that found it."""

    kind: str
    text: str


class Facts(NamedTuple):
    """What the checks measure a run by.

    `beta` is None in SFT. `chosen_tokens` is the mean length of the answers that it learns; `has_likelihood` whether
    their likelihood is part of its loss; `offers_rescue` whether --on-displacement rescue could be given, and is not.
    """

    kl_budget: float
    beta: float | None
    chosen_tokens: float
    has_likelihood: bool
    offers_rescue: bool = True


class Monitor:
    """The rows of a run so far, what is wrong at the moment, and the last step whose adapter has proved well."""

    def __init__(self, facts: Facts, healthy: int = 0):
        """Watch a run from its first step; `healthy` is a step that is known to be well."""
        self.facts = facts
        self.healthy = healthy
        self.steps: list[Row] = []
        self.evaluations: list[Row] = []
        self.persisting: set[str] = set()

    def step(self, row: Row) -> list[Finding]:
        """Take a step's row in; what is found wrong, each thing once for as long as it goes on."""
        self.steps.append(row)
        if row["step"] > PROBATION and self.is_healthy():
            # An adapter is healthy once the steps after it, which saw it, have been well.
            self.healthy = max(self.healthy, row["step"] - PROBATION)
        return self._found(_STEP_CHECKS)

    def evaluation(self, row: Row, sample: Row) -> list[Finding]:
        """Take in a row of held-out numbers and one of sample answers, either of which may be empty."""
        self.evaluations.append({**{f"sample_{name}": value for name, value in sample.items()}, **row})
        # What there is before the first step is what the others are compared with, not what the run has done.
        return self._found(_EVALUATION_CHECKS) if row or sample.get("step") else []

    def replay(self, rows: Sequence[Row], samples: Sequence[Row]) -> None:
        """Take in what a run has written so far, of which everything was said already."""
        for row in rows:
            if "loss" in row:
                self.step(row)
        evaluations = {row["step"]: row for row in rows if "eval_loss" in row}
        answered = {row["step"]: row for row in samples}
        for step in sorted(evaluations.keys() | answered.keys()):
            self.evaluation(evaluations.get(step, {}), answered.get(step, {}))

    def displacement(self) -> Finding | None:
        """The displacement that is going on now, whether it was spoken of already or not."""
        for checks, rows in ((_STEP_CHECKS, self.steps), (_EVALUATION_CHECKS, self.evaluations)):
            for kind, check in checks.items():
                if rows and kind.startswith("displacement") and (text := check(self)):
                    return Finding("displacement", text)
        return None

    def _found(self, checks: Mapping[str, Callable[["Monitor"], str | None]]) -> list[Finding]:
        found = {kind: check(self) for kind, check in checks.items()}
        wrong = {kind: text for kind, text in found.items() if text}
        new = [Finding(kind.split("/")[0], text) for kind, text in wrong.items() if kind not in self.persisting]
        self.persisting = self.persisting - found.keys() | wrong.keys()
        return new

    def recent(self, name: str, steps: int = PROBATION) -> float | None:
        """The mean of a number over the last few steps; None where it is not known."""
        values = [row[name] for row in self.steps[-steps:] if name in row]
        return statistics.fmean(values) if values else None

    def is_healthy(self) -> bool:
        """Whether the chosen answers have lost next to nothing in the last few steps."""
        shift = self.recent("logps/chosen_shift_per_token")
        return shift is None or shift >= -HEALTHY_SHIFT


def _displacement(monitor: Monitor) -> str | None:
    shift, margin = monitor.recent("logps/chosen_shift_per_token"), monitor.recent("rewards/margins")
    if len(monitor.steps) < PROBATION or shift is None or margin is None or shift >= -SHIFT or margin <= 0:
        return None
    nats = monitor.recent("logps/chosen_shift") or 0.0
    return (
        f"The chosen answers have become less likely ({nats:+.0f} nats, {shift:+.2f} a token) while the margin grows "
        f"({margin:+.2f}): the model is forgetting how to give them. {_cure(monitor.facts)}"
    )


def _held_out_displacement(monitor: Monitor) -> str | None:
    row = monitor.evaluations[-1]
    shift, high = row.get("eval_logps/chosen_shift_per_token"), row.get("eval_logps/chosen_shift_high")
    if shift is None or shift >= -SHIFT or high is None or high >= 0 or row.get("eval_rewards/margins", 1.0) <= 0:
        return None
    return (
        f"The held-out chosen answers have become less likely ({row['eval_logps/chosen_shift']:+.0f} nats, 95% "
        f"interval {row['eval_logps/chosen_shift_low']:+.0f} to {high:+.0f}) than before the first step. "
        f"{_cure(monitor.facts)}"
    )


def _cure(facts: Facts) -> str:
    if facts.beta is None:
        return "Lower --learning-rate by half, or stop earlier (--patience)."
    if facts.has_likelihood:
        return "Lower --learning-rate by half, raise --sft-weight or --beta, or stop earlier."
    rescue = ", or let --on-displacement rescue do it" if facts.offers_rescue else ""
    return f"Add --sft-weight 1, lower --learning-rate by half{rescue}."


def _shortcut(monitor: Monitor) -> str | None:
    share, margin = monitor.recent("margins/opening_share"), monitor.recent("rewards/margins")
    beta, tokens = monitor.facts.beta, monitor.facts.chosen_tokens
    if len(monitor.steps) < PROBATION or share is None or margin is None or not beta or margin / beta < _LEAST_MARGIN:
        return None
    if share < max(_OPENING_SHARE, 2 * 5 / tokens):  # the opening of short answers is most of them
        return None
    return (
        f"{share:.0%} of the margin stands in the first five tokens of the answers: the model tells them apart by how "
        "they begin, not by what they say. Look whether the chosen answers share an opening, and vary it."
    )


def _spike(monitor: Monitor) -> str | None:
    norms = [row["grad_norm"] for row in monitor.steps[-1 - _SPIKE_STEPS :]]
    if (
        len(norms) <= _SPIKE_STEPS
        or not (usual := statistics.median(norms[:-1]))
        or norms[-1] < max(_SPIKE * usual, _LEAST_SPIKE)
    ):
        return None
    return (
        f"The gradient norm is {norms[-1]:.3g}, {norms[-1] / usual:.0f} times that of the {_SPIKE_STEPS} steps before: "
        "look at the pairs of this step, add --warmup, or lower --learning-rate."
    )


def _saturation(monitor: Monitor) -> str | None:
    known = [row for row in monitor.evaluations if "eval_rewards/accuracies" in row][-2:]
    if len(known) < 2 or any(row["eval_rewards/accuracies"] < _SATURATED for row in known):
        return None
    if known[-1]["eval_rewards/accuracies_low"] < _SURELY:  # of a few pairs, all may be right by chance
        return None
    before, now = (row["eval_rewards/margins"] for row in known)
    if now <= before:
        return None
    return (
        f"The held-out accuracy is {known[-1]['eval_rewards/accuracies']:.0%} and only the margin still grows "
        f"({before:+.2f} to {now:+.2f}): more steps move the model further without telling more pairs apart. Stop "
        "here, or let --patience do it."
    )


def _length_drift(monitor: Monitor) -> str | None:
    first, now = (row.get("sample_tokens") for row in (monitor.evaluations[0], monitor.evaluations[-1]))
    if first is None or now is None or len(monitor.evaluations) < 2:
        return None
    if now < 1:
        return "The sampled answers are empty: lower --learning-rate, or stop earlier."
    drift, goal = math.log(now / max(first, 1.0)), monitor.facts.chosen_tokens
    nearer = abs(math.log(now / goal)) < abs(math.log(max(first, 1.0) / goal))
    if abs(drift) < math.log(_DRIFT) or nearer:
        return None
    change = "longer" if drift > 0 else "shorter"
    return (
        f"The sampled answers have become {change} ({first:.0f} to {now:.0f} tokens), away from the chosen ones "
        f"({goal:.0f}): the model learns length. {_cure_of_length(monitor.facts)}"
    )


def _cure_of_length(facts: Facts) -> str:
    if facts.beta is None:
        return "Look at the lengths of the answers that it learns, or stop earlier."
    return "Try --loss sigmoid_norm, --ld-alpha 0.5, or pairs of like length."


def _not_finite(monitor: Monitor) -> str | None:
    wrong = [name for name, value in monitor.evaluations[-1].items() if isinstance(value, float) and value != value]
    if not wrong:
        return None
    return f"{wrong[0]} is not a number: lower --learning-rate, or look for broken rows in the held-out data."


def _budget(monitor: Monitor) -> str | None:
    kl = monitor.evaluations[-1].get("sample_kl")
    if kl is None or kl <= monitor.facts.kl_budget:
        return None
    return (
        f"On its own answers the model diverges by {kl:.2f} nats a token from its base, beyond --kl-budget "
        f"{monitor.facts.kl_budget:g}: lower --learning-rate{'' if monitor.facts.beta is None else ', raise --beta'}, "
        "or stop earlier."
    )


_Check = Callable[[Monitor], str | None]
_STEP_CHECKS: dict[str, _Check] = {"displacement": _displacement, "shortcut": _shortcut, "gradient_spike": _spike}
_EVALUATION_CHECKS: dict[str, _Check] = {
    "displacement/held_out": _held_out_displacement,
    "saturation": _saturation,
    "length_drift": _length_drift,
    "kl": _budget,
    "not_finite": _not_finite,
}
