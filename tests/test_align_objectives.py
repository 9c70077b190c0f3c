"""The objectives, against numbers worked out by hand and against finite differences."""

import math
from typing import get_args, get_type_hints

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.align import objectives
from mlx_dpo.align.intervals import wilson
from mlx_dpo.align.options import TrainOptions

POLICY = np.array([[-20.0, -35.0, -12.5], [-24.0, -30.0, -13.0]])  # chosen, rejected
REFERENCE = np.array([[-21.0, -34.0, -12.0], [-22.0, -31.0, -15.0]])
MARGINS = (POLICY[0] - REFERENCE[0]) - (POLICY[1] - REFERENCE[1])


def losses(margins: np.ndarray, beta: float, smoothing: float = 0.0) -> np.ndarray:
    return np.array(objectives.sigmoid(mx.array(margins, dtype=mx.float32), beta, smoothing))


def test_sigmoid_by_hand():
    # β·margin is 0.3, -0.2, -0.25; -log σ(x) = log(1 + e^-x).
    assert losses(MARGINS, 0.1) == pytest.approx([0.554355, 0.798139, 0.825939], abs=1e-6)
    assert losses(MARGINS, 0.1).mean() == pytest.approx(0.726145, abs=1e-6)


def test_no_margin_costs_ln_2_whatever_beta_and_smoothing():
    for beta in (0.01, 0.1, 2.0):
        for smoothing in (0.0, 0.1, 0.4):
            assert losses(np.zeros(2), beta, smoothing) == pytest.approx(math.log(2), abs=1e-7)


def test_smoothing_by_hand_and_its_symmetry():
    # 0.9 · 0.554355 + 0.1 · 0.854355
    assert losses(MARGINS[:1], 0.1, 0.1) == pytest.approx([0.584355], abs=1e-6)
    assert losses(MARGINS, 0.7, 0.2) == pytest.approx(losses(-MARGINS, 0.7, 0.8), abs=1e-6)


def test_smoothed_loss_is_least_where_the_odds_are_those_of_the_labels():
    smoothing, beta = 0.2, 0.5
    best = math.log((1 - smoothing) / smoothing) / beta
    low, least, high = losses(np.array([best - 0.3, best, best + 0.3]), beta, smoothing)
    assert least < low
    assert least < high


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_gradient_is_that_of_finite_differences(smoothing: float):
    margins, beta, step = np.linspace(-8, 8, 9), 0.6, 0.02
    gradient = mx.grad(lambda m: objectives.sigmoid(m, beta, smoothing).sum())(mx.array(margins, dtype=mx.float32))
    slope = (losses(margins + step, beta, smoothing) - losses(margins - step, beta, smoothing)) / (2 * step)
    assert np.array(gradient) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_far_margins_stay_finite():
    assert losses(np.array([1e4, -1e4]), 1.0) == pytest.approx([0.0, 1e4])


def test_likelihood_loss_is_minus_log_p():
    assert objectives.negative_log_likelihood(mx.array([-3.5, -0.25])).tolist() == [3.5, 0.25]


def test_every_loss_that_can_be_asked_for_is_there():
    assert set(get_args(get_type_hints(TrainOptions)["loss"])) == objectives.PREFERENCE.keys()


def test_wilson_by_hand():
    # With z = 1.96 (1.959964): z² = 3.841459. 8 of 10: (0.8 + 0.192073 ± 1.959964·√(0.016 + 0.00960365)) / 1.3841459
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # 20 of 20: the lower end is 20 / (20 + z²).
    assert wilson(20, 20) == pytest.approx((20 / 23.841459, 1.0), abs=1e-6)
    assert wilson(0, 20) == pytest.approx((0.0, 3.841459 / 23.841459), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_is_symmetric_and_narrows():
    low, high = wilson(7, 31)
    assert wilson(24, 31) == pytest.approx((1 - high, 1 - low))
    spans = [high - low for low, high in (wilson(n // 2, n) for n in (2, 10, 50, 1000))]
    assert spans == sorted(spans, reverse=True)
