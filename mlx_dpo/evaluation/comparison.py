"""From answers to a comparison: every measure of every system with its interval, and every difference with its test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_dpo.data.asked import Asked
from mlx_dpo.data.audit.copies import NEAR, Encode
from mlx_dpo.data.examples import Example
from mlx_dpo.evaluation.floors import floors, nearness
from mlx_dpo.evaluation.measures import MEASURES, Measure, measured
from mlx_dpo.evaluation.options import BASE, PROMPTED
from mlx_dpo.evaluation.statistics import Difference, detectable, difference, holm, interval, is_no_worse

Values = Mapping[str, Mapping[str, np.ndarray]]  # by system and measure, (questions,)
_LEAST = 10  # questions for an interval to mean anything


def compared(
    asked: Sequence[Asked],
    answers: Mapping[str, Sequence[str]],
    learnt: Sequence[Example],
    encode: Encode | None,
    seed: int,
) -> dict[str, Any]:
    """The whole comparison as one JSON object: of all questions, and of those far from what was learnt.

    Systems are compared with the base and the prompted base, each measure question by question.
    """
    values = {name: measured(asked, texts, encode) for name, texts in answers.items()}
    lowest = {name: measured(asked, texts, encode) for name, texts in floors(asked, learnt, encode).items()}
    near = nearness(asked, learnt, encode)
    found: dict[str, Any] = {"questions": len(asked), "all": _tables(values, lowest, np.arange(len(asked)), seed)}
    found["notes"] = [] if encode else ["There is no sentence encoder, so nothing was measured by meaning."]
    if near is not None:
        far = np.flatnonzero(near < NEAR)
        found["near_questions"] = len(asked) - len(far)
        if _LEAST <= len(far) < len(asked):
            found["far"] = _tables(values, lowest, far, seed)
        found["nearness"] = [round(float(value), 4) for value in near]
    found["scores"] = {
        name: {
            measure: [None if np.isnan(x) else round(float(x), 5) for x in numbers] for measure, numbers in of.items()
        }
        for name, of in values.items()
    }
    return found


def _tables(values: Values, lowest: Values, rows: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "questions": len(rows),
        "systems": {name: _means(of, rows, seed) for name, of in values.items()},
        "floors": {name: _means(of, rows, seed) for name, of in lowest.items()},
        "differences": [
            entry
            for against in (BASE, PROMPTED)
            if against in values
            for name in values
            if name not in (BASE, against)
            for entry in _differences(name, against, values, rows, seed)
        ],
    }


def _means(of: Mapping[str, np.ndarray], rows: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    found = {}
    for measure, numbers in of.items():
        there = numbers[rows][~np.isnan(numbers[rows])]
        if len(there):
            found[measure] = interval(there, seed)._asdict()
    return found


def _differences(name: str, against: str, values: Values, rows: np.ndarray, seed: int) -> list[dict[str, Any]]:
    entries = []
    for measure in MEASURES:
        if measure.name not in values[name] or measure.name not in values[against]:
            continue
        ours, theirs = (values[who][measure.name][rows] for who in (name, against))
        there = ~np.isnan(ours) & ~np.isnan(theirs)
        if there.sum() < 2:
            continue
        found = difference(ours[there], theirs[there], seed)
        entry = {"system": name, "against": against, "measure": measure.name} | found._asdict()
        entry |= {
            "detectable": detectable(ours[there] - theirs[there]),
            "better": _better(found, measure),
        }
        if measure.margin is not None:
            no_worse = is_no_worse(found, measure.margin, higher_is_better=bool(measure.higher_is_better))
            entry |= {"margin": measure.margin, "no_worse": no_worse}
        entries.append(entry)
    primary = {m.name for m in MEASURES if m.primary}
    adjusted = holm({entry["measure"]: entry["p"] for entry in entries if entry["measure"] in primary})
    return [entry | {"p_holm": adjusted.get(entry["measure"])} for entry in entries]


def _better(found: Difference, measure: Measure) -> str:
    """yes, no or unclear: whether the interval lies on the better side of zero."""
    if measure.higher_is_better is None or not found.is_clear:
        return "unclear"
    return "yes" if (found.low > 0) == measure.higher_is_better else "no"
