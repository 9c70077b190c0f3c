"""The whole loop on every architecture that a recipe names: adapter, training, mlx-lm, fuse, chat."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
import parity
import pytest
import runs
import tiny

from mlx_dpo import fuse
from mlx_dpo.align import checkpoint
from mlx_dpo.align.events import Finished
from mlx_dpo.chat.engine import open_conversation
from mlx_dpo.chat.options import Sampling
from mlx_dpo.convert.fuse_options import FuseOptions
from mlx_dpo.models.adapters import switched_off
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.models.scoring import parts
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TOKENS = mx.array([[1, 17, 30, 8, 9, 12, 40, 2] * 5])  # longer than Gemma's sliding window


class Aligned(NamedTuple):
    """A model of one family and a finished run of four steps on it."""

    model: Path
    adapter: Path
    data: Path
    finished: Finished


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def aligned(request: pytest.FixtureRequest, tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    here = tmp_path_factory.mktemp(f"{request.param}-run")
    runs.write_pairs(here / "data" / "train.jsonl", parity.PAIRS[:5])
    runs.write_pairs(here / "data" / "valid.jsonl", parity.PAIRS[5:])
    model = tiny_folder(request.param)
    end = runs.run(runs.options(model, here / "data", here / "out", batch_size=5, epochs=4, samples=2))[-1]
    assert isinstance(end, Finished)
    return Aligned(model, here / "out", here / "data", end)


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """What plain mlx-lm computes."""
    loaded, *_ = mlx_lm.load(str(model), adapter_path=str(adapter) if adapter else None)
    return np.array(loaded(TOKENS).astype(mx.float32))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_trunk_and_head_are_the_whole(tiny_folder: Folder, family: str):
    model = load(tiny_folder(family)).model
    cut = parts(model)
    assert cut.head is not None
    assert mx.array_equal(cut.head(cut.trunk(TOKENS)[0]), model(TOKENS)[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fresh_adapter_changes_no_bit_and_a_used_one_does(tiny_folder: Folder, family: str):
    plain = load(tiny_folder(family)).model(TOKENS)
    assert mx.array_equal(runs.adapted(tiny_folder(family)).model(TOKENS), plain)
    used = runs.adapted(tiny_folder(family), seed=1).model
    assert mx.abs(used(TOKENS) - plain).max() > 0.1
    with switched_off(used):
        assert mx.array_equal(used(TOKENS), plain)


def test_training_starts_at_ln_2_without_rewards_and_learns(aligned: Aligned):
    first, *later = [row for row in runs.rows(aligned.adapter) if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-6)  # sums of some 400 nats, rounded to 3e-5
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-4)
    losses = [first["loss"]] + [row["loss"] for row in later]
    assert losses == sorted(losses, reverse=True)
    assert later[-1]["rewards/accuracies"] == 1


def test_the_folder_holds_the_weights_that_the_run_ended_with(aligned: Aligned):
    saved, _ = read_arrays(aligned.adapter / "adapters.safetensors")
    found = checkpoint.newest(aligned.adapter / "checkpoints")
    assert found is not None
    trained = {name: value for name, value in found.state.arrays.items() if name.startswith("adapter.")}
    assert {f"adapter.{name}" for name in saved} == trained.keys()
    assert all(mx.array_equal(value, trained[f"adapter.{name}"]) for name, value in saved.items())


def test_mlx_lm_says_what_the_run_measured(aligned: Aligned):
    model, tokenizer, *_ = mlx_lm.load(str(aligned.model), adapter_path=str(aligned.adapter))
    held_out = runs.pairs(Loaded(model, tokenizer, {}, aligned.model))[5:]  # type: ignore[arg-type]
    chosen = np.mean([runs.naive_log_p(model, pair.prompt, pair.chosen) for pair in held_out])
    rejected = np.mean([runs.naive_log_p(model, pair.prompt, pair.rejected) for pair in held_out])
    assert aligned.finished.scores["eval_logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert aligned.finished.scores["eval_logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def test_samples_are_what_mlx_lm_generates_with_the_adapter_and_without(aligned: Aligned):
    for sample, row in zip(aligned.finished.samples, parity.PAIRS[5:], strict=False):
        assert sample.question == row["prompt"]
        assert sample.unseen
        for adapter, answer in ((None, sample.before), (str(aligned.adapter), sample.after)):
            model, tokenizer, *_ = mlx_lm.load(str(aligned.model), adapter_path=adapter)
            turns = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).strip() == answer.removesuffix(" …")


def test_fused_is_base_with_adapter_in_plain_mlx_lm(aligned: Aligned, tmp_path: Path):
    options = FuseOptions(model=aligned.model, adapter=aligned.adapter, out=tmp_path / "fused", pairs=3)
    *_, end = fuse.run(options, aligned.data / "valid.jsonl")
    assert isinstance(end, fuse.Fused)
    with_adapter = logits(aligned.model, aligned.adapter)
    assert np.abs(logits(tmp_path / "fused") - with_adapter).max() < 1e-3
    assert np.abs(logits(aligned.model) - with_adapter).max() > 0.1
    assert end.fidelity.survived == pytest.approx(1, abs=1e-3)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config == json.loads((aligned.model / "config.json").read_text())


def test_a_turn_of_chat_is_spoken_with_the_adapter(aligned: Aligned):
    talk = open_conversation(aligned.model, aligned.adapter, Sampling(temperature=0, max_tokens=6))
    ids = talk.prompt("Is it all right to cry?")
    model, tokenizer, *_ = mlx_lm.load(str(aligned.model), adapter_path=str(aligned.adapter))
    expected = mlx_lm.generate(model, tokenizer, ids, max_tokens=6)
    if expected.strip():
        assert talk.answer("Is it all right to cry?").text == expected.rstrip("\ufffd")
    else:
        with pytest.raises(Refusal, match="empty answer"):
            talk.answer("Is it all right to cry?")
