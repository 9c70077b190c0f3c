"""Intervals for shares and means."""

import math
from collections.abc import Callable

import numpy as np

_Z = 1.959963984540054  # two-sided 95%
_DRAWS, _SEED = 1000, 0
_AT_ONCE = 2**20  # example numbers


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share; (0, 1) for no trials.

    Wilson 1927, J. Am. Stat. Assoc. 22:209.
    """
    if trials == 0:
        return 0.0, 1.0
    share = hits / trials
    spread = 1 + _Z**2 / trials
    middle = (share + _Z**2 / (2 * trials)) / spread
    half = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2)) / spread
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, draws: int = _DRAWS, seed: int = _SEED
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over `count` examples, from so many resamples, always the same.

    `statistic` takes example numbers, (draws, count), and gives a value a draw, (draws,); it is asked for as many draws
    at once as fit in some 10 MB, or for one. Efron 1979, Ann. Stat. 7:1.
    """
    random, at_once = np.random.default_rng(seed), max(1, _AT_ONCE // count)
    found = [
        statistic(random.integers(0, count, (min(at_once, draws - done), count))) for done in range(0, draws, at_once)
    ]
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
