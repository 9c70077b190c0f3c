"""The objectives, against their formulas in double precision, and against finite differences."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.align import objectives
from mlx_dpo.align.mixture import mixture, parameters
from mlx_dpo.align.quantities import NAMES, Quantities, Side, divergence_score
from mlx_dpo.refusal import Refusal

CHOSEN, REJECTED = np.array([-20.0, -35.0, -12.5]), np.array([-24.0, -30.0, -13.0])
CHOSEN_BEFORE, REJECTED_BEFORE = np.array([-21.0, -34.0, -12.0]), np.array([-22.0, -31.0, -15.0])
CHOSEN_LENGTHS, REJECTED_LENGTHS = np.array([10.0, 20.0, 5.0]), np.array([12.0, 15.0, 6.0])
PROMPTS = np.array([-3.0, -4.0, -5.0])  # log p of the prompts, for what counts them in
KL = 0.25
# The mean loss of the three pairs above with β = ε = 0.1, worked out from the formulas in double precision.
GOLDEN = {
    "sigmoid": 0.726145,
    "hinge": 1.05,
    "ipo": 26.035278,
    "exo_pair": 0.546291,
    "nca_pair": 1.402072,
    "robust": 0.732395,
    "bco_pair": 1.415976,
    "sppo_hard": 58.75,
    "aot": 0.715332,
    "aot_unpaired": 0.714917,
    "apo_zero": 1.012492,
    "apo_down": 1.008357,
    "discopop": 0.791705,
    "sigmoid_norm": 0.697983,
}
PAIRWISE = [name for name in objectives.TERMS if name not in ("sft", "kto")]


def side(logps: Any, reference: np.ndarray | None, lengths: np.ndarray, whole: Any = None) -> Side:
    logps = mx.array(logps, dtype=mx.float32)
    known = None if reference is None else mx.array(reference, dtype=mx.float32)
    return Side(logps, logps, whole, known, mx.array(lengths, dtype=mx.float32))


def quantities(chosen: Any = CHOSEN, rejected: Any = REJECTED, **more: Any) -> Quantities:
    whole = mx.array(chosen, dtype=mx.float32) + mx.array(PROMPTS, dtype=mx.float32)
    return Quantities(
        side(chosen, CHOSEN_BEFORE, CHOSEN_LENGTHS, whole),
        side(rejected, REJECTED_BEFORE, REJECTED_LENGTHS),
        kl=mx.array(KL),
        **more,
    )


def losses(name: str, found: Quantities, **options: float) -> list[mx.array]:
    """The losses of each term of an objective, with its own defaults but for `options`."""
    terms = mixture(name)
    given = terms.options | {n: v for n, v in options.items() if n in terms.options}
    return [
        term.objective(**{n: getattr(found, n) if n in NAMES else given[n] for n in parameters(term.objective)})
        for term in terms.terms
    ]


def mean(name: str, **options: float) -> float:
    (found,) = losses(name, quantities(), **options)
    return float(found.mean())


def test_every_objective_of_the_table_by_its_formula():
    for name, expected in GOLDEN.items():
        smoothing = 0.0 if name == "sigmoid" else 0.1
        assert mean(name, beta=0.1, label_smoothing=smoothing) == pytest.approx(expected, abs=2e-6 * max(1, expected))


def test_dpop_by_hand():
    # Log-ratios of chosen: 1, -1, -0.5; margins 3, -2, -2.5; the charge is 50 · (0, 1, 0.5).
    shifted = np.array([3.0, -52.0, -27.5])
    expected = np.log1p(np.exp(-0.1 * shifted)).mean()
    assert mean("dpop", beta=0.1) == pytest.approx(expected, rel=1e-6)
    assert mean("dpop", beta=0.1, dpop_lambda=0.0) == pytest.approx(GOLDEN["sigmoid"], abs=2e-6)


def test_simpo_by_hand():
    # Means per token: -2, -1.75, -2.5 against -2, -2, -13/6.
    margins = np.array([0.0, 0.25, -2.5 + 13 / 6])
    assert mean("simpo", beta=2.0, simpo_gamma=0.5) == pytest.approx(
        np.log1p(np.exp(0.5 - 2 * margins)).mean(), rel=1e-6
    )


def test_cpo_by_hand():
    contrast, likelihood = losses("cpo", quantities(), beta=0.1)
    margins = CHOSEN - REJECTED
    assert np.array(contrast) == pytest.approx(np.log1p(np.exp(-0.1 * margins)), rel=1e-6)
    assert np.array(likelihood) == pytest.approx(-CHOSEN)


def test_orpo_by_hand():
    ratio, whole = losses("orpo", quantities(), beta=0.1)
    chosen, rejected = CHOSEN / CHOSEN_LENGTHS, REJECTED / REJECTED_LENGTHS
    odds = [mean - np.log1p(-np.exp(mean)) for mean in (chosen, rejected)]
    assert np.array(ratio) == pytest.approx(0.1 * np.log1p(np.exp(odds[1] - odds[0])), rel=1e-5)
    assert np.array(whole) == pytest.approx(-(CHOSEN + PROMPTS))


def test_kto_by_hand():
    (found,) = losses("kto", quantities(), beta=0.1, undesirable_weight=1.5)
    ratios = np.concatenate([CHOSEN - CHOSEN_BEFORE, REJECTED - REJECTED_BEFORE])
    sign = np.array([1, 1, 1, -1, -1, -1])
    weight = np.where(sign > 0, 1.0, 1.5)
    expected = weight * (1 - 1 / (1 + np.exp(-0.1 * sign * (ratios - KL))))
    assert np.array(found) == pytest.approx(expected, rel=1e-6)


def test_kto_takes_thumbs_of_one_kind_alone():
    nothing = mx.zeros((0,))
    ups = objectives.kto(mx.array([1.0]), nothing, mx.array(0.0), beta=1.0)
    downs = objectives.kto(nothing, mx.array([1.0, -1.0]), mx.array(0.0), beta=1.0)
    assert ups.tolist() == pytest.approx([1 / (1 + math.e)])
    assert downs.tolist() == pytest.approx([1 / (1 + 1 / math.e), 1 / (1 + math.e)])


def test_likelihoods_are_minus_log_p():
    assert objectives.likelihood(mx.array([-3.5, -0.25])).tolist() == [3.5, 0.25]


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired", "cpo", "robust"])
def test_no_margin_costs_ln_2_whatever_beta_and_smoothing(name: str):
    even = Quantities(side(CHOSEN, CHOSEN, CHOSEN_LENGTHS), side(CHOSEN, CHOSEN, CHOSEN_LENGTHS))
    for beta in (0.01, 0.1, 2.0):
        for smoothing in (0.0, 0.1, 0.4):
            found = losses(name, even, beta=beta, label_smoothing=smoothing)[0]
            assert np.array(found) == pytest.approx(math.log(2), abs=1e-6)


def test_smoothed_sigmoid_by_hand_and_its_symmetry():
    margins = mx.array([3.0, -2.0, -2.5])
    # β·margin is 0.3: 0.9 · 0.554355 + 0.1 · 0.854355
    assert objectives.sigmoid(margins, 0.1, 0.1)[0].item() == pytest.approx(0.584355, abs=1e-6)
    assert np.array(objectives.sigmoid(margins, 0.7, 0.2)) == pytest.approx(
        np.array(objectives.sigmoid(-margins, 0.7, 0.8)), abs=1e-6
    )


def test_robust_is_unbiased_under_flips_of_its_own_rate():
    # Flipping a share ε of the labels gives, on average, the clean loss back.
    margins, rate = mx.array([3.0, -2.0, 0.7]), 0.3
    clean = objectives.sigmoid(margins, 0.5)
    mixed = (1 - rate) * objectives.robust(margins, 0.5, rate) + rate * objectives.robust(-margins, 0.5, rate)
    assert np.array(mixed) == pytest.approx(np.array(clean), rel=1e-5)


def test_exo_is_the_reverse_kl_between_two_coins():
    margin, beta, smoothing = 1.7, 0.5, 0.2
    q = 1 / (1 + math.exp(-beta * margin))
    expected = q * math.log(q / (1 - smoothing)) + (1 - q) * math.log((1 - q) / smoothing)
    assert objectives.exo_pair(mx.array([margin]), beta, smoothing).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*PAIRWISE, "kto"])
def test_gradients_are_those_of_finite_differences(name: str):
    options = {"beta": 0.3, "label_smoothing": 0.15, "dpop_lambda": 2.0}
    # Off every kink: of hinge at 1/β, of dpop where a chosen answer has lost nothing, of equal ranks.
    start = np.concatenate([CHOSEN + [0.13, -0.2, 0.31], REJECTED + [-0.17, 0.4, 0.23]])

    def total(both: mx.array) -> mx.array:
        terms = losses(name, quantities(both[:3], both[3:]), **options)
        return sum((term.sum() for term in terms), mx.array(0.0))

    gradient = np.array(mx.grad(total)(mx.array(start, dtype=mx.float32)))
    width = 0.03
    for place in range(6):
        step = np.eye(6)[place] * width
        up, down = (total(mx.array(start + s, dtype=mx.float32)).item() for s in (step, -step))
        assert gradient[place] == pytest.approx((up - down) / (2 * width), rel=0.02, abs=2e-3), place


@pytest.mark.parametrize("name", [*PAIRWISE, "kto"])
def test_far_answers_stay_finite(name: str):
    def total(both: mx.array) -> mx.array:
        terms = losses(name, quantities(both[:3], both[3:]), beta=1.0)
        return sum((term.sum() for term in terms), mx.array(0.0))

    value, gradient = mx.value_and_grad(total)(mx.array([-1e4, 0.0, -5e3, 0.0, -1e4, -5e3]))
    assert np.isfinite(np.array(value))
    assert np.isfinite(np.array(gradient)).all()


def test_discopop_is_logistic_far_below_and_exponential_far_above():
    margins = mx.array([-1e4, -200.0, -89.0, 5.0, 80.0, 1e4])
    expected = [1e4, 200.0, 89.0, math.exp(-5), math.exp(-80), 0.0]
    assert objectives.discopop(margins, 1.0).tolist() == pytest.approx(expected, rel=1e-5)
    slopes = mx.grad(lambda margin: objectives.discopop(margin, 1.0).sum())(margins)
    assert slopes.tolist() == pytest.approx([-1.0, -1.0, -1.0, -math.exp(-5), -math.exp(-80), 0.0], rel=1e-5)


def test_odds_stay_exact_for_probabilities_near_nought_and_one():
    for logp in (-40.0, -1.0, -0.5, -1e-3, -1e-6):
        p = math.exp(logp)
        ratio = objectives.odds_ratio(mx.array([logp]), mx.array([-math.log(2)]), beta=1.0)
        expected = math.log1p(math.exp(-(logp - math.log(-math.expm1(logp)))))
        assert ratio.item() == pytest.approx(expected, rel=1e-3, abs=1e-6), p


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_coupled_losses_do_not_depend_on_the_order_of_pairs(name: str):
    order = [2, 0, 1]
    turned = Quantities(
        side(CHOSEN[order], CHOSEN_BEFORE[order], CHOSEN_LENGTHS[order]),
        side(REJECTED[order], REJECTED_BEFORE[order], REJECTED_LENGTHS[order]),
    )
    (found,), (before,) = losses(name, turned), losses(name, quantities())
    assert found.mean().item() == pytest.approx(before.mean().item(), rel=1e-6)


def test_divergence_scores_are_the_derivatives_of_their_f():
    # f(t): t ln t, -ln t, t ln t - (t+1) ln((t+1)/2), and (t^α - αt - 1 + α)/(α(α-1)), up to a constant in f'.
    functions: dict[str, Any] = {
        "reverse_kl": lambda t: t * np.log(t) - t,
        "forward_kl": lambda t: t - np.log(t),
        "js_divergence": lambda t: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
        "alpha_divergence": lambda t: (t**0.3 - 0.3 * t - 1 + 0.3) / (0.3 * (0.3 - 1)),
    }
    ratios, width = np.array([0.2, 0.9, 1.0, 3.0]), 1e-5
    for name, f in functions.items():
        slope = (f(ratios + width) - f(ratios - width)) / (2 * width)
        found = divergence_score(mx.array(np.log(ratios), dtype=mx.float32), name, 0.3)  # type: ignore[arg-type]
        assert np.array(found) == pytest.approx(slope, rel=1e-4, abs=1e-5), name


def test_the_alpha_divergence_becomes_the_reverse_kl_at_one():
    ratios = mx.array([-2.0, 0.1, 3.0])
    near, at = (divergence_score(ratios, "alpha_divergence", alpha) for alpha in (1 + 1e-4, 1.0))
    assert np.array(near) == pytest.approx(np.array(at), abs=1e-3)
    assert at.tolist() == pytest.approx(ratios.tolist())


def test_every_objective_says_where_it_comes_from():
    for objective in {objective for terms in objectives.TERMS.values() for objective in terms}:
        text = inspect.getdoc(objective) or ""
        assert "arXiv:" in text or objective in (objectives.likelihood, objectives.whole_likelihood), objective


def test_the_page_of_losses_names_every_one_with_its_defaults():
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    cells = [re.split(r"(?<!\\)\|", line) for line in page.splitlines() if line.startswith("| `")]
    rows = {row[1].strip(" `"): row[3] for row in cells}
    assert list(rows) == list(objectives.TERMS)
    short = {"beta": "β", "label_smoothing": "ε", "discopop_tau": "τ", "dpop_lambda": "λ", "simpo_gamma": "γ"}
    for name, said in rows.items():
        for option, value in mixture(name).options.items():
            assert f"{short.get(option, 'weights')} {value:g}" in said, (name, option)


def test_a_mix_is_the_weighted_sum_of_its_terms():
    mixed = mixture("0.8*sigmoid + 0.2*bco_pair+1.5*sft")
    total = mixed.total(quantities(), {"beta": 0.1, "label_smoothing": 0.0})
    expected = 0.8 * GOLDEN["sigmoid"] + 0.2 * GOLDEN["bco_pair"]
    assert total.by_example.mean().item() == pytest.approx(expected, abs=3e-6)
    assert np.array(total.by_token) == pytest.approx(-1.5 * CHOSEN)


@pytest.mark.parametrize("text", ["1e-1*sigmoid+sft", "0.1*sigmoid+1.0*sft", ".1*sigmoid+sft", "1e-01 * sigmoid + sft"])
def test_weights_are_read_as_numbers_are_written(text: str):
    assert [term.weight for term in mixture(text).terms] == [pytest.approx(0.1), 1.0]


def test_the_weight_of_the_likelihood_can_be_set_apart():
    assert mixture("sigmoid", 0.5) == mixture("sigmoid+0.5*sft")
    assert mixture("sigmoid+sft", 0.0) == mixture("sigmoid")
    assert mixture("cpo").likelihood_weight == 1
    assert mixture("cpo", 0.3).likelihood_weight == 0.3


@pytest.mark.parametrize(
    "text", ["", "sigmoid+", "sigmoids", "2sigmoid", "-1*sigmoid", "0*sigmoid", "nan*sft", "kto+ipo"]
)
def test_what_is_no_loss_is_refused(text: str):
    with pytest.raises(Refusal, match="--loss"):
        mixture(text)


def test_only_losses_that_see_scores_as_a_difference_take_divergences():
    takes = {name for name in objectives.TERMS if mixture(name).preference and mixture(name).takes_divergences}
    assert takes == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


def test_losses_without_a_reference_ask_for_none():
    free = {name for name in objectives.TERMS if not mixture(name).needs_reference}
    assert free == {"simpo", "cpo", "orpo", "sft"}
