"""A window's or a data set's log-probabilities as the numbers that are logged, under TRL's names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_dpo.align.mixture import Mixture
from mlx_dpo.align.scores import Answers, Scores, having, present
from mlx_dpo.data.tokenised import TokenisedPair

_LEAST_GROWTH = 0.1  # nats a pair


class Rewards(NamedTuple):
    """Rewards and log-probabilities answer by answer, (answers,); a side that is not there is empty."""

    chosen: np.ndarray
    rejected: np.ndarray
    logps_chosen: np.ndarray
    logps_rejected: np.ndarray
    shift: np.ndarray  # of the chosen answers' log-probability against the reference, nats
    opening: float | None  # share of the margin that stands in the answers' first five tokens
    chosen_tokens: int
    paired: bool

    @property
    def margins(self) -> np.ndarray:
        """Chosen over rejected, (pairs,); empty where answers come singly."""
        return self.chosen - self.rejected if self.paired else self.chosen[:0]

    def means(self) -> dict[str, float]:
        """The means under TRL's names; `logps/chosen_shift` and `margins/opening_share` are not TRL's."""
        named = {
            "rewards/chosen": self.chosen,
            "rewards/rejected": self.rejected,
            "logps/chosen": self.logps_chosen,
            "logps/rejected": self.logps_rejected,
        }
        result = {name: float(values.mean()) for name, values in named.items() if values.size}
        if self.paired:
            result["rewards/accuracies"] = float((self.chosen > self.rejected).mean())
            result["rewards/margins"] = float(self.margins.mean())
        elif self.chosen.size and self.rejected.size:
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        if self.shift.size:
            result["logps/chosen_shift"] = float(self.shift.mean())
            result["logps/chosen_shift_per_token"] = float(self.shift.sum() / self.chosen_tokens)
        if self.opening is not None:
            result["margins/opening_share"] = self.opening
        return result


def rewards(
    policy: Scores,
    reference: Scores | None,
    pairs: Sequence[TokenisedPair],
    indices: Sequence[int],
    mixture: Mixture,
    beta: float | None,
) -> Rewards:
    """The rewards of the examples `indices`; `policy` and `reference` have a place for every example of `pairs`.

    A reward is β times the log-ratio; for objectives without a reference it is β times log p (CPO), or times its mean
    per token where the objective takes that (SimPO, ORPO). There is none in SFT, where `beta` is None.
    """
    up, down = having(pairs, indices, "chosen"), having(pairs, indices, "rejected")
    here = present(policy, pairs, indices)
    logps = logged_logps(policy, pairs, indices, mixture)
    shift, opening, values = here.chosen.logps[:0], None, logps
    if reference is not None:
        there = present(reference, pairs, indices)
        shift = here.chosen.plain - there.chosen.plain
        opening = opening_share(here, there) if up == down else None
        if mixture.needs_reference:
            values = [here.chosen.logps - there.chosen.logps, here.rejected.logps - there.rejected.logps]
    none = here.chosen.logps[:0]
    return Rewards(
        chosen=none if beta is None else beta * values[0],
        rejected=none if beta is None else beta * values[1],
        logps_chosen=logps[0],
        logps_rejected=logps[1],
        shift=shift,
        opening=opening,
        chosen_tokens=sum(len(pairs[i].chosen) for i in up),
        paired=up == down and beta is not None,
    )


def logged_logps(
    scores: Scores, pairs: Sequence[TokenisedPair], indices: Sequence[int], mixture: Mixture
) -> list[np.ndarray]:
    """The log-probabilities that are logged of the chosen and of the rejected answers of `indices`, (answers,) each.

    Sums over tokens, or their means where the objective takes those; `scores` has a place for every example of `pairs`.
    """
    found = [numbers.logps for numbers in present(scores, pairs, indices)]
    if not mixture.takes_means:
        return found
    tokens = ([len(getattr(pairs[i], side)) for i in having(pairs, indices, side)] for side in Scores._fields)
    return [logps / np.array(lengths) for logps, lengths in zip(found, tokens, strict=True)]


def opening_share(policy: Scores, reference: Scores) -> float | None:
    """The share of the margin's growth that the first five tokens of both answers make up.

    None where the margin has hardly grown yet, so that the share would be one of rounding.
    """
    whole, first = (_margin(policy, name) - _margin(reference, name) for name in ("plain", "opening"))
    return float(first / whole) if whole > _LEAST_GROWTH * len(policy.chosen.plain) else None


def _margin(scores: Scores, name: str) -> float:
    return float(np.sum(_values(scores.chosen, name), dtype=np.float64) - np.sum(_values(scores.rejected, name)))


def _values(answers: Answers, name: str) -> np.ndarray:
    return getattr(answers, name)
