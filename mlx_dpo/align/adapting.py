"""The adapter that a run trains: fresh, or the one it starts from."""

import math
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_dpo.align import record
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models import adapters
from mlx_dpo.models.adapters import AdapterShape
from mlx_dpo.models.load import Loaded, blocks, load, read_config
from mlx_dpo.models.sizes import sizes
from mlx_dpo.refusal import Refusal

_RANK, _ALPHA, _DROPOUT = 8, 16.0, 0.0
_AS_PRINTED = 1e-5  # an alpha that our own sentence names, in six digits, has to do


def with_adapter_shape(options: TrainOptions, start: AdapterShape | None = None) -> TrainOptions:
    """Fill in rank, alpha and dropout from the start adapter, or from the defaults.

    `start` is the start adapter's shape where that is still to be trained. Raises Refusal where an option contradicts
    it.
    """
    if options.adapter is None:
        return replace(
            options,
            rank=options.rank or _RANK,
            alpha=options.alpha or _ALPHA,
            dropout=_DROPOUT if options.dropout is None else options.dropout,
        )
    shape = start or adapters.read_shape(options.adapter)
    _refuse_contradiction(options, shape)
    return replace(
        options,
        rank=shape.rank,
        alpha=shape.scale * _divisor(shape.rank, options.rslora),
        dropout=shape.dropout if options.dropout is None else options.dropout,
        layers=shape.layers if shape.layers > 0 else None,  # mlx-lm writes -1 for all
        dora=shape.kind == "dora",
    )


def _refuse_contradiction(options: TrainOptions, shape: AdapterShape) -> None:
    for name, own in (("rank", shape.rank), ("layers", shape.layers)):
        given = getattr(options, name)
        if given is not None and given != own:
            raise Refusal(f"--{name} is {given}, but the adapter {options.adapter} has {own}: leave it away.")
    _refuse_other_scale(options, shape)
    if options.dora and shape.kind != "dora":
        raise Refusal(f"--dora is given, but the adapter {options.adapter} is a LoRA: leave it away.")
    if options.targets and not adapters.are_named(options.targets, shape.keys):
        own = ", ".join(shape.keys) or "every linear module"
        raise Refusal(f"--targets are not those of the adapter {options.adapter} ({own}): leave them away.")


def _refuse_other_scale(options: TrainOptions, shape: AdapterShape) -> None:
    """Raise Refusal where alpha, rank and rslora together do not give the adapter's scale, which is all it knows."""
    alpha = _ALPHA if options.alpha is None and options.rslora else options.alpha
    divisor = _divisor(shape.rank, options.rslora)
    own = shape.scale * divisor
    if alpha is None or math.isclose(alpha, own, rel_tol=_AS_PRINTED):
        return
    if options.rslora:
        raise Refusal(
            f"--rslora with --alpha {alpha:g} is a scale of {alpha / divisor:g}, but the adapter {options.adapter} has "
            f"{shape.scale:g}: leave --rslora away, or give --alpha {own:g} beside it."
        )
    raise Refusal(
        f"--alpha is {alpha:g}, but the adapter {options.adapter} has {own:g} without --rslora, a scale of "
        f"{shape.scale:g}: leave it away."
    )


def _divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by to give the scale.

    Kalajdzievski 2023 (arXiv:2312.03732): divided by √r, high ranks learn as fast as low ones.
    """
    return math.sqrt(rank) if rslora else rank


def shape_to_be(options: TrainOptions, start: AdapterShape | None, *, exact: bool) -> AdapterShape:
    """The shape of the adapter that a run will leave, before it is trained; `options` have nothing left open.

    `start` is as in `with_adapter_shape`. The keys of a fresh adapter are left empty unless `exact`, as the model has
    to be loaded to know them. Raises Refusal where the model has nowhere to put the adapter.
    """
    if options.adapter is not None:
        return replace(start or adapters.read_shape(options.adapter), dropout=options.dropout or 0.0)
    if exact:
        return _fresh_shape(load(options.model), options)
    return _shape(options, sizes(read_config(options.model)).layers)


def attached(loaded: Loaded, options: TrainOptions) -> AdapterShape:
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


def _fresh_shape(loaded: Loaded, options: TrainOptions) -> AdapterShape:
    shape = _shape(options, len(blocks(loaded.model)))
    return replace(shape, keys=adapters.chosen_keys(loaded.model, options.targets, options.layers))


def _shape(options: TrainOptions, depth: int) -> AdapterShape:
    if options.layers and options.layers > depth:
        raise Refusal(f"--layers is {options.layers}, but this model has {depth} blocks: give at most {depth}.")
    rank, alpha = options.rank or _RANK, options.alpha or _ALPHA
    return AdapterShape(
        rank=rank,
        scale=alpha / _divisor(rank, options.rslora),
        dropout=options.dropout or 0.0,
        keys=(),
        layers=options.layers or depth,
        kind="dora" if options.dora else "lora",
    )
