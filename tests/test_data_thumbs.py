"""Answers that were liked or not: from rows with a label, and from pairs, whose two answers are one each."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tables import WRITERS, as_csv, as_parquet, stored

from mlx_dpo.data.examples import Example, example, missing_columns, thumbs
from mlx_dpo.data.reading import read, split_off
from mlx_dpo.data.templates import Message
from mlx_dpo.data.tokenised import CutCounts, tokenise
from mlx_dpo.refusal import Refusal

SYSTEM, USER = Message(role="system", content="Be kind."), Message(role="user", content="He fell.")
YES = {"role": "assistant", "content": "Stay."}
GOOD = {"prompt": "He fell.", "completion": "Stay.", "label": True}
PAIR = {"prompt": "He fell.", "chosen": "Stay.", "rejected": "Go."}
SHAPES = [
    GOOD | {"system": "Be kind."},
    GOOD | {"prompt": [SYSTEM, USER]},
    GOOD | {"prompt": [SYSTEM, USER], "completion": [YES]},
    GOOD | {"prompt": [SYSTEM, USER], "completion": [SYSTEM, USER, YES]},
    GOOD | {"prompt": None, "completion": [SYSTEM, USER, YES]},
    GOOD | {"system": "Be kind.", "chosen": None, "rejected": "", "messages": 3, "text": 4, "score": []},
]


@pytest.mark.parametrize("row", SHAPES)
@pytest.mark.parametrize("label", [True, 1, 1.0, False, 0, 0.0])
def test_every_shape_of_a_thumb_is_the_same_thumb(row: dict[str, Any], label: float):
    made = example(row | {"label": label}, "here", kind="thumbs")
    answers = ("Stay.", None) if label else (None, "Stay.")
    assert made == Example((SYSTEM, USER), *answers, "here")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"label": None}, "label is missing"),
        (GOOD | {"label": ""}, "label is missing"),
        (GOOD | {"label": "yes"}, "label is 'yes', not true or false (or 1 or 0)"),
        (GOOD | {"label": "true"}, "label is 'true', not true or false"),
        (GOOD | {"label": 2}, "label is a number, not true or false"),
        (GOOD | {"label": -1}, "label is a number, not true or false"),
        (GOOD | {"label": 0.5}, "label is a number, not true or false"),
        (GOOD | {"label": float("nan")}, "label is NaN (a missing value), not true or false"),
        (GOOD | {"label": [True]}, "label is a list, not true or false"),
        (GOOD | {"completion": None}, "completion is missing"),
        (GOOD | {"completion": " "}, "completion is empty"),
        (
            GOOD | {"label": 3, "completion": ""},
            "not true or false (or 1 or 0); completion is empty",
        ),
        (GOOD | {"prompt": None}, "prompt is missing"),
        (GOOD | {"prompt": [USER, YES]}, "the prompt ends with a message of role assistant"),
        (GOOD | {"completion": [USER]}, "completion ends with a message of role user"),
        ({"prompt": "p"}, "an answer (completion with label, or chosen and rejected) is missing"),
        ({"prompt": "p", "chosen": "c"}, "rejected is missing"),
        (PAIR | {"rejected": ""}, "rejected is empty"),
        (PAIR | {"rejected": "Stay."}, "chosen and rejected are the same text"),
        (GOOD | PAIR, "has completion and label beside chosen and rejected: give either"),
        (PAIR | {"label": False}, "has label beside chosen and rejected: give either"),
        (GOOD | {"rejected": "r"}, "has completion and label beside rejected: give either"),
    ],
)
def test_a_bad_thumb_says_why(row: object, reason: str):
    made = example(row, "here", kind="thumbs")
    assert isinstance(made, list)
    assert reason in "; ".join(made)


@pytest.mark.parametrize("row", [GOOD, GOOD | {"label": 0}, GOOD | {"chosen": "", "rejected": float("nan")}])
def test_among_pairs_a_thumb_is_sent_to_the_loss_that_learns_from_it(row: object):
    made = example(row, "here", kind="pairs")
    assert made == ["has completion and label, but neither chosen nor rejected: use --loss kto for such rows"]


def test_among_pairs_a_pair_with_other_columns_stays_a_pair():
    more = {"completion": "x", "label": True}
    assert example(PAIR | more, "here", kind="pairs") == example(PAIR, "here", kind="pairs")


def test_a_pair_is_parted_into_its_chosen_and_its_rejected():
    pair = example(PAIR, "here", kind="thumbs")
    assert isinstance(pair, Example)
    up, down = thumbs([pair])
    assert (up, down) == (Example((USER,), "Stay.", None, "here"), Example((USER,), None, "Go.", "here"))
    assert thumbs([down, up]) == [down, up]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_may_hold_thumbs_and_pairs_whose_rejected_answers_come_last(tmp_path: Path, suffix: str):
    rows = [
        GOOD | {"label": False},
        PAIR | {"chosen": "A", "rejected": "B", "system": "Be kind."},
        GOOD | {"completion": "C"},
        PAIR | {"chosen": "D", "rejected": "E"},
    ]
    train = read(stored(tmp_path / f"a.{suffix}", WRITERS[suffix](rows)), kind="thumbs").train
    assert [(item.chosen, item.rejected) for item in train] == [
        (None, "Stay."),
        ("A", None),
        ("C", None),
        ("D", None),
        (None, "B"),
        (None, "E"),
    ]
    assert [len(item.prompt) for item in train] == [1, 2, 1, 1, 2, 1]
    first = 2 if suffix == "csv" else 1
    assert [int(item.source.split()[-1]) - first for item in train] == [0, 1, 2, 3, 1, 3]


@pytest.mark.parametrize(
    ("label", "up"),
    [("true", True), ("TRUE", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)],
)
def test_a_csv_file_writes_its_labels_as_text(tmp_path: Path, label: str, up: bool):
    (item,) = read(stored(tmp_path / "a.csv", as_csv([GOOD | {"label": label}])), kind="thumbs").train
    assert (item.chosen, item.rejected) == (("Stay.", None) if up else (None, "Stay."))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("yes", "label is 'yes', not true"),
        (" true", "label is ' true', not true"),
        ("2", "label is '2', not true"),
        ("", "label is missing"),
        ("nan", r"label is NaN \(a missing value\), not true"),
    ],
)
def test_another_label_in_a_csv_file_is_refused_by_row(tmp_path: Path, label: str, reason: str):
    path = stored(tmp_path / "a.csv", as_csv([GOOD, GOOD | {"label": label}]))
    with pytest.raises(Refusal, match=f"^a.csv, line 3: {reason}"):
        read(path, kind="thumbs")


def test_true_and_1_stay_text_in_every_other_column(tmp_path: Path):
    (item,) = read(stored(tmp_path / "a.csv", as_csv([GOOD | {"completion": "1"}])), kind="thumbs").train
    assert item.chosen == "1"


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("prompt", "label"), ("prompt", "chosen", "text")])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_without_the_columns_of_either_is_refused(tmp_path: Path, columns: tuple[str, ...], suffix: str):
    path = stored(tmp_path / f"a.{suffix}", WRITERS[suffix]([dict.fromkeys(columns, "x")]))
    with pytest.raises(Refusal, match="needs the columns prompt, completion and label, or prompt, chosen and rejected"):
        read(path, kind="thumbs")


def test_a_table_of_thumbs_is_no_table_of_pairs(tmp_path: Path):
    path = stored(tmp_path / "a.parquet", as_parquet([GOOD]))
    with pytest.raises(Refusal, match=r"prompt, chosen and rejected \(--loss kto learns from completion and label\)"):
        read(path, kind="pairs")
    assert missing_columns(GOOD, kind="thumbs") is missing_columns(PAIR, kind="thumbs") is None


def test_all_thumbs_of_a_prompt_are_held_out_together(tmp_path: Path):
    rows = [PAIR | {"prompt": f"question {number % 7}", "chosen": f"c {number}"} for number in range(20)]
    rows += [GOOD | {"prompt": f"question {number % 7}", "completion": f"x {number}"} for number in range(20)]
    every = read(stored(tmp_path / "a.jsonl", WRITERS["jsonl"](rows)), kind="thumbs").train
    train, valid = split_off(every, 0.3, seed=2)
    assert len(train) + len(valid) == len(every) == 60
    assert valid
    assert not {item.prompt[0]["content"] for item in train} & {item.prompt[0]["content"] for item in valid}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


LONG = {
    "prompt": "My mother asks again. " * 6,
    "chosen": "Stay with her tonight, and rest.",
    "rejected": "Redirect the patient to an activity, and do not correct the patient.",
}


def pair_of(row: dict[str, Any]) -> Example:
    made = example(row, "row 1", kind="pairs")
    assert isinstance(made, Example)
    return made


def test_the_tokens_of_a_pair_are_those_of_its_two_thumbs(tokenizer: TokenizerWrapper):
    (pair,) = tokenise([pair_of(LONG)], tokenizer, None).items
    up, down = tokenise(thumbs([pair_of(LONG)]), tokenizer, None).items
    assert up == pair._replace(rejected=[])
    assert down == pair._replace(chosen=[])


@pytest.mark.parametrize("spare", [1, 5, 40])
def test_each_thumb_is_cut_by_itself(tokenizer: TokenizerWrapper, spare: int):
    (pair,) = tokenise([pair_of(LONG)], tokenizer, None).items
    limit = len(pair.prompt) + len(pair.rejected) - spare
    (up, down), cut = tokenise(thumbs([pair_of(LONG)]), tokenizer, limit)
    shorter = len(pair.rejected) - len(pair.chosen)
    lost = [max(0, spare - shorter), spare]
    assert [len(pair.prompt) - len(item.prompt) for item in (up, down)] == lost
    assert (up.chosen, up.rejected, down.chosen, down.rejected) == (pair.chosen, [], [], pair.rejected)
    touched = sum(tokens > 0 for tokens in lost)
    assert cut == CutCounts(pairs=touched, prompts=touched, responses=0, tokens=sum(lost))


def test_a_thumb_down_loses_its_end_where_the_prompt_has_nothing_left(tokenizer: TokenizerWrapper):
    down = thumbs([pair_of(LONG)])[1]
    (whole,) = tokenise([down], tokenizer, None).items
    (bare,) = tokenise(thumbs([pair_of(LONG | {"prompt": "§"})])[1:], tokenizer, None).items
    frame = len(bare.prompt) - len(tokenizer.encode("§", add_special_tokens=False))
    (item,), cut = tokenise([down], tokenizer, frame + 5)
    assert (len(item.prompt), item.chosen, item.rejected) == (frame, [], whole.rejected[:5])
    lost = len(whole.prompt) - frame + len(whole.rejected) - 5
    assert cut == CutCounts(pairs=1, prompts=1, responses=1, tokens=lost)
    with pytest.raises(Refusal, match=f"^row 1: --max-length {frame} leaves no room for an answer"):
        tokenise([down], tokenizer, frame)


def test_a_disliked_answer_of_no_tokens_is_refused(tmp_path: Path):
    template = tiny.CHATML.replace("message['content']", "message['content'] | trim('z')")
    tiny.write_tokenizer(tmp_path, template)
    down = Example((USER,), None, "zz", "row 1")
    with pytest.raises(Refusal, match="^row 1: rejected has no token of its own"):
        tokenise([down], load_tokenizer(tmp_path), None)


def test_thumbs_down_are_no_answers_to_learn():
    assert isinstance(example(GOOD | {"label": True}, "here", kind="answers"), Example)
    found = example(GOOD | {"label": False}, "here", kind="answers")
    assert isinstance(found, list)
    assert "use --loss kto" in found[0]
