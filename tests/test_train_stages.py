"""SFT and then DPO as one run: the same as by hand, resumable, and refused where the stages do not fit together."""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx_lm
import numpy as np
import parity
import pytest
import runs
import tomli_w
from commands import said, state

from mlx_dpo import console
from mlx_dpo import stages as several
from mlx_dpo.align.events import Event, Finished, Interrupted, Stage, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics, read_options, read_rows
from mlx_dpo.cli import main
from mlx_dpo.models.adapters import read_shape
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TEXTS = [
    {"text": "My mother asks the same question again and again, and I am tired. What can I say to her tonight? " * 2}
]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in parity.PAIRS]


def fitted(folder: Path, here: Path, *stages: dict, **shared: object) -> Path:
    """A configuration with stages on the parity pairs."""
    for name, rows in (("text", TEXTS), ("answers", ANSWERS), ("pairs", parity.PAIRS)):
        runs.write_pairs(here / f"{name}.jsonl", rows)
    places = {name: str(here / f"{name}.jsonl") for name in ("text", "answers", "pairs")}
    table = {"model": str(folder), "rank": 4, "learning-rate": 5e-3, "samples": 0, **shared}
    own = [{**stage, "data": places.get(stage["data"], stage["data"])} for stage in stages]
    path = here / "stages.toml"
    path.write_text(tomli_w.dumps(table | {"stage": own}))
    return path


THREE = (
    {"method": "sft", "data": "text", "epochs": 2},
    {"method": "sft", "data": "answers", "epochs": 2, "batch-size": 8},
    {"data": "pairs", "steps": 3, "beta": 0.3, "loss": "sigmoid"},
)


@pytest.fixture
def config(tiny_folder: Folder, tmp_path: Path) -> Path:
    return fitted(tiny_folder("llama"), tmp_path, *THREE)


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


def test_a_dry_run_plans_every_stage_and_writes_nothing(config: Path, capfd: pytest.CaptureFixture[str]):
    before = state(config.parent)
    found = said(f"train --config {config} --out {config.parent}/out --dry-run", None, capfd)
    assert found.status == 0, found.messages
    assert found.output.count("GB at the peak") == 3
    assert state(config.parent) == before


@pytest.mark.parametrize(
    ("stages", "sentence", "status"),
    [
        ([{"data": "pairs", "adapter": "x"}] * 2, "Stage 2 starts from stage 1", 1),
        ([{"data": "pairs"}, {"data": "pairs", "out": "elsewhere"}], "give it once, above the stages", 1),
        ([{"data": "pairs", "betta": 1}], "betta", 2),
        ([{"data": "pairs"}, {"data": "pairs", "method": "sft", "beta": 0.2}], "--beta has no meaning", 1),
        ([{"data": "pairs"}, {"data": "pairs", "rank": 16}], "Stage 2: --rank is 16", 1),
        ([{"data": "pairs"}, {"data": "pairs", "alpha": 3.0}], "Stage 2: --alpha is 3, but", 1),
        ([{"data": "pairs"}, {"data": "pairs", "rslora": True}], "Stage 2: --rslora with --alpha 16 is", 1),
        ([{"data": "pairs"}, {"data": "pairs", "dora": True}], "Stage 2: --dora is given", 1),
        ([{"data": "pairs"}, {"data": "pairs", "layers": 1}], "Stage 2: --layers is 1", 1),
        ([{"data": "pairs"}, {"data": "pairs", "targets": ["q_proj"]}], "Stage 2: --targets are not", 1),
        ([{"data": "pairs"}, {"data": "nowhere.jsonl"}], "Stage 2: There is no nowhere.jsonl", 1),
        ([{"data": "pairs"}, {"data": "text"}], "Stage 2: ", 1),
        ([{"data": "pairs"}, {"data": "pairs", "epochs": 0}], "Stage 2: --epochs 0.0 makes no sense", 1),
        ([{"data": "pairs"}, {"data": "pairs", "track": ["tensorboard"]}], "Stage 2: --track tensorboard", 1),
        ([{"data": "pairs"}, {"data": "pairs", "memory-limit": 1e-6}], "Stage 2: The run would take about", 1),
        ([{"data": "pairs"}, {"data": "pairs", "dry-run": True}], "has dry-run inside a stage", 2),
        ([{"data": "pairs", "resume": True}, {"data": "pairs"}], "has resume inside a stage", 2),
    ],
)
@pytest.mark.parametrize("flags", ["", "--dry-run"])
def test_stages_that_do_not_fit_are_refused_in_a_sentence_before_any_is_trained(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    stages: list[dict], flags: str, sentence: str, status: int,
):  # fmt: skip
    if any("track" in stage for stage in stages):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    shared = {} if any("out" in stage for stage in stages) else {"out": str(tmp_path / "out")}
    own = stages if shared else [{"out": str(tmp_path / "out")} | stage for stage in stages]
    path = fitted(tiny_folder("llama"), tmp_path, *own, steps=1, **shared)
    found = said(f"train --config {path} {flags}", None, capfd)
    if flags and "memory-limit" in stages[-1]:  # a plan may be looked at
        assert found.status == 0
        return
    assert (found.status, sentence in found.sentence) == (status, True), found.messages
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shared", "second"),
    [
        ({"rank": 8, "alpha": 8.0, "layers": 1, "rslora": True}, {}),
        ({"rslora": True, "targets": ["[qk]_proj"]}, {"targets": ["self_attn.q_proj", "k_proj"]}),
        ({"dora": True}, {"alpha": 16.0}),
    ],
)
def test_a_shape_that_agrees_with_the_stage_before_holds_for_all(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str], shared: dict, second: dict
):
    path = fitted(tiny_folder("llama"), tmp_path, {"data": "pairs"}, {"data": "pairs"} | second, steps=1, **shared)
    found = said(f"train --config {path} --out {tmp_path}/out", None, capfd)
    assert found.status == 0, found.messages
    one, two = (read_shape(tmp_path / "out" / name) for name in ("stage-1-dpo", "stage-2-dpo"))
    assert one == two


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--rslora --alpha 8", None),
        ("--rslora --alpha 8 --rank 16", None),
        ("--alpha 32", None),
        ("--alpha 8", "--alpha is 8, but the adapter {} has 32 without --rslora, a scale of 2: leave it away."),
        ("--rslora", "--rslora with --alpha 16 is a scale of 4, but the adapter {} has 2: leave --rslora away, or give "
         "--alpha 8 beside it."),
    ],
)  # fmt: skip
def test_a_start_adapters_scale_is_what_alpha_rank_and_rslora_have_to_give(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: str, sentence: str | None
):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    start = runs.options(tiny_folder("llama"), data, tmp_path / "start", rank=16, alpha=8.0, rslora=True, steps=1)
    runs.run(start)
    command = f"train --model {start.model} --data {data} --samples 0 --steps 1 --adapter {start.out}"
    found = said(f"{command} {flags} --out {tmp_path}/out", None, capfd)
    if sentence is not None:
        assert (found.status, found.sentence) == (1, sentence.format(start.out))
        return
    assert read_shape(tmp_path / "out").scale == 8 / 4
    assert said(f"train --config {tmp_path}/out/run.toml --out {tmp_path}/again", None, capfd).status == 0


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


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        ("stage = 3\n", "train", "[[stage]]"),
        ("stage = []\n", "train", "[[stage]]"),
        ("[[stage]]\nmethod = 'sft'\n", "chat", "only mlx_dpo train takes"),
    ],
)
def test_what_are_no_stages_is_wrong_usage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, command: str, words: str
):
    path = tmp_path / "run.toml"
    path.write_text(text)
    found = said(f"{command} --config {path}", None, capfd)
    assert found.status == 2
    assert words in found.sentence
