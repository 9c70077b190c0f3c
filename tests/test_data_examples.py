"""A row is an example, or every reason why not; holding out and naming a data set."""

from collections.abc import Sequence
from typing import Any

import pytest

from mlx_dpo.data.examples import Example, Kind, Repeated, example
from mlx_dpo.data.reading import fingerprint, split_off
from mlx_dpo.data.templates import Message
from mlx_dpo.refusal import Refusal

USER, YES = {"role": "user", "content": "He fell."}, {"role": "assistant", "content": "Stay."}
NO, SYSTEM = {"role": "assistant", "content": "Go."}, {"role": "system", "content": "Be kind."}
GOOD: dict[str, Any] = {"prompt": "p", "chosen": "c", "rejected": "r"}


def reasons(row: object, *, kind: Kind = "pairs") -> str:
    made = example(row, "here", kind=kind)
    assert isinstance(made, list)
    return "; ".join(made)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "is a list, not an object"),
        (Repeated("chosen"), "the key 'chosen' appears twice"),
        ({}, "chosen is missing; rejected is missing"),
        ({"chosen": "c", "rejected": None, "prompt": "p"}, "rejected is missing"),
        ({"chosen": "a c", "rejected": "a r"}, "prompt is missing (it cannot be told from texts that begin alike"),
        (GOOD | {"chosen": "r"}, "chosen and rejected are the same text"),
        (GOOD | {"prompt": "", "chosen": " \n\u3000"}, "chosen is empty; prompt is empty"),
        (GOOD | {"chosen": 1, "rejected": True}, "chosen is a number, not text"),
        (GOOD | {"chosen": 1, "rejected": True}, "rejected is true or false, not text"),
        (GOOD | {"chosen": float("nan")}, "chosen is NaN (a missing value), not text"),
        (GOOD | {"chosen": {"a": 1}}, "chosen is an object, not text"),
        (GOOD | {"chosen": "a\x00b"}, "chosen has a NUL character at character 2"),
        (GOOD | {"rejected": "ab\ud83d"}, "rejected has half a surrogate pair (U+D83D) at character 3"),
        (GOOD | {"chosen": " [{'role': 'assistant'"}, "chosen is a list of messages written as text"),
        (GOOD | {"prompt": []}, "prompt is an empty list"),
        (GOOD | {"prompt": [USER, YES]}, "the prompt ends with a message of role assistant"),
        (GOOD | {"prompt": [SYSTEM]}, "the prompt ends with a message of role system"),
        (GOOD | {"prompt": [USER, SYSTEM, USER]}, "a system message stands elsewhere than first"),
        (GOOD | {"prompt": [USER | {"role": "tool"}]}, "prompt[0] has the role 'tool', not system, user or assistant"),
        (GOOD | {"prompt": [USER | {"role": ["user"]}]}, "prompt[0] has the role a list"),
        (GOOD | {"prompt": [{"role": "user"}]}, "prompt[0].content is missing"),
        (GOOD | {"prompt": [USER | {"content": [{"type": "text"}]}]}, "prompt[0].content is a list, not text"),
        (GOOD | {"prompt": ["hello"]}, "prompt[0] is text, not a message"),
        (GOOD | {"prompt": [Repeated("role")]}, "prompt[0] has the key 'role' twice"),
        (GOOD | {"prompt": [USER | {"name": 3}]}, "prompt[0].name is a number"),
        (GOOD | {"chosen": [YES | {"tool_calls": [{}]}]}, "chosen[0] has tool_calls, which is not learnt here"),
        (GOOD | {"chosen": [USER]}, "chosen ends with a message of role user"),
        (GOOD | {"chosen": [YES, NO]}, "chosen has 2 messages; it must be one answer"),
        ({"prompt": [USER], "chosen": [NO, YES], "rejected": [USER, NO]}, "chosen has 2 messages"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "chosen and rejected are the same text"),
        ({"chosen": [USER, YES, USER, YES], "rejected": [USER, NO, USER, NO]}, "chosen has 4 messages"),
        ({"chosen": [YES], "rejected": [NO]}, "prompt is missing"),
        ({"chosen": [USER, YES], "rejected": "Go."}, "prompt is missing"),
        (GOOD | {"system": 3}, "system is a number"),
        (GOOD | {"system": "  "}, "system is empty"),
        (GOOD | {"system": "s", "prompt": [SYSTEM, USER]}, "a system field and the prompt has a system message"),
    ],
)
def test_bad_pair_says_why(row: object, reason: str):
    assert reason in reasons(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "rejected": "r"}, "an answer (chosen, completion, messages or text) is missing"),
        ({"completion": "c"}, "prompt is missing"),
        ({"chosen": "c"}, "prompt is missing"),
        ({"messages": "hello"}, "messages is text, not a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [YES]}, "prompt is missing"),
        ({"messages": [USER, YES, USER]}, "messages ends with a message of role user"),
        ({"prompt": "p", "completion": " "}, "completion is empty"),
    ],
)
def test_bad_answered_prompt_says_why(row: object, reason: str):
    assert reason in reasons(row, kind="answers")


def test_the_beginning_is_split_off_at_a_message_and_never_inside_a_text():
    shared = [SYSTEM, USER, YES, USER]
    chosen, rejected = YES | {"content": "The same start, yes."}, YES | {"content": "The same start, no."}
    made = example({"chosen": [*shared, chosen], "rejected": [*shared, rejected]}, "here", kind="pairs")
    assert made == Example(
        tuple(Message(**turn) for turn in shared), "The same start, yes.", "The same start, no.", "here"
    )


def test_columns_that_are_not_read_change_nothing():
    extra = {"id": 7, "score": float("nan"), "completion": 3, "messages": "x", "system": None}
    assert example(GOOD | extra, "here", kind="pairs") == example(GOOD, "here", kind="pairs")


def test_a_message_keeps_its_name_and_forgets_empty_fields():
    turn = USER | {"name": "Ana", "tool_calls": None, "weight": 1}
    made = example(GOOD | {"prompt": [turn]}, "here", kind="pairs")
    assert isinstance(made, Example)
    assert made.prompt == (Message(role="user", content="He fell.", name="Ana"),)


def examples_of(prompts: Sequence[str]) -> list[Example]:
    return [
        Example((Message(role="user", content=text),), f"yes {number}", "no", f"row {number}")
        for number, text in enumerate(prompts)
    ]


def prompts_of(examples: Sequence[Example]) -> set[str]:
    return {item.prompt[0]["content"] for item in examples}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_held_out_prompts_are_never_learnt_and_no_example_is_lost(fraction: float):
    every = examples_of([f"question {number % 37}" for number in range(200)])
    train, valid = split_off(every, fraction, seed=3)
    assert not prompts_of(train) & prompts_of(valid)
    assert sorted(item.source for item in train + valid) == sorted(item.source for item in every)
    assert [item for item in every if item in train] == train
    assert 200 * fraction - 6 <= len(valid) <= 200 * fraction


def test_the_seed_and_the_prompts_alone_decide_what_is_held_out():
    every = examples_of([f"question {number}" for number in range(60)])
    held = prompts_of(split_off(every, 0.2, seed=1)[1])
    assert prompts_of(split_off(every[::-1], 0.2, seed=1)[1]) == held
    assert prompts_of(split_off(every, 0.2, seed=2)[1]) != held


def test_the_smallest_and_the_lopsided_data_are_still_split_by_prompt():
    two = examples_of(["a", "b"])
    assert [len(side) for side in split_off(two, 0.01, seed=0)] == [1, 1]
    lopsided = examples_of(["a"] * 9 + ["b"] * 3)
    assert prompts_of(split_off(lopsided, 0.1, seed=0)[1]) == {"b"}
    assert split_off(examples_of(["a"] * 5), 0.5, seed=0)[1] == []
    assert split_off(two, 0, seed=0) == (two, [])


@pytest.mark.parametrize("fraction", [-0.1, 1, 7, float("nan")])
def test_a_share_that_is_none_is_refused(fraction: float):
    with pytest.raises(Refusal, match="at least 0 and less than 1"):
        split_off(examples_of(["a", "b"]), fraction, seed=0)


def test_the_fingerprint_follows_the_text_and_its_order_only():
    every = examples_of(["a", "b"])
    assert fingerprint(every) == fingerprint([item._replace(source="elsewhere") for item in every])
    others = [
        every[::-1],
        every[:1],
        [every[0]._replace(chosen="yes 0 "), every[1]],
        [every[0]._replace(rejected=None), every[1]],
        [every[0]._replace(prompt=(Message(role="system", content="a"),)), every[1]],
    ]
    assert len({fingerprint(other) for other in [every, *others]}) == 6


# SHA-256 of the examples' text, as runs that were recorded before there were other kinds of rows have them.
NAMED = {
    "pairs": (
        [
            {"prompt": "He fell.", "system": "Be kind.", "chosen": "Stay.", "rejected": "Go."},
            {"prompt": [{"role": "user", "content": "何を?", "name": "Ana"}], "chosen": "Yes.\n", "rejected": "No."},
        ],
        "394a453eb58581ed5521f6eca1465cccc87c58345eb083eda0e8b9e330959e83",
    ),
    "answers": (
        [
            {"prompt": "He fell.", "completion": "Stay."},
            {"messages": [{"role": "user", "content": "何を?"}, {"role": "assistant", "content": "Yes.\n"}]},
        ],
        "60003de730c728f0e45ea4256dd00178474cbe87bc34f15eea4de7397025315b",
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_the_fingerprint_of_a_data_set_stays_what_it_was(kind: Kind):
    rows, digest = NAMED[kind]
    every = [example(row, "here", kind=kind) for row in rows]
    assert fingerprint([item for item in every if isinstance(item, Example)]) == digest


def test_the_fingerprint_tells_text_thumbs_and_answers_apart():
    (item,) = examples_of(["a"])
    up, down = item._replace(rejected=None), item._replace(chosen=None, rejected=item.chosen)
    every = [item, up, down, up._replace(prompt=())]
    assert len({fingerprint([other]) for other in every}) == 4
