"""One row of data, from whatever shape it was written in."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from mlx_dpo.data.templates import Message

COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "text", "label", "system")
ASKED = ("question", "reference", "answer")  # what tests have their questions and reference answers under, besides
_PAIR, _LABELLED = ("chosen", "rejected"), ("completion", "label")
_BESIDE_TEXT = {"prompt", "chosen", "completion", "messages", "system"}
_ROLES = ("system", "user", "assistant")
_RENDERED_ELSEWHERE = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")
_FORBIDDEN = re.compile("[\x00\ud800-\udfff]")
# What pandas and JSON encoders make of a list of messages that is forced into one cell.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")

Turns = tuple[Message, ...]
Kind = Literal["pairs", "answers", "thumbs", "asked"]


class Example(NamedTuple):
    """A prompt that ends with a user's turn, the preferred answer, the other one, and where they stood.

    Plain text has the prompt () and is `chosen`. An answer with a thumb up has no `rejected`, one with a thumb
    down no `chosen`.
    """

    prompt: Turns
    chosen: str | None
    rejected: str | None
    source: str


class Repeated(NamedTuple):
    """What stands for a JSON object in which a key appears twice."""

    key: str


def example(row: object, source: str, *, kind: Kind) -> Example | list[str]:
    """The example that a row holds, or every reason why it holds none.

    pairs: chosen and rejected are needed. answers: chosen, completion or messages (ending with the answer), and
    `rejected` is not looked at; or text alone. thumbs: completion with label (TRL's unpaired preferences), or
    chosen and rejected, which stay together here (`thumbs` parts them). Text is taken as it is: nothing is
    stripped or normalised.
    """
    if isinstance(row, Repeated):
        return [f"the key {row.key!r} appears twice"]
    if not isinstance(row, Mapping):
        return [f"is {_kind(row)}, not an object with named fields"]
    fields = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    given = {name for name, value in fields.items() if not _blank(value)}
    if unclear := _unclear(given, kind):
        return [unclear]
    if kind == "answers" and "text" in fields and not given & _BESIDE_TEXT:
        return _plain_text(fields["text"], source)
    names = _answer_columns(fields, given, kind)
    if missing := _missing(fields, names, kind):
        return missing
    reasons: list[str] = []
    liked = _liked(fields, reasons) if kind == "thumbs" and names == ("completion",) else True
    if kind == "answers" and fields.get("label") in (False, 0):
        reasons.append("label is false, so the answer is none to learn: leave the row out, or use --loss kto")
    answers = [_turns(name, fields[name], "assistant", reasons) for name in names]
    explicit = "prompt" in fields and names != ("messages",)
    prompt = _turns("prompt", fields["prompt"], "user", reasons) if explicit else _shared_beginning(answers)
    if reasons:
        return reasons
    whole = _with_system(fields.get("system"), prompt, reasons)
    _check_prompt(whole, reasons)
    texts = [_answer(name, turns, (prompt, whole), reasons) for name, turns in zip(names, answers, strict=True)]
    if len(texts) == 2 and not reasons and texts[0] == texts[1]:
        reasons.append("chosen and rejected are the same text")
    chosen, rejected = texts if len(texts) == 2 else (texts[0], None) if liked else (None, texts[0])
    return reasons or Example(whole, chosen, rejected, source)


def thumbs(items: Sequence[Example]) -> list[Example]:
    """Single answers: each pair's chosen one in its place, and all pairs' rejected ones at the end.

    The order is that in which TRL 1.16 parts pairs. Neighbours then answer different prompts, as KTO needs them.
    """
    ups = [item if item.chosen is None else item._replace(rejected=None) for item in items]
    return ups + [item._replace(chosen=None) for item in items if item.chosen is not None and item.rejected is not None]


def missing_columns(columns: Iterable[str], *, kind: Kind) -> str | None:
    """What a table's header lacks for any row to be an example, in words; None where it lacks nothing."""
    names = set(columns)
    if kind == "asked":
        return None if names & {"prompt", "question"} else "needs the column prompt or question"
    pair, labelled = names >= set(_PAIR), names >= set(_LABELLED)
    if kind == "answers":
        enough = names & {"chosen", "completion", "messages", "text"}
        return None if enough else "needs the columns prompt and chosen, prompt and completion, messages, or text"
    if pair or (kind == "thumbs" and labelled):
        return None
    if kind == "thumbs":
        return "needs the columns prompt, completion and label, or prompt, chosen and rejected"
    hint = " (--loss kto learns from completion and label)" if labelled else ""
    return f"needs the columns prompt, chosen and rejected{hint}"


def _blank(value: object) -> bool:
    """Whether this is how a table says that a row has nothing in a column: an empty cell, or NaN."""
    return value == "" or (isinstance(value, float) and value != value)


def _unclear(given: set[str], kind: Kind) -> str | None:
    """Why it cannot be told which kind of row this is, or that it is another kind than was asked for."""
    pair, labelled, beside = (_listed(given, names) for names in (_PAIR, _LABELLED, _BESIDE_TEXT))
    if kind == "answers" and "text" in given and beside:
        return f"has text beside {beside}: give either plain text alone, or a prompt with an answer"
    if kind == "thumbs" and pair and labelled:
        return f"has {labelled} beside {pair}: give either chosen and rejected, or one completion with its label"
    if kind == "pairs" and not pair and given >= set(_LABELLED):
        return "has completion and label, but neither chosen nor rejected: use --loss kto for such rows"
    return None


def _listed(given: set[str], names: Iterable[str]) -> str:
    *first, last = [name for name in COLUMNS if name in given and name in names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _plain_text(value: object, source: str) -> Example | list[str]:
    reasons: list[str] = []
    _check_text("text", value, reasons)
    return reasons or Example((), str(value), None, source)


def _liked(fields: Mapping[str, object], reasons: list[str]) -> bool:
    value = fields.get("label")
    if value is None or value == "":
        reasons.append("label is missing")
    elif not isinstance(value, (int, float)) or value not in (0, 1):
        reasons.append(f"label is {_shortened(value)}, not true or false (or 1 or 0)")
    return value == 1


def _answer_columns(fields: Mapping[str, object], given: set[str], kind: Kind) -> tuple[str, ...]:
    if kind == "pairs" or (kind == "thumbs" and given & set(_PAIR)):
        return _PAIR
    if kind == "thumbs":
        return ("completion",) if given & set(_LABELLED) else ()
    wanted = ("chosen", "completion", "messages") if "prompt" in fields else ("messages", "chosen", "completion")
    return tuple(name for name in wanted if name in fields)[:1]


def _missing(fields: Mapping[str, object], names: tuple[str, ...], kind: Kind) -> list[str]:
    absent = [name for name in names if name not in fields]
    if not names:
        labelled = "completion with label, or chosen and rejected"
        absent = [f"an answer ({labelled if kind == 'thumbs' else 'chosen, completion, messages or text'})"]
    if absent:
        return [f"{name} is missing" for name in absent]
    if names == ("messages",):
        value = fields["messages"]
        return [] if isinstance(value, list) else [f"messages is {_kind(value)}, not a list of messages"]
    if "prompt" in fields or all(isinstance(fields[name], list) for name in names):
        return []
    hint = ""
    if len(names) == 2:
        hint = " (it cannot be told from texts that begin alike: give prompt, or lists of messages)"
    return [f"prompt is missing{hint}"]


def _turns(name: str, value: object, role: str, reasons: list[str]) -> Turns:
    if isinstance(value, str):
        _check_text(name, value, reasons)
        return (Message(role=role, content=value),)
    if not isinstance(value, list):
        reasons.append(f"{name} is {_kind(value)}, not text or a list of messages")
        return ()
    if not value:
        reasons.append(f"{name} is an empty list")
    return tuple(_message(f"{name}[{place}]", turn, reasons) for place, turn in enumerate(value))


def _message(name: str, value: object, reasons: list[str]) -> Message:
    message = Message(role="", content="")
    if isinstance(value, Repeated):
        reasons.append(f"{name} has the key {value.key!r} twice")
        return message
    if not isinstance(value, Mapping):
        reasons.append(f"{name} is {_kind(value)}, not a message with role and content")
        return message
    role = value.get("role")
    if role not in _ROLES:
        reasons.append(f"{name} has the role {_shortened(role)}, not system, user or assistant")
    _check_text(f"{name}.content", value.get("content"), reasons)
    lost = [key for key in _RENDERED_ELSEWHERE if value.get(key)]
    if lost:
        reasons.append(f"{name} has {lost[0]}, which is not learnt here")
    message = Message(role=str(role), content=str(value.get("content")))
    if value.get("name") is not None:
        _check_text(f"{name}.name", value["name"], reasons)
        message["name"] = str(value["name"])
    return message


def _check_text(name: str, value: object, reasons: list[str]) -> None:
    if value is None:
        reasons.append(f"{name} is missing")
    elif not isinstance(value, str):
        reasons.append(f"{name} is {_kind(value)}, not text")
    elif not value or value.isspace():
        reasons.append(f"{name} is empty")
    elif found := _FORBIDDEN.search(value):
        what = "a NUL character" if found.group() == "\x00" else f"half a surrogate pair (U+{ord(found.group()):04X})"
        reasons.append(f"{name} has {what} at character {found.start() + 1}")
    elif _MESSAGES_AS_TEXT.match(value):
        it = "messages" if name == "text" else "it"
        reasons.append(f"{name} is a list of messages written as text: give {it} as a list (JSON Lines or Parquet)")


def _shared_beginning(answers: list[Turns]) -> Turns:
    if len(answers) == 1:
        return answers[0][:-1]
    chosen, rejected = answers
    count = 0
    for mine, yours in zip(chosen[:-1], rejected[:-1], strict=False):
        if mine != yours:
            break
        count += 1
    return chosen[:count]


def _with_system(system: object, prompt: Turns, reasons: list[str]) -> Turns:
    # An empty cell is how a table says that there is no system text, so it means the same everywhere.
    if system is None or system == "":
        return prompt
    _check_text("system", system, reasons)
    if prompt and prompt[0]["role"] == "system":
        reasons.append("there is a system field and the prompt has a system message already")
    return (Message(role="system", content=str(system)), *prompt)


def _check_prompt(prompt: Turns, reasons: list[str]) -> None:
    roles = [turn["role"] for turn in prompt]
    if not roles:
        reasons.append("prompt is missing")
    elif roles[-1] != "user":
        reasons.append(f"the prompt ends with a message of role {roles[-1]}; the last must be the user's")
    if "system" in roles[1:]:
        reasons.append("a system message stands elsewhere than first")


def _answer(name: str, turns: Turns, prompts: tuple[Turns, ...], reasons: list[str]) -> str:
    last = turns[len(turns) - 1]
    if len(turns) > 1 and turns[:-1] not in prompts:
        reasons.append(
            f"{name} has {len(turns)} messages; it must be one answer, or repeat the prompt's messages "
            "exactly and add one answer"
        )
    elif last["role"] != "assistant":
        reasons.append(f"{name} ends with a message of role {last['role']}, not with the assistant's answer")
    return last["content"]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and value != value:
        return "NaN (a missing value)"
    names = {str: "text", int: "a number", float: "a number", list: "a list", bytes: "binary data"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def _shortened(value: object) -> str:
    text = repr(value) if isinstance(value, str) else _kind(value)
    return text if len(text) <= 40 else text[:37] + "…'"
