"""A judge is asked in both orders, believed by its probabilities, and not at all unless it passes its controls."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_evaluation_run import QUESTIONS, ended, options  # noqa: F401  (a fixture)

from mlx_dpo.data.asked import Asked
from mlx_dpo.data.templates import Message, prompt_ids
from mlx_dpo.evaluation.controls import controls, trust
from mlx_dpo.evaluation.judge import asking, preferences, rubric, rubric_scores
from mlx_dpo.evaluation.options import EvaluateOptions
from mlx_dpo.evaluation.verdicts import at_equal_length, judged
from mlx_dpo.evaluation.words import verdict
from mlx_dpo.models.load import load

Folder = Callable[[str], Path]
REFERENCES = [
    f"That is hard for you. She can read a board with {i} words on it. You should rest while she sleeps. Call me {i}."
    for i in range(30)
]
ASKED = [
    Asked((Message(role="user", content=f"What can I do for her in week {i}?"),), text, f"row {i}")
    for i, text in enumerate(REFERENCES)
]


def parts(prompt: str) -> tuple[str, str]:
    _, _, rest = prompt.partition("Answer A:\n")
    first, _, rest = rest.partition("\n\nAnswer B:\n")
    return first, rest.rpartition("\n\nWhich answer")[0]


def reference_of(prompt: str) -> str:
    return REFERENCES[int(prompt.partition(" in week ")[2].partition("?")[0])]


def knowing(prompts: Sequence[str], both: tuple[str, str]) -> np.ndarray:
    """A judge that knows the references by heart."""
    if both == ("Yes", "No"):
        return np.tile([0.9, 0.05], (len(prompts), 1))
    right = [parts(prompt)[0] == reference_of(prompt) for prompt in prompts]
    return np.where(np.array(right)[:, None], [0.8, 0.1], [0.1, 0.8])


def always_first(prompts: Sequence[str], both: tuple[str, str]) -> np.ndarray:
    return np.tile([0.9, 0.05], (len(prompts), 1))


def babbling(prompts: Sequence[str], both: tuple[str, str]) -> np.ndarray:
    return 0.1 * knowing(prompts, both)


def easily_fooled(prompts: Sequence[str], both: tuple[str, str]) -> np.ndarray:
    """Prefers the worse of two answers that begin alike."""
    right = []
    for prompt in prompts:
        first, second = parts(prompt)
        right.append((first == reference_of(prompt)) == (first[:60] != second[:60]))
    return np.where(np.array(right)[:, None], [0.7, 0.2], [0.2, 0.7])


@pytest.mark.parametrize(
    ("ask", "reasons"),
    [
        (knowing, ()),
        (
            always_first,
            ("order consistency is 0.00", "accuracy on easy pairs is 0.00", "accuracy on hard pairs is 0.00"),
        ),
        (babbling, ("probability mass is 0.09",)),
        (easily_fooled, ("accuracy on hard pairs",)),
    ],
)
def test_a_judge_is_believed_only_after_its_controls(ask: Any, reasons: tuple[str, ...]):
    made = list(controls([a.question for a in ASKED], REFERENCES))
    assert {control.kind for control in made} == {"another question's answer", "chimera", "planted error", "truncation"}
    assert all(control.better in REFERENCES and control.worse not in (control.better, "") for control in made)
    found = trust(ask, made).reasons
    assert len(found) == len(reasons)
    assert all(reason.startswith(start) for reason, start in zip(found, reasons, strict=True))


def test_what_a_failed_judge_says_is_left_out_and_the_reason_is_told():
    answers = {"base": ["No."] * 30, "tuned": REFERENCES}
    found = judged(always_first, ASKED, answers, 0)
    assert "wins" not in found
    assert verdict({"judge": found})[0].startswith(
        "The judge's numbers are withheld, since its order consistency is 0.00"
    )


def test_a_judge_that_passes_gives_win_rates_in_both_orders():
    answers = {"base": ["No. Go."] * 30, "tuned": REFERENCES}
    found = judged(knowing, ASKED, answers, 0)
    (win,) = found["wins"]
    assert win["raw"] == 1.0
    assert win["balanced"]["mean"] == pytest.approx(0.8 / 0.9)
    assert win["order_consistency"] == 1.0
    assert found["systems"]["tuned"]["claims_covered"]["mean"] == pytest.approx(0.9 / 0.95)
    assert any("preferred 89%" in line for line in verdict({"judge": found}))


def test_a_preference_for_length_alone_is_none_at_equal_length():
    random = np.random.default_rng(0)
    longer = random.normal(30, 40, 400)
    chances = 1 / (1 + np.exp(-longer / 40))
    assert chances.mean() > 0.6
    assert at_equal_length(chances, longer) == pytest.approx(0.5, abs=0.01)
    assert at_equal_length(np.full(50, 0.7), np.zeros(50)) == pytest.approx(0.7, abs=0.01)


def test_exchanging_the_answers_exchanges_the_preference():
    found = preferences(knowing, [ASKED[0].question] * 2, [REFERENCES[0], "x"], ["x", REFERENCES[0]])
    assert found.balanced.tolist() == pytest.approx([0.8 / 0.9, 0.1 / 0.9])
    assert found.mass == pytest.approx(np.full((2, 2), 0.9))


def test_a_rubric_is_its_expected_points():
    most = sum(c.points for c in rubric() if c.points > 0)
    every = sum(c.points for c in rubric())
    assert rubric_scores(knowing, ["q"], ["a"]).tolist() == pytest.approx([0.9 / 0.95 * every / most])


def test_a_local_model_is_asked_by_its_first_token(tiny_folder: Folder):
    loaded = load(tiny_folder("llama"))
    prompts = [f"Yes or no, {'again ' * i}?" for i in range(11)]
    found = asking(loaded)(prompts, ("A", "B"))
    for prompt, chances in zip(prompts, found, strict=True):
        ids = prompt_ids(loaded.tokenizer, [Message(role="user", content=prompt)])
        every = np.array(mx.softmax(loaded.model(mx.array([ids]))[0, -1].astype(mx.float32)))
        tokens = [{loaded.tokenizer.encode(w, add_special_tokens=False)[0] for w in (x, x.lower())} for x in "AB"]
        for chance, own in zip(chances, tokens, strict=True):
            assert chance >= sum(every[token] for token in own) - 1e-6
        assert chances.sum() < 1


def test_a_random_model_s_numbers_are_withheld_in_the_report(options: EvaluateOptions):  # noqa: F811
    found = ended(replace(options, judge=options.model, adapter=()))
    assert found["judge"]["withheld"]
    assert "wins" not in found["judge"]
    assert "withheld" in (options.out / "report.html").read_text()
    assert len(QUESTIONS) == 14
