"""Statistics against scipy's idea of them, on data whose truth is known."""

import numpy as np
import pytest

from mlx_dpo.evaluation.statistics import (
    Difference,
    by_question,
    detectable,
    difference,
    holm,
    interval,
    is_no_worse,
    sign_flip,
)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = [(found := interval(random.exponential(size=60), seed)).low <= 1 <= found.high for seed in range(200)]
    # A percentile interval of 60 skewed numbers covers some 93%: 200 trials scatter by 1.8%.
    assert 0.88 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize("count", [8, 60])
def test_equal_systems_are_told_apart_as_often_as_the_level_says(count: int):
    random = np.random.default_rng(1)
    chances = np.array([sign_flip(random.standard_normal(count), seed) for seed in range(400)])
    for level in (0.05, 0.2):
        assert abs((chances <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 400)


def test_a_sign_flip_by_hand():
    # Eight ways to sign 1, 2, 3: the mean is as far from zero as 2 in two of them.
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip(np.array([1.0, -1.0])) == 1.0
    assert sign_flip(np.zeros(20)) == 1.0


def test_many_flips_come_near_all_flips():
    apart = np.random.default_rng(2).standard_normal(12) + 0.4
    assert sign_flip(np.append(apart, 0.0)) == pytest.approx(sign_flip(apart), abs=0.015)


def test_what_all_questions_share_does_not_blur_a_paired_difference():
    random = np.random.default_rng(3)
    hard = 10 * random.standard_normal(100)
    found = difference(hard + 1 + 0.1 * random.standard_normal(100), hard)
    assert found.low < 1 < found.high
    assert found.high - found.low < 0.1
    assert found.p < 0.001
    assert found.is_clear


def test_seeds_of_a_question_count_as_one():
    random = np.random.default_rng(4)
    once = random.standard_normal(40)
    found = interval(np.repeat(once[:, None], 25, axis=1))
    assert found == interval(once)
    assert by_question(np.array([[1.0, np.nan], [2.0, 4.0]])).tolist() == [1.0, 3.0]


def test_holm_by_hand():
    # 0.01 × 3; 0.02 × 2 = 0.04; 0.04 × 1 would be less than the one before.
    assert holm({"c": 0.04, "a": 0.01, "b": 0.02}) == pytest.approx({"c": 0.04, "a": 0.03, "b": 0.04})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_no_worse_looks_at_the_side_that_harms():
    found = Difference(-0.01, -0.04, 0.02, 0.5)
    assert is_no_worse(found, 0.05, higher_is_better=True)
    assert not is_no_worse(found, 0.03, higher_is_better=True)
    assert is_no_worse(found, 0.03, higher_is_better=False)


def test_a_detectable_difference_is_detected_four_times_in_five():
    random = np.random.default_rng(5)
    size = detectable(random.standard_normal(10_000)) * np.sqrt(10_000 / 50)
    found = [sign_flip(random.standard_normal(50) + size, seed) <= 0.05 for seed in range(300)]
    assert 0.72 <= np.mean(found) <= 0.88


def test_other_questions_are_no_pair():
    with pytest.raises(ValueError, match="same questions"):
        difference(np.zeros(3), np.zeros(4))


@pytest.mark.reference
def test_intervals_and_tests_are_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(6)
    apart = random.exponential(size=40) - 0.7
    theirs = stats.bootstrap((apart,), np.mean, n_resamples=20_000, method="percentile", rng=random).confidence_interval
    ours = interval(apart)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    for values in (apart, apart[:9]):
        wanted = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=False, rng=random
        )
        assert sign_flip(values) == pytest.approx(wanted.pvalue, abs=0.015)
