"""What a run minimises: the terms of its loss, with the numbers of the reference that they compare with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.align.demands import loss_of
from mlx_dpo.align.mixture import Mixture, Total
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.quantities import Quantities, Side
from mlx_dpo.align.scores import Answers, Scores, Sums, having
from mlx_dpo.data.tokenised import TokenisedPair


class Window(NamedTuple):
    """The examples of a step, and what its sums are divided by: their number, and their chosen answers' tokens.

    `whole_tokens` counts the prompts in, but for each text's first token.
    """

    indices: list[int]
    examples: int
    tokens: int
    whole_tokens: int


@dataclass(frozen=True)
class Loss:
    """The terms of a loss, their options, and the reference's numbers, a place for every example.

    `reference` is None where no term needs one. `strangers` are prompts with other prompts' answers, from which KTO
    estimates a divergence, and `strangers_reference` the reference's log-probabilities of these, (examples,).
    """

    terms: Mixture
    options: TrainOptions
    reference: Scores | None = None
    strangers: Sequence[TokenisedPair] | None = None
    strangers_reference: np.ndarray | None = None

    @classmethod
    def of(cls, options: TrainOptions) -> "Loss":
        """The loss that resolved options ask for, without the reference's numbers yet."""
        return cls(loss_of(options), options)

    @property
    def sums(self) -> Sums:
        """How answers have to be summed up for it."""
        return Sums(self.options.ld_alpha, "chosen_whole" in self.terms.quantities, self.options.wpo)

    @property
    def beta(self) -> float | None:
        """The β of its rewards; None where there are none."""
        return self.options.beta if self.terms.preference else None

    def with_terms(self, terms: Mixture) -> "Loss":
        """The same with other terms."""
        return replace(self, terms=terms)

    def window(self, pairs: Sequence[TokenisedPair], indices: list[int]) -> Window:
        """What the loss of the examples `indices` together is divided by."""
        chosen = [pairs[i] for i in having(pairs, indices, "chosen")]
        tokens = sum(len(pair.chosen) for pair in chosen)
        return Window(indices, len(indices), tokens, tokens + sum(len(pair.prompt) - 1 for pair in chosen))

    def share(
        self, scores: Scores, pairs: Sequence[TokenisedPair], batch: list[int], window: Window, kl: float | None
    ) -> mx.array:
        """A batch's share of the window's loss, (), differentiable in `scores`."""
        total = self.parts(scores, pairs, batch, kl)
        share = total.by_example.sum() / window.examples
        if window.tokens:
            share = share + total.by_token.sum() / window.tokens + total.by_whole_token.sum() / window.whole_tokens
        return share

    def parts(self, scores: Scores, pairs: Sequence[TokenisedPair], batch: list[int], kl: float | None) -> Total:
        """The losses of a batch's answers, before anything is summed or divided."""
        known = self.reference
        chosen = _side(scores.chosen, known and known.chosen, pairs, batch, "chosen")
        rejected = _side(scores.rejected, known and known.rejected, pairs, batch, "rejected")
        divergence = None if kl is None else mx.array(kl)
        f_alpha = 0.5 if self.options.f_alpha is None else self.options.f_alpha
        found = Quantities(chosen, rejected, self.options.f_divergence, f_alpha, divergence)
        confidence = scores.chosen.confidence * scores.rejected.confidence if self.options.wpo else None
        return self.terms.total(found, vars(self.options), confidence)

    def divergence(self, policy: np.ndarray, indices: list[int]) -> float | None:
        """The mean log-ratio of strangers' answers, at least 0: KTO's reference point.

        policy: (examples,) log-probabilities of the strangers `indices`, in nats.
        """
        if self.strangers_reference is None:
            return None
        return max(0.0, float(np.mean(policy - self.strangers_reference[indices])))


def _side(
    answers: Answers, reference: Answers | None, pairs: Sequence[TokenisedPair], batch: list[int], name: str
) -> Side:
    places = having(pairs, batch, name)
    lengths: Any = [len(getattr(pairs[i], name)) for i in places]
    known = None if reference is None else mx.array(reference.logps[places])
    return Side(answers.logps, answers.plain, answers.whole, known, mx.array(lengths, dtype=mx.float32))
