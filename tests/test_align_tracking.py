"""What a run sends to a tracker is what the tracker reads back, and none of it leaves this machine."""

import importlib
import json
import math
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from mlx_dpo.align.tracking import Tracker, finite_numbers, refuse_missing, tracked
from mlx_dpo.refusal import Refusal

KINDS: dict[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
OPTIONS = {"beta": 0.1, "model": "/models/small", "targets": ["q_proj"], "alpha": None}
FIRST = [
    {"step": 1, "loss": 0.75, "rewards/chosen": -0.5, "num_tokens": 120, "note": "warm", "mixture": {"a": 1}},
    {"step": 2, "loss": 0.5, "rewards/chosen": 0.25, "num_tokens": 240, "grad_norm": math.nan, "skipped": True},
    {"step": 2, "eval_loss": 0.625},
    {"step": 3, "loss": 0.375, "rewards/chosen": math.inf, "num_tokens": 360, "logps": [1.0]},
]
AGAIN = [
    {"step": 3, "loss": 0.375, "num_tokens": 360},
    {"step": 4, "loss": 2.0, "rewards/chosen": -4.0},
    {"step": 4, "eval_loss": 3.0},
    {"step": 4, "loss": 0.25, "rewards/chosen": 0.5},  # from here on once more, after going back to step 3
    {"step": 4, "eval_loss": 0.5},
]
# The numbers of both over their steps: where a step was told again, what was said last.
SERIES = {
    "loss": [(1, 0.75), (2, 0.5), (3, 0.375), (4, 0.25)],
    "rewards/chosen": [(1, -0.5), (2, 0.25), (4, 0.5)],
    "num_tokens": [(1, 120), (2, 240), (3, 360)],
    "eval_loss": [(2, 0.625), (4, 0.5)],
}
# Tracks runs one after the other in one process; a run that is said to fail raises in its block.
PROGRAM = """
import sys
from pathlib import Path
from mlx_dpo.align.tracking import tracked
from mlx_dpo.refusal import Refusal

kind, options, runs = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3], {"nan": float("nan"), "inf": float("inf")})
for out, rows, fails in runs:
    try:
        with tracked(kind, Path(out), options | {"model": Path(options["model"])}) as add:
            for row in rows:
                add(row)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        print("raised", file=sys.stderr)
    except Refusal as refusal:
        print(refusal)
"""
# What would send the numbers somewhere, were it believed.
TEMPTATIONS = {
    "HF_TOKEN": "hf_" + "a" * 34, "WANDB_API_KEY": "b" * 40, "TRACKIO_SPACE_ID": "someone/space",
    "TRACKIO_SERVER_URL": "https://example.org/?write_token=c",
}  # fmt: skip
OWN = re.compile(r"WANDB_|TRACKIO_|HF_|TRANSFORMERS_|XDG_")


def _strace() -> str | None:
    """strace, where it is there and may trace."""
    found = shutil.which("strace")
    works = (
        found and subprocess.run([found, "-o", os.devnull, "true"], check=False, capture_output=True).returncode == 0
    )
    return found if works else None


STRACE = _strace()


class Told(NamedTuple):
    """What a process printed, and the lines of its trace that name an address."""

    output: str
    messages: str
    reached: list[str]


def watched(here: Path, arguments: list[str], **more: str) -> Told:
    """Run Python, with a home of its own; where strace is there, all its processes' addresses are seen."""
    home = here / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not OWN.match(name)}
    trace = here / "trace"
    watch = [STRACE, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)] if STRACE else []
    done = subprocess.run(
        [*watch, sys.executable, *arguments], env=kept | {"HOME": str(home)} | more, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=180, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = trace.read_text(errors="replace").splitlines() if STRACE else []
    return Told(done.stdout, done.stderr, [line for line in lines if "AF_INET" in line and not _loopback(line)])


def _loopback(line: str) -> bool:
    return 'inet_addr("127.' in line or '"::1"' in line


class Tracked(NamedTuple):
    """Two runs in two processes: `out` was resumed by the second, after `other` in the first."""

    here: Path
    out: Path
    other: Path
    told: list[Told]


@pytest.fixture(scope="module", params=KINDS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tracked]:
    kind: str = request.param
    pytest.importorskip(KINDS[kind])
    here = tmp_path_factory.mktemp(kind)
    out, other = here / "my run", here / "other"
    processes = [[(str(out), FIRST, False), (str(other), FIRST[:1], False)], [(str(out), AGAIN, True)]]
    told = [watched(here, ["-c", PROGRAM, kind, repr(OPTIONS), repr(each)], **TEMPTATIONS) for each in processes]
    return kind, Tracked(here, out, other, told)


Rows = list[tuple[int, dict[str, float]]]


def _events(out: Path) -> Iterator[Any]:
    """The events of all files in turn: each is its length, a checksum, the message and another checksum."""
    message = importlib.import_module("tensorboardX.proto.event_pb2").Event
    for file in sorted((out / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield message.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def tensorboard_rows(out: Path) -> tuple[dict[str, Any], Rows]:
    """As TensorBoard reads: what was said before from a restarted step on does not count."""
    options, rows = {}, []
    for event in _events(out):
        if event.HasField("session_log"):
            rows = [row for row in rows if row[0] < event.step]
        for value in event.summary.value:
            if value.tag == "options/text_summary":
                options = json.loads(value.tensor.string_val[0])
            else:
                rows.append((event.step, {value.tag: value.simple_value}))
    said = [(step, *numbers) for step, numbers in rows]
    assert len(set(said)) == len(said)
    return options, rows


def _records(file: Path) -> Iterator[Any]:
    """The records of an offline run: blocks of 32 KiB of (checksum, length, part of a record, data), LevelDB's log."""
    message = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, part = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):
            yield message.FromString(record)
            record = b""


def wandb_rows(out: Path) -> tuple[dict[str, Any], Rows]:
    """A run's files, one after the other, which have to be one run's; W&B's own names begin with a line."""
    options, rows, names, axes = {}, [], set(), []
    for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        names.add(file.name)
        for record in _records(file):
            options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if items:
                step = items.pop("step")
                rows.append((step, {name: value for name, value in items.items() if name[0] != "_"}))
            if record.HasField("metric"):
                axes.append((record.metric.glob_name or record.metric.name, record.metric.step_metric))
    assert names == {f"run-{(out / 'tracking-id').read_text().strip()}.wandb"}
    assert ("*", "step") in axes
    return options, rows


def trackio_rows(out: Path) -> tuple[dict[str, Any], Rows]:
    """The numbers in trackio's database, which has to hold one run."""
    database = sqlite3.connect(out / "trackio" / "mlx_dpo.db")
    found = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    names = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
    ((options,),) = database.execute("SELECT config FROM configs").fetchall()
    database.close()
    assert names == [(f"{out.name}-{(out / 'tracking-id').read_text().strip()}",)]
    return json.loads(options), [(step, json.loads(metrics)) for step, metrics in found]


READ: dict[str, Callable[[Path], tuple[dict[str, Any], Rows]]] = {
    "tensorboard": tensorboard_rows, "wandb": wandb_rows, "trackio": trackio_rows,
}  # fmt: skip


def series(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """Each number over its steps."""
    found: dict[str, dict[int, float]] = {}
    for step, numbers in rows:
        for name, value in numbers.items():
            found.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in found.items()}


@pytest.mark.reference
def test_what_was_sent_is_read_back_and_a_resumed_run_goes_on(runs: tuple[str, Tracked]):
    kind, done = runs
    options, rows = READ[kind](done.out)
    assert series(rows) == SERIES
    assert {name: value for name, value in options.items() if name in OPTIONS} == OPTIONS
    assert series(READ[kind](done.other)[1]) == {
        name: values[:1] for name, values in SERIES.items() if name != "eval_loss"
    }


@pytest.mark.reference
def test_an_error_passes_through_and_nothing_is_printed(runs: tuple[str, Tracked]):
    _, done = runs
    assert [told.output for told in done.told] == ["", ""]
    assert [told.messages.split() for told in done.told] == [[], ["raised"]]


@pytest.mark.reference
def test_nothing_is_written_outside_the_runs_folder(runs: tuple[str, Tracked]):
    kind, done = runs
    assert [path for path in (done.here / "home").rglob("*") if path.is_file()] == []
    assert {path.name for path in done.here.iterdir()} <= {"home", "my run", "other", "trace"}
    assert {path.name for path in done.out.iterdir()} <= {kind, "tracking-id"}


@pytest.mark.reference
@pytest.mark.skipif(STRACE is None, reason="strace may not be used here")
def test_no_address_outside_this_machine_is_reached(runs: tuple[str, Tracked]):
    _, done = runs
    assert [line for told in done.told for line in told.reached] == []


@pytest.mark.reference
@pytest.mark.parametrize("mode", ["online", "sometimes"])
def test_what_wandb_does_not_start_with_is_refused(tmp_path: Path, mode: str):
    pytest.importorskip("wandb")
    arguments = ["-c", PROGRAM, "wandb", repr(OPTIONS), repr([(str(tmp_path / "out"), FIRST, False)])]
    told = watched(tmp_path, arguments, WANDB_MODE=mode, WANDB_BASE_URL="http://127.0.0.1:9")
    assert re.fullmatch(
        f"--track wandb does not start with WANDB_MODE={mode} \\(.*\\): run wandb login, .*\n", told.output
    )


@pytest.mark.skipif(STRACE is None, reason="strace may not be used here")
def test_the_watcher_sees_what_it_watches_for(tmp_path: Path):
    careless = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    local = careless.replace("192.0.2.1", "127.0.0.1")
    assert len(watched(tmp_path, ["-c", careless]).reached) == 1
    assert watched(tmp_path, ["-c", local]).reached == []


def test_only_finite_numbers_are_sent():
    row = {"loss": 0.5, "num_tokens": 7, "note": "warm", "logps": [1.0], "mixture": {"a": 1}, "skipped": True}
    none = {"grad_norm": math.nan, "low": -math.inf, "absent": None}
    assert finite_numbers({"step": 3} | row | none) == {"loss": 0.5, "num_tokens": 7}


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_missing_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Tracker
):
    monkeypatch.setitem(sys.modules, KINDS[kind], None)
    wanted = (
        rf"^--track {kind} needs the package {KINDS[kind]}, which is not installed: pip install 'mlx-dpo\[{kind}\]'"
    )
    with pytest.raises(Refusal, match=wanted):
        refuse_missing(kind)
    with pytest.raises(Refusal, match=wanted), tracked(kind, tmp_path / "out", OPTIONS):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Tracker):
    broken = tmp_path / KINDS[kind]
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('half of it is gone')")
    for name in [name for name in sys.modules if name.split(".")[0] == KINDS[kind]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(os.environ)
    wanted = rf"^--track {kind} needs .* cannot be imported \(half of it is gone\): pip install 'mlx-dpo\[{kind}\]'"
    with pytest.raises(Refusal, match=wanted), tracked(kind, tmp_path / "out", OPTIONS):
        pass
    assert dict(os.environ) == before


def test_every_tracker_has_its_extra():
    assert set(get_args(Tracker)) == set(KINDS)
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for kind, package in KINDS.items():
        (needed,) = extras[kind]
        assert re.match(f"{package}>=", needed)
        assert needed in extras["reference"]
