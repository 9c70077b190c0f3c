"""The command line: each command is a few lines that call a verb and print what it gives."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
    os.environ["MLX_DPO_USER_OFFLINE"] = "1"
# Libraries read these while they are imported, so they come first: this process never reaches out.
os.environ.update(dict.fromkeys(_OFFLINE, "1"))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Until somebody is there to explain an interrupt, it ends the process without a traceback.
_INTERRUPT = signal.getsignal(signal.SIGINT)
_AT_HOME = threading.current_thread() is threading.main_thread()
if _AT_HOME:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import cyclopts  # noqa: E402
from cyclopts import App, Parameter  # noqa: E402

from mlx_dpo import __version__, misuse  # noqa: E402
from mlx_dpo.align.options import TrainOptions  # noqa: E402
from mlx_dpo.chat.options import ChatOptions  # noqa: E402
from mlx_dpo.convert.fuse_options import FuseOptions  # noqa: E402
from mlx_dpo.data_commands import data  # noqa: E402
from mlx_dpo.demo import DemoOptions  # noqa: E402
from mlx_dpo.evaluation.options import EvaluateOptions  # noqa: E402
from mlx_dpo.refusal import Refusal  # noqa: E402

if _AT_HOME:
    signal.signal(signal.SIGINT, _INTERRUPT)

app = App(
    name="mlx_dpo",
    help="Align a language model to a caring way of speaking on your own machine, and talk with it there.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    result_action="return_int_as_exit_code_else_zero",
    suppress_keyboard_interrupt=False,  # `launch` says that it was interrupted
)


@app.command
def train(options: Annotated[TrainOptions, Parameter(name="*")]) -> int:
    """Align a model with preferences (DPO and its kin) or with answers and text (SFT), by a LoRA adapter.

    A --config file with several [[stage]] tables trains one stage after the other, each from the adapter before it.
    """
    return _train([options])


def _train(stages: Sequence[TrainOptions]) -> int:
    from mlx_dpo import console
    from mlx_dpo import stages as several
    from mlx_dpo import train as single
    from mlx_dpo.align import ranks, record
    from mlx_dpo.align.events import Finished, Interrupted

    out, plan_on = stages[0].out, console.out if stages[0].dry_run else console.err
    console.leave_to_the_first(ranks.group().rank)
    try:
        with console.StopRequest().listening() as stop:
            run = single.run(stages[0], stop) if len(stages) == 1 else several.run(stages, stop)
            end = console.show_training(run, plan_on)
    except KeyboardInterrupt:
        begun = (out / record.RUN).exists()
        command = record.resume_command(out)
        console.fail(f"Interrupted. To go on from the last checkpoint: {command}" if begun else "Interrupted.")
        return 130
    if isinstance(end, Interrupted):
        console.err.print(f"Stopped after step {end.steps_done}; everything is saved. To go on:")
        console.out.print(end.command)
        return 130
    if isinstance(end, Finished):
        console.out.print(f"Adapter: {end.out}\nReport:  {end.report}\n({end.seconds / 60:.1f} minutes)")
    return 0


app.command(data)


@app.command
def convert(
    source: str,
    /,
    *,
    out: Path,
    quantize: Literal["keep", "none", "4", "6", "8"] = "keep",
    dtype: Literal["keep", "float16", "bfloat16", "float32"] = "keep",
) -> int:
    """Bring a model's weights into MLX's format, and check the result against its source.

    Parameters
    ----------
    source
        A recipe's name (see mlx_dpo models), a Hub id with an optional @revision, a folder, or a .gguf file.
    out
        Folder for the converted model.
    quantize
        Keep the source's own blocks, none for floating point, or so many bits.
    dtype
        Floating-point type of what is not packed.
    """
    from mlx_dpo import console
    from mlx_dpo.convert.conversion import convert as verb

    end = console.show_conversion(verb(source, out, quantize=quantize, dtype=dtype))
    if end is not None:
        console.out.print(console.conversion_in_words(end))
    return 0


@app.command
def models(name: str | None = None, /) -> int:
    """List the recipes: base models with a known source, what each needs, and whether it fits this machine.

    Parameters
    ----------
    name
        Show all that one recipe says.
    """
    from mlx_dpo import console, machine
    from mlx_dpo.models.recipes import recipe, recipes

    if name is not None:
        console.out.print(console.recipe_in_words(recipe(name)), markup=False)
        return 0
    console.out.print(console.recipes_table(recipes(), machine.describe()))
    return 0


@app.command
def evaluate(options: Annotated[EvaluateOptions, Parameter(name="*")]) -> int:
    """Compare systems on the same questions: the base, the base with an empathetic prompt, adapters, other answers."""
    from mlx_dpo import console, curation, findings
    from mlx_dpo.evaluation.run import run

    end = findings.show_evaluation(run(options, curation.encode_with(options.encoder)))
    if end is not None:
        console.out.print(findings.comparison_in_words(end))
    return 0


@app.command
def chat(question: str | None = None, /, *, options: Annotated[ChatOptions, Parameter(name="*")]) -> int:
    """Talk with a model, or get one answer when a question is given or piped in.

    Parameters
    ----------
    question
        Answer this and leave.
    """
    from mlx_dpo.chat.terminal import run

    return run(options, question)


@app.command
def fuse(options: Annotated[FuseOptions, Parameter(name="*")]) -> int:
    """Merge an adapter into its model, and prove that the merged model still says what the adapter said."""
    from mlx_dpo import console
    from mlx_dpo import fuse as verb
    from mlx_dpo.demo import PAIRS

    end = console.show_fusing(verb.run(options, PAIRS / "valid.jsonl"))
    if end is not None:
        console.out.print(console.fusing_in_words(end))
    return 0


@app.command
def doctor(*, json: bool = False) -> int:
    """Say what this machine is: memory, device, matrix products, libraries.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    from mlx_dpo import console

    console.show_machine(as_json=json)
    return 0


@app.command
def demo(options: Annotated[DemoOptions | None, Parameter(name="*")] = None) -> int:
    """Run the whole loop on a real small model: convert, train, compare, fuse, one turn of chat."""
    from mlx_dpo.demo.loop import run

    return run(options or DemoOptions())


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
    try:
        return _guarded(tokens, None if config is None else _read_toml(config), config)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _explained(error)
    finally:
        app.config = ()


def _guarded(tokens: Sequence[str], table: dict[str, Any] | None, path: Path | None) -> int:
    if table is not None and "stage" in table:
        return _staged(tokens, table, str(path))
    if table is not None:
        app.config = (_config(tokens, table, str(path)),)
    result = app(list(tokens), exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0


def _config(tokens: Sequence[str], table: dict[str, Any], source: str) -> cyclopts.config.Dict:
    """A table of options for the command that `tokens` begin with, some of which have the names of commands."""
    commands, at = [], app
    for token in tokens:
        if token.startswith("-") or token not in at:
            break
        commands.append(token)
        at = at[token]
    for name in reversed(commands):
        table = {name: table}
    made = cyclopts.config.Dict(table)
    made.source = source
    return made


def _staged(tokens: Sequence[str], table: dict[str, Any], source: str) -> int:
    """Train the stages of a configuration, each with what stands above them and with the flags."""
    stages = table.pop("stage")
    if list(tokens[:1]) != ["train"]:
        _misused(f"--config {source} has stages, which only mlx_dpo train takes.")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        _misused(f"--config {source}: write each stage as a [[stage]] table.")
    if inside := {key.replace("_", "-") for stage in stages for key in stage} & {"dry-run", "resume"}:
        name = min(inside)
        _misused(f"--config {source} has {name} inside a stage, but it holds for all of them: give it as a flag.")
    parsed = []
    for stage in stages:
        app.config = (_config(tokens, table | stage, source),)
        _, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
        if "options" not in bound.arguments:  # --help, which is the same for every stage
            return _guarded(tokens, None, None)
        parsed.append(bound.arguments["options"])
    return _train(parsed)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    if not path.is_file():
        _misused(f"--config {path}: there is no such file.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        _misused(f"--config {path} is not UTF-8: save it in that encoding.")
    except tomllib.TOMLDecodeError as error:
        _misused(f"--config {path} is not valid TOML: {str(error).rstrip('.')}.")


def _misused(sentence: str) -> NoReturn:
    print(f"mlx_dpo: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _explained(error: BaseException) -> int:
    from mlx_dpo import console

    if isinstance(error, KeyboardInterrupt):
        console.fail("Interrupted.")
        return 130
    if isinstance(error, cyclopts.CycloptsError):
        console.fail(misuse.sentence(error))
        return 2
    if isinstance(error, Refusal):
        console.fail(str(error))
    elif isinstance(error, BrokenPipeError):
        _without_reader()
    elif isinstance(error, OSError):
        console.fail(f"{error.filename or 'An output'}: {error.strerror or error}.")
    elif isinstance(error, MemoryError) or "malloc" in str(error):
        console.fail("There is not enough memory for this: choose a smaller model, batch or length.")
    else:
        console.fail(f"Something unforeseen went wrong ({type(error).__name__}: {error}); --debug shows where.")
    return 1


def _without_reader() -> None:
    """Whoever read has gone: say nothing more, or Python would complain when it closes the output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `mlx_dpo` command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if any("\ud800" <= sign <= "\udfff" for sign in word):
            _misused(f"{word!a} is not UTF-8: type it, or rename the file, in that encoding.")
    try:
        status = app.meta(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except (cyclopts.CycloptsError, OSError) as error:
        status = _explained(error)
    raise SystemExit(status)
