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
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.rows import Rows, rows_of


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


class Yardstick:
    """Held-out pairs under one model with its adapter attached, against which merged layers are measured.

    All compute in the model's own type; logits are compared in float32, a pair at a time.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Held]):
        """Lay the pairs out; what the base says of them is computed once, at the first measurement."""
        self.model, self.forward = model, Forward.of(model)
        self.rows = [rows_of([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]) for pair in pairs]
        self.base: dict[int, float] = {}

    def measured(self, layers: Layers) -> Fidelity:
        """Compare the model, adapter attached, with the same model with the merged layers in their places."""
        kl, same, tokens = 0.0, 0, 0
        effects = np.zeros((len(self.rows), 2))
        for i, rows in enumerate(self.rows):
            adapted = self._log_p(rows)
            with replaced(self.model, layers.merged):
                merged = self._log_p(rows)
            kl += float((mx.exp(adapted) * (adapted - merged)).sum())
            same += int((adapted.argmax(-1) == merged.argmax(-1)).sum())
            tokens += rows.targets.size
            base = self._base_margin(i)
            plain = base
            if layers.rounded:
                with replaced(self.model, layers.plain):
                    plain = _margin(self._log_p(rows), rows)
            effects[i] = [_margin(adapted, rows) - base, _margin(merged, rows) - plain]
            mx.clear_cache()
        return Fidelity(kl / tokens, same / tokens, slope(effects[:, 0], effects[:, 1]), tokens, len(self.rows))

    def _base_margin(self, number: int) -> float:
        if number not in self.base:
            with switched_off(self.model):
                self.base[number] = _margin(self._log_p(self.rows[number]), self.rows[number])
        return self.base[number]

    def _log_p(self, rows: Rows) -> mx.array:
        return self.forward.log_p(rows)


def _margin(log_p: mx.array, rows: Rows) -> float:
    """Log-probability of the first row's response minus the second's, in nats."""
    sign = mx.where(rows.row_of == 0, 1.0, -1.0)
    return float((mx.take_along_axis(log_p, rows.targets[:, None], axis=-1)[:, 0] * sign).sum())


def slope(before: np.ndarray, after: np.ndarray) -> float:
    """The slope of `after` over `before` through the origin; 1 where there was no effect to lose."""
    power = float(before @ before)
    return float(before @ after) / power if power > 0 else 1.0
