"""Objectives: pure functions from log-probabilities to one loss an example.

None of them averages, logs or knows a model; the trainer weighs and sums what they return. What a function takes says
what it needs: a name of `quantities.Quantities` is computed for it, any other name is the option of that name, and its
default is the option's. Quantities are (pairs,) float32, in nats; `beta` is the strength of the pull towards the
reference.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

_log_sigmoid = nn.log_sigmoid


def sigmoid(margin: mx.array, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """DPO, -log σ(β·margin); with smoothing ε the labels are taken as wrong in a share ε of pairs.

    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); the smoothed form is cDPO, Mitchell 2023, eq. 3. TRL 1.16 ignores
    the smoothing here.
    """
    right = -_log_sigmoid(beta * margin)
    if label_smoothing == 0:
        return right
    return (1 - label_smoothing) * right - label_smoothing * _log_sigmoid(-beta * margin)


def robust(margin: mx.array, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """Robust DPO: an estimate of the loss under clean labels where a share ε of them was flipped; ε below a half.

    Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    right, flipped = -_log_sigmoid(beta * margin), -_log_sigmoid(-beta * margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(margin: mx.array, beta: float = 0.1) -> mx.array:
    """SLiC's hinge on the normalised likelihood, max(0, 1 - β·margin).

    Zhao et al. 2023 (arXiv:2305.10425); on log-ratios as in Liu et al. 2023 (arXiv:2309.06657).
    """
    return mx.maximum(0.0, 1 - beta * margin)


def ipo(token_margin: mx.array, beta: float = 0.1) -> mx.array:
    """IPO, the squared distance of the margin per token from 1/(2β); β is the paper's τ.

    Azar et al. 2023, eq. 17 (arXiv:2310.12036), the log-ratios divided by their response's tokens.
    """
    return mx.square(token_margin - 1 / (2 * beta))


def exo_pair(margin: mx.array, beta: float = 0.1, label_smoothing: float = 1e-3) -> mx.array:
    """EXO for pairs: the reverse KL of the policy's preference from labels right in a share 1-ε; ε above 0.

    Ji et al. 2024, eq. 16 (arXiv:2402.00856), where ε is 1e-3 too.
    """
    right, wrong = _log_sigmoid(beta * margin), _log_sigmoid(-beta * margin)
    against_right = right - mx.log1p(mx.array(-label_smoothing))
    return mx.exp(right) * against_right + mx.exp(wrong) * (wrong - mx.log(mx.array(label_smoothing)))


def nca_pair(chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1) -> mx.array:
    """NCA for pairs: the chosen reward is pulled up for itself, and both are kept from growing without bound.

    Chen et al. 2024 (arXiv:2402.05369).
    """
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    return -_log_sigmoid(chosen) - 0.5 * (_log_sigmoid(-chosen) + _log_sigmoid(-rejected))


def bco_pair(chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1) -> mx.array:
    """BCO on pairs: a classifier whose logit is the reward, chosen against rejected.

    Jung et al. 2024 (arXiv:2404.04656), with the reward shift δ at 0, as TRL 1.16 has it; the paper moves δ
    along with the mean reward.
    """
    return -_log_sigmoid(beta * chosen_ratio) - _log_sigmoid(-beta * rejected_ratio)


def sppo_hard(chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1) -> mx.array:
    """SPPO with hard labels: each log-ratio is drawn to ±1/(2β).

    Wu et al. 2024, eq. 4.7 (arXiv:2405.00675), the probability of winning being 1 or 0.
    """
    return mx.square(chosen_ratio - 0.5 / beta) + mx.square(rejected_ratio + 0.5 / beta)


def aot(
    policy_margin: mx.array, reference_margin: mx.array, beta: float = 0.1, label_smoothing: float = 0.0
) -> mx.array:
    """AOT for pairs: the policy's margins are to dominate the reference's as a distribution, rank by rank.

    Melnyk et al. 2024 (arXiv:2406.05882).
    """
    return sigmoid(_sorted(policy_margin) - _sorted(reference_margin), beta, label_smoothing)


def aot_unpaired(
    chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1, label_smoothing: float = 0.0
) -> mx.array:
    """AOT without pairs: the chosen log-ratios are to dominate the rejected ones, rank by rank.

    Melnyk et al. 2024 (arXiv:2406.05882).
    """
    return sigmoid(_sorted(chosen_ratio) - _sorted(rejected_ratio), beta, label_smoothing)


def apo_zero(chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1) -> mx.array:
    """APO-zero, for chosen answers better than the model's own: chosen up, rejected down, each for itself.

    D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
    """
    return mx.sigmoid(-beta * chosen_ratio) + mx.sigmoid(beta * rejected_ratio)


def apo_down(chosen_ratio: mx.array, rejected_ratio: mx.array, beta: float = 0.1) -> mx.array:
    """APO-down, for chosen answers worse than the model's own: both down, rejected further.

    D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266).
    """
    return mx.sigmoid(beta * chosen_ratio) + mx.sigmoid(-beta * (chosen_ratio - rejected_ratio))


def discopop(margin: mx.array, beta: float = 0.1, discopop_tau: float = 0.05) -> mx.array:
    """DiscoPOP: logistic loss where the margin is negative, exponential where it is positive, blended by its size.

    Lu et al. 2024, eq. 5 (arXiv:2406.08414).
    """
    reward = beta * margin
    size = reward / discopop_tau
    # One exponent for share and exponential loss: apart they are 0 and infinity where the margin is far below 0.
    return mx.sigmoid(-size) * -_log_sigmoid(reward) + mx.exp(_log_sigmoid(size) - reward)


def sigmoid_norm(token_margin: mx.array, beta: float = 5.0) -> mx.array:
    """DPO on log-ratios divided by their response's tokens.

    Lambert et al. 2024 (arXiv:2411.15124), where β is 5.
    """
    return -_log_sigmoid(beta * token_margin)


def dpop(margin: mx.array, chosen_ratio: mx.array, beta: float = 0.1, dpop_lambda: float = 50.0) -> mx.array:
    """DPO-positive: the margin is charged λ times what the chosen answer lost against the reference.

    Pal et al. 2024, eq. 3 (arXiv:2402.13228), where λ is 50.
    """
    return -_log_sigmoid(beta * (margin - dpop_lambda * mx.maximum(0.0, -chosen_ratio)))


def simpo(policy_token_margin: mx.array, beta: float = 2.0, simpo_gamma: float = 0.5) -> mx.array:
    """SimPO, without a reference: mean log p per token, chosen ahead of rejected by γ/β.

    Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """
    return -_log_sigmoid(beta * policy_token_margin - simpo_gamma)


def contrast(policy_margin: mx.array, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """The preference term of CPO, without a reference.

    Xu et al. 2024, eq. 3 (arXiv:2401.08417).
    """
    return sigmoid(policy_margin, beta, label_smoothing)


def odds_ratio(chosen_mean: mx.array, rejected_mean: mx.array, beta: float = 0.1) -> mx.array:
    """The preference term of ORPO, without a reference: β times -log σ of the log odds ratio; β is the paper's λ.

    Hong et al. 2024, eq. 7 (arXiv:2403.07691), p being the geometric mean of the token probabilities.
    """
    return -beta * _log_sigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))


def kto(
    chosen_ratio: mx.array,
    rejected_ratio: mx.array,
    kl: mx.array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """KTO: each thumb up or down by itself, its reward measured from the policy's divergence `kl`, (), in nats.

    Ethayarajh et al. 2024, eq. 7 (arXiv:2402.01306). Gives the ups' losses, then the downs'.
    """
    up = desirable_weight * mx.sigmoid(beta * (kl - chosen_ratio))
    return mx.concatenate([up, undesirable_weight * mx.sigmoid(beta * (rejected_ratio - kl))])


def likelihood(chosen: mx.array) -> mx.array:
    """SFT, -log p of the answer; divided by all answers' tokens it is the mean per token.

    chosen: (examples,) sums over response tokens.
    """
    return -chosen


def whole_likelihood(chosen_whole: mx.array) -> mx.array:
    """-log p of prompt and answer together, which ORPO learns beside its odds ratio in TRL 1.16.

    chosen_whole: (examples,) sums over all tokens but the first; the paper's eq. 6 counts the answer alone.
    """
    return -chosen_whole


def _sorted(values: mx.array) -> mx.array:
    return values[mx.stop_gradient(mx.argsort(values))]


def _log_odds(logp: mx.array) -> mx.array:
    """log(p / (1-p)) for log p below 0, without losing 1-p where p is small or close to 1."""
    near_one = mx.log(-mx.expm1(mx.minimum(logp, -1e-7)))
    small = mx.log1p(-mx.exp(mx.minimum(logp, -0.5)))
    return logp - mx.where(logp > -0.6931, near_one, small)


Objective = Callable[..., mx.array]
# What --loss can be asked for; a name with several terms is their sum.
TERMS: dict[str, tuple[Objective, ...]] = {
    "sigmoid": (sigmoid,),
    "robust": (robust,),
    "hinge": (hinge,),
    "ipo": (ipo,),
    "exo_pair": (exo_pair,),
    "nca_pair": (nca_pair,),
    "bco_pair": (bco_pair,),
    "sppo_hard": (sppo_hard,),
    "aot": (aot,),
    "aot_unpaired": (aot_unpaired,),
    "apo_zero": (apo_zero,),
    "apo_down": (apo_down,),
    "discopop": (discopop,),
    "sigmoid_norm": (sigmoid_norm,),
    "dpop": (dpop,),
    "simpo": (simpo,),
    "cpo": (contrast, likelihood),
    "orpo": (odds_ratio, whole_likelihood),
    "kto": (kto,),
    "sft": (likelihood,),
}
PER_TOKEN = (likelihood, whole_likelihood)  # divided by the tokens of all examples, not by their number
COUPLED = (aot, aot_unpaired)  # a pair's loss has a gradient in the other pairs of its step
