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


_RATE, _WIDTH = 1e-3, 576  # what went best on SmolLM2-135M, in benchmarks/DEFAULTS.md, and how wide that is


def default_rate(width: int) -> float:
    """The learning rate of a model `width` numbers wide where none is given.

    Adam's rate goes with 1/width from one model to the next: Yang et al. 2022 (arXiv:2203.03466). Tried at 576 only.
    """
    return _RATE * min(1.0, _WIDTH / width)


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
