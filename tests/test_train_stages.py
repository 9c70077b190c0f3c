"""SFT and then DPO as one run: the same as by hand, resumable, and refused where the stages do not fit together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx_lm
import numpy as np
import parity
import pytest
import runs
import tomli_w
from commands import said, state

from mlx_dpo.align.record import read_metrics, read_options
from mlx_dpo.cli import main
from mlx_dpo.models.arrays import read_arrays

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
    own = [{**stage, "data": places[stage["data"]]} for stage in stages]
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


@pytest.mark.parametrize("lost", ["stage-2-sft/manifest.json", "stage-3-dpo", "manifest.json"])
def test_what_a_kill_left_undone_is_done_by_resuming(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], lost: str
):
    out = shutil.copytree(whole, tmp_path / "out")
    kept = lost.partition("/")[0]
    for name in ("manifest.json", "adapters.safetensors", "stage-3-dpo" if "stage-2" in lost else kept):
        place = out / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    if (out / lost).is_file():
        (out / lost).unlink()
    found = said(f"train --config {out}/run.toml --out {out} --resume", None, capfd)
    assert found.status == 0, found.messages
    assert "This stage is finished." in found.messages
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)
    assert runs.rows(out) == runs.rows(whole)


def test_a_dry_run_plans_every_stage_and_writes_nothing(config: Path, capfd: pytest.CaptureFixture[str]):
    before = state(config.parent)
    found = said(f"train --config {config} --out {config.parent}/out --dry-run", None, capfd)
    assert found.status == 0, found.messages
    assert found.output.count("GB at the peak") == 3
    assert state(config.parent) == before


@pytest.mark.parametrize(
    ("stages", "flags", "sentence", "status"),
    [
        ([{"data": "pairs", "adapter": "x"}] * 2, "", "Stage 2 starts from stage 1", 1),
        ([{"data": "pairs"}, {"data": "pairs", "out": "elsewhere"}], "", "give it once, above the stages", 1),
        ([{"data": "pairs", "betta": 1}], "", "betta", 2),
        ([{"data": "pairs"}, {"data": "pairs", "method": "sft", "beta": 0.2}], "", "--beta has no meaning", 1),
        ([{"data": "pairs"}, {"data": "pairs", "rank": 16}], "", "--rank is 16", 1),
    ],
)
def test_stages_that_do_not_fit_are_refused_in_a_sentence(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    stages: list[dict], flags: str, sentence: str, status: int,
):  # fmt: skip
    shared = {} if any("out" in stage for stage in stages) else {"out": str(tmp_path / "out")}
    if not shared:
        stages[0]["out"] = str(tmp_path / "out")
    path = fitted(tiny_folder("llama"), tmp_path, *stages, steps=1, **shared)
    found = said(f"train --config {path} {flags}", None, capfd)
    assert (found.status, sentence in found.sentence) == (status, True), found.messages
    assert not (tmp_path / "out" / "manifest.json").exists()


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
