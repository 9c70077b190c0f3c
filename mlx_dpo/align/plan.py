"""What a run is going to do and take, and how much of it at once, known before the model is loaded."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo import machine
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.data.batches import Order, by_cost
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import lanes
from mlx_dpo.models.load import on_cpu
from mlx_dpo.models.memory import Adapting, Load, peak_bytes
from mlx_dpo.models.scoring import LOGIT_BYTES
from mlx_dpo.models.weights import weight_files
from mlx_dpo.refusal import Refusal

_LANE_TOKENS = 512  # on the CPU more at once is no faster
_LEAST_LOGIT_BYTES = 2**23
_MOST_STEPS = 2000  # that are gone through to find the largest batch; the longest example is always looked at


class Batching(NamedTuple):
    """How much is computed at once, which changes no number but by rounding.

    `at_once` is in tokens, prompts counted once, None for as many as --batch-size pairs have; `recompute` is gradient
    checkpointing; `logit_bytes` the size of a chunk of the head.
    """

    at_once: float | None = None
    recompute: bool = False
    logit_bytes: int = LOGIT_BYTES


_FRUGAL = Batching(1.0, recompute=True, logit_bytes=_LEAST_LOGIT_BYTES)  # one example at a time


class Plan(NamedTuple):
    """A run in numbers; tokens count prompts once for each answer, memory is an estimate of the peak.

    `at_once` is the largest number of examples in a batch.
    """

    pairs: int
    held_out: int
    tokens: int
    longest: int
    steps_an_epoch: int
    steps: int
    memory_gb: float
    batching: Batching
    at_once: int


def planned(
    options: TrainOptions,
    config: dict[str, Any],
    train: Sequence[TokenisedPair],
    valid: Sequence[TokenisedPair],
    order: Order,
    limit_gb: float,
) -> Plan:
    """Plan a run of `options` over tokenised pairs; nothing of the model but its configuration is read.

    The batching is the fastest that stays within `limit_gb`, or the most frugal where none does.
    """
    lengths = [_lengths(pair) for pair in train]
    batching, peak, at_once = batched(options, config, train, order, limit_gb)
    return Plan(
        pairs=len(train),
        held_out=len(valid),
        tokens=sum(sum(pair) for pair in lengths),
        longest=max(max(pair) for pair in lengths),
        steps_an_epoch=order.steps_an_epoch,
        steps=options.steps or order.steps(options.epochs),
        memory_gb=peak / 1e9,
        batching=batching,
        at_once=at_once,
    )


def batched(
    options: TrainOptions,
    config: dict[str, Any],
    train: Sequence[TokenisedPair],
    order: Order,
    limit_gb: float,
    *,
    shared: bool = True,
) -> tuple[Batching, float, int]:
    """The batching to take, its peak in bytes and the most examples in a batch; `shared` as the model allows."""
    windows = _windows(order, train, shared)
    result = (Batching(), float("inf"), 1)
    for batching in _candidates(options, [cost(pair, shared=shared) for pair in train]):
        peak, count = 0.0, 1
        for window in windows:
            for batch in _batches(window, train, options, batching, shared):
                found = _peak(options, config, [train[i] for i in batch], batching, shared=shared)
                peak, count = max(peak, found), max(count, len(batch))
        if peak < result[1]:
            result = (batching, peak, count)
        if peak <= limit_gb * 1e9:
            break
    return result


def _peak(
    options: TrainOptions,
    config: dict[str, Any],
    batch: Sequence[TokenisedPair],
    batching: Batching,
    *,
    shared: bool,
) -> float:
    adapting = Adapting(options.rank or 8, options.layers, bool(options.dropout))
    load = Load.of(batch, shared=shared)
    return peak_bytes(config, _weights(options.model), load, adapting, batching.recompute, batching.logit_bytes)


@functools.cache
def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def limit_gb(options: TrainOptions) -> float:
    """The memory that a run may take, in GB."""
    return options.memory_limit or machine.describe().memory_limit / 1e9


def refuse_too_large(plan: Plan, options: TrainOptions, config: dict[str, Any], train: Sequence[TokenisedPair]) -> None:
    """Raise Refusal, with what would fit, where even the most frugal batching takes more memory than may be used."""
    limit = limit_gb(options)
    if plan.memory_gb <= limit:
        return
    length = _fitting_length(train, options, config, limit * 1e9)
    way_out = f"--max-length {length} would fit" if length else "use a smaller model or adapt fewer --layers"
    raise Refusal(
        f"The run would take about {plan.memory_gb:.2g} GB, one example at a time and with --grad-checkpoint, and "
        f"{limit:.2g} GB may be used: {way_out}, or raise --memory-limit."
    )


def _fitting_length(
    train: Sequence[TokenisedPair], options: TrainOptions, config: dict[str, Any], limit: float
) -> int | None:
    """The greatest --max-length with which every pair stays within `limit` bytes; None where there is none."""
    kinds = {(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in train}
    largest = [kind for kind in kinds if not any(_is_below(kind, other) for other in kinds)]
    low, high = 8, max(prompt + max(answers) for prompt, *answers in largest)
    while low < high:
        length = (low + high + 1) // 2
        cut = [_cut(kind, length) for kind in largest]
        fits = all(_peak(options, config, [pair], _FRUGAL, shared=True) <= limit for pair in cut)
        low, high = (length, high) if fits else (low, length - 1)
    return low if low > 8 else None


def _is_below(kind: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return kind != other and all(a <= b for a, b in zip(kind, other, strict=True))


def _cut(kind: tuple[int, ...], length: int) -> TokenisedPair:
    """Tokens without meaning, as many as are left of a pair of these lengths under --max-length."""
    prompt = min(kind[0], max(1, length - max(kind[1:])))
    chosen, rejected = (min(answer, length - prompt) for answer in kind[1:])
    return TokenisedPair([0] * prompt, [0] * chosen, [0] * rejected, "")


def cost(pair: TokenisedPair, *, shared: bool) -> float:
    """Tokens that an example's forward pass goes over; with `shared` its prompt is gone over once."""
    lengths = _lengths(pair)
    return sum(lengths) - (len(pair.prompt) if shared and len(lengths) > 1 else 0)


def _candidates(options: TrainOptions, costs: list[float]) -> Iterator[Batching]:
    """From the fastest to the most frugal."""
    most, least = sum(sorted(costs)[-options.batch_size :]), max(costs)
    first = most if not on_cpu() else min(most, max(least, _LANE_TOKENS * lanes.count()))
    for recompute in (False, True):
        if options.grad_checkpoint and not recompute:
            continue
        at_once = first
        while True:
            yield Batching(at_once, recompute)
            if at_once <= least:
                break
            at_once = max(least, at_once / 2)
    yield _FRUGAL


def _windows(order: Order, train: Sequence[TokenisedPair], shared: bool) -> list[list[int]]:
    windows = [order.window(step) for step in range(min(order.steps_an_epoch, _MOST_STEPS))]
    return [*windows, [max(range(len(train)), key=lambda i: cost(train[i], shared=shared))]]


def _batches(
    window: list[int], train: Sequence[TokenisedPair], options: TrainOptions, batching: Batching, shared: bool
) -> list[list[int]]:
    costs = [cost(train[i], shared=shared) for i in window]
    return by_cost(window, costs, options.batch_size, batching.at_once)


def _lengths(pair: TokenisedPair) -> tuple[int, ...]:
    return tuple(len(pair.prompt) + len(answer) for answer in (pair.chosen, pair.rejected) if answer)
