"""A model as a judge, asked for one letter or one word, and believed by the probabilities of that first token."""

import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.data.templates import Message, prompt_ids
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded
from mlx_dpo.models.rows import rows_of
from mlx_dpo.refusal import Refusal

_RUBRIC = Path(__file__).with_name("rubric.toml")
_AT_ONCE = 8
_PAIR = (
    "A person who looks after a family member asked:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    "Which answer is more helpful: kind, correct and easy to follow? Reply with one letter, A or B."
)
_SINGLE = (
    "A person who looks after a family member asked:\n{question}\n\nThe answer was:\n{answer}\n\n{asks} "
    "Reply with one word, Yes or No."
)
_CLAIM = (
    "Text:\n{text}\n\nStatement:\n{claim}\n\nDoes the text say what the statement says? Reply with one word, Yes or No."
)

# (prompts, the two words) to the probabilities of each word as the first token, (prompts, 2).
Ask = Callable[[Sequence[str], tuple[str, str]], np.ndarray]


class Criterion(NamedTuple):
    """A question of the rubric, and the points that a yes is worth."""

    id: str
    points: float
    asks: str


class Preferences(NamedTuple):
    """P(first is preferred) of pairs as given and exchanged, (pairs,) each; the mass on A and B, (pairs, 2)."""

    straight: np.ndarray
    exchanged: np.ndarray
    mass: np.ndarray

    @property
    def balanced(self) -> np.ndarray:
        """The mean over both orders, (pairs,)."""
        return (self.straight + self.exchanged) / 2

    @property
    def consistency(self) -> float:
        """The share of pairs in which both orders prefer the same answer."""
        return float(((self.straight > 0.5) == (self.exchanged > 0.5)).mean())


def asking(loaded: Loaded) -> Ask:
    """Ask a local model, in float32 from the head on; raises Refusal where the two words begin with the same token."""
    forward = Forward.of(loaded.model)
    loaded.model.eval()

    def ask(prompts: Sequence[str], both: tuple[str, str]) -> np.ndarray:
        ids = [_first_tokens(loaded, word) for word in both]
        if ids[0] & ids[1]:
            raise Refusal(f"The judge's tokenizer begins {both[0]} and {both[1]} alike: use another model as judge.")
        given = [prompt_ids(loaded.tokenizer, [Message(role="user", content=prompt)]) for prompt in prompts]
        order, found = sorted(range(len(given)), key=lambda i: len(given[i])), np.zeros((len(given), 2))
        for first in range(0, len(order), _AT_ONCE):
            some = order[first : first + _AT_ONCE]
            log_p = forward.log_p(rows_of([(given[i], [min(ids[0])]) for i in some]))
            chances = mx.stack([mx.exp(log_p[:, mx.array(sorted(one))]).sum(axis=1) for one in ids], axis=1)
            found[some] = np.array(chances)
            mx.clear_cache()
        return found

    return ask


def _first_tokens(loaded: Loaded, word: str) -> set[int]:
    spellings = [word, f" {word}", word.upper(), f" {word.upper()}", word.lower(), f" {word.lower()}"]
    encoded = [loaded.tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
    return {ids[0] for ids in encoded if len(ids) == 1} or {encoded[0][0]}


def preferences(ask: Ask, questions: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Preferences:
    """Which of two answers is preferred, question by question, asked in both orders."""
    shares, masses = [], []
    for left, right in ((firsts, seconds), (seconds, firsts)):
        prompts = [_PAIR.format(question=q, first=a, second=b) for q, a, b in zip(questions, left, right, strict=True)]
        chances = ask(prompts, ("A", "B"))
        masses.append(chances.sum(axis=1))
        shares.append(_share(chances))
    return Preferences(shares[0], 1 - shares[1], np.stack(masses, axis=1))


def rubric_scores(ask: Ask, questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The expected points of each answer over the most that there are, (questions,), from -∞ to 1."""
    total = np.zeros(len(questions))
    for criterion in rubric():
        prompts = [
            _SINGLE.format(question=q, answer=a, asks=criterion.asks) for q, a in zip(questions, answers, strict=True)
        ]
        total += criterion.points * _yes(ask, prompts)
    return total / sum(criterion.points for criterion in rubric() if criterion.points > 0)


def said_in(ask: Ask, texts: Sequence[str], claims: Sequence[str]) -> np.ndarray:
    """P(yes) that each text says its claim, (texts,)."""
    return _yes(ask, [_CLAIM.format(text=text, claim=claim) for text, claim in zip(texts, claims, strict=True)])


def _yes(ask: Ask, prompts: Sequence[str]) -> np.ndarray:
    return _share(ask(prompts, ("Yes", "No")))


def _share(chances: np.ndarray) -> np.ndarray:
    """The first word's part of the mass on both, (prompts,)."""
    return chances[:, 0] / np.maximum(chances.sum(axis=1), 1e-12)


@cache
def rubric() -> tuple[Criterion, ...]:
    """The criteria of rubric.toml."""
    entries = tomllib.loads(_RUBRIC.read_text(encoding="utf-8"))["criterion"]
    return tuple(Criterion(entry["id"], float(entry["points"]), entry["asks"]) for entry in entries)
