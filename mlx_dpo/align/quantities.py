"""What objectives are computed from: log-probabilities of both sides of a batch, and what follows from them."""

import math
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
_LARGEST_EXPONENT = 80.0  # e⁸⁰ is still a float32


class Side(NamedTuple):
    """The chosen or the rejected answers of a batch: (answers,) float32 sums over tokens in nats, and token counts.

    `logps` is what preference objectives see, which LD-DPO weighs by place; `plain` is the unweighed sum and `whole`
    that of prompt and answer, where it is asked for. `reference` is None without one.
    """

    logps: mx.array
    plain: mx.array
    whole: mx.array | None
    reference: mx.array | None
    lengths: mx.array


class Quantities:
    """What an objective can take, by name, computed when it is asked for: (pairs,) float32, in nats."""

    def __init__(
        self,
        chosen: Side,
        rejected: Side,
        divergence: Divergence = "reverse_kl",
        f_alpha: float = 0.5,
        kl: mx.array | None = None,
    ):
        """`kl` is the policy's divergence from the reference, (), for objectives that measure rewards from it."""
        self._chosen, self._rejected, self._kl = chosen, rejected, kl
        self._divergence: Divergence = divergence
        self._f_alpha = f_alpha

    @property
    def chosen(self) -> mx.array:
        """log p of the chosen answers."""
        return self._chosen.plain

    @property
    def chosen_whole(self) -> mx.array:
        """log p of prompt and chosen answer."""
        if self._chosen.whole is None:
            raise ValueError("The prompts' log-probabilities were not computed.")
        return self._chosen.whole

    @property
    def chosen_mean(self) -> mx.array:
        """Mean log p of a chosen answer's tokens."""
        return self._chosen.logps / self._chosen.lengths

    @property
    def rejected_mean(self) -> mx.array:
        """Mean log p of a rejected answer's tokens."""
        return self._rejected.logps / self._rejected.lengths

    @property
    def policy_margin(self) -> mx.array:
        """log p of chosen over rejected under the policy."""
        return self._chosen.logps - self._rejected.logps

    @property
    def policy_token_margin(self) -> mx.array:
        """The same of the means per token."""
        return self.chosen_mean - self.rejected_mean

    @property
    def reference_margin(self) -> mx.array:
        """log p of chosen over rejected under the reference."""
        return _known(self._chosen) - _known(self._rejected)

    @property
    def chosen_ratio(self) -> mx.array:
        """log p of policy over reference, of the chosen answers."""
        return self._chosen.logps - _known(self._chosen)

    @property
    def rejected_ratio(self) -> mx.array:
        """log p of policy over reference, of the rejected answers."""
        return self._rejected.logps - _known(self._rejected)

    @property
    def margin(self) -> mx.array:
        """Score of chosen over rejected: of log-ratios, or of what a divergence makes of them."""
        return self._score(self.chosen_ratio) - self._score(self.rejected_ratio)

    @property
    def token_margin(self) -> mx.array:
        """The same, each score divided by its answer's tokens."""
        chosen = self._score(self.chosen_ratio) / self._chosen.lengths
        return chosen - self._score(self.rejected_ratio) / self._rejected.lengths

    @property
    def kl(self) -> mx.array:
        """The policy's divergence from the reference, ()."""
        if self._kl is None:
            raise ValueError("The divergence was not computed.")
        return self._kl

    def _score(self, ratio: mx.array) -> mx.array:
        return divergence_score(ratio, self._divergence, self._f_alpha)


def divergence_score(ratio: mx.array, divergence: Divergence, f_alpha: float) -> mx.array:
    """f'(π/π_ref) from the log-ratio, elementwise, up to constants that cancel between chosen and rejected.

    Wang et al. 2023 (arXiv:2309.16240): log t for the reverse KL, 1 - 1/t for the forward KL, log(2t/(1+t)) for
    Jensen-Shannon, (t^(α-1) - 1)/(α-1) for the α-divergence, in the signs and constants of TRL 1.16.
    """
    if divergence == "forward_kl":
        return 1 - mx.exp(mx.minimum(-ratio, _LARGEST_EXPONENT))
    if divergence == "js_divergence":
        return math.log(2) + nn.log_sigmoid(ratio)
    if divergence == "alpha_divergence" and abs(f_alpha - 1) >= 1e-6:
        power = f_alpha - 1
        return (mx.exp(mx.minimum(power * ratio, _LARGEST_EXPONENT)) - 1) / power
    return ratio


_PROVIDED = {name for name, value in vars(Quantities).items() if isinstance(value, property)}
OF_REFERENCE = frozenset({"margin", "token_margin", "chosen_ratio", "rejected_ratio", "reference_margin", "kl"})
OF_MEANS = frozenset({"chosen_mean", "rejected_mean", "policy_token_margin"})
OF_DIVERGENCE = frozenset({"margin", "token_margin"})
NAMES = frozenset(_PROVIDED)


def _known(side: Side) -> mx.array:
    if side.reference is None:
        raise ValueError("The reference's log-probabilities were not computed.")
    return side.reference
