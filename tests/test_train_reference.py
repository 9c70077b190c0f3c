"""What the reference said is computed once, and believed only where it is the same reference."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import parity
import pytest
import runs
import shortcuts
from shortcuts import PLACE, assert_close, numbers

from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models.arrays import read_arrays

cache = shortcuts.cache
options = shortcuts.options
deep_model = shortcuts.deep_model
deep = shortcuts.deep
reference_passes = shortcuts.reference_passes


def test_a_sweep_computes_the_reference_once(options: TrainOptions, reference_passes: list[int]):
    runs.run(options)
    assert sum(reference_passes) == 2 * len(parity.PAIRS)
    reference_passes.clear()
    first = runs.rows(options.out)
    for number, change in enumerate([{"beta": 0.4, "rank": 2}, {"loss": "ipo", "learning_rate": 1e-3}]):
        again = replace(options, out=options.out.parent / str(number), **change)
        runs.run(again)
        assert reference_passes == []
        row = runs.rows(again.out)[0]
        assert row["logps/chosen"] == pytest.approx(first[0]["logps/chosen"], rel=1e-6)
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("change", [{}, {"loss": "kto"}, {"loss": "sigmoid+sft", "ld_alpha": 0.5}], ids=str)
def test_the_same_run_again_is_the_same_to_the_bit(
    options: TrainOptions, reference_passes: list[int], change: dict[str, Any]
):
    options = replace(options, **change)
    if "kto" in str(change):
        options = replace(options, data=runs.write_pairs(options.data, parity.LABELLED))
    runs.run(options)
    assert reference_passes
    reference_passes.clear()
    again = replace(options, out=options.out.parent / "again")
    runs.run(again)
    assert reference_passes == []
    assert runs.rows(again.out) == runs.rows(options.out)
    assert runs.adapter_bytes(again.out) == runs.adapter_bytes(options.out)


def test_a_resumed_run_computes_no_reference(options: TrainOptions, reference_passes: list[int]):
    runs.run(replace(options, save_every=1), 2)
    reference_passes.clear()
    runs.run(replace(options, save_every=1, resume=True))
    assert reference_passes == []
    whole = replace(options, out=options.out.parent / "whole")
    runs.run(whole)
    assert runs.rows(options.out) == runs.rows(whole.out)


def test_with_new_pairs_only_those_are_computed(options: TrainOptions, reference_passes: list[int]):
    few = runs.write_pairs(options.data.parent / "few.jsonl", parity.PAIRS[:5])
    runs.run(replace(options, data=few, holdout=None))
    reference_passes.clear()
    runs.run(replace(options, out=options.out.parent / "more"))
    assert sum(reference_passes) == 2 * len(parity.PAIRS[5:])


def test_a_start_adapter_is_another_reference(options: TrainOptions):
    runs.run(options)
    start = replace(options, adapter=options.out, out=options.out.parent / "further", rank=None)
    runs.run(start)
    fresh = replace(start, out=options.out.parent / "fresh", disk_limit=0)
    runs.run(fresh)
    assert_close(numbers(start.out), numbers(fresh.out))
    assert runs.rows(start.out)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_with_no_disk_nothing_is_written(deep: TrainOptions, cache: Path, reference_passes: list[int]):
    cache.mkdir()
    for out in ("one", "two"):
        reference_passes.clear()
        runs.run(replace(deep, out=deep.out.parent / out, disk_limit=0))
        assert sum(reference_passes) == 2 * len(parity.PAIRS)
    assert list(cache.iterdir()) == []


def test_nothing_but_numbers_of_the_reference_stays(deep: TrainOptions, cache: Path):
    runs.run(deep)
    assert [path.name for path in cache.iterdir()] == [PLACE]
    written = (cache / PLACE).read_bytes()
    assert not any(word.encode() in written for word in ("mother", "calm", "Redirect"))


def stretched(model: Path) -> None:
    arrays, _ = read_arrays(model / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 1.1
    mx.save_safetensors(str(model / "model.safetensors"), arrays, metadata={"format": "pt"})


def turned(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))


def scaled(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_parameters"]["scale"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [stretched, turned, scaled])
def test_another_model_in_the_same_place_has_its_own_numbers(options: TrainOptions, change: Callable[[Path], None]):
    here = options.out.parent
    model = shutil.copytree(options.model, here / "model")
    options = replace(options, model=model, alpha=None)
    runs.run(options)
    (options.out / "manifest.json").unlink()  # so that the start adapter may be another
    further = replace(options, adapter=options.out, rank=None) if change is scaled else options
    runs.run(replace(further, out=here / "before"))
    change(options.out if change is scaled else model)
    runs.run(replace(further, out=here / "after"))
    runs.run(replace(further, out=here / "fresh", disk_limit=0))
    before, after, fresh = (numbers(here / name) for name in ("before", "after", "fresh"))
    assert_close(after, fresh)
    assert abs(after[0]["logps/chosen"] - before[0]["logps/chosen"]) > 0.01


@pytest.mark.parametrize("layers", [None, 1])
def test_a_cache_that_cannot_be_is_done_without(options: TrainOptions, cache: Path, layers: int | None):
    cache.write_text("a file in its place")
    runs.run(replace(options, layers=layers))
    assert (options.out / "manifest.json").exists()


def test_a_damaged_cache_is_done_without(options: TrainOptions, cache: Path):
    runs.run(options)
    whole = (cache / PLACE).read_bytes()
    middle = len(whole) // 2
    (cache / PLACE).write_bytes(whole[:middle] + bytes(b ^ 0x10 for b in whole[middle:]))
    again = replace(options, out=options.out.parent / "again")
    runs.run(again)
    assert_close(numbers(again.out), numbers(options.out))


# What lies below the adapters
