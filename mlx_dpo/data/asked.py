"""Questions with the answers that they should have had, to weigh a model's answers by."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.data.examples import Turns, example
from mlx_dpo.data.rows import parsed

_REFERENCES = ("reference", "answer", "chosen", "completion")


class Asked(NamedTuple):
    """A conversation that ends with a question, its reference answer where there is one, and where they stood."""

    prompt: Turns
    reference: str | None
    source: str

    @property
    def question(self) -> str:
        """The words of the last turn."""
        return self.prompt[-1]["content"]


def read_asked(path: Path) -> list[Asked]:
    """The rows of a .jsonl, .json, .csv or .parquet file with a prompt or question, and perhaps a reference answer.

    A reference stands under reference, answer, chosen or completion. Raises Refusal with every bad row.
    """
    return parsed(path, "asked", _asked)


def hash_of(questions: Sequence[Turns]) -> str:
    """The SHA-256 of questions in their order, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()


def _asked(row: object, source: str) -> Asked | list[str]:
    if not isinstance(row, Mapping):
        made = example(row, source, kind="answers")
        return made if isinstance(made, list) else ["has no prompt"]
    prompt = row.get("prompt") if row.get("prompt") not in (None, "") else row.get("question")
    reference = next((row[name] for name in _REFERENCES if row.get(name) not in (None, "")), None)
    asked = {"prompt": prompt, "system": row.get("system"), "completion": "x" if reference is None else reference}
    made = example(asked, source, kind="answers")
    if isinstance(made, list):
        return made
    return Asked(made.prompt, None if reference is None else made.chosen, source)
