"""Shortcut probes: how well something that is beside the point tells chosen from rejected answers.

What a few words tell apart, preference learning learns first, and little else (Geirhos et al. 2020, arXiv:2004.07780).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_dpo.data.audit.findings import Finding, Subject, level
from mlx_dpo.prose import grade, opening, words

_FOLDS = 5
_WARN, _FAIL = 0.7, 0.9
_SMOOTHING = 0.5
_Guess = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (rows learnt from, rows guessed) to scores, answers of each


def probes(subject: Subject) -> Iterator[Finding]:
    """What the first words, the length and the readability alone tell, in cross-validation grouped by prompt."""
    folds = _folds(subject.prompts)
    openings = [[opening(text, 5).split() for text in side] for side in (subject.chosen, subject.rejected)]
    for count in (1, 2, 5):
        name = "the first word" if count == 1 else f"the first {count} words"
        guess = _by_words([[first[:count] for first in side] for side in openings])
        yield _finding(f"first {count} word{'s' * (count > 1)}", name, _accuracy(guess, folds))
    for check, name, measure in (
        ("length", "the number of words", lambda text: float(len(words(text)))),
        ("readability", "the reading grade", grade),
    ):
        values = np.array([[measure(text) for text in side] for side in (subject.chosen, subject.rejected)])
        yield _finding(check, name, _accuracy(_by_threshold(values), folds))


def _finding(check: str, name: str, accuracy: float) -> Finding:
    sentence = f"From {name} alone the side of {accuracy:.2%} of the answers can be told."
    return Finding(f"shortcut: {check}", level(accuracy, _WARN, _FAIL), sentence, {"accuracy": accuracy})


def _folds(prompts: Sequence[str]) -> np.ndarray:
    """A fold a row, from the words of its prompt alone: equal prompts lie together."""
    keys = [" ".join(words(prompt.lower())) for prompt in prompts]
    return np.array([int(hashlib.sha256(key.encode()).hexdigest(), 16) % _FOLDS for key in keys])


def _accuracy(guess: _Guess, folds: np.ndarray) -> float:
    """The share of answers whose side is guessed from the other folds; a score of 0 is half a hit."""
    hits = 0.0
    for fold in range(_FOLDS):
        learnt, asked = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(asked) and len(learnt):
            scores = guess(learnt, asked) * np.array([[1.0], [-1.0]])
            hits += float((scores > 0).sum() + 0.5 * (scores == 0).sum())
        else:
            hits += len(asked)
    return hits / (2 * len(folds)) if len(folds) else 0.0


def _by_words(openings: list[list[list[str]]]) -> _Guess:
    """Naive Bayes over words and their places; a word not met before counts as those met once (Good 1953)."""

    def guess(learnt: np.ndarray, asked: np.ndarray) -> np.ndarray:
        counts = [Counter(feature for i in learnt for feature in enumerate(side[i])) for side in openings]
        chances = {
            feature: np.log(counts[0][feature] + _SMOOTHING) - np.log(counts[1][feature] + _SMOOTHING)
            for feature in counts[0].keys() | counts[1].keys()
        }
        once = [Counter(place for (place, _), n in side.items() if n == 1) for side in counts]

        def chance(feature: tuple[int, str]) -> float:
            if feature in chances:
                return chances[feature]
            return float(np.log(once[0][feature[0]] + _SMOOTHING) - np.log(once[1][feature[0]] + _SMOOTHING))

        return np.array([[sum(map(chance, enumerate(side[i]))) for i in asked] for side in openings])

    return guess


def _by_threshold(values: np.ndarray) -> _Guess:
    """The best cut of one number, (2, rows), found among those learnt from."""

    def guess(learnt: np.ndarray, asked: np.ndarray) -> np.ndarray:
        chosen, rejected = np.sort(values[0, learnt]), np.sort(values[1, learnt])
        cuts = np.unique(np.concatenate([chosen, rejected]))
        # Answers up to a cut, of each side: where the two shares are furthest apart the cut tells most.
        below = [np.searchsorted(side, cuts, side="right") / len(side) for side in (chosen, rejected)]
        best = int(np.abs(below[0] - below[1]).argmax())
        sign = 1.0 if below[0][best] >= below[1][best] else -1.0
        return np.where(values[:, asked] <= cuts[best], sign, -sign)

    return guess
