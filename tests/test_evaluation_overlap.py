"""Overlap with a reference, by hand."""

import pytest

from mlx_dpo.evaluation.overlap import chrf, rouge_l


def test_rouge_l_by_hand():
    # Common in order: police, the, gunman (3 of 4 and 4 words).
    assert rouge_l("police kill the gunman", "Police killed the gunman.") == pytest.approx(2 * 3 / 8)
    # Order counts: "the gunman" alone is common in order, or "police kill".
    assert rouge_l("the gunman police kill", "police kill the gunman") == pytest.approx(2 * 2 / 8)


def test_chrf_by_hand():
    # Without spaces "ab" and "abc": 1-grams 2 of 2 and of 3, 2-grams 1 of 1 and of 2; longer ones the answer lacks.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf("a b", "abc") == pytest.approx(5 * precision * recall / (4 * precision + recall))


@pytest.mark.parametrize("measure", [rouge_l, chrf])
def test_the_ends_of_the_scale(measure):
    assert measure("Rest now, and call me.", "Rest now, and call me.") == pytest.approx(1.0)
    assert measure("", "Rest.") == measure("Rest.", "") == measure("xyz", "Rube") == 0.0
