"""A run that goes wrong says so, stops or is rescued; the best evaluation is kept; all of it survives a kill."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import parity
import pytest
import runs
from commands import said

from mlx_dpo import train
from mlx_dpo.align import checkpoint, monitor, objectives
from mlx_dpo.align.events import Event, Finished, Note, Warned
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics
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
    assert runs.rows(options.out) == runs.rows(rescued)


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


def test_stopped_for_displacement_it_does_not_go_on_unasked(options: TrainOptions):
    stopping = replace(options, on_displacement="stop")
    with pytest.raises(Refusal, match="^Stopped after step"):
        runs.run(stopping)
    done = read_metrics(options.out)[-1]["step"]
    with pytest.raises(Refusal, match=f"^Stopped after step {done}; everything is saved"):
        runs.run(replace(stopping, resume=True))
    assert read_metrics(options.out)[-1]["step"] == done


def test_a_run_begun_with_warnings_can_be_resumed_to_be_rescued(options: TrainOptions, rescued: Path):
    runs.run(replace(options, save_every=0), 8)
    events = runs.run(replace(options, resume=True, on_displacement="rescue"))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(note.startswith("Rescued: back to step 0") for note in notes)
    assert isinstance(events[-1], Finished)
    # It is called for later than in a run that was ready for it from the start, and ends alike.
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(rescued)


def test_another_rhythm_of_checkpoints_leaves_a_way_back(options: TrainOptions):
    chosen = replace(options, on_displacement="rescue", save_every=3)
    runs.run(chosen, 2)
    assert isinstance(runs.run(replace(chosen, resume=True, save_every=1))[-1], Finished)


def test_a_damaged_way_back_gives_way_to_an_older_one(options: TrainOptions, rescued: Path):
    chosen = replace(options, on_displacement="rescue", loss="0.02*apo_down+0.001*sft", learning_rate=2e-3)
    for event in train.run(chosen):
        if isinstance(event, Warned) and event.finding.kind == "displacement":
            for step in checkpoint.steps(chosen.out / "checkpoints"):
                if step:
                    (chosen.out / "checkpoints" / f"step-{step:08d}.safetensors").write_bytes(b"damaged")
    facts = json.loads((chosen.out / "manifest.json").read_text())
    assert {entry["back_to"] for entry in facts["rescues"]} == {0}


def test_displacement_at_the_very_end_is_acted_on(options: TrainOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(monitor._STEP_CHECKS, "displacement", lambda monitor: None)
    monkeypatch.setitem(
        monitor._EVALUATION_CHECKS,
        "displacement/held_out",
        lambda monitor: "It fell." if monitor.evaluations[-1]["eval_loss"] and len(monitor.steps) == 12 else None,
    )
    with pytest.raises(Refusal, match="^Stopped after step 12; everything is saved. It fell."):
        runs.run(replace(options, on_displacement="stop", holdout=0.3, epochs=6))


def test_non_finite_numbers_are_recorded_and_rescued_by_a_lower_rate(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
):
    def fragile(margin: mx.array, beta: float = 0.1) -> mx.array:
        return mx.where(mx.abs(margin) > 4.0, mx.array(math.nan), objectives.sigmoid(margin, beta))

    monkeypatch.setitem(objectives.TERMS, "sigmoid", (fragile,))
    chosen = replace(options, loss="sigmoid", on_displacement="rescue", learning_rate=2e-2, epochs=2)
    events = list(_until_refused(chosen))
    assert any(isinstance(event, Warned) and event.finding.kind == "not_finite" for event in events)
    rows = [row for row in read_metrics(chosen.out) if "rescue" in row]
    assert rows[0]["rate_factor"] == 0.5
    assert rows[0]["sft_weight"] == 0
    assert "loss of nan" in rows[0]["reason"]
    assert rows[0]["abandoned"][-1]["warnings"][0]["kind"] == "not_finite"


def _until_refused(options: TrainOptions) -> Iterator[Event]:
    with contextlib.suppress(Refusal):
        yield from train.run(options)


def test_held_out_examples_and_questions_belong_to_the_run(options: TrainOptions):
    folder = options.data.parent / "folder"
    runs.write_pairs(folder / "train.jsonl", parity.PAIRS[:5])
    runs.write_pairs(folder / "valid.jsonl", parity.PAIRS[5:])
    questions = runs.write_pairs(options.data.parent / "questions.jsonl", [{"prompt": "Why?"}])
    chosen = replace(options, data=folder, questions=questions, samples=1, sample_tokens=4)
    runs.run(chosen, 1)
    runs.write_pairs(folder / "valid.jsonl", parity.PAIRS[6:])
    with pytest.raises(Refusal, match="^--data does not hold what this run was begun with"):
        runs.run(replace(chosen, resume=True))
    runs.write_pairs(folder / "valid.jsonl", parity.PAIRS[5:])
    runs.write_pairs(questions, [{"prompt": "Why not?"}])
    with pytest.raises(Refusal, match="^--questions does not hold what this run was begun with"):
        runs.run(replace(chosen, resume=True))


def test_rows_that_were_lost_are_missed(options: TrainOptions):
    runs.run(options, 4)
    lines = (options.out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (options.out / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    with pytest.raises(Refusal, match="lacks rows of the 4 steps"):
        runs.run(replace(options, resume=True))


def test_a_run_of_an_older_version_goes_on_with_what_is_now_the_default(options: TrainOptions):
    runs.run(options, 2)
    record = options.out / "run.toml"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not line.startswith(("best-by", "lora-plus", "wpo"))))
    assert isinstance(runs.run(replace(options, resume=True))[-1], Finished)
