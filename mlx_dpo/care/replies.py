"""What an answer must not say, read sentence by sentence from rules that are data."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.prose import plain, sentences
from mlx_dpo.refusal import Refusal

RULES = Path(__file__).with_name("replies.toml")
_BEFORE = 48  # characters in which a denial is looked for
_DENIED = re.compile(
    r"(?:\b(?:not|never|no|avoid|avoiding|without|instead of|rather than|refrain from|resist|tempt\w*|dangerous to|"
    r"unsafe to|risky to|mistake to|myth)|n't)\b[^.;:!?]*$"
)


@dataclass(frozen=True)
class Rule:
    """One thing that an answer must not say; patterns are compiled, `source` says where the rule comes from."""

    id: str
    words: str
    says: tuple[re.Pattern[str], ...]
    near: tuple[re.Pattern[str], ...]
    unless: tuple[re.Pattern[str], ...]
    source: str
    reviewed: bool

    def objects_to(self, sentence: str, around: str) -> bool:
        """Whether a sentence says it, in an answer and to a question (`around`); all in lower case."""
        if self.near and not any(pattern.search(around) for pattern in self.near):
            return False
        if any(pattern.search(sentence) for pattern in self.unless):
            return False
        found = (match for pattern in self.says for match in pattern.finditer(sentence))
        return any(not _DENIED.search(sentence[max(0, match.start() - _BEFORE) : match.start()]) for match in found)


class Objection(NamedTuple):
    """A sentence of an answer, and the rule that it breaks."""

    rule: Rule
    sentence: str


def objections(answer: str, question: str = "") -> list[Objection]:
    """Every sentence of an answer that breaks a rule, in order; a sentence may break several."""
    around = _plain(f"{question}\n{answer}")
    return [
        Objection(rule, sentence)
        for sentence in sentences(answer)
        for rule in rules()
        if rule.objects_to(_plain(sentence), around)
    ]


@cache
def rules(path: Path = RULES) -> tuple[Rule, ...]:
    """The rules of a file; Refusal where one is not as the file's head describes it."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["rule"]
        return tuple(_rule(entry) for entry in entries)
    except (KeyError, TypeError, ValueError, re.error) as fault:
        raise Refusal(f"{path} holds a rule that cannot be read ({fault}): restore it from the package.") from None


def _rule(entry: dict) -> Rule:
    compiled = {name: tuple(re.compile(text) for text in entry.get(name, ())) for name in ("says", "near", "unless")}
    return Rule(entry["id"], entry["words"], source=entry["source"], reviewed=entry["reviewed"], **compiled)


def _plain(text: str) -> str:
    return plain(text).replace("*", "")
