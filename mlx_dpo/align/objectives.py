"""Objectives: pure functions from log-probabilities to one loss an example.

None of them averages, logs or knows a model; the trainer weighs and sums what they return.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def sigmoid(margin: mx.array, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """DPO, -log σ(β·margin), elementwise; with smoothing ε the labels are taken as wrong in a share ε of pairs.

    margin: (pairs,) log-ratio of chosen minus log-ratio of rejected, in nats.
    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); the smoothed form is cDPO, Mitchell 2023, eq. 3.
    """
    right = -nn.log_sigmoid(beta * margin)
    if label_smoothing == 0:
        return right
    return (1 - label_smoothing) * right - label_smoothing * nn.log_sigmoid(-beta * margin)


def negative_log_likelihood(logps: mx.array) -> mx.array:
    """SFT, -log p of the answer, elementwise; divided by the window's answer tokens it is the mean per token.

    logps: (examples,) sums over response tokens, in nats.
    """
    return -logps


PREFERENCE: dict[str, Callable[[mx.array, float, float], mx.array]] = {"sigmoid": sigmoid}
