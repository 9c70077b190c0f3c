"""What a run need not compute: what lies below the adapters, a prompt twice. No number changes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import pytest
import runs
import shortcuts
import tiny
from mlx_lm.models import llama
from shortcuts import PLACE, Folder, assert_close, assert_same_adapter, numbers

from mlx_dpo import train
from mlx_dpo.align.events import Note, Phase, Stepped
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import load

cache = shortcuts.cache
options = shortcuts.options
deep_model = shortcuts.deep_model
deep = shortcuts.deep
reference_passes = shortcuts.reference_passes


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
