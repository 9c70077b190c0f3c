"""Stages that do not fit together are refused before any is trained, and a plan tells all of them."""

import sys
from pathlib import Path

import pytest
import runs
import staged
from commands import said, state
from staged import Folder, fitted

from mlx_dpo.models.adapters import read_shape

config = staged.config


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
