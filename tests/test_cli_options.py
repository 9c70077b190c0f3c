"""Options that cannot be meant: each is refused by its name, in one sentence, and nothing is begun."""

from collections.abc import Callable

import pytest
from commands import CHAT, CONVERT, TRAIN, Kind, World, nothing, refused, said

TOML = "--config {here}/run.toml train --out {out}"


def _toml(text: str) -> Callable[[World], object]:
    def write(world: World) -> None:
        places = f'model = "{world.model}"\ndata = "{world.pairs}"\n'
        (world.here / "run.toml").write_text(places + text, encoding="utf-8")

    return write


def _absurd(flag: str, value: str) -> Kind:
    return Kind(f"train --model {{model}} --data {{pairs}} --out {{out}} {flag} {value}", nothing, (flag, value))


def _mistyped(command: str, *names: str) -> Kind:
    return Kind(command, nothing, names, status=2)


ABSURD = [
    ("--learning-rate", "0"), ("--learning-rate", "-0.1"), ("--learning-rate", "nan"), ("--learning-rate", "inf"),
    ("--learning-rate", "5"), ("--beta", "0"), ("--beta", "-1"), ("--beta", "nan"), ("--rank", "0"), ("--alpha", "0"),
    ("--rank", "-8"), ("--dropout", "1"), ("--dropout", "-0.1"), ("--batch-size", "0"), ("--grad-accumulation", "0"),
    ("--epochs", "0"), ("--epochs", "inf"), ("--steps", "0"), ("--steps", "-1"), ("--label-smoothing", "0.5"),
    ("--sft-weight", "-1"), ("--warmup", "-1"), ("--max-length", "3"), ("--layers", "0"), ("--max-grad-norm", "-1"),
    ("--seed", "-1"), ("--seed", "4294967296"), ("--holdout", "1"), ("--holdout", "-0.1"), ("--eval-every", "-1"),
    ("--save-every", "-1"), ("--memory-limit", "0"), ("--samples", "-1"), ("--sample-tokens", "0"),
]  # fmt: skip
KINDS = {f"{flag} {value}": _absurd(flag, value) for flag, value in ABSURD} | {
    "more layers than there are": Kind(f"{TRAIN} --layers 3", nothing, ("--layers", "3", "2 blocks")),
    "targets that name nothing": Kind(f"{TRAIN} --targets nonsense", nothing, ("--targets", "nonsense", "q_proj")),
    "a preference option for SFT": Kind(f"{TRAIN} --method sft --beta 0.2", nothing, ("--beta", "sft")),
    "more memory than is allowed": Kind(f"{TRAIN} --memory-limit 0.000001", nothing, ("--memory-limit",)),
    "warm-up longer than the run": Kind(f"{TRAIN} --warmup 50", nothing, ("--warmup",)),
    "half a step of warm-up": Kind(f"{TRAIN} --warmup 1.5", nothing, ("--warmup", "1.5")),
    "a learning rate that is a word": _mistyped(f"{TRAIN} --learning-rate fast", "--learning-rate", "fast"),
    "a number of steps that is not whole": _mistyped(f"{TRAIN} --epochs 1 --batch-size 1.5", "--batch-size", "1.5"),
    "an unknown loss": _mistyped(f"{TRAIN} --loss hinge9", "--loss", "hinge9", "sigmoid"),
    "an unknown method": _mistyped(f"{TRAIN} --method ppo", "--method", "ppo"),
    "an unknown flag": _mistyped(f"{TRAIN} --lerning-rate 1", "--lerning-rate", "--learning-rate"),
    "a word too many": _mistyped(f"{TRAIN} more", "more"),
    "a flag without its value": _mistyped(f"{TRAIN} --seed", "--seed"),
    "no model": _mistyped("train --data {pairs} --out {out}", "--model"),
    "no out": _mistyped("train --model {model} --data {pairs}", "--out"),
    "an unknown command": _mistyped("trian", "trian", "train"),
    "an unknown first option": _mistyped("--verbose train", "--verbose"),
    "a conversion of nothing": _mistyped("convert --out {out}", "SOURCE"),
    "a conversion to no place": _mistyped("convert {model}", "--out"),
    "a conversion to 5 bits": _mistyped(f"{CONVERT} --quantize 5", "--quantize", "5"),
    "a conversion to int8": _mistyped(f"{CONVERT} --dtype int8", "--dtype", "int8"),
    "a fuse of no adapter": _mistyped("fuse --model {model} --out {out}", "--adapter"),
    "a fuse measured on no pairs": Kind(
        "fuse --model {model} --adapter {adapter} --out {out} --pairs 0", nothing, ("--pairs", "0")
    ),
    "a recipe that is not there": Kind("models llama", nothing, ("llama", "smollm2-135m-instruct")),
    "two recipes": _mistyped("models smollm2-135m-instruct qwen3-4b-instruct", "qwen3-4b-instruct"),
    "a temperature of 9": Kind(f"{CHAT} --temperature 9", nothing, ("--temperature", "9")),
    "a temperature of nan": Kind(f"{CHAT} --temperature nan", nothing, ("--temperature", "nan")),
    "a top-p of 0": Kind(f"{CHAT} --top-p 0", nothing, ("--top-p", "0")),
    "no tokens": Kind("chat --model {model} --max-tokens 0 hello", nothing, ("--max-tokens", "0")),
    "a negative seed": Kind(f"{CHAT} --seed -4", nothing, ("--seed", "-4")),
    "no configuration file": Kind("--config {here}/none.toml train --out {out}", nothing, ("none.toml",), 2),
    "a configuration that is no TOML": Kind(TOML, _toml("rank = = 4\n"), ("run.toml", "TOML"), 2),
    "a configuration in Latin-1": Kind(
        TOML, lambda world: (world.here / "run.toml").write_bytes(b'model = "\xe9"\n'), ("run.toml", "UTF-8"), 2
    ),
    "an unknown key": Kind(TOML, _toml("lerning-rate = 1\n"), ("lerning-rate",), 2),
    "a key with the wrong type": Kind(TOML, _toml('batch-size = "many"\n'), ("batch-size", "many"), 2),
    "a number where a word belongs": Kind(TOML, _toml("loss = 3\n"), ("loss", "3"), 2),
    "a list where a number belongs": Kind(TOML, _toml("seed = [1, 2]\n"), ("seed",), 2),
    "a table where a number belongs": Kind(TOML, _toml("[seed]\nvalue = 1\n"), ("seed",), 2),
    "an absurd number": Kind(TOML, _toml("beta = nan\n"), ("--beta", "nan")),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_option_that_cannot_be_meant_is_refused(name: str, world: World, capfd: pytest.CaptureFixture[str]):
    refused(KINDS[name], world, capfd)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(world: World, capfd: pytest.CaptureFixture[str]):
    _toml("steps = 7\nbatch-size = 2\n")(world)
    assert "7 steps (2 an epoch)" in said(f"{TOML} --dry-run", world, capfd).output
    assert "5 steps (2 an epoch)" in said(f"{TOML} --dry-run --steps 5", world, capfd).output
    assert "7 steps (4 an epoch)" in said(f"{TOML} --dry-run --batch-size 1", world, capfd).output
