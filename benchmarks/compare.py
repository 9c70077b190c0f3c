"""Compare mlx_dpo with mlx-lm-lora and TRL on the same pairs and write RESULTS.md: `make bench`.

Each contestant runs in a process of its own, one after the other, round after round; ratios are taken within a round,
so that a machine whose speed drifts does not decide. The first round has every case; a later one has those that still
fit into --minutes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx_dpo  # noqa: F401  # ahead of MLX

# isort: split
import mlx.core as mx
from transformers import AutoTokenizer

from benchmarks import pairs, results
from benchmarks.cases import ANSWERS, CASES, LORA, OURS, PEERS, PROGRAMS, TRL, Case, Setting, write_job
from benchmarks.environments import HOME, ROOT, interpreter, variables
from benchmarks.peers.job import BATCH, Result
from mlx_dpo.demo import PAIRS

_PAPER = ROOT.parent / "shared" / "data" / "empathy-by-design" / "pairs.jsonl"
_QUICK = ["short", "memory", ANSWERS]
_LONGEST = 3600  # seconds that one process may take


class Failed(Exception):
    """A contestant's process ended without a result; the text is the last line that it wrote."""


class Bench(NamedTuple):
    """All that the processes need, and where they may write."""

    setting: Setting
    scratch: Path

    def call(self, program: str, *arguments: str, contestant: str = OURS) -> Any:
        """Run a program of `peers/` and return the JSON of its last line; raises Failed."""
        python = interpreter(contestant, on_gpu=self.setting.on_gpu)
        done = subprocess.run(
            [str(python), "-m", f"benchmarks.peers.{program}", *arguments],
            cwd=ROOT,
            env=variables(self.setting.threads, self.scratch),
            capture_output=True,
            text=True,
            timeout=_LONGEST,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines or not lines[-1].startswith("{"):
            raise Failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        return json.loads(lines[-1])

    def run(self, case: Case, contestant: str) -> Result:
        """One contestant on one case; raises Failed."""
        job = write_job(case, contestant, self.setting, self.scratch)
        return Result(**self.call(PROGRAMS[contestant], str(job), contestant=contestant))


def measured(bench: Bench, options: argparse.Namespace) -> Iterator[results.Measured]:
    """Go through the rounds and give all that is measured so far after each case, and after the answers."""
    device = "gpu" if bench.setting.on_gpu else "cpu"
    found = results.Measured([], {case.name: [] for case in CASES}, {}, None)
    begun, took = time.monotonic(), dict[str, float]()
    for number in range(options.rounds):
        if number and not any(_fits(case, took, begun, options) for case in CASES):
            break
        found.limits.append(bench.call("limit", device))
        for case in CASES:
            if case.name not in options.cases or (number and not _fits(case, took, begun, options)):
                continue
            started = time.monotonic()
            found.rounds[case.name].append(_round(bench, case, options.peers, found.failures))
            took[case.name] = time.monotonic() - started
            yield found
    if ANSWERS in options.cases:
        _say("answers in a chat")
        answers = bench.call("answers", str(bench.setting.model), device, str(max(3, options.rounds)))
        yield found._replace(answers=answers)


def _fits(case: Case, took: dict[str, float], begun: float, options: argparse.Namespace) -> bool:
    # Memory hardly differs from round to round.
    if case.name not in took or case.grad_checkpoint:
        return False
    return time.monotonic() - begun + took[case.name] < 60 * options.minutes


def _round(bench: Bench, case: Case, peers: list[str], failures: dict[str, str]) -> dict[str, Result]:
    """Each contestant once, ours first."""
    done = {}
    for contestant in (OURS, *(other for other in case.others if other.split(",")[0] in peers)):
        try:
            done[contestant] = bench.run(case, contestant)
        except (Failed, subprocess.TimeoutExpired) as fault:
            failures[f"{contestant}, {case.words}"] = str(fault)
            _say(f"{case.name}: {contestant} failed: {fault}")
            continue
        seconds = ", ".join(f"{value:.2f}" for value in done[contestant].seconds)
        _say(f"{case.name}: {contestant}: steps of {seconds} s")
    return done


def same_weights(model: Path, kind: str, bench: Bench, *, with_torch: bool) -> Path:
    """The folder with the model's weights unpacked, which all contestants read; PyTorch checks its logits."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    folder = HOME / f"weights-{digest.hexdigest()[:12]}-{kind}"
    if not folder.exists():
        bench.call("weights", str(model), str(folder), kind)
    if with_torch:
        apart = bench.call("weights", str(model), str(folder), "check", contestant=TRL)["apart"]
        _say(f"logits of PyTorch and MLX differ by at most {apart:.1g}")
    return folder


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="most rounds [3]")
    parser.add_argument("--minutes", type=float, default=40, help="a further round ends within these [40]")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round, half of it with long prompts [2]")
    every = [case.name for case in CASES] + [ANSWERS]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="whom to compare with [all]")
    parser.add_argument("--model", type=Path, help="folder that mlx_dpo convert wrote [SmolLM2-135M-Instruct]")
    parser.add_argument("--data", type=Path, help="JSONL file of pairs [the paper's where it is, or the demo's]")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if mx.is_available(mx.gpu) else "cpu")
    parser.add_argument("--quick", action="store_true", help="one round of one step, short pairs only")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 1
        options.cases = [name for name in options.cases if name in _QUICK]
    return options


def main() -> None:
    """Prepare the model, the pairs and the peers, measure, and write this machine's section after every case."""
    options = _options()
    model = options.model or HOME / "model"
    if not model.exists():
        command = [sys.executable, "-m", "mlx_dpo", "convert", "smollm2-135m-instruct", "--out", str(model)]
        subprocess.run(command, cwd=ROOT, check=True)
    file = options.data or (_PAPER if _PAPER.exists() else PAIRS / "train.jsonl")
    rows = pairs.read(file, (1 + options.steps) * BATCH)
    tokenizer = AutoTokenizer.from_pretrained(model)
    on_gpu = options.device == "gpu"
    lengthened = pairs.lengthened(rows, tokenizer)
    setting = Setting(model, on_gpu, _cores(), rows, lengthened, options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(setting, Path(scratch))
        for peer in options.peers:
            interpreter(peer, on_gpu=on_gpu)
        kind = "bfloat16" if on_gpu else "float32"
        weights = same_weights(model, kind, bench, with_torch=TRL in options.peers)
        bench = bench._replace(setting=setting._replace(model=weights))
        name = options.model.name if options.model else "SmolLM2-135M-Instruct"
        config = json.loads((weights / "config.json").read_text())
        about = results.About(setting, name, config, tokenizer, file.name, kind)
        section = ""
        # A comparison that is ended early has written what it knows.
        for found in measured(bench, options):
            section = results.write(found, about, with_lora=LORA in options.peers)
        print(section)


if __name__ == "__main__":
    main()
