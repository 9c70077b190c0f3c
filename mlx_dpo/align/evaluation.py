"""Held-out numbers: exact over all pairs, never means of batch means, with an interval for the accuracy."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.align import objectives
from mlx_dpo.align.intervals import wilson
from mlx_dpo.align.reference import PairLogps
from mlx_dpo.align.trainer import Settings, reward_means
from mlx_dpo.data.tokenised import TokenisedPair


def evaluated(
    policy: PairLogps, reference: PairLogps, pairs: Sequence[TokenisedPair], settings: Settings
) -> dict[str, float]:
    """The training numbers over held-out pairs, prefixed eval_, with the reference's log-probabilities beside."""
    tokens = sum(len(pair.chosen) for pair in pairs)
    sft = -float(policy.chosen.sum(dtype=np.float64)) / tokens
    if settings.method == "sft":
        return {"eval_loss": sft, "eval_logps/chosen": float(policy.chosen.mean())}
    margin = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    losses = objectives.PREFERENCE[settings.loss](mx.array(margin), settings.beta, settings.label_smoothing)
    means = reward_means(policy, reference, settings.beta)
    low, high = wilson(int((margin > 0).sum()), len(margin))
    return {
        "eval_loss": float(np.array(losses).mean()) + settings.sft_weight * sft,
        **{f"eval_{name}": value for name, value in means.items()},
        "eval_rewards/accuracies_low": low,
        "eval_rewards/accuracies_high": high,
        "eval_logps/chosen_reference": float(reference.chosen.mean()),
        "eval_logps/rejected_reference": float(reference.rejected.mean()),
        "eval_pairs": len(pairs),
    }
