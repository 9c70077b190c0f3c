"""The names of the repairs, apart from what they need, so that the command line starts quickly."""

from typing import Literal

Repair = Literal["dedupe", "unsafe", "openers", "length", "trim"]
REPAIRS: tuple[Repair, ...] = ("dedupe", "unsafe", "openers", "length", "trim")
Openers = Literal["vary", "strip"]
