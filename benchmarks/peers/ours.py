"""mlx_dpo on a job, through `mlx_dpo.train.run`: `python -m benchmarks.peers.ours JOB`."""

import gc
import json
import time
from importlib.metadata import version
from pathlib import Path

import mlx_dpo  # noqa: F401  # ahead of MLX

# isort: split
import mlx.core as mx

from benchmarks.peers.job import ALPHA, BATCH, BETA, RANK, RATE, Job, Result, given_job, resident_peak
from mlx_dpo import train
from mlx_dpo.align.events import Phase, Stepped
from mlx_dpo.align.options import TrainOptions


def main() -> None:
    """Warm up in a run of its own, since a run scores the reference of all its pairs before the first step."""
    job = given_job()
    mx.set_default_device(mx.gpu if job.on_gpu else mx.cpu)
    result = Result(versions=f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    rows = job.rows()
    scratch = Path(job.scratch)
    if job.warmup:
        trained(job, rows[: job.warmup * BATCH], scratch / "warmup", result)
        result.seconds.clear()
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
    trained(job, rows[job.warmup * BATCH :], scratch / "timed", result)
    result.print()


def trained(job: Job, rows: list[dict[str, str]], folder: Path, result: Result) -> None:
    """Take one step a batch of `rows` and add what was measured to `result`."""
    folder.mkdir(parents=True)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = len(rows) // BATCH
    begun, scored, ended = None, 0.0, 0.0
    for event in train.run(options(job, data, folder / "run", steps)):
        now = time.perf_counter()
        if isinstance(event, Phase) and not ended and event.name != "Loading the model":
            begun = now if begun is None else begun
            scored = now - begun if event.done == event.total else 0.0
        if isinstance(event, Stepped):
            numbers = event.numbers
            first = numbers["step"] == 1  # before which come the reference and the check of the start
            result.seconds.append(numbers["seconds"] if first else now - ended)
            result.losses.append(numbers["loss"])
            result.chosen.append(numbers["logps/chosen"])
            result.rejected.append(numbers["logps/rejected"])
            ended = now
            if numbers["step"] == steps:
                result.epoch_seconds = scored + sum(result.seconds) if scored else None
                result.resident_peak = resident_peak()
                result.device_peak = mx.get_peak_memory() if job.on_gpu else None


def options(job: Job, data: Path, out: Path, steps: int) -> TrainOptions:
    """Plain DPO as the others are told to do it."""
    return TrainOptions(
        model=Path(job.model),
        data=data,
        out=out,
        loss="sigmoid",
        beta=BETA,
        rank=RANK,
        alpha=ALPHA,
        layers=job.layers,
        learning_rate=RATE,
        schedule="constant",
        max_grad_norm=0.0,
        steps=steps,
        batch_size=BATCH,
        shuffle=False,
        holdout=0.0,
        samples=0,
        save_every=0,
        grad_checkpoint=job.grad_checkpoint,
        memory_limit=1e5,
    )


if __name__ == "__main__":
    main()
