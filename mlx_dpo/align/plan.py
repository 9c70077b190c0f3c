"""What a run is going to do and take, known before the model is loaded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_dpo.align.options import TrainOptions
from mlx_dpo.data.batches import Order
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.load import on_cpu
from mlx_dpo.models.memory import Load, peak_bytes
from mlx_dpo.models.weights import weight_files


class Plan(NamedTuple):
    """A run in numbers; tokens count prompts once for each answer, memory is an estimate of the peak."""

    pairs: int
    held_out: int
    tokens: int
    longest: int
    steps_an_epoch: int
    steps: int
    memory_gb: float


def planned(
    options: TrainOptions,
    config: dict[str, Any],
    train: Sequence[TokenisedPair],
    valid: Sequence[TokenisedPair],
    order: Order,
) -> Plan:
    """Plan a run of `options` over tokenised pairs; nothing of the model but its configuration is read."""
    lengths = [_lengths(pair) for pair in train]
    longest = max(max(pair) for pair in lengths)
    rows = min(options.batch_size, len(train)) * max(len(pair) for pair in lengths)
    load = Load(
        rows=rows,
        length=longest,
        responses=rows * max(max(len(p.chosen), len(p.rejected)) for p in train),
        rank=options.rank or 8,
        grad_checkpoint=options.grad_checkpoint,
        dropout=bool(options.dropout),
        layers=options.layers,
    )
    weights = sum(file.stat().st_size for file in weight_files(options.model))
    steps = options.steps or order.steps(options.epochs)
    peak = peak_bytes(config, weights, load, on_cpu=on_cpu())
    return Plan(
        pairs=len(train),
        held_out=len(valid),
        tokens=sum(sum(pair) for pair in lengths),
        longest=longest,
        steps_an_epoch=order.steps_an_epoch,
        steps=steps,
        memory_gb=peak / 1e9,
    )


def _lengths(pair: TokenisedPair) -> tuple[int, ...]:
    return tuple(len(pair.prompt) + len(answer) for answer in (pair.chosen, pair.rejected) if answer)
