"""A run as planned, as recorded, and what one that must not end well leaves behind: nothing that looks finished."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import parity
import pytest
import runs

from mlx_dpo import train
from mlx_dpo.align import objectives
from mlx_dpo.align.events import Evaluated, Finished, Planned, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.load import load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> TrainOptions:
    return runs.options(tiny_folder("llama"), runs.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")


def test_a_base_with_a_number_that_is_none_trains_nothing(options: TrainOptions, tmp_path: Path):
    broken = shutil.copytree(options.model, tmp_path / "broken")
    arrays, _ = read_arrays(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name] * mx.array(math.nan)
    mx.save_safetensors(str(broken / "model.safetensors"), arrays, metadata={"format": "pt"})
    with pytest.raises(Refusal, match="not finite"):
        runs.run(replace(options, model=broken))
    assert not options.out.exists()


def test_a_run_that_breaks_down_leaves_nothing_that_looks_finished(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
):
    def fragile(margin: mx.array, beta: float = 0.1) -> mx.array:
        return mx.where(mx.abs(margin) > 1e-3, mx.array(math.inf), objectives.sigmoid(margin, beta))

    monkeypatch.setitem(objectives.TERMS, "sigmoid", (fragile,))
    with pytest.raises(Refusal, match="^Step 2 gave a loss of inf .* lower --learning-rate.* until step 1 is saved"):
        runs.run(replace(options, epochs=4, save_every=0))
    left = {path.name for path in options.out.iterdir()}
    assert left == {"run.toml", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    assert [path.name for path in (options.out / "checkpoints").iterdir()] == ["step-00000001.safetensors"]
    assert [row["step"] for row in runs.rows(options.out)] == [1]


def test_a_dry_run_plans_and_writes_nothing(options: TrainOptions):
    (planned,) = runs.run(replace(options, dry_run=True, epochs=2, batch_size=3))
    assert isinstance(planned, Planned)
    loaded = load(options.model)
    items = runs.pairs(loaded)
    lengths = [len(pair.prompt) + len(answer) for pair in items for answer in (pair.chosen, pair.rejected)]
    plan = planned.plan
    assert (plan.pairs, plan.held_out, plan.tokens, plan.longest) == (8, 0, sum(lengths), max(lengths))
    assert (plan.steps_an_epoch, plan.steps) == (3, 6)
    assert plan.at_once == 3
    assert 4 * sum(value.size for _, value in runs.named(loaded.model.parameters())) < plan.memory_gb * 1e9 < 1e8


def test_the_plan_is_what_happens(options: TrainOptions):
    events = runs.run(replace(options, epochs=2, batch_size=3))
    planned = next(event for event in events if isinstance(event, Planned))
    rows = runs.rows(options.out)
    assert len(rows) == planned.plan.steps
    assert rows[-1]["num_tokens"] == 2 * planned.plan.tokens


def test_steps_win_over_epochs(options: TrainOptions):
    runs.run(replace(options, epochs=9, steps=3))
    assert len(runs.rows(options.out)) == 3


def test_evaluation_comes_when_asked_for_and_at_the_end(options: TrainOptions):
    events = runs.run(replace(options, holdout=0.3, eval_every=2, batch_size=2, epochs=2))
    found = [event for event in events if isinstance(event, Evaluated)]
    rows = [row for row in runs.rows(options.out) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [event.numbers for event in found] == rows


def test_memory_beyond_the_limit_is_refused_before_anything_is_written(options: TrainOptions):
    with pytest.raises(Refusal, match="may be used: --max-length [0-9]+ would fit, or raise --memory-limit"):
        runs.run(replace(options, memory_limit=1e-3))
    assert not options.out.exists()


def test_the_manifest_names_base_data_adapter_and_versions(options: TrainOptions):
    runs.run(replace(options, holdout=0.3))
    facts = json.loads((options.out / "manifest.json").read_text())

    def sha(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert facts["base"]["sha256"] == {"model.safetensors": sha(options.model / "model.safetensors")}
    assert facts["adapter"]["sha256"] == sha(options.out / "adapters.safetensors")
    assert facts["versions"].keys() >= {"mlx", "mlx-lm", "mlx-dpo"}
    assert facts["scores"]["eval_pairs"] == 2


@pytest.mark.parametrize(("rows", "flags", "held_out"), [(120, {}, 12), (99, {}, 0), (120, {"holdout": 0.0}, 0)])
def test_of_many_pairs_a_tenth_is_held_out_unless_told_otherwise(
    options: TrainOptions, rows: int, flags: dict[str, float], held_out: int
):
    many = [parity.PAIRS[0] | {"prompt": f"question {number}"} for number in range(rows)]
    data = runs.write_pairs(options.data.parent / "many.jsonl", many)
    chosen = replace(options, data=data, steps=2, batch_size=2, save_every=1, **flags)
    planned = next(event for event in runs.run(chosen, 1) if isinstance(event, Planned)).plan
    assert (planned.pairs, planned.held_out) == (rows - held_out, held_out)
    assert f"holdout = {0.1 if held_out else 0.0}" in (options.out / "run.toml").read_text()
    runs.run(replace(chosen, resume=True))
    assert (options.out / "manifest.json").exists()


def test_many_rows_of_one_prompt_are_all_learnt(options: TrainOptions):
    same = [parity.PAIRS[0] | {"chosen": f"Answer {number}."} for number in range(110)]
    data = runs.write_pairs(options.data.parent / "same.jsonl", same)
    planned = next(event for event in runs.run(replace(options, data=data, dry_run=True)) if isinstance(event, Planned))
    assert (planned.plan.pairs, planned.plan.held_out) == (110, 0)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_do_not_write_into_one_folder(options: TrainOptions, resume: bool):
    first = train.run(replace(options, epochs=2, batch_size=2, save_every=1))
    second = train.run(replace(options, epochs=2, batch_size=2, save_every=1, resume=resume))
    if not resume:  # begun before the first has written anything
        next(second)
    for event in first:
        if isinstance(event, Stepped) and event.numbers["step"] == 2:
            break
    with pytest.raises(Refusal, match="Another run is writing into .*out: wait for it"):
        list(second)
    assert isinstance(list(first)[-1], Finished)
    assert [row["step"] for row in runs.rows(options.out)] == list(range(1, 9))
