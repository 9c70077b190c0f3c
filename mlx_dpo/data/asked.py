"""Questions with the answers that they should have had, to weigh a model's answers by."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.data.examples import Turns, example
from mlx_dpo.data.problems import Problem, refusal
from mlx_dpo.data.rows import rows

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
    found, problems = rows(path, kind="asked")
    made: list[Asked] = []
    for source, row in found:
        result = _asked(row, source)
        if isinstance(result, Asked):
            made.append(result)
        else:
            problems += [Problem(source, reason) for reason in result]
    if problems:
        raise refusal(problems, path)
    return made


def _asked(row: object, source: str) -> Asked | list[str]:
    if not isinstance(row, Mapping):
        parsed = example(row, source, kind="answers")
        return parsed if isinstance(parsed, list) else ["has no prompt"]
    prompt = row.get("prompt") if row.get("prompt") not in (None, "") else row.get("question")
    reference = next((row[name] for name in _REFERENCES if row.get(name) not in (None, "")), None)
    asked = {"prompt": prompt, "system": row.get("system"), "completion": "x" if reference is None else reference}
    parsed = example(asked, source, kind="answers")
    if isinstance(parsed, list):
        return parsed
    return Asked(parsed.prompt, None if reference is None else parsed.chosen, source)
