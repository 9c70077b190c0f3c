"""What a run need not compute: the reference again, what lies below the adapters, a prompt twice. No number changes."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import parity
import pytest
import runs
import tiny
from mlx_lm.models import llama

from mlx_dpo import train
from mlx_dpo.align.events import Note, Phase, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import load
from mlx_dpo.models.lora import adapted_layers

Folder = Callable[[str], Path]
Row = dict[str, Any]
PLACE = "reference.sqlite"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for what is remembered."""
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path, cache: Path) -> TrainOptions:
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    return runs.options(tiny_folder("llama"), data, tmp_path / "out", holdout=0.3, batch_size=2)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, "deep", tiny.FAMILIES["llama"] | {"num_hidden_layers": 4})
        return tiny.write_model(tmp_path_factory.mktemp("deep") / "model", "deep")


@pytest.fixture
def deep(options: TrainOptions, deep_model: Path) -> TrainOptions:
    return replace(options, model=deep_model, layers=1, epochs=2)


@pytest.fixture
def reference_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass without the adapter has gone over, filled as the runs go."""
    original, passes = Forward.token_logps, []

    def counting(self: Forward, rows: Any, *args: Any, **kwargs: Any) -> mx.array:
        if not adapted_layers(self.model):
            passes.append(len(rows.said))
        return original(self, rows, *args, **kwargs)

    monkeypatch.setattr(Forward, "token_logps", counting)
    return passes


def numbers(out: Path) -> list[Row]:
    kept = [{name: v for name, v in row.items() if isinstance(v, int | float)} for row in runs.rows(out)]
    # A quotient of differences, and the sign of one, in which rounding is anything.
    still = [abs(row.get("rewards/margins", 1)) < 5e-4 for row in kept]
    return [
        {name: v for name, v in row.items() if "opening_share" not in name and not ("accuracies" in name and at_rest)}
        for row, at_rest in zip(kept, still, strict=True)
    ]


def assert_close(rows: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        # Rewards are differences of sums of some 400 nats.
        assert row == pytest.approx(other, rel=1e-4, abs=5e-4)
        losses = [(row[name], other[name]) for name in ("loss", "eval_loss") if name in row]
        assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in losses)


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = (read_arrays(out / "adapters.safetensors")[0] for out in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert mx.allclose(value, theirs[name], rtol=1e-3, atol=1e-5), name


# The reference


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


class Blocks:
    """Counts how often each block of a model is computed, from the bottom up, since the last look."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.calls: Counter[int] = Counter()
        self.models: list[Any] = []

    def forget(self) -> None:
        """Number the blocks of the next model from 0 again."""
        self.numbers.clear()
        self.calls.clear()

    def called(self, block: Any) -> None:
        self.models.append(block)  # so that no number is given out again
        self.calls[self.numbers.setdefault(id(block), len(self.numbers))] += 1

    def since(self) -> list[int]:
        found = [self.calls[number] for number in range(4)]
        self.calls.clear()
        return found


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    original, found = llama.TransformerBlock.__call__, Blocks()

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.called(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", counting)
    return found


_BELOW = "Computing what lies below the adapters"


def watched(options: TrainOptions, computed: Blocks) -> tuple[list[int], list[list[int]]]:
    """Calls of each block while those below the adapters are computed beforehand, and in each part of the run after."""
    computed.forget()
    beforehand, later = [0] * 4, []
    for event in train.run(options):
        if isinstance(event, Phase) and event.name == _BELOW:
            beforehand = [a + b for a, b in zip(beforehand, computed.since(), strict=True)]
        elif any(beforehand) or isinstance(event, Stepped):
            later.append(computed.since())
    return beforehand, [calls for calls in later if any(calls)]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_lower_blocks_are_computed_once_for_reference_and_policy(
    deep: TrainOptions, computed: Blocks, recompute: bool
):
    beforehand, later = watched(replace(deep, grad_checkpoint=recompute), computed)
    assert beforehand[0] == beforehand[1] == beforehand[2] > 0
    assert len(later) > 6
    assert all(calls[:3] == [0, 0, 0] for calls in later)
    assert all(calls[3] > 0 for calls in later)


def test_without_a_disk_they_are_computed_in_every_step(deep: TrainOptions, computed: Blocks):
    _, later = watched(replace(deep, disk_limit=0), computed)
    assert all(calls[0] > 0 for calls in later)


def test_where_the_reference_was_known_they_are_computed_once_all_the_same(deep: TrainOptions, computed: Blocks):
    runs.run(replace(deep, out=deep.out.parent / "before"))
    beforehand, later = watched(replace(deep, epochs=3), computed)
    assert beforehand[0] > 0
    assert all(calls[0] == 0 for calls in later)


def half_of_it(options: TrainOptions) -> float:
    """Half of what the states of all pairs take, in GB."""
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in runs.pairs(load(options.model)))
    return 0.5e-9 * 4 * 64 * tokens


@pytest.fixture(scope="module")
def expected(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with nothing kept."""
    here = tmp_path_factory.mktemp("expected")
    data = runs.write_pairs(here / "pairs.jsonl")
    more = {"holdout": 0.3, "layers": 1, "epochs": 2, "batch_size": 2, "disk_limit": 0}
    runs.run(runs.options(deep_model, data, here / "out", **more))
    return here / "out"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("limit", [half_of_it, lambda _: None], ids=["half", "all"])
def test_what_is_kept_changes_no_number(
    deep: TrainOptions, expected: Path, limit: Callable[[TrainOptions], float | None], recompute: bool
):
    runs.run(replace(deep, disk_limit=limit(deep), grad_checkpoint=recompute))
    assert_close(numbers(deep.out), numbers(expected))
    assert_same_adapter(deep.out, expected)


def test_half_the_room_holds_half(deep: TrainOptions, computed: Blocks):
    _, without = watched(replace(deep, out=deep.out.parent / "without", disk_limit=0, batch_size=1), computed)
    _, with_half = watched(replace(deep, disk_limit=half_of_it(deep), batch_size=1), computed)
    assert 0 < sum(calls[0] for calls in with_half) < 0.8 * sum(calls[0] for calls in without)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for a product of matrices to come out otherwise beside other rows, in its last bits."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, "wide", tiny.FAMILIES["llama"] | sizes)
        return tiny.write_model(tmp_path_factory.mktemp("wide") / "model", "wide")


@pytest.mark.parametrize("stop_after", [1, 3])
def test_such_a_run_resumes_to_the_same_bytes(deep: TrainOptions, wide_model: Path, cache: Path, stop_after: int):
    ragged = [row | {"chosen": " ".join([row["chosen"]] * (1 + i % 4))} for i, row in enumerate(parity.PAIRS)]
    wide = replace(deep, model=wide_model, data=runs.write_pairs(deep.data, ragged), batch_size=3, save_every=1)
    whole = replace(wide, out=deep.out.parent / "whole")
    runs.run(whole)
    (cache / PLACE).unlink()
    runs.run(wide, stop_after)
    runs.run(replace(wide, resume=True))
    assert runs.rows(wide.out) == runs.rows(whole.out)
    assert runs.adapter_bytes(wide.out) == runs.adapter_bytes(whole.out)


def test_text_in_pieces_of_any_length_is_kept(deep: TrainOptions):
    words = " ".join(pair["chosen"] for pair in parity.PAIRS)
    lengths = [{"text": words[: 40 + number]} for number in range(12)]
    data = runs.write_pairs(deep.data.parent / "text.jsonl", lengths)
    more = {"method": "sft", "loss": TrainOptions.loss, "max_length": 8, "epochs": 3, "holdout": None}
    text = replace(deep, data=data, **more)
    runs.run(text)
    plain = replace(text, out=deep.out.parent / "plain", disk_limit=0)
    runs.run(plain)
    assert_close(numbers(text.out), numbers(plain.out))


# What a model does not allow


def notes(events: Sequence[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


@pytest.mark.parametrize(
    ("family", "shares"), [("llama", True), ("gemma3_text", True), ("gemma2", False), ("mamba", False)]
)
def test_a_model_that_cannot_share_prompts_says_so_and_learns(
    options: TrainOptions, tiny_folder: Folder, family: str, shares: bool
):
    said = notes(runs.run(replace(options, model=tiny_folder(family), epochs=2)))
    assert [text.startswith("This model cannot go on from a prompt") for text in said] == [True] * (not shares)
    losses = [row["loss"] for row in runs.rows(options.out) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=5e-6)
    assert min(losses[3:]) < losses[0]


def test_where_there_is_nothing_to_share_nothing_is_said(options: TrainOptions, tiny_folder: Folder):
    answers = replace(options, model=tiny_folder("gemma2"), method="sft", loss=TrainOptions.loss)
    assert notes(runs.run(answers)) == []


def test_losses_fall_alike_with_the_prompt_shared_and_with_it_computed_twice(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
):
    runs.run(options)
    of = Forward.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Forward, "of", classmethod(lambda cls, model: replace(of(cls, model), shares=False)))
    alone = replace(options, out=options.out.parent / "alone", disk_limit=0)
    assert len(notes(runs.run(alone))) == 1
    assert_close(numbers(alone.out), numbers(options.out))
