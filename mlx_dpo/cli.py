"""The command line: each command is a few lines that call a verb and print what it gives."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
    os.environ["MLX_DPO_USER_OFFLINE"] = "1"
# Libraries read these while they are imported, so they come first: this process never reaches out.
os.environ.update(dict.fromkeys(_OFFLINE, "1"))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import cyclopts  # noqa: E402
from cyclopts import App, Parameter  # noqa: E402

from mlx_dpo import __version__  # noqa: E402
from mlx_dpo.align.options import TrainOptions  # noqa: E402
from mlx_dpo.refusal import Refusal  # noqa: E402

app = App(
    name="mlx_dpo",
    help="Align a language model to a caring way of speaking on your own machine, and talk with it there.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    result_action="return_int_as_exit_code_else_zero",
)


@app.command
def train(options: Annotated[TrainOptions, Parameter(name="*")]) -> int:
    """Align a model with preference pairs (DPO) or with answers (SFT), by a LoRA adapter."""
    from mlx_dpo import console
    from mlx_dpo import train as verb
    from mlx_dpo.align.events import Finished, Interrupted

    with console.StopRequest().listening() as stop:
        end = console.show_training(verb.run(options, stop))
    if isinstance(end, Interrupted):
        console.err.print(f"Stopped after step {end.steps_done}; everything is saved. To go on:")
        console.out.print(end.command)
        return 130
    if isinstance(end, Finished):
        console.out.print(f"Adapter: {end.out}\nReport:  {end.report}\n({end.seconds / 60:.1f} minutes)")
    return 0


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    debug: bool = False,
) -> int:
    """Run one command.

    Parameters
    ----------
    config
        TOML file with the command's options; flags win over it.
    debug
        Show the traceback of an error.
    """
    if config is not None:
        app.config = (cyclopts.config.Toml(_readable_toml(config), use_commands_as_keys=False),)
    try:
        return _guarded(tokens)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _explained(error)
    finally:
        app.config = ()


def _guarded(tokens: Sequence[str]) -> int:
    result = app(list(tokens), exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0


def _readable_toml(path: Path) -> Path:
    import tomllib

    if not path.is_file():
        _misused(f"--config {path}: there is no such file.")
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _misused(f"--config {path} is not valid TOML: {error}.")
    return path


def _misused(sentence: str) -> NoReturn:
    print(f"mlx_dpo: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _explained(error: BaseException) -> int:
    from mlx_dpo import console

    if isinstance(error, KeyboardInterrupt):
        console.fail("Interrupted.")
        return 130
    if isinstance(error, cyclopts.CycloptsError):
        console.fail(" ".join(str(error).split()))
        return 2
    if isinstance(error, Refusal):
        console.fail(str(error))
    elif isinstance(error, OSError):
        console.fail(f"{error.filename or 'A file'}: {error.strerror or error}.")
    elif isinstance(error, MemoryError) or "malloc" in str(error):
        console.fail("There is not enough memory for this: choose a smaller model, batch or length.")
    else:
        console.fail(f"Something unforeseen went wrong ({type(error).__name__}: {error}); --debug shows where.")
    return 1


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `mlx_dpo` command."""
    try:
        status = app.meta(
            list(sys.argv[1:] if arguments is None else arguments), exit_on_error=False, print_error=False
        )
    except cyclopts.CycloptsError as error:
        status = _explained(error)
    raise SystemExit(status)
