"""Questions without answers, to be put to a model before and after."""

from collections.abc import Mapping
from pathlib import Path

from mlx_dpo.data.examples import Turns, example
from mlx_dpo.data.rows import parsed
from mlx_dpo.refusal import Refusal


def read_questions(path: Path) -> list[Turns]:
    """The prompts of a .jsonl or .json file, each text or a list of messages under `prompt`.

    Raises Refusal with every bad row, by file, line (or row) and reason.
    """
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise Refusal(f"{path} is no .jsonl or .json file: give questions as rows with a prompt.")
    return parsed(path, "answers", _question)


def _question(row: object, source: str) -> Turns | list[str]:
    # A question is an example whose answer is not asked for: the same rules hold for its prompt.
    if isinstance(row, Mapping):
        row = {name: row.get(name) for name in ("prompt", "system")} | {"completion": "x"}
    made = example(row, source, kind="answers")
    return made if isinstance(made, list) else made.prompt
