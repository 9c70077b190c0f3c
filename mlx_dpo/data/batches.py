"""The order of examples: a function of the seed and the step alone, so that any step can be asked for again."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which examples make up which step.

    A step is a window of `accumulation` batches of `batch_size` examples. The last window of an epoch and its
    last batch may be smaller; none is dropped.
    """

    examples: int
    batch_size: int
    accumulation: int
    seed: int
    shuffle: bool

    @property
    def steps_an_epoch(self) -> int:
        """Steps that one pass over the examples takes."""
        return math.ceil(self.examples / (self.batch_size * self.accumulation))

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least one."""
        return max(1, math.ceil(epochs * self.steps_an_epoch - 1e-9))

    def window(self, step: int) -> list[list[int]]:
        """The batches of step `step` (from 0), each a list of example numbers."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        span = self.batch_size * self.accumulation
        chosen = order[place * span : (place + 1) * span].tolist()
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]


def by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Example numbers in batches of like length, longest first, for passes whose order does not matter."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
