"""A run that was interrupted, killed or repeated ends with the very bytes of one that never stopped."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import parity
import pytest
import runs
import tiny
import tomli_w
from commands import said, state

from mlx_dpo import train
from mlx_dpo.align.events import Finished, Interrupted, Note
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.record import read_metrics
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
# Everything that could differ: dropout, windows of two batches and of one, a new order in the second epoch.
HARD: dict[str, Any] = {
    "dropout": 0.2, "batch_size": 2, "grad_accumulation": 2, "epochs": 2, "sft_weight": 0.3, "warmup": 0.3,
    "schedule": "cosine", "save_every": 1, "holdout": 0.3, "eval_every": 2, "seed": 11,
}  # fmt: skip


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    """A run of four steps, not begun."""
    return runs.options(tiny_folder("llama"), runs.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out", **HARD)


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, never stopped; tests must not write there."""
    here = tmp_path_factory.mktemp("never-stopped")
    runs.run(runs.options(tiny_folder("llama"), runs.write_pairs(here / "pairs.jsonl"), here / "whole", **HARD))
    return here / "whole"


def resumed(options: TrainOptions, **changes: Any) -> TrainOptions:
    return replace(options, resume=True, **changes)


def assert_same(out: Path, whole: Path) -> None:
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)
    assert runs.rows(out) == runs.rows(whole)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(options: TrainOptions, whole: Path, stop_after: int):
    end = runs.run(options, stop_after)[-1]
    assert isinstance(end, Interrupted)
    assert end.steps_done == stop_after
    assert not (options.out / "adapters.safetensors").exists()
    assert not (options.out / "manifest.json").exists()
    assert isinstance(runs.run(resumed(options))[-1], Finished)
    assert len(read_metrics(whole)) == 4 + 2
    assert_same(options.out, whole)


def test_a_run_may_be_interrupted_after_every_step(options: TrainOptions, whole: Path):
    runs.run(options, 1)
    for _ in range(2):
        runs.run(resumed(options), 1)
    runs.run(resumed(options))
    assert_same(options.out, whole)


def test_the_command_to_go_on_works_as_it_is_printed(
    options: TrainOptions, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    options = replace(options, out=tmp_path / "my run; really")
    end = runs.run(options, 2)[-1]
    assert isinstance(end, Interrupted)
    program, *words = shlex.split(end.command)
    assert program == "mlx_dpo"
    assert said(words, None, capfd).status == 0
    assert_same(options.out, whole)


def test_without_a_checkpoint_it_starts_from_the_first_step(options: TrainOptions, whole: Path):
    runs.run(replace(options, save_every=0), 2)
    for file in (options.out / "checkpoints").iterdir():
        file.unlink()
    events = runs.run(resumed(options))
    assert any(isinstance(event, Note) and "no checkpoint yet" in event.text for event in events)
    assert_same(options.out, whole)


def test_steps_after_the_last_checkpoint_are_taken_again(options: TrainOptions, whole: Path):
    runs.run(options, 3)
    newest = max((options.out / "checkpoints").iterdir())
    newest.unlink()
    with (options.out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo')  # as a crash leaves it
    events = runs.run(resumed(options))
    assert any(isinstance(event, Note) and "after step 2" in event.text for event in events)
    assert_same(options.out, whole)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(options: TrainOptions, whole: Path, damage: str):
    runs.run(options, 3)
    newest = max((options.out / "checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes({"cut": bytes(data[:-50]), "flipped": bytes(data), "emptied": b""}[damage])
    events = runs.run(resumed(options))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[0] == f"{newest} is damaged and was passed over."
    assert "after step 2" in notes[1]
    assert_same(options.out, whole)


def test_where_all_checkpoints_are_damaged_it_says_so(options: TrainOptions):
    runs.run(options, 3)
    for file in (options.out / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refusal, match=r"step-00000003.safetensors and every older checkpoint is damaged"):
        runs.run(resumed(options))


def test_a_run_killed_while_it_ends_is_ended_by_resuming(options: TrainOptions, whole: Path):
    for event in train.run(options):
        if getattr(event, "name", "") == "Writing the report":
            break
    assert not (options.out / "manifest.json").exists()
    assert len(read_metrics(options.out)) == len(read_metrics(whole))
    runs.run(resumed(options))
    assert_same(options.out, whole)


def test_a_killed_process_goes_on_to_the_same_bytes(tiny_folder: Folder, tmp_path: Path):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    options = runs.options(tiny_folder("llama"), data, tmp_path / "out", **HARD | {"epochs": 25, "eval_every": 0})
    whole = replace(options, out=tmp_path / "whole")
    flags = f"--model {options.model} --data {data} --out {options.out} --config {tmp_path / 'run.toml'}".split()
    (tmp_path / "run.toml").write_text(toml(options))
    command = [sys.executable, "-m", "mlx_dpo.train", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while len(read_metrics(options.out)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= len(read_metrics(options.out)) < 50
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Going on after step" in done.stderr
    runs.run(whole)
    assert_same(options.out, tmp_path / "whole")


def toml(options: TrainOptions) -> str:
    """The options that HARD and runs.options set, as a user writes them."""
    given = as_toml(options)
    return tomli_w.dumps({k: v for k, v in given.items() if v is not None and k not in ("model", "data", "out")})


def test_its_own_record_repeats_a_run_to_the_same_bytes(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    found = said(f"train --config {whole}/run.toml --out {tmp_path}/again", None, capfd)
    assert found.status == 0, found.messages
    assert_same(tmp_path / "again", whole)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"beta": 0.2}, "--beta"),
        ({"learning_rate": 1e-3}, "--learning-rate"),
        ({"batch_size": 4}, "--batch-size"),
        ({"dropout": 0.0}, "--dropout"),
        ({"seed": 1}, "--seed"),
        ({"epochs": 3}, "--epochs"),
        ({"steps": 2}, "--steps"),
        ({"rank": 8}, "--rank"),
        ({"shuffle": False}, "--shuffle"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(options: TrainOptions, change: dict[str, Any], name: str):
    runs.run(options, 1)
    before = state(options.out)
    with pytest.raises(Refusal, match=f"^{name} is .* in .*run.toml: resume with the run's own options"):
        runs.run(resumed(options, **change))
    assert state(options.out) == before


def test_options_that_change_no_number_may_change(options: TrainOptions, whole: Path):
    runs.run(options, 1)
    runs.run(resumed(options, save_every=3, memory_limit=9.0, grad_checkpoint=True))
    ours, theirs = (runs.rows(out) for out in (options.out, whole))
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, rel=1e-5, abs=1e-6)


def _other_data(options: TrainOptions, here: Path) -> dict[str, Any]:
    return {"data": runs.write_pairs(here / "other.jsonl", parity.PAIRS[::-1])}


def _edited_data(options: TrainOptions, here: Path) -> dict[str, Any]:
    options.data.write_text(options.data.read_text().replace("Install locks.", "Install blocks."))
    return {}


def _other_model(options: TrainOptions, here: Path) -> dict[str, Any]:
    return {"model": tiny.write_model(here / "other", seed=99)}


@pytest.mark.parametrize(("change", "name"), [(_other_data, "data"), (_edited_data, "data"), (_other_model, "model")])
def test_other_data_or_another_model_is_refused(
    options: TrainOptions, tmp_path: Path, change: Callable[[TrainOptions, Path], dict[str, Any]], name: str
):
    runs.run(options, 2)
    before = state(options.out)
    with pytest.raises(Refusal, match=f"^--{name} does not hold what this run was begun with"):
        runs.run(resumed(options, **change(options, tmp_path)))
    assert state(options.out) == before


def test_another_start_adapter_is_refused(options: TrainOptions, tmp_path: Path):
    start = {"rank": None, "dropout": None}
    for seed in (1, 2):
        runs.run(replace(options, out=tmp_path / f"start-{seed}", seed=seed, epochs=1))
    options = replace(options, adapter=tmp_path / "start-1", **start)
    runs.run(options, 1)
    with pytest.raises(Refusal, match="^--adapter does not hold what this run was begun with"):
        runs.run(resumed(options, adapter=tmp_path / "start-2"))


def test_files_that_only_moved_are_the_same_files(options: TrainOptions, whole: Path, tmp_path: Path):
    runs.run(options, 2)
    moved = options.data.rename(tmp_path / "moved.jsonl")
    runs.run(resumed(options, data=moved))
    assert_same(options.out, whole)
    assert f'data = "{moved}"' in (options.out / "run.toml").read_text()


def test_a_finished_run_is_not_resumed(options: TrainOptions, whole: Path):
    before = state(whole)
    with pytest.raises(Refusal, match="is finished: there is nothing to resume"):
        runs.run(resumed(options, out=whole))
    assert state(whole) == before


def test_where_there_was_no_run_there_is_nothing_to_resume(options: TrainOptions):
    with pytest.raises(Refusal, match=r"holds no run.toml, so there is no run to resume"):
        runs.run(resumed(options))
    assert not options.out.exists()


def test_an_out_folder_that_holds_another_run_stays_as_it_is(options: TrainOptions, whole: Path):
    before = state(whole)
    with pytest.raises(Refusal, match="holds a run already: add --resume"):
        runs.run(replace(options, out=whole))
    assert state(whole) == before


def test_an_out_folder_that_holds_other_files_stays_as_it_is(options: TrainOptions):
    options.out.mkdir()
    (options.out / "letter.txt").write_text("dear")
    with pytest.raises(Refusal, match="already holds files: choose another --out"):
        runs.run(options)
    assert [path.name for path in options.out.iterdir()] == ["letter.txt"]


def test_no_more_than_two_checkpoints_are_kept_and_no_litter(options: TrainOptions):
    runs.run(options, 1)
    (options.out / "checkpoints" / ".part-step-00000002.safetensors").write_bytes(b"killed here")
    runs.run(resumed(options))
    names = sorted(path.name for path in (options.out / "checkpoints").iterdir())
    assert names == ["step-00000003.safetensors", "step-00000004.safetensors"]
    assert not any(path.name.startswith(".") for path in options.out.iterdir())


def test_a_run_does_not_depend_on_what_was_drawn_before(options: TrainOptions, whole: Path):
    mx.random.seed(987)
    mx.random.uniform(shape=(3,))
    runs.run(options)
    assert_same(options.out, whole)
