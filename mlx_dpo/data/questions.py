"""Questions without answers, to be put to a model before and after."""

from collections.abc import Mapping
from pathlib import Path

from mlx_dpo.data.examples import Turns, example
from mlx_dpo.data.problems import Problem, refusal
from mlx_dpo.data.rows import rows
from mlx_dpo.refusal import Refusal


def read_questions(path: Path) -> list[Turns]:
    """The prompts of a .jsonl or .json file, each text or a list of messages under `prompt`.

    Raises Refusal with every bad row, by file, line (or row) and reason.
    """
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise Refusal(f"{path} is no .jsonl or .json file: give questions as rows with a prompt.")
    found, problems = rows(path, kind="answers")
    questions: list[Turns] = []
    for source, row in found:
        # A question is an example whose answer is not asked for: the same rules hold for its prompt.
        asked = {name: row.get(name) for name in ("prompt", "system")} if isinstance(row, Mapping) else row
        made = example(asked | {"completion": "x"} if isinstance(asked, dict) else row, source, kind="answers")
        if isinstance(made, list):
            problems += [Problem(source, reason) for reason in made]
        else:
            questions.append(made.prompt)
    if problems:
        raise refusal(problems, path)
    return questions
