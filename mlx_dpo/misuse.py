"""What is wrong with a command line, in a sentence."""

from cyclopts import CycloptsError, UnknownCommandError, UnusedCliTokensError

_HINTS = ("Did you mean", "Choose from")


def sentence(error: CycloptsError) -> str:
    """What cannot be understood, and where it says what could be."""
    text = " ".join(str(error).split())
    if isinstance(error, UnusedCliTokensError):
        text = f"There are words too many ({' '.join(error.unused_tokens or ())})."
    elif isinstance(error, UnknownCommandError) and (first := (error.unused_tokens or [""])[0]).startswith("-"):
        text = f"Unknown option: {first}."
    if any(hint in text for hint in _HINTS):
        return text
    return f"{text.rstrip('.')}; see {' '.join(['mlx_dpo', *(error.command_chain or ()), '--help'])}."
