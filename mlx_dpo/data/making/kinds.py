"""The kinds of pairs that can be made, apart from what makes them, so that the command line starts quickly."""

from typing import Literal

Kind = Literal["tone", "planted-error"]
KINDS: tuple[Kind, ...] = ("tone", "planted-error")
