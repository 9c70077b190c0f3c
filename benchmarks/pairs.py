"""The pairs that all contestants learn from: read, lengthened where a case asks for it, and counted in tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LONG_PROMPT = 600
_SUBJECTS = ("The day centre", "Her neighbour", "The nurse", "His brother", "The pharmacist", "A friend")
_DOINGS = ("called about the visit", "left a note on the table", "asked for the list", "brought the papers", "waited")
_TIMES = ("on Monday morning", "after lunch", "late in the evening", "before the weekend", "at half past nine")


class Lengths(NamedTuple):
    """Tokens of a prompt under the chat template and of its two answers, end of turn included."""

    prompt: int
    chosen: int
    rejected: int


def read(file: Path, count: int) -> list[dict[str, str]]:
    """The first `count` pairs of a JSONL file whose rows have prompt, chosen and rejected texts.

    Raises ValueError where there are fewer, or where a text is missing.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    names = ("prompt", "chosen", "rejected")
    if len(rows) < count:
        raise ValueError(f"{file} has {len(rows)} pairs and the steps take {count}: give fewer --steps or another file")
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{file}, row {number}: prompt, chosen and rejected must be texts")
    return [{name: row[name] for name in names} for row in rows]


def lengthened(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[dict[str, str]]:
    """The pairs with a made-up text ahead of each prompt, so that it takes about LONG_PROMPT tokens."""
    return [row | {"prompt": _longer(row["prompt"], number, tokenizer)} for number, row in enumerate(rows)]


def lengths(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[Lengths]:
    """What the chat template makes of each pair."""
    found = []
    for row in rows:
        prompt = len(_ids(tokenizer, row["prompt"]))
        chosen, rejected = (len(_ids(tokenizer, row["prompt"], row[side])) - prompt for side in ("chosen", "rejected"))
        found.append(Lengths(prompt, chosen, rejected))
    return found


def _longer(prompt: str, number: int, tokenizer: Any) -> str:
    text, sentences = prompt, []
    while len(_ids(tokenizer, text)) < LONG_PROMPT:
        i = number + len(sentences)
        sentences.append(f"{_SUBJECTS[i % 6]} {_DOINGS[i % 5]} {_TIMES[i // 5 % 5]}.")
        text = " ".join([*sentences, prompt])
    return text


def _ids(tokenizer: Any, prompt: str, answer: str | None = None) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=False)
