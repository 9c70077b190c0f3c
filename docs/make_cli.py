"""Writes docs/cli.md: what every command says of itself with --help, 80 columns wide and without colour."""

import io
from pathlib import Path

from cyclopts import App
from rich.console import Console

from mlx_dpo.cli import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 80
HEAD = """# The command line

`mlx_dpo COMMAND`, and `python -m mlx_dpo COMMAND`, the same; `python -m mlx_dpo.train` is `mlx_dpo train`.

Results go to standard output, progress and messages to standard error. The exit status is 0 when all is done, 1 when
something was refused or failed (one sentence says what, and what to do about it), 2 when the command line cannot be
understood, and 130 when it was interrupted.

`--config FILE.toml` holds options of a command under the names of their flags, without the dashes in front
(`learning-rate = 1e-4`); flags win over the file, the file over the defaults, and an unknown key is refused.

`python docs/make_cli.py` writes this page from what the commands say with `--help`; a test keeps both equal.
"""


def reference() -> str:
    """The whole page."""
    sections = [_section("mlx_dpo", ["--help"])]
    for name in _names(app):
        sections += [
            _section(" ".join(["mlx_dpo", name, *more]), [name, *more, "--help"]) for more in _parts(app[name])
        ]
    return "\n".join([HEAD, *sections])


def _names(commands: App) -> list[str]:
    return sorted(name for name in commands if not name.startswith("-"))


def _parts(command: App) -> list[list[str]]:
    """A command itself, and each of those below it."""
    return [[], *([name] for name in _names(command))]


def _section(title: str, arguments: list[str]) -> str:
    return f"## {title}\n\n```text\n{_help(arguments)}```\n"


def _help(arguments: list[str]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, no_color=True, force_terminal=False, legacy_windows=False)
    app.meta(arguments, console=console, result_action="return_value")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
