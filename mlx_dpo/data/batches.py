"""The order of examples: a function of the seed and the step alone, so that any step can be asked for again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_dpo.models.group import shares


@dataclass(frozen=True)
class Order:
    """Which examples make up which step.

    A step is a window of `accumulation` times `batch_size` examples, whose loss is one. The last window of an epoch
    may be smaller; none is dropped.
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

    def window(self, step: int) -> list[int]:
        """The numbers of the examples of step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        span = self.batch_size * self.accumulation
        return order[place * span : (place + 1) * span].tolist()


def by_cost(items: Sequence[int], costs: Sequence[float], most: int, budget: float | None) -> list[list[int]]:
    """Items in the fewest batches of about the same cost, each of at most `most` items and within `budget`.

    An item that goes beyond the budget by itself is a batch by itself. The same for the same items in the same order.
    """
    wanted = 0.0 if budget is None else sum(costs) / budget
    count = max(math.ceil(len(items) / most), math.ceil(wanted), 1)
    while True:
        parts = [part for part in shares(costs, count) if part]
        fit = (len(part) == 1 or (budget or math.inf) >= sum(costs[i] for i in part) for part in parts)
        if count >= len(items) or (all(fit) and max(map(len, parts)) <= most):
            return [[items[place] for place in part] for part in parts]
        count += 1


def by_length(lengths: list[int], batch_size: int, at_once: float | None = None) -> list[list[int]]:
    """Example numbers in batches of like length, longest first, for passes whose order does not matter.

    A batch of more than one example has at most `at_once` tokens, where that is given.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        last = batches[-1] if batches else []
        fits = at_once is None or sum(lengths[j] for j in last) + lengths[i] <= at_once
        if last and len(last) < batch_size and fits:
            last.append(i)
        else:
            batches.append([i])
    return batches
