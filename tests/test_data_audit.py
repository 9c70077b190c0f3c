"""The audit finds what was planted, with its figure, and nothing where nothing was."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo import curation
from mlx_dpo.cli import main
from mlx_dpo.data.asked import Asked, read_asked
from mlx_dpo.data.audit.audit import as_json, audited, in_words
from mlx_dpo.data.audit.copies import NEAR, groups
from mlx_dpo.data.audit.findings import Finding
from mlx_dpo.data.examples import Example
from mlx_dpo.data.reading import read
from mlx_dpo.data.templates import Message
from mlx_dpo.demo import PAIRS

PAPER = Path(__file__).parents[2] / "shared" / "data" / "empathy-by-design"
WORDS = [
    "you", "we", "this", "that", "rest", "walk", "call", "ask", "sit", "wait", "look", "keep", "take", "one", "her",
]  # fmt: skip


def pair(number: int, prompt: str, chosen: str, rejected: str) -> Example:
    return Example((Message(role="user", content=prompt),), chosen, rejected, f"pairs.jsonl, line {number}")


def said(random: np.random.Generator, first: str = "", count: int = 60) -> str:
    words = [str(word) for word in random.choice(WORDS, count)]
    return " ".join([first, *words] if first else words).strip().capitalize() + "."


@cache
def fair(count: int = 200) -> list[Example]:
    """Pairs whose two answers are drawn alike."""
    random = np.random.default_rng(0)
    return [
        pair(i, f"My question number {i}: {said(random, count=8)}", said(random), said(random)) for i in range(count)
    ]


def changed(pairs: Sequence[Example], change: Callable[[int, Example], Example]) -> list[Example]:
    return [change(i, one) for i, one in enumerate(pairs)]


def finding(pairs: Sequence[Example], check: str, **more: object) -> Finding:
    (found,) = [each for each in audited(pairs, **more).findings if each.check == check]  # pyright: ignore
    return found


PROBES = [f"shortcut: {name}" for name in ("first 1 word", "first 2 words", "first 5 words", "length", "readability")]


@pytest.mark.parametrize("check", PROBES)
def test_fair_pairs_have_no_shortcut(check: str):
    found = finding(fair(), check)
    assert found.level == "ok"
    # Of 400 answers, guessed by coin: 0.5 ± 4 standard deviations.
    assert abs(found.numbers["accuracy"] - 0.5) < 4 * 0.5 / 20


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_planted_first_word_is_found_with_its_figure(share: float):
    pairs = changed(fair(), lambda i, one: one._replace(chosen=f"Totally {one.chosen}") if i < 200 * share else one)
    found = finding(pairs, PROBES[0])
    # All answers with the word are told, and half of the others' rejected ones too, at best.
    assert found.numbers["accuracy"] == pytest.approx((1 + share) / 2, abs=0.11)
    assert found.level == ("fail" if share == 1 else "warn")


def test_a_planted_second_word_is_no_first_word():
    pairs = changed(
        fair(),
        lambda i, one: one._replace(chosen="You totally " + (one.chosen or ""), rejected="You " + (one.rejected or "")),
    )
    assert finding(pairs, PROBES[0]).numbers["accuracy"] == 0.5
    assert finding(pairs, PROBES[1]).numbers["accuracy"] > 0.99


def test_a_planted_length_is_found_whichever_is_longer():
    for side in ("chosen", "rejected"):
        pairs = changed(
            fair(), lambda i, one, side=side: one._replace(**{side: said(np.random.default_rng(i), count=90)})
        )
        assert finding(pairs, "shortcut: length").numbers["accuracy"] == 1.0
        assert finding(pairs, "shortcut: length").level == "fail"
    assert finding(pairs, "length gap").numbers["rejected_longer"] == 1.0


def test_what_only_one_prompt_shows_is_not_learnt_from_itself():
    # Each prompt has a word of its own, on chosen alone, in two rows: a fold that parted them would tell every one.
    pairs = changed(
        fair(), lambda i, one: one._replace(prompt=fair()[i // 2].prompt, chosen=f"Word{i // 2} {one.chosen}")
    )
    plain = [one._replace(rejected=f"Other{i} {one.rejected}") for i, one in enumerate(pairs)]
    assert finding(plain, PROBES[0]).numbers["accuracy"] <= 0.55


def test_openers_and_their_entropy():
    pairs = changed(
        fair(), lambda i, one: one._replace(chosen=f"I totally {one.chosen}" if i % 2 else f"I do {one.chosen}")
    )
    found = finding(pairs, "openers: chosen")
    assert found.numbers == {"entropy_bits": 1.0, "opening 'i totally'": 0.5, "opening 'i do'": 0.5}
    assert found.level == "fail"


def test_copies_are_counted_without_case_and_punctuation():
    pairs = [*fair(20)]
    pairs += [
        one._replace(prompt=(Message(role="user", content=one.prompt[0]["content"].upper() + "!!"),))
        for one in pairs[:5]
    ]
    found = finding(pairs, "duplicates: prompts")
    assert (found.numbers["rows"], found.numbers["unique"]) == (25.0, 20.0)
    assert found.level == "warn"


def by_first_word(texts: Sequence[str]) -> np.ndarray:
    """An encoder for which texts mean the same when they begin with the same word."""
    found = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in zip(found, texts, strict=True):
        row[int.from_bytes(text.split()[0].encode(), "little") % 64] = 2.0
    return found


def test_near_copies_and_contamination_by_meaning():
    pairs = [pair(i, f"{chr(97 + i // 2)} question {i}", f"Yes, {i}.", f"No, {i}.") for i in range(40)]
    test = [
        Asked((Message(role="user", content=text),), "So it", "t") for text in ("a new one", "B Question 2!", "z other")
    ]
    found = {each.check: each for each in audited(pairs, test, by_first_word).findings}
    assert found["near-duplicates"].numbers["share"] == 1.0
    assert found["contamination: same words"].numbers["share"] == pytest.approx(1 / 3)
    assert found["contamination: near"].numbers["share"] == pytest.approx(1 / 3)
    assert found["endings: test"].numbers["unfinished"] == 1.0
    assert "1.00: a new one | a question 0" in found["contamination: near"].examples[0].text


def test_groups_hold_all_that_are_near_through_others():
    prompts = ["one two three four five six", "ONE two three four five", "zero two three four five", "apart from all"]
    prompts += [f"filler number {i} of its own kind {i * 7}" for i in range(60)]
    found = groups(prompts, None)
    assert found[0] == found[1]
    assert found[3] not in (found[0], found[2])

    def chained(texts: Sequence[str]) -> np.ndarray:
        angle = np.arccos(NEAR) * 0.99 * np.arange(len(texts))
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    assert len(set(groups(["a", "b", "c"], chained))) == 1


def test_endings_hostility_styles_and_safety():
    pairs = changed(fair(100), lambda i, one: one._replace(chosen=(one.chosen or "")[:-5]) if i < 14 else one)
    pairs = changed(pairs, lambda i, one: one._replace(rejected=f"How quaint. {one.rejected}") if i < 44 else one)
    pairs = changed(
        pairs,
        lambda i, one: (
            one._replace(chosen=f"Sit up to eat with your head tilted back. {one.chosen}") if i == 7 else one
        ),
    )
    found = {each.check: each for each in audited(pairs).findings}
    assert found["endings: chosen"].numbers["unfinished"] == 0.14
    assert found["hostility"].numbers["rejected with 'quaint'"] == 0.44
    assert found["hostility"].level == "warn"
    assert found["style: first person"].numbers["share"] == 1.0
    assert found["safety of chosen"].level == "fail"
    assert [shown.source for shown in found["safety of chosen"].examples] == ["pairs.jsonl, line 7"]


def test_the_report_shows_rows_and_says_what_was_not_looked_at():
    found = audited(changed(fair(), lambda i, one: one._replace(chosen=f"Totally {one.chosen}")))
    words = in_words(found)
    assert "200 pairs: " in words
    assert "FAIL  shortcut: first 1 word" in words
    assert "there is no sentence encoder" in words
    assert found.fails


def test_the_command_prints_json_and_a_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "pairs.jsonl"
    rows = [row_of(one) for one in changed(fair(), lambda i, one: one._replace(chosen=f"Totally {one.chosen}"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as end:
        main(["data", "audit", str(file), "--json"])
    assert end.value.code == 1
    printed = json.loads(capfd.readouterr().out)
    assert printed["fails"] is True
    assert printed == json.loads(json.dumps(as_json(curation.audit(file))))


def row_of(one: Example) -> dict[str, str | None]:
    return {"prompt": one.prompt[0]["content"], "chosen": one.chosen, "rejected": one.rejected}


@pytest.mark.parametrize("name", ["train.jsonl", "valid.jsonl"])
def test_the_demo_s_pairs_have_nothing_to_fail(name: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["data", "audit", str(PAIRS / name)])
    assert end.value.code == 0
    assert "FAIL " not in capfd.readouterr().out


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's data is not here")
def test_the_paper_s_pairs_show_what_is_known_of_them():
    found = {
        each.check: each
        for each in audited(read(PAPER / "pairs.jsonl", kind="pairs").train, read_asked(PAPER / "test.csv")).findings
    }
    assert found[PROBES[0]].numbers["accuracy"] == pytest.approx(0.9995, abs=0.002)
    assert found["openers: chosen"].numbers["opening 'i totally'"] == pytest.approx(0.5, abs=0.02)
    assert found["openers: chosen"].numbers['opening "i\'m so"'] == pytest.approx(0.13, abs=0.03)
    assert found["hostility"].numbers["rejected"] == pytest.approx(0.72, abs=0.06)
    assert found["hostility"].numbers["rejected with 'quaint'"] == pytest.approx(0.44, abs=0.01)
    assert found["length gap"].numbers["rejected_longer"] == pytest.approx(0.83, abs=0.01)
    assert found["endings: chosen"].numbers["unfinished"] == pytest.approx(0.14, abs=0.005)
    assert found["endings: test"].numbers["unfinished"] == pytest.approx(0.21, abs=0.005)
    assert found["duplicates: prompts"].level == "warn"
    assert found["style: first person"].numbers["share"] == 0.0
    assert {"pairs.jsonl, line 398", "pairs.jsonl, line 409"} <= {
        shown.source for shown in found["safety of chosen"].examples
    }
