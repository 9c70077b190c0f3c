"""A run that goes wrong says so, stops or is rescued; the best evaluation is kept; all of it survives a kill."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from commands import said, state

from mlx_dpo import train
from mlx_dpo.align import checkpoint, monitor
from mlx_dpo.align.events import Event, Finished, Note, Warned
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
# What pulls both answers of a pair down, faintly: Adam makes full steps of it, and the sft term outweighs it.
HARMFUL: dict[str, Any] = {
    "loss": "0.02*apo_down", "beta": 0.5, "learning_rate": 5e-3, "schedule": "constant", "batch_size": 4, "epochs": 6,
    "save_every": 2, "seed": 5,
}  # fmt: skip


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    return runs.options(tiny_folder("llama"), runs.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out", **HARMFUL)


@pytest.fixture(scope="module")
def rescued(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was rescued and never stopped; tests must not write there."""
    here = tmp_path_factory.mktemp("rescued")
    data = runs.write_pairs(here / "pairs.jsonl")
    runs.run(runs.options(tiny_folder("llama"), data, here / "out", **HARMFUL, on_displacement="rescue"))
    return here / "out"


def warnings(out: Path) -> list[tuple[int, str]]:
    return [(row["step"], found["kind"]) for row in read_metrics(out) for found in row.get("warnings", ())]


def shift_at_the_end(out: Path) -> float:
    return [row["logps/chosen_shift"] for row in read_metrics(out) if "loss" in row][-1]


def test_it_warns_in_words_in_the_record_and_in_the_report_and_goes_on(options: TrainOptions):
    events = runs.run(options)
    assert isinstance(events[-1], Finished)
    (warned,) = [event for event in events if isinstance(event, Warned) and event.finding.kind == "displacement"]
    assert warned.step <= 10
    assert warnings(options.out)[0] == (warned.step, "displacement")
    assert "less likely" in (options.out / "report.html").read_text()
    assert shift_at_the_end(options.out) < 0


def test_told_to_stop_it_stops_with_everything_saved_and_says_how_to_go_on(
    options: TrainOptions, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(
        Refusal, match="^Stopped after step .* everything is saved.* --on-displacement warn$"
    ) as stopped:
        runs.run(replace(options, on_displacement="stop"))
    done = warnings(options.out)[0][0]
    assert checkpoint.steps(options.out / "checkpoints")[0] == done
    assert not (options.out / "manifest.json").exists()
    words = str(stopped.value).rpartition("mlx_dpo ")[2].split()
    assert said(words, None, capfd).status == 0
    runs.run(replace(options, out=options.out.parent / "warned"))
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(options.out.parent / "warned")


def test_a_rescue_goes_back_changes_the_loss_says_so_and_ends_well(options: TrainOptions):
    events = runs.run(replace(options, on_displacement="rescue"))
    assert isinstance(events[-1], Finished)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(note.startswith("Rescued: back to step ") and "likelihood at weight 1" in note for note in notes)
    facts = json.loads((options.out / "manifest.json").read_text())
    first = facts["rescues"][0]
    assert first["sft_weight"] == 1
    assert first["called_at"] == warnings_before_the_rescue(options.out)
    steps = [row["step"] for row in read_metrics(options.out) if "loss" in row]
    assert steps == list(range(1, 13))
    assert facts["options"]["loss"] == "0.02*apo_down"
    (row, *_) = [row for row in read_metrics(options.out) if "rescue" in row]
    assert [abandoned["step"] for abandoned in row["abandoned"]][-1] == first["called_at"]
    warned = replace(options, out=options.out.parent / "warned")
    runs.run(warned)
    assert shift_at_the_end(options.out) > shift_at_the_end(warned.out)


def warnings_before_the_rescue(out: Path) -> int:
    (row, *_) = [row for row in read_metrics(out) if "rescue" in row]
    return next(r["step"] for r in row["abandoned"] if any(w["kind"] == "displacement" for w in r.get("warnings", ())))


def test_a_rescued_run_goes_back_to_the_very_numbers_of_its_healthy_step(rescued: Path):
    rows = read_metrics(rescued)
    at = next(number for number, row in enumerate(rows) if "rescue" in row)
    healthy = rows[at]["step"]
    abandoned = [row for row in rows[at]["abandoned"] if "loss" in row][0]
    again = next(row for row in rows[at + 1 :] if row.get("step") == healthy + 1)
    # The first step after going back sees the same adapter and the same pairs; only the loss is another one.
    for name in ("logps/chosen", "logps/rejected", "logps/chosen_shift", "rewards/margins"):
        assert again[name] == abandoned[name], name
    assert again["loss"] != abandoned["loss"]


@pytest.mark.parametrize("stop_after", range(1, 12, 2))
def test_a_rescued_run_that_is_interrupted_ends_with_the_same_bytes(
    options: TrainOptions, rescued: Path, stop_after: int
):
    options = replace(options, on_displacement="rescue")
    runs.run(options, stop_after)
    while not (options.out / "manifest.json").exists():
        runs.run(replace(options, resume=True), stop_after)
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(rescued)
    assert runs.rows(options.out)[-1] == runs.rows(rescued)[-1]


def killed_at(options: TrainOptions, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a function of the rescue is called, where the process is as good as killed."""

    class Killed(BaseException):
        pass

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    def run(patch: pytest.MonkeyPatch) -> None:
        for event in train.run(options):
            if isinstance(event, Warned) and event.finding.kind == "displacement":
                patch.setattr(f"mlx_dpo.align.{broken}", kill)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        run(patch)


@pytest.mark.parametrize(
    "broken", ["checkpoint.drop_after", "record.Rows.take_back", "rescue.apply", "checkpoint.save"]
)
def test_killed_in_the_middle_of_a_rescue_it_is_rescued_again(
    options: TrainOptions, rescued: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    options = replace(options, on_displacement="rescue")
    killed_at(options, broken, monkeypatch)
    runs.run(replace(options, resume=True))
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(rescued)
    ours, theirs = (json.loads((out / "manifest.json").read_text())["rescues"] for out in (options.out, rescued))
    assert ours == theirs


def test_where_rescues_do_not_help_the_run_is_given_up(options: TrainOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(monitor, "SHIFT", -10.0)  # nothing is ever good enough
    with pytest.raises(Refusal, match="4 rescues did not help"):
        runs.run(replace(options, on_displacement="rescue", epochs=20))
    assert not (options.out / "manifest.json").exists()


def test_a_loss_without_a_reference_has_no_displacement_to_act_on(options: TrainOptions):
    chosen = replace(options, loss="simpo", beta=None, on_displacement="rescue")
    with pytest.raises(Refusal, match="^--on-displacement cannot be used with --loss simpo"):
        runs.run(chosen)


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
    assert [row["step"] for row in samples] == [0, 2, 4, 5, 6][: len(samples)] or samples[-1]["step"] > 4
    assert samples[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert samples[-1]["kl"] > 1e-4
    end = events[-1]
    assert isinstance(end, Finished)
    assert [sample.before for sample in end.samples] == samples[0]["answers"]
