"""SIGKILL at any moment, many times: the run that goes on ends with the bytes of one that never stopped."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tomli_w

from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.record import read_metrics

Folder = Callable[[str], Path]
KILLS, PATIENCE = 8, 240.0  # seconds


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    """A run in which everything is going on at once, rescue, evaluations and the best of them included."""
    return runs.options(
        tiny_folder("llama"), runs.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out", loss="0.02*apo_down",
        beta=0.5, schedule="cosine", batch_size=2, epochs=30, dropout=0.1, save_every=3, holdout=0.3, eval_every=4,
        samples=1, keep="best", best_by="chosen", on_displacement="rescue", keep_checkpoints=3, lora_plus=2.0,
    )  # fmt: skip


def started(options: TrainOptions, *flags: str) -> subprocess.Popen[bytes]:
    here = options.out.parent
    command = [sys.executable, "-m", "mlx_dpo", "train", "--config", str(here / "run.toml"), *flags]
    with (here / "messages.txt").open("wb") as messages:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)


def test_killed_at_random_it_ends_with_the_same_bytes(options: TrainOptions):
    whole = replace(options, out=options.out.parent / "whole")
    runs.run(whole)
    assert any("rescue" in row for row in read_metrics(whole.out))
    given = {name: value for name, value in as_toml(options).items() if value is not None}
    (options.out.parent / "run.toml").write_text(tomli_w.dumps(given))
    drawn, killed = random.Random(7), 0
    deadline = time.monotonic() + PATIENCE
    while not (options.out / "manifest.json").exists():
        assert time.monotonic() < deadline
        resume = ["--resume"] if (options.out / "run.toml").exists() else []
        begun = len(read_metrics(options.out))
        process = started(options, *resume)
        if killed < KILLS:
            # From the first row that it writes on, or the first start would be all that is ever killed.
            while len(read_metrics(options.out)) <= begun and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 0.25))
            process.kill()
        status = process.wait(timeout=PATIENCE)
        assert status in (0, -signal.SIGKILL), (options.out.parent / "messages.txt").read_text()
        killed += status == -signal.SIGKILL
    assert killed >= KILLS // 2
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(whole.out)
    assert runs.rows(options.out) == runs.rows(whole.out)
    assert (options.out / "samples.jsonl").read_bytes() == (whole.out / "samples.jsonl").read_bytes()
