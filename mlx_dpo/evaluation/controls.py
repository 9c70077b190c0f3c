"""What a judge has to tell apart before its word counts: pairs from the references, whose better answer is known."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_dpo.data.making.errors import with_error
from mlx_dpo.evaluation.judge import Ask, preferences
from mlx_dpo.prose import sentences

_LEAST = {
    "order consistency": 0.8,
    "probability mass": 0.5,
    "accuracy on easy pairs": 0.9,
    "accuracy on hard pairs": 0.75,
}
_MOST = 40  # pairs of a kind


class Control(NamedTuple):
    """A question with an answer that is better and one that is worse, and what was done to it."""

    kind: str
    question: str
    better: str
    worse: str

    @property
    def is_easy(self) -> bool:
        """Whether anyone would see it at once."""
        return self.kind == "another question's answer"


class Trust(NamedTuple):
    """What a judge scored on the controls, and why it is not to be believed, in words; no reason means that it is."""

    scores: dict[str, float]
    reasons: tuple[str, ...]


def controls(questions: Sequence[str], references: Sequence[str]) -> Iterator[Control]:
    """Answers to other questions (easy); chimeras, planted errors and truncations (hard), up to 40 of each."""
    count = len(questions)
    for i in range(min(count, _MOST)):
        question, right, other = questions[i], references[i], references[(i + count // 2) % count]
        if right == other:
            continue
        yield Control("another question's answer", question, right, other)
        own, foreign = sentences(right), sentences(other)
        if len(own) > 1 and len(foreign) > 1:
            chimera = [*own[: len(own) // 2], *foreign[len(foreign) // 2 :]]
            yield Control("chimera", question, right, " ".join(chimera))
        if (wrong := with_error(right)) != right:
            yield Control("planted error", question, right, wrong)
        cut = right[: len(right) * 3 // 5].rsplit(" ", 1)[0]
        yield Control("truncation", question, right, cut)


def trust(ask: Ask, made: Sequence[Control]) -> Trust:
    """Try a judge on the controls; below what is asked for on any of them its numbers are to be withheld."""
    found = preferences(ask, [c.question for c in made], [c.better for c in made], [c.worse for c in made])
    right = found.balanced > 0.5
    scores = {"order consistency": found.consistency, "probability mass": float(found.mass.mean())}
    for name, easy in (("accuracy on easy pairs", True), ("accuracy on hard pairs", False)):
        chosen = np.array([control.is_easy == easy for control in made])
        scores[name] = float(right[chosen].mean()) if chosen.any() else 0.0
    reasons = [
        f"{name} is {scores[name]:.2f}, and has to be at least {least}"
        for name, least in _LEAST.items()
        if scores[name] < least
    ]
    return Trust(scores, tuple(reasons))
