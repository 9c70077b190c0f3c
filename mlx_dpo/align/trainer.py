"""The one training loop: a window of pairs in, an updated adapter and the step's numbers out."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_dpo.align import objectives
from mlx_dpo.align.checkpoint import Checkpoint
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.reference import PairLogps, batch_logps, pair_rows
from mlx_dpo.align.schedule import learning_rate, warmup_steps
from mlx_dpo.data.batches import Order
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.adapters import adapter_weights
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.load import compute_dtype
from mlx_dpo.models.memory import recomputed_blocks
from mlx_dpo.models.scoring import Parts
from mlx_dpo.refusal import Refusal


class Window(NamedTuple):
    """What the loss of a step is divided by: its pairs and their chosen response tokens."""

    pairs: int
    tokens: int


class Trainer:
    """The state of a run: adapter, optimiser, steps and tokens done."""

    def __init__(
        self,
        model: nn.Module,
        cut: Parts | None,
        pairs: Sequence[TokenisedPair],
        order: Order,
        reference: PairLogps | None,
        options: TrainOptions,
        steps: int,
    ):
        """Train `model`'s adapter on `pairs`; `reference` holds a number a pair, and is None for SFT."""
        self.model, self.cut, self.pairs, self.order = model, cut, pairs, order
        self.reference, self.options, self.steps = reference, options, steps
        self.steps_done = 0
        self.tokens_done = 0
        # PyTorch's AdamW with its weight decay at 0, as TRL has it.
        self.optimizer = optimizers.AdamW(learning_rate=0.0, weight_decay=0.0, bias_correction=True)
        self.optimizer.init(model.trainable_parameters())

    def step(self) -> dict[str, float]:
        """Take one step and return its numbers, under TRL's names.

        Raises Refusal, before the adapter is touched, where loss or gradient is not finite.
        """
        started = time.perf_counter()
        mx.reset_peak_memory()
        batches = self.order.window(self.steps_done)
        indices = [i for batch in batches for i in batch]
        window = Window(len(indices), sum(len(self.pairs[i].chosen) for i in indices))
        loss, logps, gradients = self._accumulated(batches, window)
        gradients, norm = _clipped(gradients, self.options.max_grad_norm)
        rate = self._rate()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Refusal(
                f"Step {self.steps_done + 1} gave a loss of {loss:g} and a gradient norm of {norm:g}: the adapter "
                "was left as it was before; lower --learning-rate, or look for broken rows."
            )
        self.optimizer.learning_rate = mx.array(rate)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        tokens = sum(_tokens(self.pairs[i]) for i in indices)
        self.steps_done += 1
        self.tokens_done += tokens
        seconds = time.perf_counter() - started
        mx.clear_cache()
        return {
            "step": self.steps_done,
            "loss": loss,
            **self.rewards(logps, indices),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": self.tokens_done,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }

    def _rate(self) -> float:
        peak, schedule, warmup = self.options.learning_rate, self.options.schedule, self.options.warmup
        return learning_rate(self.steps_done, self.steps, peak, schedule, warmup_steps(warmup, self.steps))

    def _accumulated(self, batches: list[list[int]], window: Window) -> tuple[float, PairLogps, Any]:
        total, gradients = 0.0, None
        chosen, rejected = [], []
        self.model.train()
        for number, batch in enumerate(batches):
            # Dropout depends on the place in the run alone, so that a resumed run draws the same.
            mx.random.seed(_stream(self.options.seed, self.steps_done, number))
            loss, logps, new = self._gradients(batch, window)
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(loss, logps, gradients)
            total += float(loss)
            values = np.array(logps)
            chosen.append(values[: len(batch)])
            rejected.append(values[len(batch) :])
        self.model.eval()
        return total, PairLogps(np.concatenate(chosen), np.concatenate(rejected)), gradients

    def _gradients(self, batch: list[int], window: Window) -> tuple[mx.array, mx.array, Any]:
        rows = pair_rows([self.pairs[i] for i in batch])
        before = self.model.trainable_parameters()

        def loss() -> tuple[mx.array, mx.array]:
            logps = batch_logps(self.model, self.cut, rows)
            return self._loss(logps, batch, window), logps

        with recomputed_blocks(self.model) if self.options.grad_checkpoint else nullcontext():
            (value, logps), gradients = nn.value_and_grad(self.model, loss)()
        self.model.update(before)
        return value, logps, gradients

    def _loss(self, logps: mx.array, batch: list[int], window: Window) -> mx.array:
        """This batch's share of the window's mean loss."""
        options = self.options
        chosen = logps[: len(batch)]
        sft = objectives.negative_log_likelihood(chosen).sum() / window.tokens
        if options.method == "sft":
            return sft
        objective = objectives.PREFERENCE[options.loss]
        losses = objective(self._margin(logps, batch), options.beta, options.label_smoothing)
        preference = losses.sum() / window.pairs
        return preference + options.sft_weight * sft if options.sft_weight else preference

    def _margin(self, logps: mx.array, batch: list[int]) -> mx.array:
        if self.reference is None:
            raise Refusal("A preference loss needs reference log-probabilities.")
        reference_margin = self.reference.chosen[batch] - self.reference.rejected[batch]
        return logps[: len(batch)] - logps[len(batch) :] - mx.array(reference_margin)

    def rewards(self, logps: PairLogps, indices: list[int]) -> dict[str, float]:
        """Mean rewards (β times sums) and log-probabilities of the pairs `indices`."""
        if self.reference is None:
            return {"logps/chosen": float(logps.chosen.mean())}
        return reward_means(
            logps,
            PairLogps(self.reference.chosen[indices], self.reference.rejected[indices]),
            self.options.beta,
        )

    def check_start(self) -> None:
        """Compare policy and reference on the first batch, before the first step: rewards 0, loss ln 2.

        Raises Refusal where they differ by more than the rounding of the model's number format.
        """
        batch = self.order.window(0)[0]
        self.model.eval()
        values = np.array(batch_logps(self.model, self.cut, pair_rows([self.pairs[i] for i in batch])))
        finite = np.isfinite(values)
        if not finite.all():
            worst = self.pairs[batch[int(finite.argmin()) % len(batch)]].source
            raise Refusal(f"The model gives numbers that are not finite (near {worst}): convert it again.")
        if self.reference is None:
            return
        expected = np.concatenate([self.reference.chosen[batch], self.reference.rejected[batch]])
        off = np.abs(values - expected)
        allowed = _rounding(self.model) * np.maximum(1.0, np.abs(expected))
        if np.any(off > allowed):
            raise Refusal(
                f"Before the first step the policy differs from its reference by {off.max():.3g} nats, where it "
                "has to be equal: the run was stopped, since its rewards would be wrong from the start."
            )

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        arrays = {f"adapter.{name}": value for name, value in adapter_weights(self.model).items()}
        arrays |= {f"optimizer.{name}": value for name, value in named_arrays(self.optimizer.state).items()}
        return Checkpoint(arrays, {"steps_done": self.steps_done, "tokens_done": self.tokens_done})

    def restore(self, state: Checkpoint) -> None:
        """Take up where `checkpoint()` left off; Refusal where the checkpoint is another adapter's."""
        adapter, optimizer = (_below(part, state.arrays) for part in ("adapter.", "optimizer."))
        own = adapter_weights(self.model)
        if {k: v.shape for k, v in adapter.items()} != {k: v.shape for k, v in own.items()}:
            raise Refusal("The checkpoint belongs to another model or adapter: give the run's own --out.")
        self.model.update(tree_unflatten(list(adapter.items())))
        self.optimizer.state = tree_unflatten(list(optimizer.items()))
        self.steps_done = state.numbers["steps_done"]
        self.tokens_done = state.numbers["tokens_done"]


def reward_means(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, float]:
    """Means over pairs under TRL's names: rewards are β times the summed log-ratio."""
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "logps/chosen": float(policy.chosen.mean()),
        "logps/rejected": float(policy.rejected.mean()),
    }


def _below(prefix: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _tokens(pair: TokenisedPair) -> int:
    twice = len(pair.prompt) + len(pair.rejected) if pair.rejected else 0
    return len(pair.prompt) + len(pair.chosen) + twice


def _clipped(gradients: Any, limit: float) -> tuple[Any, float]:
    clipped, norm = optimizers.clip_grad_norm(gradients, limit if limit > 0 else math.inf)
    return (clipped if limit > 0 else gradients), float(norm)


def _stream(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _rounding(model: nn.Module) -> float:
    """Relative rounding of a summed log-probability between two layouts of the same batch."""
    return 1e-4 if compute_dtype(model) == mx.float32 else 2e-2
