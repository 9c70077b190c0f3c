"""Pairs parted without leaks and mended without a new word, and a record of all that was done."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_data_audit import changed, fair, row_of

from mlx_dpo.cli import main
from mlx_dpo.data.audit.copies import groups
from mlx_dpo.data.audit.mending import mended
from mlx_dpo.data.audit.parting import parted
from mlx_dpo.data.audit.repairs import REPAIRS, Repair
from mlx_dpo.data.examples import Example
from mlx_dpo.data.reading import read
from mlx_dpo.data.templates import Message
from mlx_dpo.prose import is_finished, words
from mlx_dpo.refusal import Refusal


def asked(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def doubled() -> list[Example]:
    """Pairs of which every prompt is there twice, once with another end."""
    return changed(
        fair(), lambda i, one: one._replace(prompt=asked(f"{fair()[i // 2].prompt[0]['content']} {'!' * i}"))
    )


def file_of(folder: Path, pairs: Sequence[Example]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row_of(one)) + "\n" for one in pairs))
    return file


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_are_never_on_two_sides(seed: int):
    pairs = doubled()
    splits = parted(pairs, 0.1, 0.2, seed)
    group = dict(
        zip((one.source for one in pairs), groups([one.prompt[0]["content"] for one in pairs], None), strict=True)
    )
    sides = [{group[one.source] for one in side} for side in splits]
    assert all(sides[i].isdisjoint(sides[j]) for i in range(3) for j in range(i))
    assert [len(side) for side in splits] == [140, 20, 40]
    assert sorted(one.source for side in splits for one in side) == sorted(one.source for one in pairs)


def test_the_seed_alone_draws():
    pairs = fair()
    assert parted(pairs, 0.1, 0.1, 3) == parted(pairs, 0.1, 0.1, 3)
    assert parted(pairs, 0.1, 0.1, 3).test != parted(pairs, 0.1, 0.1, 4).test
    assert {one.source for one in parted(pairs[::-1], 0.1, 0.1, 3).test} == {
        one.source for one in parted(pairs, 0.1, 0.1, 3).test
    }


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(Refusal, match=r"--valid 0.5 and --test 0.5 leave nothing"):
        parted(fair(), 0.5, 0.5, 0)


def one(**changes: str) -> Example:
    fields = {
        "prompt": "What now?",
        "chosen": "Rest a while. Then call.",
        "rejected": "Go on now. Do not stop.",
    } | changes
    return Example(asked(fields["prompt"]), fields["chosen"], fields["rejected"], "row 1")


@pytest.mark.parametrize(
    ("repair", "before", "after"),
    [
        ("trim", {"chosen": "Rest a while. Then cal"}, {"chosen": "Rest a while."}),
        ("trim", {"rejected": "Go on now.\n- Do not st"}, {"rejected": "Go on now."}),
        ("trim", {}, {}),
        ("length", {"rejected": "Go on now. Do not. Stop it at once now. And go."}, {"rejected": "Go on now. Do not."}),
        ("unsafe", {}, {}),
    ],
)
def test_a_repair_by_hand(repair: Repair, before: dict[str, str], after: dict[str, str]):
    (found,) = mended([one(**before)], [repair])
    kept = found.pair
    assert kept == one(**after)._replace(source="row 1") or (repair == "length" and kept is not None)
    assert bool(found.changes) == (before != after)
    if repair == "length" and kept is not None:
        assert len(words(kept.rejected or "")) <= 1.1 * len(words(kept.chosen or ""))


@pytest.mark.parametrize(
    ("repair", "row", "why"),
    [
        ("trim", {"chosen": "Rest a whil"}, "dropped: the chosen answer has no finished sentence"),
        ("trim", {"chosen": "Rest. Then", "rejected": "Rest."}, "dropped: both answers would be the same once"),
        ("unsafe", {"chosen": "I'm a nurse. Rest."}, "dropped: the chosen answer claims to be a licensed person"),
    ],
)
def test_what_cannot_be_mended_is_dropped_and_it_says_why(repair: Repair, row: dict[str, str], why: str):
    (found,) = mended([one(**row)], [repair])
    assert found.pair is None
    assert found.changes[-1].startswith(why)


def test_later_copies_of_a_prompt_go():
    found = mended(doubled(), ["dedupe"])
    assert [row.pair is not None for row in found] == [True, False] * 100
    assert found[1].changes == ("dropped: the prompt is that of pairs.jsonl, line 0",)


@pytest.mark.parametrize("openers", ["vary", "strip"])
def test_a_common_opening_is_taken_off(openers: str):
    pairs = changed(fair(), lambda i, one: one._replace(chosen=f"I totally get it. {one.chosen}") if i % 2 else one)
    rows = mended(pairs, ["openers"], openers)  # pyright: ignore[reportArgumentType]
    left = sum((row.pair.chosen or "").startswith("I totally") for row in rows if row.pair)
    assert left == (10 if openers == "vary" else 0)  # 5% of 200
    again = mended(pairs[::-1], ["openers"], openers)  # pyright: ignore[reportArgumentType]
    assert [row.pair for row in rows] == [row.pair for row in again[::-1]]


def test_all_repairs_leave_words_that_were_there():
    pairs = changed(doubled(), lambda i, one: one._replace(chosen=f"I totally get it. {one.chosen}"[: 200 + i]))
    for before, row in zip(pairs, mended(pairs, REPAIRS), strict=True):
        if row.pair is not None:
            assert row.pair.prompt == before.prompt
            assert (row.pair.chosen or "") in (before.chosen or "")
            assert is_finished(row.pair.chosen or "")
            assert bool(row.changes) == (row.pair != before)


def ended(words: Sequence[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


def test_the_commands_write_whole_files_that_can_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pairs = changed(doubled(), lambda i, one: one._replace(chosen=f"I totally get it. {one.chosen}"))
    file, out, parts = file_of(tmp_path, pairs), tmp_path / "new" / "fixed.jsonl", tmp_path / "parts"
    assert ended(["data", "fix", str(file), "--out", str(out)]) == 0
    assert "100 of 200 rows" in capfd.readouterr().out
    fixed = read(out, kind="pairs").train
    assert [one[:3] for one in fixed] == [row.pair[:3] for row in mended(read(file, kind="pairs").train) if row.pair]
    record = [json.loads(line) for line in (tmp_path / "new" / "fixed.changes.jsonl").read_text().splitlines()]
    assert [row["source"] for row in record] == [f"pairs.jsonl, line {i}" for i in range(1, 201)]
    assert sum(row["kept"] for row in record) == 100
    assert ended(["data", "split", str(out), "--out", str(parts), "--seed", "1"]) == 0
    assert [len(side) for side in read(parts, kind="pairs")] == [80, 10, 10]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fix", "{file}", "--out", "{file}"], "pairs.jsonl is there already"),
        (["fix", "{file}", "--out", "{here}/x.csv"], "give --out a name that ends in .jsonl"),
        (["split", "{file}", "--out", "{here}"], "already holds files"),
        (["split", "{file}", "--out", "{here}/x", "--test", "1"], "leave nothing to learn"),
        (["audit", "{here}/none.jsonl"], "There is no"),
        (["audit", "{file}", "--encoder", "{here}"], "holds no config.json"),
        (["audit", "{file}", "--against", "{here}/none.csv"], "is not a file that can be read"),
    ],
)
def test_bad_use_is_refused_in_a_sentence(
    tmp_path: Path, words: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
):
    file = file_of(tmp_path, fair())
    before = file.read_bytes()
    assert ended(["data", *(word.format(file=file, here=tmp_path) for word in words)]) == 1
    said = capfd.readouterr()
    assert sentence in said.err
    assert said.err.startswith("mlx_dpo: ")
    assert said.out == ""
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
