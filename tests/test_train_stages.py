"""SFT and then DPO as one run: the same as by hand, resumable, and refused where the stages do not fit together."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
import runs
import staged
import tomli_w
from commands import said, state
from staged import TEXTS, THREE, Folder, fitted

from mlx_dpo import console
from mlx_dpo import stages as several
from mlx_dpo.align.events import Event, Finished, Interrupted, Stage, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics, read_options, read_rows
from mlx_dpo.cli import main
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.refusal import Refusal

config = staged.config


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three stages, trained in one go; tests must not write there."""
    here = tmp_path_factory.mktemp("stages")
    path = fitted(tiny_folder("llama"), here, *THREE)
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(path), "--out", str(here / "out")])
    assert end.value.code == 0
    return here / "out"


def test_the_result_is_that_of_the_same_runs_by_hand(
    config: Path, whole: Path, tiny_folder: Folder, capfd: pytest.CaptureFixture[str]
):
    here, model = config.parent, tiny_folder("llama")
    by_hand = [
        f"--rank 4 --method sft --data {here}/text.jsonl --epochs 2 --out {here}/1",
        f"--adapter {here}/1 --method sft --data {here}/answers.jsonl --epochs 2 --batch-size 8 --out {here}/2",
        f"--adapter {here}/2 --data {here}/pairs.jsonl --steps 3 --beta 0.3 --loss sigmoid --out {here}/3",
    ]
    for flags in by_hand:
        assert said(f"train --model {model} --learning-rate 5e-3 --samples 0 {flags}", None, capfd).status == 0
    assert runs.adapter_bytes(whole) == runs.adapter_bytes(here / "3")
    rows = read_metrics(whole)
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3, 3]
    assert [row["step"] for row in rows] == [1, 2, 1, 2, 1, 2, 3]
    # The reference is the model after the second stage.
    assert rows[4]["rewards/chosen"] == pytest.approx(0, abs=1e-4)


def test_the_folder_is_one_that_mlx_lm_opens(whole: Path, tiny_folder: Folder):
    model, *_ = mlx_lm.load(str(tiny_folder("llama")), adapter_path=str(whole))
    saved, _ = read_arrays(whole / "adapters.safetensors")
    found = dict(runs.named(model.parameters()))
    assert all(np.array_equal(np.array(value), np.array(found[name])) for name, value in saved.items())
    assert json.loads((whole / "manifest.json").read_text())["start"]["adapter"].endswith("stage-2-sft")


def test_its_record_repeats_it_to_the_same_bytes(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert [stage["method"] for stage in read_options(whole)["stage"]] == ["sft", "sft", "dpo"]
    assert said(f"train --config {whole}/run.toml --out {tmp_path}/again", None, capfd).status == 0
    assert runs.adapter_bytes(tmp_path / "again") == runs.adapter_bytes(whole)


def unfinished(whole: Path, out: Path, *lost: str) -> Path:
    """A copy of a finished run as a kill would have left it, without these files and folders."""
    shutil.copytree(whole, out)
    for name in ("manifest.json", "adapters.safetensors", *lost):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    return out


@pytest.mark.parametrize(
    "lost", [("stage-2-sft/manifest.json", "stage-3-dpo"), ("stage-3-dpo",), ("stage-3-dpo/manifest.json",), ()]
)
def test_what_a_kill_left_undone_is_done_by_resuming(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], lost: tuple[str, ...]
):
    out = unfinished(whole, tmp_path / "out", *lost)
    found = said(f"train --config {out}/run.toml --out {out} --resume", None, capfd)
    assert found.status == 0, found.messages
    assert "This stage is finished." in found.messages
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)
    assert runs.rows(out) == runs.rows(whole)


def test_a_record_that_a_kill_left_in_part_is_not_in_the_way(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = unfinished(whole, tmp_path / "out", "stage-3-dpo")
    (out / "stage-3-dpo").mkdir()
    (out / "stage-3-dpo" / ".run.toml.part-x1y2").write_text("meth")
    found = said(f"train --config {out}/run.toml --out {out} --resume", None, capfd)
    assert found.status == 0, found.messages
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)
    assert not list(out.rglob("*.part-*"))


def test_stages_that_start_from_an_adapter_are_repeated_and_resumed_from_their_record(
    whole: Path, tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    first = {"data": "answers", "method": "sft", "adapter": str(whole)}
    path = fitted(tiny_folder("llama"), tmp_path, first, {"data": "pairs"}, steps=1)
    assert said(f"train --config {path} --out {tmp_path}/out", None, capfd).status == 0
    assert said(f"train --config {tmp_path}/out/run.toml --out {tmp_path}/again", None, capfd).status == 0
    out = unfinished(tmp_path / "out", tmp_path / "cut", "stage-2-dpo")
    assert said(f"train --config {out}/run.toml --out {out} --resume", None, capfd).status == 0
    assert runs.adapter_bytes(out) == runs.adapter_bytes(tmp_path / "again") == runs.adapter_bytes(tmp_path / "out")
    assert json.loads((out / "stage-1-sft" / "manifest.json").read_text())["start"]["adapter"] == str(whole)


def _other(number: int, **options: object) -> Callable[[Path], object]:
    def change(here: Path) -> None:
        table = read_options(here / "out")
        table["stage"][number - 1] |= options
        (here / "stages.toml").write_text(tomli_w.dumps(table))

    return change


def _other_data(here: Path) -> None:
    runs.write_pairs(here / "text.jsonl", [*TEXTS, {"text": "One more."}])
    _other(1, data=str(here / "text.jsonl"))(here)


def _fewer(here: Path) -> None:
    table = read_options(here / "out")
    (here / "stages.toml").write_text(tomli_w.dumps(table | {"stage": table["stage"][:2]}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_other(1, epochs=7.0), "--epochs of stage 1 is 7.0 here and 2.0 in "),
        (_other(3, beta=0.1), "--beta of stage 3 is 0.1 here and 0.3 in "),
        (_other(1, method="dpo", data="x"), "--method of stage 1 is dpo here and sft in "),
        (_fewer, "There are 2 stages here and 3 in "),
        (_other_data, "Stage 1: --data does not hold what this run was begun with"),
        (_other(2, data="nowhere.jsonl"), "Stage 2: There is no nowhere.jsonl"),
    ],
)
@pytest.mark.parametrize("flag", ["", "--dry-run"])
def test_stages_other_than_those_begun_are_not_resumed(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], object], sentence: str, flag: str,
):  # fmt: skip
    out = unfinished(whole, tmp_path / "out", "stage-3-dpo")
    change(tmp_path)
    before = state(out)
    found = said(f"train --config {tmp_path}/stages.toml --out {out} --resume {flag}", None, capfd)
    assert (found.status, sentence in found.sentence) == (1, True), found.messages
    assert state(out) == before


def test_what_is_free_to_change_may_change_on_resuming(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = unfinished(whole, tmp_path / "out", "stage-3-dpo")
    _other(3, **{"save-every": 1})(tmp_path)
    assert said(f"train --config {tmp_path}/stages.toml --out {out} --resume", None, capfd).status == 0
    assert read_options(out)["stage"][2]["save-every"] == 1
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)


def test_a_run_with_stages_is_no_run_without_and_the_other_way_round(
    config: Path, whole: Path, tiny_folder: Folder, capfd: pytest.CaptureFixture[str]
):
    here = config.parent
    single = runs.options(tiny_folder("llama"), here / "pairs.jsonl", here / "single", epochs=2)
    runs.run(single, stop_after=1)
    out = unfinished(whole, here / "out", "stage-3-dpo")
    before = state(here)
    found = said(f"train --config {config} --out {single.out} --resume", None, capfd)
    assert (found.status, "has no stages: go on with it by mlx_dpo train" in found.sentence) == (1, True), found
    with pytest.raises(Refusal, match=f"is one in stages: go on with it by .*--config {out}/run.toml"):
        runs.run(replace(single, out=out, resume=True))
    assert state(here) == before


def test_every_stages_answers_and_numbers_are_in_the_folder_and_its_files_reach_the_disk_before_their_names(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fsync, renamed, flushed = os.fsync, Path.replace, list[int]()
    unsafe = list[str]()

    def noted(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched(path: Path, target: Path) -> Path:
        if target.parent == tmp_path / "out" and path.stat().st_ino not in flushed:
            unsafe.append(target.name)
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", watched)
    path = fitted(tiny_folder("llama"), tmp_path, {"data": "pairs"}, {"data": "pairs"}, steps=2, samples=1)
    path.write_text(path.read_text().replace("samples = 1", 'samples = 1\nsample-tokens = 4\nloss = "sigmoid"'))
    assert said(f"train --config {path} --out {tmp_path}/out", None, capfd).status == 0
    assert unsafe == []
    own = [read_rows(tmp_path / "out" / name / "samples.jsonl") for name in ("stage-1-dpo", "stage-2-dpo")]
    assert [len(rows) for rows in own] == [2, 2]
    marked = [{"stage": number} | row for number, rows in enumerate(own, start=1) for row in rows]
    assert read_rows(tmp_path / "out" / "samples.jsonl") == marked


def two(model: Path, here: Path, **second: object) -> list[TrainOptions]:
    """SFT in two steps, then DPO on the same pairs."""
    one = runs.options(model, runs.write_pairs(here / "pairs.jsonl"), here / "out", method="sft", steps=2)
    return [one, runs.options(model, one.data, one.out, **second)]


def trained(stages: list[TrainOptions], stop_after: int | None = None) -> list[Event]:
    asked = iter(range(1, 1_000))
    return list(several.run(stages, lambda: next(asked) == stop_after))


def test_the_command_of_an_interrupted_stage_goes_on_with_all_of_them(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    stages = two(tiny_folder("llama"), tmp_path, steps=3)
    end = trained(stages, 3)[-1]
    assert isinstance(end, Interrupted)
    assert end == (1, f"mlx_dpo train --resume --config {tmp_path}/out/run.toml")
    assert said(end.command.split()[1:], None, capfd).status == 0
    trained([replace(options, out=tmp_path / "whole") for options in stages])
    assert runs.adapter_bytes(tmp_path / "out") == runs.adapter_bytes(tmp_path / "whole")


def test_the_way_out_of_a_stage_that_was_stopped_leads_to_the_end_of_all(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    harmful = {"loss": "0.02*apo_down", "beta": 0.5, "schedule": "constant", "epochs": 6, "seed": 5}
    with pytest.raises(Refusal, match=f"--config {tmp_path}/out/run.toml --on-displacement warn$") as stopped:
        trained(two(tiny_folder("llama"), tmp_path, on_displacement="stop", **harmful))
    words = str(stopped.value).rpartition("mlx_dpo ")[2].split()
    assert said(words, None, capfd).status == 0
    assert runs.adapter_bytes(tmp_path / "out") == runs.adapter_bytes(tmp_path / "out" / "stage-2-dpo")


def test_a_full_disk_in_a_stage_names_the_folder_to_go_on_with(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stages = two(tiny_folder("llama"), tmp_path, steps=1)
    renamed = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.parent.name == "stage-2-dpo":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return renamed(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(Refusal, match=f"^{tmp_path}/out cannot be written .*: make room there, and go on with"):
        trained(stages)


def test_the_time_that_is_told_at_the_end_is_that_of_all_stages(tiny_folder: Folder, tmp_path: Path):
    pause, number, end = 2.0, 0, None
    for event in several.run(two(tiny_folder("llama"), tmp_path, steps=1)):
        number = event.number if isinstance(event, Stage) else number
        if isinstance(event, Stepped) and (event.numbers["step"], number) == (1, 1):
            time.sleep(pause)
        end = event
    assert isinstance(end, Finished)
    assert end.seconds >= pause
    assert (end.out, end.report) == (tmp_path / "out", tmp_path / "out" / "report.html")


def test_through_a_pipe_each_stages_steps_are_told_and_those_after_a_rescue_again(capfd: pytest.CaptureFixture[str]):
    numbers = {"loss": 1.0, "tokens_per_second": 1.0, "peak_memory_gb": 1.0}
    steps = [*range(1, 31), *range(11, 21)]  # of 40, a rescue from 30 back to 10
    stepped = [Stepped(numbers | {"step": step}, 40) for step in steps]
    second = [Stepped(numbers | {"step": step}, 3) for step in (1, 2, 3)]
    console.show_training([Stage(1, 2, "sft"), *stepped, Stage(2, 2, "dpo"), *second])
    told = [line.partition(":")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    first = [f"step {step}/40" for step in (4, 8, 12, 16, 20, 24, 28, 12, 16, 20)]
    assert told == [*first, "step 1/3", "step 2/3", "step 3/3"]
