"""Whole numbers on the command line and in TOML: 1.5 is refused, not rounded."""

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter, Token


def _whole(kind: type, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a whole number.') from None


Whole = Annotated[int, Parameter(converter=_whole)]
