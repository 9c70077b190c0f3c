"""Repairs to preference pairs: what can be mended without writing a word, and a record of what was done to each row."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mlx_dpo.care.replies import objections
from mlx_dpo.data.audit.copies import same
from mlx_dpo.data.audit.repairs import REPAIRS, Openers, Repair
from mlx_dpo.data.examples import Example
from mlx_dpo.prose import is_finished, opening, sentences, words

_COMMON = 0.05  # of the answers of a side that may begin alike
_MARK = re.compile(r"\n\s*(?:[-*•]|\d{1,2}[.)])?\s*$")
_PASSES = 10  # what comes to stand first may be common in its turn
_ABOUT = 1.1  # times as many words as the other answer has


class Mended(NamedTuple):
    """A pair as it is now, None where it was dropped, and what was done to it."""

    pair: Example | None
    source: str
    changes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What was done, as one JSON object."""
        return {"source": self.source, "kept": self.pair is not None, "changes": list(self.changes)}


def mended(pairs: Sequence[Example], repairs: Sequence[Repair] = REPAIRS, openers: Openers = "vary") -> list[Mended]:
    """Every pair after the repairs, in the order of the rows.

    dedupe drops later rows with the same prompt, unsafe rows whose chosen answer breaks a care rule, openers takes off
    first sentences that many answers begin with (`vary`: until no opening is common; `strip`: all of those), length
    cuts whole sentences off the longer answer, trim an unfinished sentence; a pair without an answer left is dropped.
    """
    rows = [Mended(pair, pair.source, ()) for pair in pairs]
    if "dedupe" in repairs:
        rows = _without_copies(rows)
    if "unsafe" in repairs:
        rows = [_without_danger(row) for row in rows]
    if "openers" in repairs:
        for side in ("chosen", "rejected"):
            for _ in range(_PASSES):
                before, rows = rows, _with_other_openings(rows, side, openers)
                if rows == before:
                    break
    if "length" in repairs:
        rows = [_balanced(row) for row in rows]
    if "trim" in repairs:
        rows = [_finished(row) for row in rows]
    return rows


def _dropped(row: Mended, why: str) -> Mended:
    return row._replace(pair=None, changes=(*row.changes, f"dropped: {why}"))


def _changed(row: Mended, side: str, text: str, what: str) -> Mended:
    pair = row.pair and row.pair._replace(**{side: text})
    if pair is not None and pair.chosen == pair.rejected:
        return _dropped(row, f"both answers would be the same once {what}")
    return row._replace(pair=pair, changes=(*row.changes, f"{side}: {what}"))


def _each(change: Callable[[Mended, Example], Mended]) -> Callable[[Mended], Mended]:
    return lambda row: row if row.pair is None else change(row, row.pair)


def _without_copies(rows: list[Mended]) -> list[Mended]:
    first: dict[str, str] = {}
    found = []
    for row in rows:
        key = same(" ".join(turn["content"] for turn in row.pair.prompt)) if row.pair else ""
        before = first.setdefault(key, row.source)
        found.append(row if before == row.source else _dropped(row, f"the prompt is that of {before}"))
    return found


@_each
def _without_danger(row: Mended, pair: Example) -> Mended:
    broken = objections(pair.chosen or "", pair.prompt[-1]["content"])
    return _dropped(row, f"the chosen answer {broken[0].rule.words}") if broken else row


@_each
def _finished(row: Mended, pair: Example) -> Mended:
    for side in ("chosen", "rejected"):
        text = getattr(pair, side) or ""
        if is_finished(text):
            continue
        kept = without_last(text)
        if not kept:
            return _dropped(row, f"the {side} answer has no finished sentence")
        row = _changed(row, side, kept, "unfinished sentence cut")
        if row.pair is None:
            return row
    return row


@_each
def _balanced(row: Mended, pair: Example) -> Mended:
    counts = {side: len(words(getattr(pair, side))) for side in ("chosen", "rejected")}
    longer = max(counts, key=lambda side: counts[side])
    wanted = min(counts.values())
    text = getattr(pair, longer)
    kept = text
    while len(words(kept)) > _ABOUT * wanted:
        shorter = without_last(kept)
        if len(words(shorter)) < wanted / _ABOUT:
            break
        kept = shorter
    return row if kept == text else _changed(row, longer, kept, f"cut to {len(words(kept))} words")


def without_last(text: str) -> str:
    """A text without its last sentence, finished or not, nor the mark of the list item that it was."""
    parts = sentences(text)
    return _MARK.sub("", text[: text.rindex(parts[-1])]).rstrip() if len(parts) > 1 else ""


def _with_other_openings(rows: list[Mended], side: str, how: Openers) -> list[Mended]:
    there = [row.pair for row in rows if row.pair is not None]
    count = Counter(opening(getattr(pair, side), 2) for pair in there)
    most = max(1.0, _COMMON * len(there))
    common = {first for first, number in count.items() if number > most}
    found = dict[int, Mended]()
    # In an order that only the rows' own words decide, so that the same rows change in any file.
    for place in sorted(range(len(rows)), key=lambda place: _lot(rows[place])):
        row = rows[place]
        text = getattr(row.pair, side) if row.pair else ""
        first = opening(text, 2)
        parts = sentences(text)
        if first in common and (how == "strip" or count[first] > most) and len(parts) > 1:
            rest = text[text.index(parts[0]) + len(parts[0]) :].lstrip()
            count[first] -= 1
            row = _changed(row, side, rest, f"opening “{first} …” taken off")
        found[place] = row
    return [found[place] for place in range(len(rows))]


def _lot(row: Mended) -> str:
    return hashlib.sha256(repr(row.pair and (row.pair.prompt, row.pair.chosen, row.pair.rejected)).encode()).hexdigest()
