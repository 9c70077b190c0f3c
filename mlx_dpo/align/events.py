"""What a run tells while it goes; the console prints it, a library caller reads it."""

from pathlib import Path
from typing import NamedTuple

from mlx_dpo.align.plan import Plan
from mlx_dpo.align.report import Sample


class Phase(NamedTuple):
    """A part of the run that takes a while, and how far it has come."""

    name: str
    done: int
    total: int


class Note(NamedTuple):
    """Something that the user should read."""

    text: str


class Planned(NamedTuple):
    """What is going to happen."""

    plan: Plan


class Stepped(NamedTuple):
    """A step was taken: its row of metrics.jsonl, and how many steps there are."""

    numbers: dict[str, float]
    steps: int


class Evaluated(NamedTuple):
    """Held-out pairs were scored: the row of metrics.jsonl."""

    numbers: dict[str, float]


class Interrupted(NamedTuple):
    """The run was stopped; everything is saved and `command` goes on."""

    steps_done: int
    command: str


class Finished(NamedTuple):
    """The adapter and its report are written."""

    out: Path
    report: Path
    scores: dict[str, float]
    samples: list[Sample]
    seconds: float


Event = Phase | Note | Planned | Stepped | Evaluated | Interrupted | Finished
