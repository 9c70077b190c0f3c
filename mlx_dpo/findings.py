"""What a person sees of data and of answers: audits, repairs, comparisons."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import progress
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from mlx_dpo import curation
from mlx_dpo.align import events
from mlx_dpo.console import err, out
from mlx_dpo.convert import events as conversion
from mlx_dpo.data.audit import audit
from mlx_dpo.data.audit.audit import Audited
from mlx_dpo.data.audit.mending import Mended
from mlx_dpo.data.making.making import Progress
from mlx_dpo.evaluation import run as evaluation
from mlx_dpo.evaluation import words


def show_audit(found: Audited, *, as_json: bool) -> None:
    """Print an audit, as a report or as one JSON object."""
    print(json.dumps(audit.as_json(found), ensure_ascii=False) if as_json else audit.in_words(found))


def show_mending(rows: list[Mended], file: Path) -> None:
    """Print how many rows were changed and dropped, and where to read what was done."""
    kept = sum(row.pair is not None for row in rows)
    changed = sum(row.pair is not None and bool(row.changes) for row in rows)
    out.print(f"Pairs: {file} ({kept} of {len(rows)} rows, {changed} of them changed)")
    out.print(f"What was done to each row: {curation.changes_beside(file)}")


def show_evaluation(happenings: Iterable[evaluation.Event]) -> evaluation.Evaluated | None:
    """Show an evaluation as it happens and return its end."""
    end = None
    with _bar() as bar:
        tasks: dict[str, TaskID] = {}
        for event in happenings:
            if isinstance(event, events.Phase):
                if event.name not in tasks:
                    tasks[event.name] = bar.add_task(event.name, total=event.total)
                    if not err.is_terminal:
                        err.print(f"{event.name} …")
                bar.update(tasks[event.name], completed=event.done, total=event.total)
            elif isinstance(event, events.Note):
                err.print(event.text)
            else:
                end = event
    return end


def comparison_in_words(end: evaluation.Evaluated) -> str:
    """A comparison as a table, and where its report is."""
    return f"{words.in_words(end.found)}\nReport:  {end.out / evaluation.PAGE}"


def show_making(happenings: Iterable[Progress | list[dict[str, Any]]], file: Path) -> None:
    """Show how pairs are made, and print how many there are and for how many questions there are none."""
    rows: list[dict[str, Any]] = []
    with _bar() as bar:
        task = bar.add_task("Writing", total=None)
        for event in happenings:
            if isinstance(event, list):
                rows = event
            else:
                bar.update(task, completed=event.done, total=event.total)
    pairs = sum(len(row["pairs"]) for row in rows)
    without = sum(not row["pairs"] for row in rows)
    out.print(f"Pairs: {file} ({pairs} of {len(rows)} questions; {without} questions have none)")
    out.print(f"How each was made, or why not: {curation.work_beside(file)}")


def _bar() -> progress.Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    return progress.Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def show_fetching(happenings: Iterable[conversion.Event | Path]) -> Path:
    """Show a fetch as it happens and return what was fetched."""
    place = Path()
    for event in happenings:
        if isinstance(event, Path):
            place = event
        elif isinstance(event, conversion.Phase):
            err.print(f"{event.text} …")
    return place
