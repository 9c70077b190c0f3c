"""The same rows read equal from every format; whatever is wrong is named by file, place and reason."""

import csv
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tables import WRITERS, Rows, as_csv, as_json, as_jsonl, as_parquet, stored

import mlx_dpo
from mlx_dpo.data.examples import Kind
from mlx_dpo.data.reading import fingerprint, read
from mlx_dpo.refusal import Refusal

HERS = Path(mlx_dpo.__file__).parents[2] / "shared/data/empathy-by-design/pairs.jsonl"
TEXTS = [
    "plain",
    ' "quoted", with a comma ',
    "two\nlines\n",
    "dos\r\nand mac\rends",
    "a separator\u2028and next line\x85 inside",
    "何を言えばいい？ 🫖 a\u0301",
    "\ufeffa mark at the start",
    "tab\tand \\ and {\"role\": 1} and 'NaN'",
    "long " * 50_000,
]
PAIRS = [
    {"prompt": text, "chosen": f"yes {text}", "rejected": f"no {text}", "system": "Be kind." if n % 2 else ""}
    for n, text in enumerate(TEXTS)
]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "He fell."}]
YES, NO = {"role": "assistant", "content": "Stay."}, {"role": "assistant", "content": "Go."}
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def refused(path: Path, *, kind: Kind = "pairs") -> str:
    with pytest.raises(Refusal) as caught:
        read(path, kind=kind)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_comes_back_exactly_from_every_format(tmp_path: Path, suffix: str):
    train, valid, test = read(stored(tmp_path / f"a.{suffix}", WRITERS[suffix](PAIRS)), kind="pairs")
    assert [(e.prompt[-1]["content"], e.chosen, e.rejected) for e in train] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS
    ]
    assert [e.prompt[0]["role"] for e in train] == ["system" if row["system"] else "user" for row in PAIRS]
    assert (valid, test) == ([], [])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": [YES], "rejected": [NO]},
        {"prompt": TALK, "chosen": "Stay.", "rejected": "Go."},
        {"chosen": [*TALK, YES], "rejected": [*TALK, NO], "score": 3.5, "id": None},
        {"prompt": TALK, "chosen": [*TALK, YES], "rejected": [*TALK, NO]},
        {"prompt": "He fell.", "system": "Be kind.", "chosen": [*TALK[1:], YES], "rejected": [*TALK, NO]},
        {"prompt": TALK[1:], "system": "Be kind.", "chosen": [YES], "rejected": "Go."},
    ],
)
def test_every_shape_of_a_pair_is_the_same_pair(tmp_path: Path, suffix: str, row: dict[str, Any]):
    ((prompt, chosen, rejected, source),) = read(
        stored(tmp_path / f"a.{suffix}", WRITERS[suffix]([row])), kind="pairs"
    ).train
    assert (list(prompt), chosen, rejected) == (TALK, "Stay.", "Go.")
    assert source == ("a.jsonl, line 1" if suffix == "jsonl" else f"a.{suffix}, row 1")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": "Stay.", "rejected": ""},
        {"prompt": TALK, "completion": [YES]},
        {"messages": [*TALK, YES]},
        {"prompt": "He fell.", "messages": [*TALK, YES]},
        {"chosen": [*TALK, YES], "rejected": 7},
    ],
)
def test_every_shape_of_an_answered_prompt_is_the_same_example(tmp_path: Path, row: dict[str, Any]):
    ((prompt, chosen, rejected, _),) = read(stored(tmp_path / "a.jsonl", as_jsonl([row])), kind="answers").train
    assert (list(prompt), chosen, rejected) == (TALK, "Stay.", None)


def test_folder_has_its_splits_in_any_mix_of_formats(tmp_path: Path):
    stored(tmp_path / "train.parquet", as_parquet(PAIRS))
    stored(tmp_path / "valid.CSV", as_csv(PAIRS[:2]))
    stored(tmp_path / "test.json", as_json(PAIRS[2:]))
    stored(tmp_path / "README.md", b"not data")
    train, valid, test = read(tmp_path, kind="pairs")
    assert fingerprint(train) == fingerprint(valid + test)
    assert valid[1].source == "valid.CSV, line 3"


def test_sources_name_the_physical_line(tmp_path: Path):
    text = 'prompt,chosen,rejected\n"a\nb",c,"d\n\n"\nx,y,z\n\n'
    train = read(stored(tmp_path / "a.csv", text.encode()), kind="pairs").train
    assert [e.source for e in train] == ["a.csv, line 2", "a.csv, line 6"]
    train = read(stored(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + as_jsonl([GOOD, GOOD]) + b"\n"), kind="pairs").train
    assert [e.source for e in train] == ["a.jsonl, line 1", "a.jsonl, line 2"]


BAD_FILES = {
    "blank.jsonl": (as_jsonl([GOOD]) + b"\n" + as_jsonl([GOOD]), "blank.jsonl, line 2: the line is blank"),
    "cut.jsonl": (as_jsonl([GOOD, GOOD])[:-9], "cut.jsonl, line 2: broken JSON at character .* cut off"),
    "broken.jsonl": (
        b"{'prompt': 1}\n" + as_jsonl([GOOD]),
        "broken.jsonl, line 1: broken JSON at character 2",
    ),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' appears twice"),
    "list.jsonl": (b"[1]\n3\nnull", "line 1: is a list(.|\n)*line 2: is a number(.|\n)*line 3: is null"),
    "latin.jsonl": (as_jsonl([GOOD]) + b'{"prompt": "caf\xe9"}', r"latin.jsonl, line 2: byte 16 .*0xe9"),
    "utf16.jsonl": (as_jsonl([GOOD]).decode().encode("utf-16"), "utf16.jsonl: line 1 is UTF-16, not UTF-8"),
    "utf16.csv": (as_csv([GOOD]).decode().encode("utf-16"), "utf16.csv: line 1 is UTF-16, not UTF-8"),
    "latin.csv": (as_csv([GOOD]) + b"caf\xe9,b,c\n", "latin.csv, line 3: byte 4 .* not UTF-8"),
    "latin.json": (b'[{"prompt":\n "caf\xe9"}]', "latin.json, line 2: byte 6 .* not UTF-8"),
    "deep.jsonl": (b"[" * 200_000, "deep.jsonl, line 1: is nested too deeply"),
    "deep.json": (b"[" * 200_000, "deep.json: is nested too deeply"),
    "big.jsonl": (b'{"id": ' + b"9" * 5000 + b"}", "big.jsonl, line 1: has a number of too many digits"),
    "lines.json": (as_jsonl([GOOD, GOOD]), "lines.json: broken JSON at line 2.*named .jsonl"),
    "object.json": (b'{"data": [1]}', "object.json: holds no list of rows"),
    "none.json": (b"[]", "none.json: the file holds no rows"),
    "row.json": (as_json([GOOD, {"prompt": "a"}]), "row.json, row 2: chosen is missing; rejected is missing"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "mark.csv": (b"\xef\xbb\xbf\n", "mark.csv: the file is empty"),
    "empty.parquet": (b"", "empty.parquet: the file is empty"),
    "header.csv": (b"prompt,chosen,rejected\n", "header.csv: the file holds no rows"),
    "semicolon.csv": (
        b"prompt;chosen;rejected\n",
        "line 1: the header has 'prompt;chosen;rejected', and needs",
    ),
    "missing.csv": (
        b"prompt,chosen\na,b\n",
        "missing.csv, line 1: the header has 'prompt', 'chosen', and needs",
    ),
    "double.csv": (
        b"prompt,chosen,chosen,rejected\n",
        "line 1: the header has the column 'chosen' more than once",
    ),
    "open.csv": (
        as_csv([GOOD]) + b'a,"b,c\nd,e,f\n',
        "open.csv, line 3: a quote that opens here is never closed",
    ),
    "quote.csv": (as_csv([GOOD]) + b'a,"b"x,c\n', "quote.csv, line 3: the record is broken CSV"),
    "many.csv": (as_csv([GOOD]) + b"a,b,c,d\n", "many.csv, line 3: has 4 fields, the header has 3"),
    "few.csv": (as_csv([GOOD]) + b"a,b\n", "few.csv, line 3: has 2 fields, the header has 3"),
    "blank.csv": (as_csv([GOOD]) + b"\na,b,c\n", "blank.csv, line 3: the line is blank"),
    "nan.csv": (as_csv([GOOD]) + b"a,nan,c\nd,e,\n", "line 3: chosen is NaN(.|\n)*line 4: rejected is empty"),
    "cut.parquet": (as_parquet([GOOD])[:-7], "cut.parquet: is not a whole Parquet file"),
    "text.parquet": (as_jsonl([GOOD]), "text.parquet: is not a whole Parquet file"),
    "float.parquet": (as_parquet([GOOD | {"chosen": float("nan")}]), "float.parquet, row 1: chosen is NaN"),
    "null.parquet": (as_parquet([GOOD, {"prompt": "a"}]), "null.parquet, row 2: chosen is missing"),
    "bytes.parquet": (as_parquet([GOOD | {"prompt": b"a"}]), "row 1: prompt is binary data, not text"),
    "column.parquet": (
        as_parquet([{"prompt": "a", "chosen": "b"}]),
        "column.parquet: the header has .*needs",
    ),
    "none.parquet": (as_parquet([]), "none.parquet: the header has nothing"),
    "pairs.txt": (as_jsonl([GOOD]), "pairs.txt: is none of .jsonl, .json, .csv, .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_by_name_place_and_reason(tmp_path: Path, name: str):
    data, reason = BAD_FILES[name]
    message = refused(stored(tmp_path / name, data))
    assert re.search(reason, message), message
    assert name in message
    assert str(tmp_path / name) in message


def test_all_bad_rows_of_all_files_are_named_at_once(tmp_path: Path):
    stored(tmp_path / "train.jsonl", b'{"prompt": "caf\xe9"}\n{"prompt": "a"}\n' + as_jsonl([GOOD]) + b"{\n")
    stored(tmp_path / "valid.csv", as_csv([GOOD]) + b"a,b\n")
    lines = refused(tmp_path).splitlines()
    assert lines[0].startswith("4 things are wrong in ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "train.jsonl, line 1",
        "train.jsonl, line 2",
        "train.jsonl, line 4",
        "valid.csv, line 3",
    ]


def test_a_long_list_of_bad_rows_ends_with_how_many_more(tmp_path: Path):
    lines = refused(stored(tmp_path / "a.jsonl", as_jsonl([{"prompt": "a"}] * 53))).splitlines()
    assert lines[0].startswith("53 things are wrong")
    assert len(lines) == 52
    assert lines[-1].strip() == "… and 3 more"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "has no train file"),
        (["valid.jsonl"], "has no train file"),
        (["train.csv", "train.jsonl"], "has both train.csv and train.jsonl"),
        (["train.jsonl", "validation.jsonl"], "validation.jsonl would not be read: name it valid.jsonl"),
        (["train.jsonl/"], "train.jsonl: is not a file"),
    ],
)
def test_folder_without_exactly_one_file_a_split_is_refused(tmp_path: Path, names: list[str], reason: str):
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            stored(tmp_path / name, as_jsonl([GOOD]))
    message = refused(tmp_path)
    assert reason in message
    assert str(tmp_path) in message


def test_what_is_not_there_or_not_a_file_is_refused(tmp_path: Path):
    assert f"There is no {tmp_path / 'x.jsonl'}" in refused(tmp_path / "x.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: is not a file" in refused(tmp_path / "pipe.jsonl")
    assert "cannot be read" in refused(tmp_path / ("x" * 5000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path):
    stored(tmp_path / "a.jsonl", as_jsonl([GOOD])).chmod(0)
    assert "a.jsonl: cannot be read (Permission denied)" in refused(tmp_path / "a.jsonl")


def test_the_limit_on_csv_fields_is_left_as_it_was(tmp_path: Path):
    before = csv.field_size_limit()
    row = GOOD | {"chosen": "x" * (before + 1)}
    assert len(read(stored(tmp_path / "a.csv", as_csv([row])), kind="pairs").train[0].chosen or "") == before + 1
    assert csv.field_size_limit() == before


DAMAGED: dict[Kind, Rows] = {
    "pairs": PAIRS[:7],
    "answers": [{"text": text} for text in TEXTS[:7]],
    "thumbs": [{"prompt": text, "completion": "c", "label": text == "plain"} for text in TEXTS[:7]],
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_damaged_file_reads_or_is_refused_and_never_crashes(tmp_path: Path, suffix: str, kind: Kind):
    dice = random.Random(suffix)
    whole = WRITERS[suffix](DAMAGED[kind])
    outcomes = set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 3, 30))):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        path = stored(tmp_path / f"a.{suffix}", bytes(data))
        try:
            outcomes.add(len(read(path, kind=kind).train) > 0)
        except Refusal as refusal:
            outcomes.add(str(path) in str(refusal))
    assert outcomes == {True}


@pytest.mark.skipif(not HERS.exists(), reason="the paper's pairs are not here")
def test_the_papers_pairs_read_whole():
    train = read(HERS, kind="pairs").train
    assert len(train) == 909
    assert train[-1].source == "pairs.jsonl, line 909"
