"""What is wrong with the data, gathered so that a user reads all of it at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.refusal import Refusal

_SHOWN = 50


class Problem(NamedTuple):
    """One thing that is wrong, and where: "pairs.jsonl, line 12"."""

    where: str
    reason: str


def refusal(problems: Sequence[Problem], path: Path | None = None) -> Refusal:
    """All problems in one Refusal: a sentence with their number, then one line each, 50 at most."""
    place = f" in {path}" if path else ""
    if len(problems) == 1:
        return Refusal(f"{problems[0].where}: {problems[0].reason}; correct it{place} and run again.")
    lines = [f"  {where}: {reason}" for where, reason in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  … and {len(problems) - _SHOWN} more")
    advice = "correct them and run again (nothing was skipped or changed)"
    head = f"{len(problems)} things are wrong{place}: {advice}."
    return Refusal("\n".join([head, *lines]))
