"""The job that each contestant is given, and what it answers: one JSON object each.

Runs in every contestant's own environment, so it needs nothing but Python itself.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BATCH, RANK, ALPHA, BETA, RATE = 4, 8, 16, 0.1, 1e-4
TOKENS, TURNS, AROUND = 48, 50, 3  # of a whole answer, of a conversation, and turns in its median


@dataclass(frozen=True)
class Job:
    """Train on the pairs in their order, BATCH a step; the first `warmup` steps are not timed.

    `pairs` is a JSONL file of prompt, chosen and rejected texts, one batch a step. `cached` asks for the reference's
    numbers to be computed before the steps, `layers` for adapters on so many blocks from the top (None: on all).
    `scratch` is a folder to write into. The model computes in bfloat16 on a GPU and in float32 on the CPU.
    """

    model: str
    pairs: str
    scratch: str
    on_gpu: bool
    threads: int
    steps: int
    warmup: int = 1
    cached: bool = True
    layers: int | None = None
    grad_checkpoint: bool = False

    def rows(self) -> list[dict[str, str]]:
        """The pairs of all steps."""
        return [json.loads(line) for line in Path(self.pairs).read_text(encoding="utf-8").splitlines()]


@dataclass
class Result:
    """What a contestant measured.

    `seconds` holds each timed step; `epoch_seconds` the same pairs with the reference scored, None where it was cached.
    `losses`, `chosen` and `rejected` (a batch's mean log-probability of an answer, in nats) have one number a step,
    warm-up included. Memory in bytes; `device_peak` is None on the CPU.
    """

    seconds: list[float] = field(default_factory=list)
    epoch_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    resident_peak: int = 0
    device_peak: int | None = None
    versions: str = ""

    def print(self) -> None:
        """Print the result as the last line of the output, where the comparison looks for it."""
        print(json.dumps(asdict(self)), flush=True)


def given_job() -> Job:
    """The job in the file that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def resident_peak() -> int:
    """The most memory that this process has held in RAM so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Watch:
    """Takes the time at the end of each step, and the memory at the end of the last."""

    def __init__(self, job: Job, result: Result, device_peak: Callable[[], Any]):
        """Begin before the first step."""
        self.job, self.result, self.device_peak = job, result, device_peak
        self.done = 0
        self.last = time.perf_counter()

    def step_ended(self) -> None:
        """Note a step, whose work the device has finished."""
        now = time.perf_counter()
        self.done += 1
        if self.done > self.job.warmup:
            self.result.seconds.append(now - self.last)
        self.last = now
        if self.done == self.job.warmup + self.job.steps:
            self.result.resident_peak = resident_peak()
            self.result.device_peak = self.device_peak() if self.job.on_gpu else None
