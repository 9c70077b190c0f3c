"""What happened in a run, from the rows of metrics.jsonl: also the steps that rescues took back."""

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def in_order(rows: Sequence[Row], taken_back: bool = False) -> Iterator[tuple[Row, bool]]:
    """Every row as it came about, and whether it was taken back; a rescue's row comes after what it took back."""
    for row in rows:
        yield from in_order(row.get("abandoned", ()), True)
        yield row, taken_back


def attempts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each attempt that was taken back, the earliest first, without those of rescues."""
    for row in rows:
        if "abandoned" in row:
            yield from attempts(row["abandoned"])
            yield [own for own in row["abandoned"] if "abandoned" not in own]


def steps(rows: Sequence[Row]) -> list[Row]:
    """The rows of steps that stand."""
    return [row for row in rows if "loss" in row]


def evaluations(rows: Sequence[Row]) -> list[Row]:
    """The rows of held-out numbers that stand."""
    return [row for row in rows if "eval_loss" in row]


def rescues(rows: Sequence[Row]) -> list[Row]:
    """The rows of rescues that the run's last attempt went through."""
    return [row for row in rows if "abandoned" in row]
