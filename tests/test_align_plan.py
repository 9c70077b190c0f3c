"""How much is computed at once: the fastest within the limit, ever more frugal below it, and the numbers the same."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import parity
import pytest
import runs
import tiny

from mlx_dpo import cli, train
from mlx_dpo.align import plan
from mlx_dpo.align.events import Phase, Planned, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.plan import Batching, Plan
from mlx_dpo.console import plan_in_words
from mlx_dpo.data.batches import Order
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import lanes
from mlx_dpo.models.load import on_cpu
from mlx_dpo.models.scoring import LOGIT_BYTES
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TEMPLATE = 20  # tokens of it, which are never cut, at most
WIDE = tiny.FAMILIES["llama"] | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations outweigh its parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, "wide", WIDE)
        return tiny.write_model(tmp_path_factory.mktemp("wide") / "model", "wide")


def longer(row: dict[str, Any], prompt: int = 1, answer: int = 1) -> dict[str, Any]:
    return row | {
        "prompt": " ".join([row["prompt"]] * prompt),
        "chosen": " ".join([row["chosen"]] * answer),
        "rejected": " ".join([row["rejected"]] * answer),
    }


@pytest.fixture
def options(wide: Path, tmp_path: Path) -> TrainOptions:
    data = runs.write_pairs(tmp_path / "pairs.jsonl", [longer(row, 2, 2) for row in parity.PAIRS])
    return runs.options(wide, data, tmp_path / "out", batch_size=8)


def dry(options: TrainOptions) -> Plan:
    """The plan of a dry run, which does nothing else."""
    events = runs.run(replace(options, dry_run=True))
    assert not options.out.exists()
    (planned,) = [event.plan for event in events if isinstance(event, Planned)]
    return planned


def descent(options: TrainOptions) -> list[Plan]:
    """The plans of ever lower limits, each just below what the one before would take; the last one fits in none."""
    found = [dry(replace(options, memory_limit=1e3))]
    while len(found) < 40:
        limit = found[-1].memory_gb * (1 - 1e-9)
        found.append(dry(replace(options, memory_limit=limit)))
        if found[-1].memory_gb > limit:
            return found[:-1]
    raise AssertionError("there is no end of it")


def least(options: TrainOptions) -> float:
    """What the most frugal plan takes, in GB."""
    return dry(replace(options, memory_limit=1e-6)).memory_gb


def frugality(batching: Batching) -> tuple[bool, int, float]:
    return batching.recompute, -batching.logit_bytes, -(batching.at_once or np.inf)


METHODS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "sft": {"method": "sft", "loss": TrainOptions.loss},
    "text": {"method": "sft", "loss": TrainOptions.loss},
    "kto": {"loss": "kto"},
}


def of_kind(options: TrainOptions, kind: str) -> TrainOptions:
    rows: list[dict[str, Any]] = [longer(row, 2, 2) for row in parity.PAIRS]
    if kind == "kto":
        rows = [row | {"completion": f"{row['completion']} {row['completion']}"} for row in parity.LABELLED]
    if kind == "text":
        rows = [{"text": (row["chosen"] + " ") * 3} for row in parity.PAIRS]
    return replace(options, data=runs.write_pairs(options.data.parent / f"{kind}.jsonl", rows), **METHODS[kind])


@pytest.mark.parametrize("kind", METHODS)
def test_lower_limits_give_ever_more_frugal_plans_that_fit(options: TrainOptions, kind: str):
    chosen = of_kind(options, kind)
    plans = descent(chosen)
    assert len(plans) >= 4
    assert plans[0].batching.recompute is False
    assert plans[0].batching.logit_bytes == LOGIT_BYTES
    assert plans[-1].batching.recompute is True
    for before, after in pairwise(plans):
        assert frugality(before.batching) < frugality(after.batching)
        assert after.memory_gb < before.memory_gb
        if before.batching.recompute == after.batching.recompute:
            assert after.at_once <= before.at_once
    for limit in np.linspace(plans[-1].memory_gb, plans[0].memory_gb, 7):
        found = dry(replace(chosen, memory_limit=float(limit)))
        assert found.memory_gb <= limit
        # The first that fits: no faster one does.
        assert found.batching == next(one.batching for one in plans if one.memory_gb <= limit)


def pairs(count: int, prompt: int, answer: int) -> list[TokenisedPair]:
    made = []
    for number in range(count):
        words = [5 + (number + i) % 90 for i in range(answer + number % 3)]
        made.append(TokenisedPair([number + 1] * prompt, words, [*words[1:], 3], f"row {number}"))
    return made


def test_chunks_of_the_head_shrink_last(options: TrainOptions):
    config = WIDE | {"vocab_size": 50_000}
    train, order = pairs(8, 20, 100), Order(8, 4, 1, 0, shuffle=True)
    chosen = replace(options, batch_size=4, rank=8)
    found = [plan.batched(chosen, config, train, order, 1e3)]
    while found[-1][0] != found[-2][0] if len(found) > 1 else True:
        found.append(plan.batched(chosen, config, train, order, found[-1][1] * (1 - 1e-9) / 1e9))
    *larger, smallest, same = [batching for batching, _, _ in found]
    assert smallest == same
    assert smallest.logit_bytes < LOGIT_BYTES
    assert all(batching.logit_bytes == LOGIT_BYTES for batching in larger)
    assert smallest.recompute


def test_with_room_enough_as_much_is_computed_at_once_as_is_fast(options: TrainOptions):
    short, long = pairs(64, 5, 5), pairs(64, 100, 100)
    order = Order(64, 16, 2, 0, shuffle=True)
    chosen = replace(options, batch_size=16, rank=8)
    _, _, count = plan.batched(chosen, WIDE | {"vocab_size": 400}, short, order, 1e3)
    assert count == 16
    batching, _, count = plan.batched(chosen, WIDE | {"vocab_size": 400}, long, order, 1e3)
    if on_cpu():  # a lane of 512 tokens is full
        full = 512 * lanes.count()
        assert batching.at_once == full
        assert count == full // plan.cost(long[1], shared=True)
    else:
        assert count == 16


def test_gradient_checkpointing_that_is_asked_for_stays(options: TrainOptions):
    forced = replace(options, grad_checkpoint=True)
    assert all(found.batching.recompute for found in descent(forced))


def test_a_dry_run_prints_the_plan(options: TrainOptions, capfd: pytest.CaptureFixture[str]):
    words = f"train --model {options.model} --data {options.data} --out {options.out} --batch-size 8 --dry-run"
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 0
    expected = dry(replace(options, loss=TrainOptions.loss, rank=8, learning_rate=None))
    assert capfd.readouterr().out.split() == plan_in_words(expected).split()
    assert not options.out.exists()


def losses(out: Path) -> list[float]:
    return [row[name] for row in runs.rows(out) for name in ("loss", "eval_loss", "grad_norm") if name in row]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("pairs", {}),
        ("pairs", {"loss": "aot", "grad_accumulation": 2}),
        ("sft", {}),
        ("text", {"max_length": 30}),
        ("kto", {}),
    ],
    ids=str,
)
def test_a_tight_limit_changes_no_number(options: TrainOptions, kind: str, change: dict[str, Any]):
    chosen = replace(of_kind(options, kind), steps=3, batch_size=4, **change)
    tight = replace(chosen, out=options.out.parent / "tight", memory_limit=least(chosen) * 1.001)
    assert dry(tight).at_once < dry(chosen).at_once
    runs.run(chosen)
    runs.run(tight)
    assert losses(tight.out) == pytest.approx(losses(chosen.out), rel=1e-5, abs=5e-6)


on_two_cores = pytest.mark.skipif(
    not on_cpu() or lanes.count() != 2, reason="fitted on two cores; others keep other things"
)


def peaks(options: TrainOptions) -> tuple[float, float]:
    """The most memory taken before the first step, and by a step, in GB beyond what was taken already."""
    mx.clear_cache()
    mx.reset_peak_memory()
    already = mx.get_active_memory() / 1e9
    before = steps = 0.0
    for event in train.run(options):
        if isinstance(event, Stepped):
            steps = max(steps, event.numbers["peak_memory_gb"])
        elif not steps:
            before = max(before, mx.get_peak_memory() / 1e9)
    return before - already, steps - already


@on_two_cores
@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_steps_stay_within_the_limit(options: TrainOptions, share: float):
    """Between the most frugal plan (0) and the fastest (1)."""
    low, high = least(options), dry(options).memory_gb
    limit = 1.001 * (low + share * (high - low))
    assert peaks(replace(options, memory_limit=limit, steps=2))[1] < 1.15 * limit


@on_two_cores
def test_what_comes_before_the_steps_stays_within_the_limit_too(options: TrainOptions):
    rows = [longer(row | {"prompt": f"{number}. {row['prompt']}"}) for number in range(4) for row in parity.PAIRS]
    many = replace(options, data=runs.write_pairs(options.data, rows), batch_size=32)
    limit = 1.001 * least(many)
    assert peaks(replace(many, memory_limit=limit, steps=1))[0] < 1.15 * limit


def refused(options: TrainOptions) -> str:
    """The sentence of a run that does not fit, and that has not begun."""
    events = []
    with pytest.raises(Refusal) as fault:
        events.extend(train.run(options))
    assert not any(isinstance(event, Phase) for event in events)
    assert not options.out.exists()
    return str(fault.value)


# The longest text alone does not decide: a short prompt with two long answers comes after it when all are cut.
SHAPES: dict[str, Sequence[tuple[int, int]]] = {
    "alike": [(2, 2)] * 8,
    "long prompts": [(6, 1)] * 8,
    "long answers": [(1, 6)] * 8,
    "a long prompt among long answers": [(9, 1), (1, 4), (1, 4), (1, 3), (1, 4), (1, 3), (1, 4), (1, 4)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_length_that_is_named_fits_and_is_about_the_greatest(options: TrainOptions, shape: str):
    rows = [longer(row, *times) for row, times in zip(parity.PAIRS, SHAPES[shape], strict=True)]
    chosen = replace(options, data=runs.write_pairs(options.data.parent / "shaped.jsonl", rows))
    floor = least(replace(chosen, max_length=40))
    assert_named_length_fits(chosen, floor + 0.6 * (least(chosen) - floor))


@pytest.mark.parametrize("kind", ["sft", "text", "kto"])
def test_the_length_that_is_named_fits_for_other_methods_too(options: TrainOptions, kind: str):
    chosen = of_kind(options, kind)
    floor = least(replace(chosen, max_length=30))
    assert_named_length_fits(chosen, floor + 0.5 * (least(chosen) - floor))


def assert_named_length_fits(chosen: TrainOptions, limit: float) -> None:
    sentence = refused(replace(chosen, memory_limit=limit))
    found = re.search(r"--max-length (\d+) would fit, or raise --memory-limit", sentence)
    assert found, sentence
    length = int(found[1])
    assert dry(replace(chosen, memory_limit=limit, max_length=length)).memory_gb <= limit
    assert dry(replace(chosen, memory_limit=limit, max_length=length + TEMPLATE)).memory_gb > limit
    runs.run(replace(chosen, memory_limit=limit, max_length=length, steps=1))


def test_where_no_length_fits_another_model_is_named(options: TrainOptions):
    assert "use a smaller model or adapt fewer --layers, or raise" in refused(replace(options, memory_limit=1e-6))


def test_it_is_refused_before_the_model_is_loaded(options: TrainOptions, tmp_path: Path):
    broken = shutil.copytree(options.model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(
        (broken / "model.safetensors").read_bytes().replace(b"model.norm.weight", b"model.morn.weight")
    )
    assert "may be used" in refused(replace(options, model=broken, memory_limit=1e-3))
    with pytest.raises(Refusal, match="does not hold a whole llama model"):
        runs.run(replace(options, model=broken))
