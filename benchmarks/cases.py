"""What is compared: the cases, who runs in each, and what is aimed at."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers.job import BATCH, Job, Result

OURS, LORA, TRL, TRL_LIVE = "mlx_dpo", "mlx-lm-lora", "TRL", "TRL, reference in each step"
PEERS = (LORA, TRL)
PROGRAMS = {OURS: "ours", LORA: "mlx_lm_lora", TRL: "pytorch", TRL_LIVE: "pytorch"}
ANSWERS = "answers"


class Case(NamedTuple):
    """A comparison of the same training steps.

    `others` are the peers' runs; ours gives both the steps' time and the epoch's with the reference. `layers` is how
    many blocks from the top have adapters (None: all).
    """

    name: str
    others: tuple[str, ...]
    words: str
    is_long: bool = False
    layers: int | None = None
    grad_checkpoint: bool = False

    def steps(self, wanted: int) -> int:
        """Timed steps; long prompts need no more than half of them to take as long."""
        return max(1, wanted // 2) if self.is_long else wanted

    @property
    def warmup(self) -> int:
        """Steps before those that are timed; none where only memory is looked at."""
        return 0 if self.grad_checkpoint else 1


CASES = (
    Case("short", (LORA, TRL, TRL_LIVE), "the pairs as they are"),
    Case("top8", (LORA, TRL), "adapters on the top 8 blocks", layers=8),
    Case("memory", (LORA, TRL), "gradient checkpointing", grad_checkpoint=True),
    Case("long", (LORA, TRL, TRL_LIVE), "600-token shared prompt", is_long=True),
)


class Row(NamedTuple):
    """A row of the table: whose numbers of which case, and the ratios aimed at.

    `what` is a number of `Result`: seconds (a step's, reference cached), epoch_seconds (reference included) or a peak
    of memory. For times the ratio is other/ours and has to be at least the aim, for memory ours/other and at most.
    """

    words: str
    case: str
    what: str
    others: tuple[str, str]
    aims: tuple[float, float]

    @property
    def is_memory(self) -> bool:
        """Whether the row is one of memory."""
        return self.what.endswith("_peak")


_CACHED, _LIVE = (LORA, TRL), (LORA, TRL_LIVE)
ROWS = (
    Row("a step, reference cached", "short", "seconds", _CACHED, (3, 2)),
    Row("an epoch, reference included", "short", "epoch_seconds", _LIVE, (2, 1.5)),
    Row("600-token prompt: a step, reference cached", "long", "seconds", _CACHED, (4, 3)),
    Row("600-token prompt: an epoch, reference included", "long", "epoch_seconds", _LIVE, (4, 3)),
    Row("adapters on the top 8 blocks: a step, reference cached", "top8", "seconds", _CACHED, (5, 4)),
    Row("peak resident memory", "short", "resident_peak", _CACHED, (1 / 2, 1 / 2)),
    Row("peak resident memory, gradient checkpointing", "memory", "resident_peak", _CACHED, (1 / 4, 1 / 4)),
    Row("peak of the GPU's memory", "short", "device_peak", _CACHED, (1 / 2, 1 / 2)),
    Row("peak of the GPU's memory, gradient checkpointing", "memory", "device_peak", _CACHED, (1 / 4, 1 / 4)),
)


def value(result: Result, row: Row) -> float | None:
    """A result's number for a row: pairs a second, or GB; None where it has none."""
    number = getattr(result, row.what)
    if row.is_memory:
        return number / 1e9 if number else None
    seconds = sum(number) if isinstance(number, list) else number
    return len(result.seconds) * BATCH / seconds if seconds else None


class Setting(NamedTuple):
    """What all runs of a comparison share: the model folder, where it runs, and the pairs short and long."""

    model: Path
    on_gpu: bool
    threads: int
    short: Sequence[dict[str, str]]
    long: Sequence[dict[str, str]]
    steps: int


def pairs_of(case: Case, setting: Setting) -> list[dict[str, str]]:
    """The pairs of a case, batch by batch, those of the warm-up first."""
    first, count = case.warmup * BATCH, (case.warmup + case.steps(setting.steps)) * BATCH
    rows = setting.long if case.is_long else setting.short
    # On the CPU a short warm-up does what a long one would, in a fifth of the time.
    warm = rows if setting.on_gpu else setting.short
    return [*warm[:first], *rows[first:count]]


def write_job(case: Case, contestant: str, setting: Setting, folder: Path) -> Path:
    """Write a contestant's job and its pairs into a new folder below `folder`, and return the job's file."""
    place = Path(tempfile.mkdtemp(dir=folder))
    pairs = place / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in pairs_of(case, setting)), encoding="utf-8")
    (place / "scratch").mkdir()
    job = Job(
        model=str(setting.model),
        pairs=str(pairs),
        scratch=str(place / "scratch"),
        on_gpu=setting.on_gpu,
        threads=setting.threads,
        steps=case.steps(setting.steps),
        warmup=case.warmup,
        cached=contestant != TRL_LIVE,
        layers=case.layers,
        grad_checkpoint=case.grad_checkpoint,
    )
    file = place / "job.json"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    return file
