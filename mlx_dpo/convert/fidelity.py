"""How much of an adapter is left after merging: the same texts under base, base with adapter, and merged."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dpo.convert.merge import Layers
from mlx_dpo.models.adapters import switched_off
from mlx_dpo.models.scoring import rows_of

Text = tuple[Sequence[int], Sequence[int]]  # prompt, response


class Fidelity(NamedTuple):
    """Merged against base with adapter, over the response tokens of held-out pairs.

    kl: mean KL(adapted ‖ merged) in nats a token. agreement: share of tokens with the same likeliest token.
    survived: the share of the adapter's effect on the log-ratio of chosen and rejected that is left, as the slope
    of merged over adapted through the origin; each effect is taken against the base in the same number format, so
    that what rounding does to the base is not counted as the adapter's. tokens, pairs: how many were compared.
    """

    kl: float
    agreement: float
    survived: float
    tokens: int
    pairs: int


@contextlib.contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The same model with other layers in some places, for as long as the block lasts."""
    modules = dict(model.named_modules())
    before = [(name, modules[name]) for name in layers]
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(before))


class Held(NamedTuple):
    """A held-out pair as token ids."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def measured(model: nn.Module, layers: Layers, pairs: Sequence[Held]) -> Fidelity:
    """Compare `model`, whose adapters are attached, with the same model with the merged layers in their places.

    All compute in the model's own type; logits are compared in float32, a pair at a time.
    """
    kl, same, tokens = 0.0, 0, 0
    effects = np.zeros((len(pairs), 2))
    for i, pair in enumerate(pairs):
        rows = rows_of([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
        sign = mx.where(rows.row_of == 0, 1.0, -1.0)

        def log_p(rows=rows) -> mx.array:
            logits = model(rows.tokens)
            logits = logits.reshape(-1, logits.shape[-1])[rows.places].astype(mx.float32)
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        def margin(log_probabilities: mx.array, rows=rows, sign=sign) -> mx.array:
            return (mx.take_along_axis(log_probabilities, rows.targets[:, None], axis=-1)[:, 0] * sign).sum()

        adapted = log_p()
        with switched_off(model):
            base = float(margin(log_p()))
        with replaced(model, layers.merged):
            merged = log_p()
            mx.eval(merged)
        with replaced(model, layers.plain):
            plain = float(margin(log_p()))
        divergence = (mx.exp(adapted) * (adapted - merged)).sum()
        agree = (adapted.argmax(-1) == merged.argmax(-1)).sum()
        effects[i] = [float(margin(adapted)) - base, float(margin(merged)) - plain]
        kl += float(divergence)
        same += int(agree)
        tokens += rows.targets.size
        mx.clear_cache()
    return Fidelity(kl / tokens, same / tokens, slope(effects[:, 0], effects[:, 1]), tokens, len(pairs))


def slope(before: np.ndarray, after: np.ndarray) -> float:
    """The slope of `after` over `before` through the origin; 1 where there was no effect to lose."""
    power = float(before @ before)
    return float(before @ after) / power if power > 0 else 1.0
