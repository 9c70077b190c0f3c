"""Empathy and politeness by words that can be pointed at: each point of a score names the strategy that gave it."""

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.data.audit.wording import lexicon
from mlx_dpo.prose import either, plain, sentences

_LISTS = Path(__file__).with_name("tone.toml")


class Tone(NamedTuple):
    """Strategies that were found in a text: those of empathy, polite ones, impolite ones."""

    empathic: tuple[str, ...]
    polite: tuple[str, ...]
    impolite: tuple[str, ...]

    @property
    def empathy(self) -> float:
        """The share of EPITOME's three ways that is there, from 0 to 1."""
        return len(self.empathic) / len(_lists()["empathy"])

    @property
    def politeness(self) -> float:
        """The share of polite strategies that is there, less that of impolite ones, from -1 to 1."""
        return len(self.polite) / len(_lists()["polite"]) - len(self.impolite) / (len(_lists()["impolite"]) + 1)


def tone(text: str) -> Tone:
    """The strategies in a text."""
    said = plain(text)
    found = {
        name: tuple(strategy for strategy, pattern in patterns.items() if pattern.search(said))
        for name, patterns in _lists().items()
    }
    hostile = ("insult",) if lexicon()["hostile"].search(said) else ()
    return Tone(found["empathy"], found["polite"], (*found["impolite"], *hostile))


def without_opening(text: str) -> str:
    """A text without its first sentence, in which a learnt phrase may stand for the whole."""
    parts = sentences(text)
    return " ".join(parts[1:])


@cache
def _lists() -> dict[str, dict[str, re.Pattern[str]]]:
    table = tomllib.loads(_LISTS.read_text(encoding="utf-8"))
    return {name: {strategy: either(texts) for strategy, texts in group.items()} for name, group in table.items()}
