"""Learning rates over the steps of a run."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]
_DECAY: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def warmup_steps(warmup: float, steps: int) -> int:
    """Warm-up in steps: a value below 1 is a share of all steps, any other a number of steps."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleName, warmup: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear from 0 during warm-up, then the schedule to its end.

    The same values as transformers' get_scheduler gives for these names.
    """
    if step < warmup:
        return peak * step / max(1, warmup)
    return peak * _DECAY[schedule]((step - warmup) / max(1, steps - warmup))
