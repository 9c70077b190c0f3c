"""Broken pairs on the command line: each kind is refused in one sentence, before the model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PAIRS, TRAIN, Kind, World, nothing, refused, write_pairs


def _rows(*rows: object) -> Callable[[World], object]:
    return lambda world: world.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _bytes(data: bytes) -> Callable[[World], object]:
    return lambda world: world.pairs.write_bytes(data)


def _split(names: str) -> Callable[[World], object]:
    def make(world: World) -> None:
        world.pairs.unlink()
        world.pairs.mkdir()
        for name in names.split():
            write_pairs(world.pairs / name)

    return make


GOOD = PAIRS[0]
LINE = json.dumps(GOOD).encode() + b"\n"
FOREIGN = "train --model {model} --data {here}/other%s --out {out} --steps 1"
SFT = TRAIN + " --method sft"
KINDS = {
    "no such file": Kind("train --model {model} --data {here}/none.jsonl --out {out}", nothing, ("none.jsonl",)),
    "a file that holds nothing": Kind(TRAIN, _bytes(b""), ("pairs.jsonl", "empty")),
    "a file of blanks": Kind(TRAIN, _bytes(b" \n\n"), ("pairs.jsonl", "empty")),
    "a row without rejected": Kind(TRAIN, _rows(GOOD, GOOD | {"rejected": None}), ("line 2", "rejected")),
    "a row that is a list": Kind(TRAIN, _rows([1, 2]), ("line 1",)),
    "a row of numbers": Kind(TRAIN, _rows(GOOD | {"prompt": 7}), ("line 1", "prompt", "number")),
    "an answer of blanks": Kind(TRAIN, _rows(GOOD | {"chosen": "  "}), ("line 1", "chosen")),
    "chosen equals rejected": Kind(TRAIN, _rows(GOOD | {"rejected": GOOD["chosen"]}), ("line 1", "rejected")),
    "an unknown role": Kind(TRAIN, _rows(GOOD | {"prompt": [{"role": "boss", "content": "x"}]}), ("line 1", "boss")),
    "a lone surrogate": Kind(TRAIN, _bytes(LINE.replace(b"mother", rb"\ud800")), ("line 1",)),
    "a column twice": Kind(TRAIN, _bytes(LINE.replace(b'"rejected"', b'"chosen"')), ("line 1", "chosen")),
    "broken JSON": Kind(TRAIN, _bytes(LINE + LINE.replace(b":", b";") + LINE), ("line 2", "JSON")),
    "a file that is cut off": Kind(TRAIN, _bytes(LINE + LINE[:40]), ("line 2", "cut off")),
    "JSON nested without end": Kind(TRAIN, _bytes(b"[" * 200_000), ("line 1", "nested")),
    "UTF-16": Kind(TRAIN, _bytes(LINE.decode().encode("utf-16")), ("UTF-16", "UTF-8")),
    "Latin-1": Kind(TRAIN, _bytes(LINE.replace(b"mother", b"m\xe9re")), ("line 1", "UTF-8")),
    "not text at all": Kind(TRAIN, _bytes(bytes(range(256))), ("pairs.jsonl", "UTF-8")),
    "another kind of file": Kind(
        FOREIGN % ".docx", lambda world: (world.here / "other.docx").write_text("x"), ("other.docx", ".jsonl")
    ),
    "a table without its columns": Kind(
        FOREIGN % ".csv", lambda world: (world.here / "other.csv").write_text("question,answer\na,b\n"), ("prompt",)
    ),
    "a table with a short row": Kind(
        FOREIGN % ".csv",
        lambda world: (world.here / "other.csv").write_text("prompt,chosen,rejected\na,b\n"),
        ("line 2", "2 fields"),
    ),
    "no Parquet": Kind(
        FOREIGN % ".parquet", lambda world: (world.here / "other.parquet").write_bytes(b"PAR1x"), ("other.parquet",)
    ),
    "no list": Kind(FOREIGN % ".json", lambda world: (world.here / "other.json").write_text("{}"), ("other.json",)),
    "a folder without train": Kind(TRAIN, _split("valid.jsonl"), ("train",)),
    "a folder with a misnamed file": Kind(TRAIN, _split("train.jsonl validation.jsonl"), ("validation", "valid")),
    "holdout beside a valid file": Kind(
        TRAIN + " --holdout 0.5", _split("train.jsonl valid.jsonl"), ("--holdout", "valid")
    ),
    "holdout of a single prompt": Kind(TRAIN + " --holdout 0.5", _rows(GOOD), ("--holdout",)),
    "longer than the longest": Kind(TRAIN + " --max-length 8", nothing, ("--max-length",)),
    "a labelled completion among pairs": Kind(
        TRAIN,
        _rows(GOOD, {"prompt": "x", "completion": "y", "label": True}),
        ("line 2", "completion", "label", "--loss kto"),
    ),
    "a table of labelled completions": Kind(
        FOREIGN % ".csv",
        lambda world: (world.here / "other.csv").write_text("prompt,completion,label\na,b,true\n"),
        ("chosen", "--loss kto"),
    ),
    "a text beside a prompt": Kind(SFT, _rows({"text": "a"}, GOOD | {"text": "a"}), ("line 2", "text", "prompt")),
    "a text of numbers": Kind(SFT, _rows({"text": 7}), ("line 1", "text", "number")),
    "a text of blanks": Kind(SFT, _rows({"text": " "}), ("line 1", "text", "empty")),
    "a table without a text": Kind(
        FOREIGN % ".csv" + " --method sft",
        lambda world: (world.here / "other.csv").write_text("texts\na\n"),
        ("other.csv", "messages", "text"),
    ),
    "questions that are none": Kind(
        TRAIN + " --questions {here}/q.jsonl",
        lambda world: (world.here / "q.jsonl").write_text('{"question": "x"}\n'),
        ("q.jsonl", "prompt"),
    ),
    "pairs to measure a fuse that are not there": Kind(
        "fuse --model {model} --adapter {adapter} --out {out} --data {here}/none.jsonl", nothing, ("none.jsonl",)
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_broken_pairs_are_refused(name: str, world: World, capfd: pytest.CaptureFixture[str]):
    refused(KINDS[name], world, capfd)


def test_every_bad_row_has_its_line(world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> Path:
        return write_pairs(place.pairs, [GOOD, {}, GOOD, GOOD | {"chosen": 3}])

    refused(Kind(TRAIN, damage, ("2 things", "nothing was skipped")), world, capfd)
