"""Pairs made from questions: matched, within the care rules, and the same however often the work was stopped."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_dpo import curation
from mlx_dpo.care.replies import objections
from mlx_dpo.cli import main
from mlx_dpo.data.making import making
from mlx_dpo.data.making.errors import with_error
from mlx_dpo.data.making.making import Making, identity, made
from mlx_dpo.data.reading import read
from mlx_dpo.data.templates import Message
from mlx_dpo.journal import Journal
from mlx_dpo.models.answers import Answer
from mlx_dpo.models.load import load
from mlx_dpo.prose import words
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
QUESTIONS = [(Message(role="user", content=f"{i}. What can I do when she wakes at night?"),) for i in range(7)]
WARM = [
    "That sounds hard. You can keep a small lamp on, and sit with her until she sleeps again.",
    "I am a nurse. You can keep a small lamp on, and sit with her until she is calm again.",
    "No wonder you are tired. Keep a lamp on. Sit with her. Say where she is, and that you are there for her now.",
]
COLD = [
    "Maintain low ambient lighting. Supervise until sleep resumes. Reorient as required by protocol now and",
    "Maintain low ambient lighting at night. Supervise the person until sleep resumes. Reorient as required.",
    "Light.",
]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A writer whose answers are known, in the place of the model's."""
    asked: list[Any] = []

    def drawn(loaded: Any, prompts: Sequence[Any], limit: int, *, temperature: float, seed: int) -> list[Answer]:
        asked.append((len(prompts), temperature, seed))
        voices = {0: ["Keep a lamp on."], 1: WARM, 2: COLD}
        texts = voices[(len(asked) - 1) % 3]
        return [Answer(texts[i % len(texts)], []) for i in range(len(prompts))]

    monkeypatch.setattr(making, "drawn_answers", drawn)
    return asked


def work(folder: Path, how: Making, name: str = "work") -> Journal:
    return Journal(folder / f"{name}.jsonl", identity(QUESTIONS, how, ["hash"]))


def test_the_best_matched_pair_within_the_rules_is_taken(scripted: list[Any], tiny_folder: Folder, tmp_path: Path):
    how = Making(batch_size=4)
    journal = work(tmp_path, how)
    progress = list(made(load(tiny_folder("llama")), QUESTIONS, journal, how))
    assert [step.done for step in progress] == [0, 4, 7]
    for row, question in zip(journal.rows, QUESTIONS, strict=True):
        tone, planted = row["pairs"]
        assert tone["prompt"] == question[0]["content"]
        # The nurse is none, the unfinished answer loses a sentence; of the rest these are the most alike in length.
        assert (tone["chosen"], tone["rejected"], tone["kind"]) == (WARM[0], COLD[1], "tone")
        assert (planted["chosen"], planted["kind"]) == (WARM[0], "planted-error")
        assert planted["rejected"] == with_error(WARM[0]) != WARM[0]
        assert row["why"] is None
    assert [each[:2] for each in scripted[:3]] == [(4, 0.0), (12, 0.8), (12, 0.8)]
    assert len({seed for *_, seed in scripted}) == len(scripted)


def test_kinds_that_are_not_asked_for_are_not_made(scripted: list[Any], tiny_folder: Folder, tmp_path: Path):
    how = Making(kinds=("planted-error",))
    journal = work(tmp_path, how)
    list(made(load(tiny_folder("llama")), QUESTIONS, journal, how))
    assert {pair["kind"] for row in journal.rows for pair in row["pairs"]} == {"planted-error"}


@pytest.mark.parametrize("stops", [0, 1, 2])
def test_a_stopped_work_goes_on_to_the_same_rows(tiny_folder: Folder, tmp_path: Path, stops: int):
    loaded, how = load(tiny_folder("llama")), Making(candidates=2, max_tokens=5, batch_size=3)
    whole = work(tmp_path, how, "whole")
    list(made(loaded, QUESTIONS, whole, how))
    part = work(tmp_path, how, "part")
    going: Any = made(loaded, QUESTIONS, part, how)
    for _ in range(stops + 1):
        next(going)
    going.close()
    if part.rows:
        part.cut_to(len(part.rows) - 1)
    with part.file.open("ab") as broken:
        broken.write(b'{"pairs": [{')
    again = work(tmp_path, how, "part")
    list(made(loaded, QUESTIONS, again, how))
    assert again.rows == whole.rows
    assert again.file.read_bytes() == whole.file.read_bytes()


def test_other_work_in_the_same_place_is_refused(tmp_path: Path):
    work(tmp_path, Making())
    with pytest.raises(Refusal, match="was made with another making"):
        work(tmp_path, Making(seed=1))
    (tmp_path / "work.jsonl").write_text('{"a":\n')
    with pytest.raises(Refusal, match="is damaged"):
        work(tmp_path, Making())


def test_a_planted_error_changes_one_fact():
    assert with_error("Wait 10 minutes, then 5 more.") == "Wait 100 minutes, then 5 more."
    assert with_error("You should rest. It is late.") == "You should not rest. It is late."
    assert with_error("Always lock it.").lower() != "always lock it."
    assert with_error("Rest now.") == "Rest now."


def ended(command: Sequence[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["data", "make", *command])
    return end.value.code


def written(folder: Path) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": question[0]["content"]}) + "\n" for question in QUESTIONS))
    return file


def test_what_was_made_can_be_learnt(
    scripted: list[Any], tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "pairs.jsonl"
    assert ended([str(written(tmp_path)), "--model", str(tiny_folder("llama")), "--out", str(out)]) == 0
    assert f"Pairs: {out} (14 of 7 questions; 0 questions have none)" in capfd.readouterr().out
    pairs = read(out, kind="pairs").train
    assert len(pairs) == 14
    assert all(not objections(pair.chosen or "") and len(words(pair.rejected or "")) > 5 for pair in pairs)


def test_a_model_that_writes_nothing_usable_is_told_so(
    tiny_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    command = [str(written(tmp_path)), "--model", str(tiny_folder("llama")), "--max-tokens", "4"]
    out = tmp_path / "pairs.jsonl"
    assert ended([*command, "--out", str(out)]) == 1
    assert "No pair could be made" in capfd.readouterr().err
    assert not out.exists()
    rows = [json.loads(line) for line in curation.work_beside(out).read_text().splitlines()[1:]]
    assert [row["why"] for row in rows] == ["no answer was whole, long enough and within the care rules"] * 7


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--out", "{here}/x.csv"], "give --out a name that ends in .jsonl"),
        (["--out", "{here}/questions.jsonl"], "is there already"),
        (["--out", "{here}/x.jsonl", "--candidates", "0"], "--candidates 0 makes no sense"),
        (["--out", "{here}/x.jsonl", "--temperature", "3"], "--temperature 3.0 makes no sense"),
    ],
)
def test_bad_use_is_refused(
    tiny_folder: Folder, tmp_path: Path, more: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
):
    command = [
        str(written(tmp_path)),
        "--model",
        str(tiny_folder("llama")),
        *(word.format(here=tmp_path) for word in more),
    ]
    assert ended(command) == 1
    assert sentence in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]
