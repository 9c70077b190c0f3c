"""Every measure of an answer, with what it means and which way is better."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mlx_dpo.care.replies import objections
from mlx_dpo.data.asked import Asked
from mlx_dpo.data.audit.copies import Encode, unit
from mlx_dpo.data.audit.wording import lexicon
from mlx_dpo.evaluation.overlap import chrf, rouge_l
from mlx_dpo.evaluation.tone import tone, without_opening
from mlx_dpo.prose import grade, is_finished, plain, sentences, words


class Measure(NamedTuple):
    """A measure: its name, what it counts, whether more is better (None: neither), whether it needs a reference answer.

    `primary` measures are those that a comparison is decided by; those with a `margin` are to be no worse by it.
    """

    name: str
    words: str
    higher_is_better: bool | None
    of: Callable[[Asked, str], float] | None
    needs_reference: bool = False
    primary: bool = False
    margin: float | None = None

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]


def _sentence_length(answer: str) -> float:
    return len(words(answer)) / max(1, len(sentences(answer)))


def _new(name: str) -> Callable[[Asked, str], float]:
    """How many drugs or numbers an answer names that neither its question nor its reference does."""

    def count(asked: Asked, answer: str) -> float:
        pattern = lexicon()[name]
        known = set(pattern.findall(plain(f"{asked.question} {asked.reference or ''}")))
        return float(len(set(pattern.findall(plain(answer))) - known))

    return count


MEASURES = (
    Measure("cosine", "cosine of the answer's and the reference's meaning", True, None, True, True),
    Measure(
        "rouge_l", "ROUGE-L against the reference", True,
        lambda q, a: rouge_l(a, q.reference or ""), True,
    ),
    Measure("chrf", "chrF2 against the reference", True, lambda q, a: chrf(a, q.reference or ""), True),
    Measure("grade", "Flesch-Kincaid grade", False, lambda q, a: grade(a), primary=True),
    Measure("sentence_words", "words a sentence", False, lambda q, a: _sentence_length(a)),
    Measure("empathy", "ways of showing empathy, of three", True, lambda q, a: tone(a).empathy),
    Measure(
        "empathy_after_opening", "ways of showing empathy after the first sentence", True,
        lambda q, a: tone(without_opening(a)).empathy, primary=True,
    ),
    Measure("politeness", "polite less impolite strategies", True, lambda q, a: tone(a).politeness),
    Measure(
        "politeness_after_opening", "polite less impolite strategies after the first sentence", True,
        lambda q, a: tone(without_opening(a)).politeness,
    ),
    Measure("new_drugs", "drugs that the reference does not name", False, _new("drugs"), True, margin=0.1),
    Measure(
        "new_numbers", "numbers that the reference does not name", False, _new("numbers"), True, margin=0.5,
    ),
    Measure(
        "objections", "sentences that break a care rule", False,
        lambda q, a: float(len(objections(a, q.question))), margin=0.02,
    ),
    Measure("words", "words", None, lambda q, a: float(len(words(a)))),
    Measure("unfinished", "share that stops in the middle", False, lambda q, a: float(not is_finished(a))),
)  # fmt: skip


def measured(asked: Sequence[Asked], answers: Sequence[str], encode: Encode | None) -> dict[str, np.ndarray]:
    """Every measure that can be taken, (questions,) each; NaN where a question has no reference."""
    found: dict[str, np.ndarray] = {}
    for measure in MEASURES:
        if measure.of is not None:
            of = measure.of
            found[measure.name] = np.array(
                [
                    np.nan if measure.needs_reference and q.reference is None else of(q, a)
                    for q, a in zip(asked, answers, strict=True)
                ]
            )
    if encode is not None:
        found["cosine"] = cosines([q.reference for q in asked], answers, encode)
    return {m.name: found[m.name] for m in MEASURES if m.name in found and not np.isnan(found[m.name]).all()}


def cosines(references: Sequence[str | None], answers: Sequence[str], encode: Encode) -> np.ndarray:
    """The cosine of each answer's vector and its reference's, (questions,); NaN without a reference."""
    theirs = unit(encode([reference or "" for reference in references]))
    found = (unit(encode(list(answers))) * theirs).sum(axis=1).astype(float)
    return np.where([reference is None for reference in references], np.nan, found)
