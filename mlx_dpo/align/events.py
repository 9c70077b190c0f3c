"""What a run tells while it goes; the console prints it, a library caller reads it."""

from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.align.monitor import Finding
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


class Stage(NamedTuple):
    """One stage of several begins."""

    number: int
    stages: int
    method: str


class Stepped(NamedTuple):
    """A step was taken: its row of metrics.jsonl, and how many steps there are."""

    numbers: dict[str, Any]
    steps: int


class Warned(NamedTuple):
    """The monitor found something wrong at a step."""

    step: int
    finding: Finding


class Evaluated(NamedTuple):
    """Held-out pairs were scored and questions answered: the row of metrics.jsonl."""

    numbers: dict[str, Any]


class Interrupted(NamedTuple):
    """The run was stopped; everything is saved and `command` goes on."""

    steps_done: int
    command: str


class Finished(NamedTuple):
    """The adapter and its report are written."""

    out: Path
    report: Path
    scores: dict[str, Any]
    samples: list[Sample]
    seconds: float


Event = Phase | Note | Planned | Stage | Stepped | Warned | Evaluated | Interrupted | Finished
