"""The one training loop: a window of pairs in, an updated adapter and the step's numbers out."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_dpo.align.checkpoint import Checkpoint
from mlx_dpo.align.loss import Loss, Window
from mlx_dpo.align.optimizers import compiled, optimizer, set_rate
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.plan import Batching, cost
from mlx_dpo.align.rewards import rewards
from mlx_dpo.align.schedule import learning_rate, warmup_steps
from mlx_dpo.align.scores import (
    Scores,
    batch_of,
    batch_scores,
    computed_scores,
    empty_scores,
    having,
    present,
    put,
    together,
)
from mlx_dpo.data.batches import Order, by_cost, by_length
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.adapters import adapter_weights
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.group import Group
from mlx_dpo.models.load import compute_dtype
from mlx_dpo.models.recomputing import recomputed_blocks
from mlx_dpo.refusal import Refusal

_ALONE, _WHOLE = Group(), Batching()


class NotFinite(Refusal):
    """A step's loss or gradient is not finite; the adapter was not touched."""


class Step(NamedTuple):
    """What the window of a step came to, before the adapter is touched."""

    loss: float
    gradients: Any
    scores: Scores
    kl: float | None


class Trainer:
    """The state of a run: adapter, optimiser, steps and tokens done."""

    def __init__(
        self,
        forward: Forward,
        pairs: Sequence[TokenisedPair],
        order: Order,
        loss: Loss,
        options: TrainOptions,
        steps: int,
        batching: Batching = _WHOLE,
        group: Group = _ALONE,
    ):
        """Train the adapter of `forward`'s model on `pairs` towards `loss`.

        `batching` says how much is computed at once; the ranks of `group` share the work.
        """
        self.forward = replace(forward, logit_bytes=batching.logit_bytes)
        self.model, self.pairs, self.order = forward.model, pairs, order
        self.loss, self.options, self.steps = loss, options, steps
        self.batching, self.group = batching, group
        self.steps_done = 0
        self.tokens_done = 0
        self.rate_factor = 1.0
        self.optimizer = optimizer(options, self.model.trainable_parameters())
        self._updated = compiled(self.optimizer)

    def step(self) -> dict[str, float]:
        """Take one step and return its numbers, under TRL's names.

        Raises NotFinite, before the adapter is touched, where loss or gradient is not finite.
        """
        started = time.perf_counter()
        mx.reset_peak_memory()
        indices = self.order.window(self.steps_done)
        found = self._window(indices)
        gradients, norm = _clipped(found.gradients, self.options.max_grad_norm)
        rate = self._rate()
        if not math.isfinite(found.loss) or not math.isfinite(norm):
            raise NotFinite(
                f"Step {self.steps_done + 1} gave a loss of {found.loss:g} and a gradient norm of {norm:g}: the "
                "adapter was left as it was before; lower --learning-rate, or look for broken rows."
            )
        set_rate(self.optimizer, rate, self.options.lora_plus)
        parameters, self.optimizer.state = self._updated(
            gradients, self.model.trainable_parameters(), self.optimizer.state
        )
        self.model.update(parameters)
        mx.eval(parameters, self.optimizer.state)
        tokens = sum(_tokens(self.pairs[i]) for i in indices)
        self.steps_done += 1
        self.tokens_done += tokens
        seconds = time.perf_counter() - started
        mx.clear_cache()
        means = rewards(found.scores, self.loss.reference, self.pairs, indices, self.loss.terms, self.loss.beta).means()
        return {
            "step": self.steps_done,
            "loss": found.loss,
            **means,
            **({} if found.kl is None else {"kl": found.kl}),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": self.tokens_done,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }

    def _rate(self) -> float:
        peak, schedule, warmup = self.options.learning_rate, self.options.schedule, self.options.warmup
        if peak is None:
            raise ValueError("the learning rate was left open")
        rate = learning_rate(self.steps_done, self.steps, peak, schedule, warmup_steps(warmup, self.steps))
        return self.rate_factor * rate

    def _window(self, indices: list[int]) -> Step:
        """Loss and gradient over all examples of a step, whichever rank and batch each is computed in."""
        window = self.loss.window(self.pairs, indices)
        batches = self._batches(indices)
        kl = self._divergence(window)
        apart = self.group.size > 1 or len(indices) > max(map(len, batches), default=0)  # the same on every rank
        slopes = self._slopes(batches, window) if self.loss.terms.is_coupled and apart else None
        total, found = 0.0, empty_scores(len(self.pairs))
        gradients = tree_map(mx.zeros_like, self.model.trainable_parameters())
        self.model.train()
        for number, batch in enumerate(batches):
            self._seed(number)
            with self.forward.at_work():
                value, scores, new = self._gradients(batch, window, kl, slopes)
                gradients = tree_map(mx.add, gradients, new)
                mx.eval(value, scores, gradients)
            total += float(value)
            put(found, scores, self.pairs, batch)
        self.model.eval()
        gradients, total, found = together(self.group, gradients, total, found)
        return Step(slopes.loss if slopes else total, gradients, found, kl)

    def _batches(self, indices: list[int]) -> list[list[int]]:
        """This rank's examples of a step, in batches that are computed at once."""
        costs = {i: cost(self.pairs[i], shared=self.forward.shares) for i in indices}
        mine = self.group.share(indices, list(costs.values()))
        return by_cost(mine, [costs[i] for i in mine], self.options.batch_size, self.batching.at_once) if mine else []

    def _seed(self, batch: int) -> None:
        # Dropout depends on the place in the run alone, so that a resumed run draws the same.
        mx.random.seed(_stream(self.options.seed, self.steps_done, batch * self.group.size + self.group.rank))

    def _gradients(
        self, batch: list[int], window: Window, kl: float | None, slopes: "_Slopes | None"
    ) -> tuple[mx.array, Scores, Any]:
        before = self.model.trainable_parameters()
        laid = batch_of(self.forward, [self.pairs[i] for i in batch], self.loss.sums)

        def loss() -> tuple[mx.array, Scores]:
            scores = batch_scores(self.forward, laid, self.loss.sums)
            if slopes is not None:
                return slopes.along(scores, batch), scores
            return self.loss.share(scores, self.pairs, batch, window, kl), scores

        with recomputed_blocks(self.model) if self.batching.recompute else nullcontext():
            (value, scores), gradients = nn.value_and_grad(self.model, loss)()
        self.model.update(before)
        return value, scores, gradients

    def _computed(self, batch: list[int]) -> Scores:
        return computed_scores(self.forward, [self.pairs[i] for i in batch], self.loss.sums)

    def _slopes(self, batches: list[list[int]], window: Window) -> "_Slopes":
        """How the loss of the whole window changes with each answer, where pairs of different batches are coupled."""
        found = empty_scores(len(self.pairs))
        self.model.train()
        for number, batch in enumerate(batches):
            self._seed(number)
            put(found, self._computed(batch), self.pairs, batch)
        _, _, found = together(self.group, {}, 0.0, found)
        return _Slopes(self.loss, found, self.pairs, window)

    def _divergence(self, window: Window) -> float | None:
        """The policy's divergence from the reference that KTO measures rewards from, over the window, at least 0."""
        strangers = self.loss.strangers
        if strangers is None:
            return None
        self.model.eval()
        found = empty_scores(len(strangers))
        costs = [float(len(strangers[i].prompt) + len(strangers[i].chosen)) for i in window.indices]
        mine = self.group.share(window.indices, costs)
        lengths = [len(strangers[i].prompt) + len(strangers[i].chosen) for i in mine]
        for batch in by_length(lengths, self.options.batch_size, self.batching.at_once):
            some = [mine[place] for place in batch]
            scores = computed_scores(self.forward, [strangers[i] for i in some], self.loss.sums)
            put(found, scores, strangers, some)
        _, _, found = together(self.group, {}, 0.0, found)
        return self.loss.divergence(found.chosen.plain[window.indices], window.indices)

    def check_start(self) -> None:
        """Compare policy and reference on the first batch, before the first step: rewards 0, loss ln 2.

        Raises Refusal where they differ by more than the rounding of the model's number format.
        """
        batch = self._batches(self.order.window(0))[0] if self.group.size == 1 else self.order.window(0)[:1]
        self.model.eval()
        scores = self._computed(batch)
        for side in Scores._fields:
            places = having(self.pairs, batch, side)
            values = np.array(getattr(scores, side).plain)
            if not np.isfinite(values).all():
                worst = self.pairs[places[int(np.isfinite(values).argmin())]].source
                raise Refusal(f"The model gives numbers that are not finite (near {worst}): convert it again.")
            if self.loss.reference is None or not places:
                continue
            expected = getattr(self.loss.reference, side).plain[places]
            off = np.abs(values - expected)
            if np.any(off > _rounding(self.model) * np.maximum(1.0, np.abs(expected))):
                raise Refusal(
                    f"Before the first step the policy differs from its reference by {off.max():.3g} nats, where it "
                    "has to be equal: the run was stopped, since its rewards would be wrong from the start."
                )

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on; random numbers come from the seed and the step."""
        arrays = {f"adapter.{name}": value for name, value in adapter_weights(self.model).items()}
        arrays |= {f"optimizer.{name}": value for name, value in named_arrays(self.optimizer.state).items()}
        return Checkpoint(arrays, {"steps_done": self.steps_done, "tokens_done": self.tokens_done})

    def restore(self, state: Checkpoint) -> None:
        """Take up where `checkpoint()` left off; Refusal where the checkpoint is another adapter's."""
        self.restore_adapter(state)
        self.optimizer.state = tree_unflatten(list(_below("optimizer.", state.arrays).items()))
        self.steps_done = state.numbers["steps_done"]
        self.tokens_done = state.numbers["tokens_done"]

    def restore_adapter(self, state: Checkpoint) -> None:
        """Take the adapter of a checkpoint and nothing else; Refusal where it is another one's."""
        adapter, own = _below("adapter.", state.arrays), adapter_weights(self.model)
        if {k: v.shape for k, v in adapter.items()} != {k: v.shape for k, v in own.items()}:
            raise Refusal("The checkpoint belongs to another model or adapter: give the run's own --out.")
        self.model.update(tree_unflatten(list(adapter.items())))


class _Slopes:
    """The loss of a window in which pairs of different batches are coupled, and its derivative by each answer.

    A first pass without gradients finds them; the second then goes batch by batch along these slopes, which gives the
    gradient that one large batch would.
    """

    def __init__(self, loss: Loss, found: Scores, pairs: Sequence[TokenisedPair], window: Window):
        """Take the numbers found of the window's pairs; `found` has a place for every example of `pairs`."""
        indices = window.indices
        whole = tree_map(mx.array, present(found, pairs, indices))
        # Only pairs are coupled, and only single answers have a divergence.
        value, self.slopes = mx.value_and_grad(lambda scores: loss.share(scores, pairs, indices, window, None))(whole)
        self.loss, self.place = float(value), {index: place for place, index in enumerate(indices)}

    def along(self, scores: Scores, batch: list[int]) -> mx.array:
        """The batch's answers times their slopes, whose gradient is the batch's share of the window's."""
        places = mx.array([self.place[i] for i in batch])
        total = mx.array(0.0)
        for side, slope in zip(scores, self.slopes, strict=True):
            for name in ("logps", "plain", "whole"):
                total = total + (getattr(side, name) * getattr(slope, name)[places]).sum()
        return total


def _below(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _tokens(pair: TokenisedPair) -> int:
    answers = [answer for answer in (pair.chosen, pair.rejected) if answer]
    return sum(len(pair.prompt) + len(answer) for answer in answers)


def _clipped(gradients: Any, limit: float) -> tuple[Any, float]:
    clipped, norm = mlx_optimizers.clip_grad_norm(gradients, limit if limit > 0 else math.inf)
    return (clipped if limit > 0 else gradients), float(norm)


def _stream(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _rounding(model: nn.Module) -> float:
    """Relative rounding of a summed log-probability between two layouts of the same batch."""
    return 1e-4 if compute_dtype(model) == mx.float32 else 2e-2
