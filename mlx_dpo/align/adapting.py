"""The adapter that a run trains: fresh, or the one it starts from."""

import math
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_dpo.align import record
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models import adapters
from mlx_dpo.models.load import Loaded, blocks
from mlx_dpo.refusal import Refusal

_RANK, _ALPHA, _DROPOUT = 8, 16.0, 0.0


def with_adapter_shape(options: TrainOptions) -> TrainOptions:
    """Fill in rank, alpha and dropout from the start adapter, or from the defaults.

    Raises Refusal where an option contradicts the start adapter.
    """
    if options.adapter is None:
        return replace(
            options,
            rank=options.rank or _RANK,
            alpha=options.alpha or _ALPHA,
            dropout=_DROPOUT if options.dropout is None else options.dropout,
        )
    shape = adapters.read_shape(options.adapter)
    if options.rslora:
        raise Refusal(f"--rslora is given, but the scale of the adapter {options.adapter} is set: leave it away.")
    for name, own in (("rank", shape.rank), ("alpha", shape.alpha), ("layers", shape.layers)):
        given = getattr(options, name)
        if given is not None and abs(given - own) > 1e-6:
            raise Refusal(f"--{name} is {given:g}, but the adapter {options.adapter} has {own:g}: leave it away.")
    if options.dora and shape.kind != "dora":
        raise Refusal(f"--dora is given, but the adapter {options.adapter} is a LoRA: leave it away.")
    if options.targets and not adapters.are_named(options.targets, shape.keys):
        own = ", ".join(shape.keys) or "every linear module"
        raise Refusal(f"--targets are not those of the adapter {options.adapter} ({own}): leave them away.")
    dropout = shape.dropout if options.dropout is None else options.dropout
    layers = shape.layers if shape.layers > 0 else None  # mlx-lm writes -1 for all
    dora = shape.kind == "dora"
    return replace(options, rank=shape.rank, alpha=shape.alpha, dropout=dropout, layers=layers, dora=dora)


def attached(loaded: Loaded, options: TrainOptions) -> adapters.AdapterShape:
    """Put the adapter into the model, everything else frozen, and return its shape."""
    dropout = options.dropout or 0.0
    if options.adapter is None:
        shape = _fresh_shape(loaded, options)
        adapters.attach(loaded.model, shape, options.seed)
        return shape
    record.refuse_other_base(options.adapter, options.model)
    adapters.load_adapter(loaded.model, options.adapter)
    adapters.set_dropout(loaded.model, dropout)
    # Learnt in float32, however it was stored: smaller numbers would lose the small updates.
    wide = {name: value.astype(mx.float32) for name, value in adapters.adapter_weights(loaded.model).items()}
    loaded.model.update(tree_unflatten(list(wide.items())))
    return replace(adapters.read_shape(options.adapter), dropout=dropout)


def _fresh_shape(loaded: Loaded, options: TrainOptions) -> adapters.AdapterShape:
    depth = len(blocks(loaded.model))
    if options.layers and options.layers > depth:
        raise Refusal(f"--layers is {options.layers}, but this model has {depth} blocks: give at most {depth}.")
    rank, alpha = options.rank or _RANK, options.alpha or _ALPHA
    return adapters.AdapterShape(
        rank=rank,
        # Kalajdzievski 2023 (arXiv:2312.03732): divided by √r, high ranks learn as fast as low ones.
        scale=alpha / (math.sqrt(rank) if options.rslora else rank),
        dropout=options.dropout or 0.0,
        keys=adapters.chosen_keys(loaded.model, options.targets, options.layers),
        layers=options.layers or depth,
        kind="dora" if options.dora else "lora",
    )
