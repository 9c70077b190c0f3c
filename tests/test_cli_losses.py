"""Losses on the command line: what each may be given, what is refused, data of single answers and of plain text."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import runs
from commands import TRAIN, World, said, state

from mlx_dpo.align.record import read_metrics

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss hinge --label-smoothing 0.1", "--label-smoothing has no meaning with --loss hinge"),
        ("--loss sppo_hard --simpo-gamma 0.1", "--simpo-gamma has no meaning with --loss sppo_hard"),
        ("--dpop-lambda 5", "--dpop-lambda has no meaning with --loss sigmoid+sft"),
        ("--loss sigmoid --undesirable-weight 2", "--undesirable-weight has no meaning with --loss sigmoid"),
        ("--loss apo_zero --f-divergence forward_kl", "--f-divergence cannot be used with --loss apo_zero"),
        ("--loss simpo --f-divergence js_divergence", "--f-divergence cannot be used with --loss simpo"),
        ("--loss simpo --ld-alpha 0.5", "--ld-alpha cannot be used with --loss simpo"),
        ("--loss kto --ld-alpha 0.5", "--ld-alpha cannot be used with --loss kto"),
        ("--loss aot --wpo", "--wpo cannot be used with --loss aot"),
        ("--loss kto --wpo", "--wpo cannot be used with --loss kto"),
        ("--f-alpha 0.3", "--f-alpha has no meaning without --f-divergence alpha_divergence"),
        ("--loss exo_pair --label-smoothing 0", "--label-smoothing 0 makes exo_pair's loss infinite"),
        ("--loss sft", "--loss sft compares nothing: give --method sft"),
        ("--loss kto --batch-size 1", "give a --batch-size of at least 2"),
        ("--ld-alpha 1.5", "--ld-alpha 1.5 makes no sense"),
        ("--method sft --wpo", "--wpo has no meaning with --method sft"),
        ("--method sft --on-displacement stop", "--on-displacement has no meaning with --method sft"),
        ("--lora-plus 0", "--lora-plus 0.0 makes no sense"),
        ("--keep-checkpoints 0", "--keep-checkpoints 0 makes no sense"),
        ("--patience 2", "--patience needs evaluations"),
    ],
)
def test_an_option_that_a_loss_does_not_use_is_refused_by_name(
    world: World, capfd: pytest.CaptureFixture[str], flags: str, words: str
):
    before = state(world.here)
    found = said(f"{TRAIN} {flags}", world, capfd)
    assert (found.status, words in found.sentence) == (1, True), found.messages
    assert state(world.here) == before


@pytest.mark.parametrize("loss", ["sigmod", "sigmoid,sft", "kto+sigmoid", "2*", "sigmoid+0*sft", "inf*sigmoid"])
def test_a_loss_that_there_is_not_is_wrong_usage(world: World, capfd: pytest.CaptureFixture[str], loss: str):
    found = said(f"{TRAIN} --loss {loss}", world, capfd)
    assert found.status == 2
    assert "--loss" in found.sentence
    assert not world.out.exists()


@pytest.mark.parametrize(
    ("flags", "resolved"),
    [
        ("", {"loss": "sigmoid+sft", "beta": 0.1, "label-smoothing": 0.0, "learning-rate": 0.001}),
        ("--loss simpo", {"beta": 2.0, "simpo-gamma": 0.5}),
        ("--loss sigmoid_norm", {"beta": 5.0}),
        ("--loss exo_pair --beta 0.2", {"beta": 0.2, "label-smoothing": 0.001}),
        ("--loss discopop", {"discopop-tau": 0.05}),
        ("--loss dpop", {"dpop-lambda": 50.0}),
        ("--loss sigmoid --f-divergence alpha_divergence", {"f-alpha": 0.5}),
        ("--loss kto --undesirable-weight 1.5", {"desirable-weight": 1.0, "undesirable-weight": 1.5}),
    ],
)
def test_the_record_says_what_open_options_came_to(
    world: World, capfd: pytest.CaptureFixture[str], flags: str, resolved: dict[str, object]
):
    assert said(f"{TRAIN} {flags}", world, capfd).status == 0
    record = tomllib.loads((world.out / "run.toml").read_text())
    assert {name: record.get(name) for name in resolved} == resolved


def test_the_short_way_and_the_mix_are_the_same_run(world: World, capfd: pytest.CaptureFixture[str]):
    ways = {"a": "--sft-weight 0.5", "b": "--loss sigmoid+0.5*sft", "c": "--loss sigmoid --sft-weight 0.5"}
    for name, flags in ways.items():
        assert said(f"{TRAIN.replace('{out}', f'{world.here}/{name}')} {flags}", world, capfd).status == 0
    rows = [runs.rows(world.here / name) for name in ways]
    assert rows[0] == rows[1] == rows[2]
    assert said(f"{TRAIN} --sft-weight 0", world, capfd).status == 0
    assert runs.rows(world.out)[0]["loss"] == pytest.approx(0.693147, abs=5e-6)


THUMBS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for side in ("chosen", "rejected")
    for pair in parity.PAIRS
]


def test_thumbs_and_the_pairs_they_come_from_are_the_same_run(world: World, capfd: pytest.CaptureFixture[str]):
    command = "train --model {model} --data {pairs} --out {out} --loss kto --epochs 5 --samples 0 --holdout 0.3"
    command += " --learning-rate 5e-3"
    outs = []
    for name, rows in (("thumbs", THUMBS), ("pairs", parity.PAIRS)):
        place = world._replace(pairs=runs.write_pairs(world.here / f"{name}.jsonl", rows), out=world.here / name)
        assert said(command, place, capfd).status == 0
        outs.append(place.out)
    assert runs.adapter_bytes(outs[0]) == runs.adapter_bytes(outs[1])
    first, *_, last = [row for row in read_metrics(outs[0]) if "loss" in row]
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    assert first["kl"] == pytest.approx(0.0, abs=1e-3)
    assert "rewards/accuracies" not in first
    assert last["loss"] < 0.5
    scores = json.loads((outs[0] / "manifest.json").read_text())["scores"]
    assert scores["eval_rewards/margins"] > 0


def test_thumbs_of_one_kind_only_are_learnt_too(world: World, capfd: pytest.CaptureFixture[str]):
    place = world._replace(pairs=runs.write_pairs(world.here / "ups.jsonl", THUMBS[:8]))
    assert said(f"{TRAIN} --loss kto", place, capfd).status == 0
    (row,) = read_metrics(world.out)
    assert "rewards/rejected" not in row
    assert row["rewards/chosen"] == pytest.approx(0, abs=1e-4)


def test_plain_text_is_learnt_and_held_out_by_text(world: World, capfd: pytest.CaptureFixture[str]):
    texts = [{"text": f"{pair['prompt']} {pair['chosen']}"} for pair in parity.PAIRS]
    place = world._replace(pairs=runs.write_pairs(world.here / "text.jsonl", texts))
    flags = "--method sft --epochs 3 --learning-rate 5e-3 --holdout 0.3 --max-length 20"
    found = said(f"{TRAIN.replace('--steps 1', '')} {flags}", place, capfd)
    assert found.status == 0, found.messages
    scores = json.loads((world.out / "manifest.json").read_text())["scores"]
    assert scores["eval_logps/chosen"] > scores["eval_logps/chosen_reference"]
    rows = read_metrics(world.out)
    assert rows[-2]["loss"] < rows[0]["loss"]
