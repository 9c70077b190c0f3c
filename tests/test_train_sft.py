"""Supervised runs, and preference runs that start from one."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import parity
import pytest
import runs
from commands import said

from mlx_dpo.align.events import Finished
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import refuse_other_base
from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.load import load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    return runs.options(tiny_folder("llama"), runs.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")


def test_the_loss_is_the_mean_over_the_chosen_tokens(options: TrainOptions):
    loaded = load(options.model)
    items = runs.pairs(loaded)
    losses = [-runs.naive_log_p(loaded.model, pair.prompt, pair.chosen) for pair in items]
    runs.run(replace(options, method="sft", loss="sigmoid+sft", batch_size=3, grad_accumulation=3))
    (row,) = runs.rows(options.out)
    assert row["loss"] == pytest.approx(sum(losses) / sum(len(pair.chosen) for pair in items), rel=1e-5)
    assert row["logps/chosen"] == pytest.approx(-np.mean(losses), rel=1e-5)
    assert row["num_tokens"] == sum(len(pair.prompt) + len(pair.chosen) for pair in items)
    assert "rewards/chosen" not in row


def test_it_learns_from_rows_that_have_no_rejected_answer(options: TrainOptions, tmp_path: Path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in parity.PAIRS]
    alone = runs.write_pairs(tmp_path / "completions.jsonl", rows)
    runs.run(replace(options, method="sft", loss="sigmoid+sft", epochs=3))
    runs.run(replace(options, method="sft", loss="sigmoid+sft", epochs=3, data=alone, out=tmp_path / "alone"))
    assert runs.adapter_bytes(options.out) == runs.adapter_bytes(tmp_path / "alone")
    losses = [row["loss"] for row in runs.rows(options.out)]
    assert np.mean(losses[4:]) < np.mean(losses[:2])


def test_held_out_answers_are_weighed_against_the_base(options: TrainOptions):
    end = runs.run(replace(options, method="sft", loss="sigmoid+sft", holdout=0.3, epochs=4))[-1]
    assert isinstance(end, Finished)
    assert end.scores["eval_pairs"] == 2
    assert end.scores["eval_logps/chosen"] > end.scores["eval_logps/chosen_reference"]
    assert "held-out answers" in end.report.read_text()


@pytest.mark.parametrize("name", ["beta", "label_smoothing", "sft_weight"])
def test_options_of_preferences_are_refused(options: TrainOptions, name: str):
    with pytest.raises(Refusal, match=f"^--{name.replace('_', '-')} has no meaning with --method sft"):
        runs.run(replace(options, method="sft", loss="sigmoid+sft", **{name: 0.2}))
    assert not options.out.exists()


@pytest.fixture
def started(options: TrainOptions, tmp_path: Path) -> TrainOptions:
    """A DPO run that starts from a supervised one."""
    supervised = replace(options, method="sft", loss="sigmoid+sft", epochs=2, out=tmp_path / "sft")
    runs.run(replace(supervised, targets=("q_proj", "v_proj"), alpha=6.0))
    return replace(options, adapter=tmp_path / "sft", rank=None)


def test_the_start_adapter_is_the_reference(started: TrainOptions):
    runs.run(replace(started, epochs=2))
    first, *later = runs.rows(started.out)
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-6)  # sums of some 400 nats, rounded to 3e-5
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-4)
    assert later[-1]["loss"] < math.log(2)
    with_start = load(started.model)
    assert isinstance(started.adapter, Path)
    adapters.load_adapter(with_start.model, started.adapter)
    assert adapters.read_shape(started.out) == adapters.read_shape(started.adapter)
    plain = load(started.model)
    pair = runs.pairs(plain)[0]
    moved = [runs.naive_log_p(loaded.model, pair.prompt, pair.chosen) for loaded in (plain, with_start)]
    assert abs(moved[1] - moved[0]) > 1  # so that the base would not have given these zeros


def test_a_start_adapter_is_not_changed_by_what_starts_from_it(started: TrainOptions):
    assert isinstance(started.adapter, Path)
    before = {path.name: path.read_bytes() for path in started.adapter.iterdir() if path.is_file()}
    runs.run(started)
    assert {path.name: path.read_bytes() for path in started.adapter.iterdir() if path.is_file()} == before
    assert runs.adapter_bytes(started.out) != runs.adapter_bytes(started.adapter)


def test_its_record_repeats_a_run_that_started_from_an_adapter(
    started: TrainOptions, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    runs.run(started)
    assert said(f"train --config {started.out}/run.toml --out {tmp_path}/again", None, capfd).status == 0
    assert runs.adapter_bytes(started.out) == runs.adapter_bytes(tmp_path / "again")


def test_a_start_adapter_of_other_weights_is_refused(started: TrainOptions, tmp_path: Path):
    assert isinstance(started.adapter, Path)
    other = shutil.copytree(started.model, tmp_path / "other")
    arrays, _ = read_arrays(other / "model.safetensors")
    name = "model.norm.weight"
    arrays[name] = arrays[name] * 1.01
    mx.save_safetensors(str(other / "model.safetensors"), arrays, metadata={"format": "pt"})
    with pytest.raises(Refusal, match="was trained on other weights than"):
        runs.run(replace(started, model=other))
    refuse_other_base(started.adapter, started.model)
    assert not started.out.exists()
