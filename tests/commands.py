"""The command line as a user types it, on a small world of one model, some pairs and an adapter."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_dpo import train
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.cli import main

TRAIN = "train --model {model} --data {pairs} --out {out} --steps 1 --samples 0"
CHAT = "chat --model {model} --max-tokens 4 hello"
FUSE = "fuse --model {model} --adapter {adapter} --out {out} --pairs 2"
CONVERT = "convert {model} --out {out}"
PAIRS = [
    {
        "prompt": f"My mother asked {number} times what day it is, and I am tired.",
        "chosen": "You are doing a hard thing. Write the day on a board, and rest while she reads it.",
        "rejected": "Repetition is a symptom of dementia. Redirect the patient to an activity.",
    }
    for number in range(2, 6)
]


class World(NamedTuple):
    """A folder in which a test may break everything; `out` is not there yet."""

    here: Path
    model: Path
    pairs: Path
    adapter: Path
    out: Path


class Said(NamedTuple):
    """How a command ended, and what it wrote."""

    status: int
    output: str
    messages: str

    @property
    def told(self) -> list[str]:
        """The lines from the one that begins with `mlx_dpo:` on."""
        assert ("\n" + self.messages).count("\nmlx_dpo: ") == 1, self.messages
        return ("\n" + self.messages).partition("\nmlx_dpo: ")[2].splitlines()

    @property
    def sentence(self) -> str:
        """The one line behind `mlx_dpo:`, with the list of bad rows where there is one."""
        told = self.told
        assert len(told) == 1 or all(line.startswith("  ") for line in told[1:]), self.messages
        return " ".join(told)


class Kind(NamedTuple):
    """A kind of bad input: the command, what is broken beforehand, what the sentence has to name, the status."""

    command: str
    damage: Callable[[World], object]
    names: tuple[str, ...]
    status: int = 1


def nothing(_: World) -> None:
    """Break nothing: the command line alone is wrong."""


def write_pairs(path: Path, rows: list | None = None) -> Path:
    """Pairs as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or PAIRS))
    return path


def trained(model: Path, pairs: Path, out: Path) -> Path:
    """The folder of a finished run of two steps."""
    list(train.run(TrainOptions(model=model, data=pairs, out=out, steps=2, samples=0, rank=2)))
    return out


def world(here: Path, model: Path, adapter: Path) -> World:
    """Copies of a model and an adapter, and pairs."""
    shutil.copytree(model, here / "model")
    shutil.copytree(adapter, here / "adapter")
    return World(here, here / "model", write_pairs(here / "pairs.jsonl"), here / "adapter", here / "out")


def typed(command: str, place: World | None = None) -> list[str]:
    """The words of a command line with its places filled in; `_` stands for a space inside a word."""
    places = place._asdict() if place else {}
    return [word.format(**places) for word in command.split()]


def said(command: str | list[str], place: World | None, capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a command in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(typed(command, place) if isinstance(command, str) else command)
    output, messages = capfd.readouterr()
    return Said(int(str(end.value.code)), output, messages)


def state(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with a hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_dir()
    }


def refused(kind: Kind, place: World, capfd: pytest.CaptureFixture[str]) -> str:
    """Break the world, run the command, and return its sentence, having seen that it left everything as it was."""
    kind.damage(place)
    before = state(place.here)
    found = said(kind.command, place, capfd)
    assert "Traceback" not in found.messages
    sentence = found.sentence
    assert found.output == ""
    assert found.status == kind.status, found
    assert state(place.here) == before
    assert ".part-" not in sentence  # a name that nobody will find
    missing = [name for name in kind.names if name not in sentence]
    assert not missing, sentence
    return sentence
