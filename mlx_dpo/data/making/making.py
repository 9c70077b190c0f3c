"""Pairs made from questions: the same facts told in two voices, several times each, and the best matched pair kept."""

import hashlib
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.care.replies import objections
from mlx_dpo.data.asked import hash_of
from mlx_dpo.data.audit.mending import without_last
from mlx_dpo.data.examples import Turns
from mlx_dpo.data.making.errors import with_error
from mlx_dpo.data.making.kinds import KINDS, Kind
from mlx_dpo.data.templates import Message, instructed, prompt_ids
from mlx_dpo.journal import Journal
from mlx_dpo.models.answers import drawn_answers
from mlx_dpo.models.load import Loaded
from mlx_dpo.prose import is_finished, words
from mlx_dpo.refusal import Refusal

_WRITERS = Path(__file__).with_name("writers.toml")
_VOICES = ("supportive", "prescriptive")
_LEAST_WORDS = 12


@dataclass(frozen=True)
class Making:
    """How pairs are made: candidates a voice, the longest answer in tokens, how freely they are drawn, of what kinds.

    `tone` is supportive against prescriptive; `planted-error` the supportive answer against itself with a mistake.
    """

    candidates: int = 3
    max_tokens: int = 200
    temperature: float = 0.8
    batch_size: int = 8
    seed: int = 0
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name, least in (("candidates", 1), ("max_tokens", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise Refusal(f"--{flag} {getattr(self, name)} makes no sense: give {least} or more.")
        if not 0 <= self.temperature <= 2:
            raise Refusal(f"--temperature {self.temperature} makes no sense: choose a number from 0 to 2.")


class Progress(NamedTuple):
    """How many of the questions are done."""

    done: int
    total: int


def identity(questions: Sequence[Turns], making: Making, model: list[str]) -> dict[str, Any]:
    """What makes the work on some questions the same work; `model` are the hashes of its weights."""
    return {
        "questions": hash_of(questions),
        "model": model,
        "making": asdict(making) | {"kinds": list(making.kinds)},
        "writers": writers(),
    }


def made(loaded: Loaded, questions: Sequence[Turns], journal: Journal, making: Making) -> Iterator[Progress]:
    """Make the pairs of all questions that the journal lacks, batch by batch: a row a question, with pairs or why none.

    The journal's row has `pairs` (prompt, chosen, rejected, kind), `facts` and `why` (None where there are pairs).
    """
    size = making.batch_size
    if len(journal.rows) < len(questions):
        journal.cut_to(len(journal.rows) // size * size)  # always the same batches
    yield Progress(len(journal.rows), len(questions))
    for first in range(len(journal.rows), len(questions), size):
        journal.add(_rows(loaded, questions[first : first + size], first, making))
        yield Progress(len(journal.rows), len(questions))


def _rows(loaded: Loaded, questions: Sequence[Turns], first: int, making: Making) -> list[dict[str, Any]]:
    facts = _drawn(loaded, [instructed(q, writers()["facts"]) for q in questions], making, (first, 0), temperature=0.0)
    voices = []
    for number, voice in enumerate(_VOICES):
        prompts = [
            instructed(question, writers()[voice].format(facts=" ".join(fact.split())))
            for question, fact in zip(questions, facts, strict=True)
            for _ in range(making.candidates)
        ]
        texts = _drawn(loaded, prompts, making, (first, number + 1), temperature=making.temperature)
        voices.append([texts[i : i + making.candidates] for i in range(0, len(texts), making.candidates)])
    return [
        _row(question, fact, warm, cold, making)
        for question, fact, warm, cold in zip(questions, facts, *voices, strict=True)
    ]


def _row(question: Turns, facts: str, supportive: list[str], prescriptive: list[str], making: Making) -> dict[str, Any]:
    asked = question[-1]["content"]
    warm, cold = (
        [text for text in map(_whole, texts) if _is_usable(text, asked)] for texts in (supportive, prescriptive)
    )
    both = [(a, b) for a in warm for b in cold if a != b]
    pairs = []
    if both and "tone" in making.kinds:
        chosen, rejected = min(both, key=lambda pair: abs(math.log(len(words(pair[0])) / len(words(pair[1])))))
        pairs.append({"chosen": chosen, "rejected": rejected, "kind": "tone"})
    if warm and "planted-error" in making.kinds and (wrong := with_error(warm[0])) != warm[0]:
        pairs.append({"chosen": warm[0], "rejected": wrong, "kind": "planted-error"})
    why = None if pairs else "no answer was whole, long enough and within the care rules"
    prompt = asked if len(question) == 1 else list(question)
    return {"pairs": [{"prompt": prompt} | pair for pair in pairs], "facts": facts, "why": why}


def _drawn(
    loaded: Loaded, prompts: list[list[Message]], making: Making, place: tuple[int, int], temperature: float
) -> list[str]:
    """Answers that depend on the seed and the place in the work alone, so that a resumed run draws the same."""
    seed = int(hashlib.sha256(repr((making.seed, *place)).encode()).hexdigest()[:8], 16)
    ids = [prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    found = drawn_answers(loaded, ids, making.max_tokens, temperature=temperature, seed=seed)
    return [answer.text.removesuffix(" …") for answer in found]


def _whole(text: str) -> str:
    return text if is_finished(text) else without_last(text)


def _is_usable(text: str, question: str) -> bool:
    return is_finished(text) and len(words(text)) >= _LEAST_WORDS and not objections(text, question)


@cache
def writers() -> dict[str, str]:
    """What the model is told, by voice."""
    table = tomllib.loads(_WRITERS.read_text(encoding="utf-8"))
    return {name: " ".join(text.split()) for name, text in table.items()}
