"""What an audit found: one finding a check, with its figures and the rows that show it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "warn", "fail"]
SHOWN = 5  # examples of a finding


class Shown(NamedTuple):
    """A row that shows a finding, and the words in it."""

    source: str
    text: str


class Finding(NamedTuple):
    """What a check found, in a sentence; `numbers` are its figures, shares from 0 to 1."""

    check: str
    level: Level
    sentence: str
    numbers: dict[str, float]
    examples: tuple[Shown, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The finding as one JSON object."""
        return self._asdict() | {"examples": [shown._asdict() for shown in self.examples]}


class Subject(NamedTuple):
    """What is audited, row by row: the question, both answers, and where they stood."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    sources: list[str]

    def shown(self, rows: Sequence[int], texts: Sequence[str]) -> tuple[Shown, ...]:
        """The first few of some rows, with what they say in `texts`."""
        return tuple(Shown(self.sources[i], texts[i]) for i in list(rows)[:SHOWN])


def level(value: float, warn: float, fail: float | None = None) -> Level:
    """How grave a share is that should be low."""
    if fail is not None and value > fail:
        return "fail"
    return "warn" if value > warn else "ok"
