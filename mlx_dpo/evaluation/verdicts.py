"""What a judge that may be believed says of systems: win rates, rubric points, claims covered and supported."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_dpo.data.asked import Asked
from mlx_dpo.evaluation.controls import controls, trust
from mlx_dpo.evaluation.judge import Ask, preferences, rubric_scores, said_in
from mlx_dpo.evaluation.options import BASE, PROMPTED
from mlx_dpo.evaluation.statistics import interval
from mlx_dpo.prose import sentences, words

_STEPS = 50


def judged(ask: Ask, asked: Sequence[Asked], answers: Mapping[str, Sequence[str]], seed: int) -> dict[str, Any]:
    """The judge's part of the report: its controls, and its numbers unless they are withheld, with the reasons.

    Raises nothing for a judge that fails: what it says is then left out.
    """
    known = [(question.question, question.reference) for question in asked if question.reference is not None]
    made = list(controls([question for question, _ in known], [reference for _, reference in known]))
    if not made:
        return {"withheld": ["trial takes reference answers, and there are none"], "controls": {}}
    tried = trust(ask, made)
    if tried.reasons:
        return {"withheld": list(tried.reasons), "controls": tried.scores}
    questions = [question.question for question in asked]
    return {
        "withheld": [],
        "controls": tried.scores,
        "wins": [
            {"system": name, "against": against} | win_rates(ask, questions, answers[name], answers[against], seed)
            for against in (BASE, PROMPTED)
            if against in answers
            for name in answers
            if name not in (BASE, against)
        ],
        "systems": {name: _single(ask, asked, texts, seed) for name, texts in answers.items()},
    }


def win_rates(
    ask: Ask, questions: Sequence[str], ours: Sequence[str], theirs: Sequence[str], seed: int
) -> dict[str, Any]:
    """How often ours is preferred: in one order alone, over both, and were both answers of one length.

    The last is Dubois et al. 2024 (arXiv:2404.04475): a logistic regression on the difference in words, read at none.
    """
    found = preferences(ask, questions, ours, theirs)
    longer = np.array([len(words(a)) - len(words(b)) for a, b in zip(ours, theirs, strict=True)], dtype=float)
    return {
        "raw": float((found.straight > 0.5).mean()),
        "balanced": interval(found.balanced, seed)._asdict(),
        "length_controlled": at_equal_length(found.balanced, longer),
        "order_consistency": found.consistency,
    }


def at_equal_length(chances: np.ndarray, longer: np.ndarray) -> float:
    """The chance at a difference of zero, by a logistic regression of `chances` (0 to 1) on `longer`."""
    scale = longer.std() or 1.0
    x = np.stack([np.ones_like(longer), longer / scale], axis=1)
    weights = np.zeros(2)
    for _ in range(_STEPS):  # Newton's method, with a little of a ridge so that separable data end
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (chances - p) - 1e-3 * weights
        curve = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(2)
        step = np.linalg.solve(curve, slope)
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def _single(ask: Ask, asked: Sequence[Asked], answers: Sequence[str], seed: int) -> dict[str, Any]:
    points = rubric_scores(ask, [question.question for question in asked], answers)
    found: dict[str, Any] = {"rubric": interval(points, seed)._asdict()}
    pairs = [(q.reference, a) for q, a in zip(asked, answers, strict=True) if q.reference is not None and sentences(a)]
    if pairs:
        covered = [float(said_in(ask, [a] * len(s), s).mean()) for r, a in pairs if (s := sentences(r))]
        supported = [float(said_in(ask, [r] * len(s), s).mean()) for r, a in pairs if (s := sentences(a))]
        found["claims_covered"] = interval(np.array(covered), seed)._asdict()
        found["claims_supported"] = interval(np.array(supported), seed)._asdict()
    return found
