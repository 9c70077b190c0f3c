"""Intervals for shares."""

import math

_Z = 1.959963984540054  # two-sided 95%


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
