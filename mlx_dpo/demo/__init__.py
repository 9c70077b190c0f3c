"""The whole loop in one command, on a small real model."""

from dataclasses import dataclass
from pathlib import Path

PAIRS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Where the demo writes, and how long it may take."""

    out: Path | None = None
    """Folder for the results. [default: runs/demo, or the next free runs/demo-2, …]"""
    quick: bool = False
    """Take four steps on eight pairs: shows that everything runs, not what it can do."""
