"""A run's numbers in the trackers that people already use, on this machine unless they asked for more."""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import write_whole

Tracker = Literal["tensorboard", "wandb", "trackio"]
Send = Callable[[dict[str, float], int], None]

_PACKAGES: dict[Tracker, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mlx_dpo"
_SERIES = "tracking-id"


def refuse_missing(kind: Tracker) -> None:
    """Raise Refusal, saying what to install, where the tracker's package is not there; nothing is imported."""
    package = _PACKAGES[kind]
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:
        found = False
    if not found:
        raise Refusal(_to_install(kind, "is not installed"))


@contextlib.contextmanager
def tracked(kind: Tracker, out: Path, options: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that sends one row of metrics.jsonl to a tracker, which is closed when the block ends.

    A row's finite numbers are sent at its "step", everything else in it is not. `options` are kept with the run.
    Files go below `out`; a run that is resumed there continues its own series.
    Raises Refusal where the tracker cannot be imported or does not start.
    """
    refuse_missing(kind)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with _ADAPTERS[kind](out, json.loads(json.dumps(options, default=str))) as send:

        def add(row: dict[str, Any]) -> None:
            numbers = finite_numbers(row)
            if numbers:
                send(numbers, row["step"])

        yield add


def finite_numbers(row: dict[str, Any]) -> dict[str, float]:
    """What of a row can be drawn over its steps."""
    return {name: value for name, value in row.items() if name != "step" and _drawn(value)}


def _drawn(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def _tensorboard(out: Path, options: dict[str, Any]) -> Iterator[Send]:
    """Event files in out/tensorboard, each row on the disk as it comes, without a thread in between."""
    files, events, summary = (
        _imported("tensorboard", f"tensorboardX.{name}") for name in ("event_file_writer", "proto.event_pb2", "summary")
    )
    folder = out / "tensorboard"
    folder.mkdir(exist_ok=True)
    # Two files of the same second would otherwise be one, which the second writer empties.
    writer = files.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    last = None

    def write(step: int, **what: Any) -> None:
        writer.write_event(events.Event(wall_time=time.time(), step=step, **what))

    def send(numbers: dict[str, float], step: int) -> None:
        nonlocal last
        if last is None:
            write(step, summary=summary.text("options", _as_code(options)))
        # Where steps are taken again, TensorBoard leaves out what was said before from this step on.
        again = step if "loss" in numbers else step + 1
        if last is None or again <= last:
            write(again, session_log=events.SessionLog(status=events.SessionLog.START))
        last = step
        for name, value in numbers.items():
            write(step, summary=summary.scalar(name, value))
        writer.flush()

    try:
        yield send
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(out: Path, options: dict[str, Any]) -> Iterator[Send]:
    """W&B, offline (out/wandb, which `wandb sync` sends later) unless WANDB_MODE says otherwise."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    # Error reporting would reach out in offline mode too; online, W&B says where the run is to be seen.
    environment = {
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": os.environ.get("WANDB_CACHE_DIR", str(out / "wandb" / "cache")),
        "WANDB_SILENT": os.environ.get("WANDB_SILENT", "true" if mode == "offline" else "false"),
    }
    with _environment(environment):
        wandb = _imported("wandb", "wandb")
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        series = _series(out)
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or _PROJECT, id=series, name=out.name, dir=str(out), mode=mode,
                resume="allow", config=options, settings=settings,
            )  # fmt: skip
        except (wandb.Error, ValueError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise Refusal(
                f"--track wandb does not start with WANDB_MODE={mode} ({why}): run wandb login, or set "
                "WANDB_MODE=offline."
            ) from error
        # Its own count of rows never goes back, as steps do where a run is resumed: they are drawn over "step" instead.
        run.define_metric("*", step_metric="step")
        failed = True
        try:
            yield lambda numbers, step: run.log({"step": step} | numbers)
            failed = False
        finally:
            run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _trackio(out: Path, options: dict[str, Any]) -> Iterator[Send]:
    """trackio's database in out/trackio, or in TRACKIO_DIR, and never in a Space or on a server."""
    folder = os.environ.get("TRACKIO_DIR") or str(out / "trackio")
    elsewhere = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID")
    with _environment({"TRACKIO_DIR": folder} | dict.fromkeys(elsewhere)):
        trackio = _imported_trackio(Path(folder))
        with _offline_hub(), contextlib.redirect_stdout(io.StringIO()):
            run = trackio.init(
                project=_PROJECT, name=f"{out.name}-{_series(out)}", config=options, resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        try:
            yield lambda numbers, step: run.log(dict(numbers), step=step)
        finally:
            with contextlib.redirect_stdout(io.StringIO()):
                run.finish()
            trackio.context_vars.current_run.set(None)  # or it is finished again, aloud, as Python ends


def _imported_trackio(folder: Path) -> Any:
    """The trackio that writes to `folder`: it reads TRACKIO_DIR once, so for another folder it is imported anew."""
    loaded = sys.modules.get("trackio.utils")
    if loaded is not None and Path(loaded.TRACKIO_DIR) != folder:
        for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
            del sys.modules[name]
    return _imported("trackio", "trackio")


_ADAPTERS: dict[Tracker, Callable[[Path, dict[str, Any]], AbstractContextManager[Send]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _series(out: Path) -> str:
    """The run's own id, kept in `out`: a new run where an old one was deleted must not go on with its series."""
    path = out / _SERIES
    if path.exists():
        known = path.read_text(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{8}", known):
            return known
    series = secrets.token_hex(4)
    write_whole(path, f"{series}\n".encode())
    return series


def _as_code(options: dict[str, Any]) -> str:
    return "\n".join(f"    {line}" for line in json.dumps(options, indent=2).splitlines())


def _imported(kind: Tracker, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refusal(_to_install(kind, f"cannot be imported ({error})")) from error


def _to_install(kind: Tracker, why: str) -> str:
    return f"--track {kind} needs the package {_PACKAGES[kind]}, which {why}: pip install 'mlx-dpo[{kind}]'."


@contextlib.contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables as given, None for absent, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _offline_hub() -> Iterator[None]:
    """No request to the Hub, which trackio would ask for the user's name, for as long as the block lasts."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
