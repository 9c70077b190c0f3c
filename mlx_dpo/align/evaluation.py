"""Held-out numbers: exact over all pairs, never means of batch means; 95% intervals of those that `evaluated` names."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_dpo.align.intervals import bootstrap, wilson
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.rewards import Rewards, logged_logps, rewards
from mlx_dpo.align.scores import Scores, having, present
from mlx_dpo.data.tokenised import TokenisedPair


def evaluated(
    policy: Scores, start: Scores, pairs: Sequence[TokenisedPair], loss: Loss, kl: float | None = None
) -> dict[str, float]:
    """The training numbers over held-out examples, prefixed eval_, four of them with intervals (_low, _high).

    The interval of the accuracy is Wilson's; those of the margin, of the chosen answers' change and of the loss are
    bootstrapped over examples. Only pairs have one of the accuracy and the margin; the loss has none where pairs are
    coupled or an example has no chosen answer.

    `start` is what the model said before the first step, with which the chosen answers' log-probability is compared;
    `loss` holds the held-out numbers of its reference, and `kl` is its divergence, where it needs them.
    """
    every = list(range(len(pairs)))
    found = rewards(policy, start, pairs, every, loss.terms, loss.beta)
    scores = tree_map(mx.array, present(policy, pairs, every))
    result = {"eval_loss": float(loss.share(scores, pairs, every, loss.window(pairs, every), kl))}
    result |= _loss_interval(scores, pairs, loss, kl)
    result |= {f"eval_{name}": value for name, value in found.means().items()}
    if kl is not None:
        result["eval_kl_of_strangers"] = kl
    result |= _intervals(found)
    for side, logps in zip(Scores._fields, logged_logps(start, pairs, every, loss.terms), strict=True):
        if logps.size:
            result[f"eval_logps/{side}_reference"] = float(logps.mean())
    if found.paired:
        for name, said in (("", policy), ("_reference", start)):
            result[f"eval_logps/preferred_per_token{name}"] = _preferred(said, pairs)
    return result | {"eval_pairs": len(pairs)}


def _preferred(scores: Scores, pairs: Sequence[TokenisedPair]) -> float:
    """The share of pairs whose chosen answer has the higher mean log p per token."""
    chosen, rejected = (np.array([len(getattr(pair, side)) for pair in pairs]) for side in Scores._fields)
    return float((scores.chosen.plain / chosen > scores.rejected.plain / rejected).mean())


def _intervals(found: Rewards) -> dict[str, float]:
    result: dict[str, float] = {}
    if found.paired:
        low, high = wilson(int((found.margins > 0).sum()), len(found.margins))
        result |= _named("rewards/accuracies", low, high)
    for name, values in (("rewards/margins", found.margins), ("logps/chosen_shift", found.shift)):
        if values.size:
            result |= _named(name, *_mean_interval(values))
    return result


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    return bootstrap(lambda drawn: values[drawn].mean(axis=1), len(values))


def _named(name: str, low: float, high: float) -> dict[str, float]:
    return {f"eval_{name}_low": low, f"eval_{name}_high": high}


def _loss_interval(scores: Scores, pairs: Sequence[TokenisedPair], loss: Loss, kl: float | None) -> dict[str, float]:
    """The interval of the loss, where its parts belong to examples one by one."""
    every = list(range(len(pairs)))
    if loss.terms.is_coupled or len(having(pairs, every, "chosen")) < len(pairs):
        return {}
    parts = loss.parts(scores, pairs, every, kl)
    by_example, by_token, by_whole = (np.broadcast_to(np.array(part), len(pairs)) for part in parts)
    tokens = np.array([len(pair.chosen) for pair in pairs])
    whole = tokens + np.array([len(pair.prompt) - 1 for pair in pairs])

    def statistic(drawn: np.ndarray) -> np.ndarray:
        a_token = by_token[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
        a_token = a_token + by_whole[drawn].sum(axis=1) / whole[drawn].sum(axis=1)
        return by_example[drawn].mean(axis=1) + a_token

    return _named("loss", *bootstrap(statistic, len(pairs)))
