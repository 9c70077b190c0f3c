"""What so many questions can tell of two systems: the unit is the question, and every comparison is paired."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mlx_dpo.align.intervals import bootstrap

_DRAWS, _AT_ONCE = 10_000, 2**22
_DETECTABLE = 1.959963984540054 + 0.8416212335729143  # two-sided 5%, power 80%


class Interval(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference a question, its 95% interval, and the chance of one so large if signs were chance."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def by_question(values: np.ndarray) -> np.ndarray:
    """One number a question from (questions, seeds) or (questions,): the mean over what is there (NaN is not)."""
    values = np.asarray(values, dtype=float)
    return values if values.ndim == 1 else np.nanmean(values, axis=1)


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean over questions and its 95% percentile interval, questions drawn with replacement.

    Efron & Tibshirani 1993, ch. 13: each question brings all its seeds along.
    """
    values = by_question(values)
    return Interval(
        float(values.mean()), *bootstrap(lambda rows: values[rows].mean(axis=1), len(values), draws=_DRAWS, seed=seed)
    )


def difference(ours: np.ndarray, others: np.ndarray, seed: int = 0) -> Difference:
    """Ours less the others', question by question: bootstrap interval, and a two-sided sign-flip test.

    The test is exact where all 2ⁿ flips are few, and else by 10,000 of them, itself counted among them (Phipson & Smyth
    2010). Raises ValueError for different questions.
    """
    if len(ours) != len(others):
        raise ValueError("a paired comparison needs the same questions")
    apart = by_question(ours) - by_question(others)
    mean, low, high = interval(apart, seed)
    return Difference(mean, low, high, sign_flip(apart, seed))


def sign_flip(apart: np.ndarray, seed: int = 0) -> float:
    """The chance of a mean as far from zero as that of `apart` (questions,), were each sign a coin's."""
    count, observed = len(apart), abs(float(apart.mean()))
    close = observed * (1 - 1e-12)
    if count <= 12:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ apart / count) >= close).mean())
    random, hits = np.random.default_rng(seed), 0
    for size in _parts(count):
        signs = random.integers(0, 2, (size, count)) * 2 - 1
        hits += int((np.abs(signs @ apart / count) >= close).sum())
    return (hits + 1) / (_DRAWS + 1)


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """p-values as Holm adjusts them for being several (Holm 1979)."""
    found, most = {}, 0.0
    for rank, (name, p) in enumerate(sorted(chances.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, p * (len(chances) - rank)))
        found[name] = most
    return {name: found[name] for name in chances}


def is_no_worse(found: Difference, margin: float, *, higher_is_better: bool) -> bool:
    """Non-inferiority: whether the interval leaves out a loss of `margin` or more."""
    return found.low > -margin if higher_is_better else found.high < margin


def detectable(apart: np.ndarray) -> float:
    """The true mean difference that so many questions would show four times in five, at the 5% level."""
    values = by_question(apart)
    return _DETECTABLE * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _parts(count: int) -> list[int]:
    at_once = max(1, min(_DRAWS, _AT_ONCE // count))
    return [min(at_once, _DRAWS - done) for done in range(0, _DRAWS, at_once)]
