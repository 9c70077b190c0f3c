"""The best evaluation's adapter is kept, patience runs out, sample answers are there: whatever comes in between."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from commands import state

from mlx_dpo import train
from mlx_dpo.align import checkpoint
from mlx_dpo.align.events import Event, Finished, Note
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    return runs.options(tiny_folder("llama"), data, tmp_path / "out", epochs=6, save_every=2, seed=5)


BEST: dict[str, Any] = {
    "loss": "sigmoid", "learning_rate": 2e-2, "schedule": "constant", "batch_size": 2, "epochs": 3, "save_every": 2,
    "holdout": 0.4, "eval_every": 1, "keep": "best", "beta": None, "sample_tokens": 4, "samples": 1,
}  # fmt: skip


def evaluations(out: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in read_metrics(out) if name in row]


@pytest.mark.parametrize(
    ("best_by", "name", "sign"),
    [("loss", "eval_loss", -1), ("chosen", "eval_logps/chosen", 1), ("margin", "eval_rewards/margins", 1)],
)
def test_the_best_evaluations_adapter_is_kept(options: TrainOptions, best_by: str, name: str, sign: int):
    chosen = replace(options, **(BEST | {"best_by": best_by}))
    events = runs.run(chosen)
    found = evaluations(chosen.out, name)
    best = max(found, key=lambda entry: sign * entry[1])[0]
    facts = json.loads((chosen.out / "manifest.json").read_text())
    assert facts["step"] == best
    assert facts["scores"][name] == dict(found)[best]
    end = events[-1]
    assert isinstance(end, Finished)
    # The same adapter as of a run that was let go no further than that step.
    short = replace(chosen, out=chosen.out.parent / "short", keep="last", best_by="loss", steps=best, epochs=1)
    runs.run(short)
    ours, theirs = (read_arrays(out / "adapters.safetensors")[0] for out in (chosen.out, short.out))
    assert all(np.array_equal(np.array(value), np.array(theirs[key])) for key, value in ours.items())
    samples = [json.loads(line) for line in (chosen.out / "samples.jsonl").read_text().splitlines()]
    assert [sample.after for sample in end.samples] == next(row["answers"] for row in samples if row["step"] == best)


def test_patience_ends_a_run_and_says_so(options: TrainOptions):
    chosen = replace(options, **(BEST | {"keep": "last", "patience": 2, "best_by": "chosen", "epochs": 12}))
    events = runs.run(chosen)
    found = evaluations(chosen.out, "eval_logps/chosen")
    best = max(found, key=lambda entry: entry[1])[0]
    last = [row["step"] for row in read_metrics(chosen.out)][-1]
    assert last == best + 2
    assert last < 12 * 3
    assert any(isinstance(event, Note) and f"Ended after {last} of " in event.text for event in events)
    assert json.loads((chosen.out / "manifest.json").read_text())["steps_taken"] == last


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_best_and_patience_survive_interruptions(options: TrainOptions, stop_after: int):
    chosen = replace(options, **(BEST | {"patience": 3, "epochs": 6}))
    whole = replace(chosen, out=chosen.out.parent / "whole")
    runs.run(whole)
    runs.run(chosen, stop_after)
    while not (chosen.out / "manifest.json").exists():
        runs.run(replace(chosen, resume=True), stop_after)
    assert runs.adapter_bytes(chosen.out) == runs.adapter_bytes(whole.out)
    assert runs.rows(chosen.out) == runs.rows(whole.out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"eval_every": 0}, "--keep best needs evaluations"),
        ({"holdout": 0.0}, "has no held-out examples to choose the best step by"),
        ({"keep": "last", "best_by": "chosen"}, "--best-by has no meaning without"),
        ({"loss": "kto", "best_by": "margin"}, "--best-by margin needs pairs"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_written(
    options: TrainOptions, change: dict[str, Any], sentence: str
):
    before = state(options.out.parent)
    with pytest.raises(Refusal, match=sentence):
        runs.run(replace(options, **(BEST | change)))
    assert state(options.out.parent) == before


def test_keep_checkpoints_is_how_many_there_are(options: TrainOptions):
    runs.run(replace(options, keep_checkpoints=4))
    assert checkpoint.steps(options.out / "checkpoints") == [12, 10, 8, 6]


def test_sample_answers_are_there_from_before_the_first_step_to_the_end(options: TrainOptions):
    chosen = replace(options, **(BEST | {"keep": "last", "eval_every": 2, "epochs": 2}))
    events: list[Event] = runs.run(chosen)
    samples = [json.loads(line) for line in (chosen.out / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 2, 4, 6]
    assert samples[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert samples[-1]["kl"] > 1e-4
    end = events[-1]
    assert isinstance(end, Finished)
    assert [sample.before for sample in end.samples] == samples[0]["answers"]


def test_a_damaged_best_adapter_is_said_to_be_and_the_next_best_is_kept(options: TrainOptions):
    chosen = replace(options, **(BEST | {"on_displacement": "warn", "best_by": "margin", "eval_every": 2, "epochs": 4}))
    for event in train.run(chosen):
        if getattr(event, "name", "") == "Writing the report":
            break
    found = evaluations(chosen.out, "eval_rewards/margins")
    best = max(found, key=lambda entry: entry[1])[0]
    (chosen.out / "checkpoints" / "best" / f"step-{best:08d}.safetensors").write_bytes(b"damaged")
    notes = [event.text for event in runs.run(replace(chosen, resume=True)) if isinstance(event, Note)]
    assert any(f"step {best}" in note and "is damaged or gone" in note for note in notes)
