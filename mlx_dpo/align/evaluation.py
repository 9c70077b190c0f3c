"""Held-out numbers: exact over all pairs, never means of batch means, with an interval for the accuracy."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.align import objectives
from mlx_dpo.align.intervals import wilson
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.reference import PairLogps
from mlx_dpo.align.trainer import reward_means
from mlx_dpo.data.tokenised import TokenisedPair


def evaluated(
    policy: PairLogps, reference: PairLogps, pairs: Sequence[TokenisedPair], options: TrainOptions
) -> dict[str, float]:
    """The training numbers over held-out pairs, prefixed eval_, with the reference's log-probabilities beside."""
    tokens = sum(len(pair.chosen) for pair in pairs)
    sft = -float(policy.chosen.sum(dtype=np.float64)) / tokens
    chosen = {
        "eval_logps/chosen": float(policy.chosen.mean()),
        "eval_logps/chosen_reference": float(reference.chosen.mean()),
        "eval_pairs": len(pairs),
    }
    if options.method == "sft":
        return {"eval_loss": sft, **chosen}
    margin = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    losses = objectives.PREFERENCE[options.loss](mx.array(margin), options.beta, options.label_smoothing)
    means = reward_means(policy, reference, options.beta)
    low, high = wilson(int((margin > 0).sum()), len(margin))
    return {
        "eval_loss": float(np.array(losses).mean()) + options.sft_weight * sft,
        **{f"eval_{name}": value for name, value in means.items()},
        "eval_rewards/accuracies_low": low,
        "eval_rewards/accuracies_high": high,
        **chosen,
        "eval_logps/rejected_reference": float(reference.rejected.mean()),
    }
