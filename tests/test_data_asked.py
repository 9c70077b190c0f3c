"""Test questions, with and without reference answers, from whatever names their columns have."""

import json
from pathlib import Path

import pytest

from mlx_dpo.data.asked import read_asked
from mlx_dpo.refusal import Refusal

ROWS = {
    "question and answer": {"question": "Why?", "answer": "So."},
    "prompt and reference": {"prompt": "Why?", "reference": "So."},
    "a pair": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    "messages": {"prompt": [{"role": "user", "content": "Why?"}], "completion": "So."},
}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_columns(tmp_path: Path, kind: str):
    (found,) = read_asked(written(tmp_path / "test.jsonl", ROWS[kind]))
    assert (found.question, found.reference, found.source) == ("Why?", "So.", "test.jsonl, line 1")


def test_a_question_alone_has_no_reference(tmp_path: Path):
    rows = {"question": "Why?", "answer": ""}, {"prompt": "Who?"}
    assert [asked.reference for asked in read_asked(written(tmp_path / "t.jsonl", *rows))] == [None, None]


def test_a_table(tmp_path: Path):
    file = tmp_path / "test.csv"
    file.write_text('question,answer\n"Why, then?","So.\nThat is it."\n')
    (found,) = read_asked(file)
    assert (found.question, found.reference) == ("Why, then?", "So.\nThat is it.")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"answer": "So."}], "line 1: prompt is missing"),
        ([{"question": "Why?", "answer": 3}], "line 1: completion is a number"),
        (["Why?"], "line 1: is text, not an object"),
        ([{"question": ""}, 5], "2 things are wrong"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[object], reason: str):
    with pytest.raises(Refusal) as refused:
        read_asked(written(tmp_path / "test.jsonl", *rows))
    assert reason in str(refused.value)


def test_a_table_without_questions_is_refused(tmp_path: Path):
    file = tmp_path / "test.csv"
    file.write_text("name,answer\na,b\n")
    with pytest.raises(Refusal, match="needs the column prompt or question"):
        read_asked(file)
