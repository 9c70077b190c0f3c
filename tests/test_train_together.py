"""One run by several processes over the loopback: the run of one process, in the folder of the first."""

import contextlib
import functools
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import parity
import pytest
import runs
import safetensors.numpy
import tiny
from test_models_group import LAUNCH, ports, started

from mlx_dpo.align.events import Finished
from mlx_dpo.align.options import TrainOptions, flag
from mlx_dpo.align.record import read_rows

Folder = Callable[[str], Path]
Alone = Callable[[str], Path]
# A step of two batches and one of a single pair, at which all but one rank have nothing to do.
TRACKS = find_spec("tensorboardX") is not None  # an extra
RUN: dict[str, Any] = {
    "loss": "sigmoid", "beta": 0.3, "rank": 4, "learning_rate": 1e-3, "schedule": "cosine", "batch_size": 2,
    "grad_accumulation": 2, "epochs": 3, "eval_every": 2, "save_every": 2, "samples": 2, "sample_tokens": 6,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": RUN,
    "aot": RUN | {"loss": "aot"},  # whose pairs are coupled
    "kto": RUN | {"loss": "kto", "batch_size": 3, "epochs": 2, "desirable_weight": 1.5},
}
# Commands one after the other, as processes take long to start, and a signal that one sends itself when a method of its
# group is called, for the first time since the third step began.
PROGRAM = """
import json, os, signal, sys
from mlx_dpo.align.trainer import Trainer
from mlx_dpo.cli import main
from mlx_dpo.models.group import Group

commands, name, number = json.loads(sys.argv[1]), *sys.argv[2:]
begun, struck = [], []
step, method = Trainer.step, getattr(Group, name)

def counted(self):
    begun.append(self.steps_done)
    return step(self)

def watched(self, *arguments):
    if len(begun) == 3 and not struck and hasattr(signal, number):
        struck.append(True)
        os.kill(os.getpid(), getattr(signal, number))
    return method(self, *arguments)

Trainer.step = counted
setattr(Group, name, watched)
for words in commands:
    try:
        main(words)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            print("status", end.code, file=stream, flush=True)
"""
OTHERS = "give all of them the same, and start them again."
# What the first and the second rank are given besides, and what both say of it.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "seed": ({}, {"seed": 1}, f"Rank 1 has not the same options as rank 0: {OTHERS}"),
    "resume": ({"resume": True}, {}, f"Rank 1 has not the same options as rank 0: {OTHERS}"),
    "dry run": ({}, {"dry_run": True}, f"Rank 1 has not the same options as rank 0: {OTHERS}"),
    "data": ({}, {"data": "other"}, f"Rank 1 has not the same data as rank 0: {OTHERS}"),
    "questions": ({}, {"questions": "other/train.jsonl"}, f"Rank 1 has not the same questions as rank 0: {OTHERS}"),
    "model": ({}, {"model": "model"}, f"Rank 1 has not the same model as rank 0: {OTHERS}"),
    "stages": (
        {"config": "stages.toml"},
        {"config": "stages.toml"},
        "Stages are trained by one process: start each stage by itself to share it among several.",
    ),
}


class Said(NamedTuple):
    """How a rank ended a command, and what it wrote."""

    status: int
    output: str
    messages: str

    @property
    def told(self) -> list[str]:
        """What it complained of, a sentence a line."""
        return re.findall(r"^mlx_dpo(?:, rank \d)?: (.*)$", self.messages, re.MULTILINE)


class Place(NamedTuple):
    """A folder with one for each rank below it, in which that rank finds its data and none of the others'."""

    here: Path
    model: Path

    @property
    def out(self) -> Path:
        """The first rank's --out."""
        return self.here / "rank0" / "out"

    def words(self, run: dict[str, Any], **more: Any) -> list[str]:
        """The command of a run, its places below the rank's own folder; what is True is a flag by itself."""
        places = {"model": self.model, "data": "data", "questions": "questions.jsonl", "out": "out"}
        given = {flag(name): value for name, value in (places | run | more).items()}
        return ["train", *(word for name, value in given.items() for word in [name, str(value)][: 2 - (value is True)])]

    def ranks(self, programs: Sequence[list[str]]) -> list[Said]:
        """Start a rank for each program, without mlx.launch, so that nobody ends one when another ends."""
        hosts = self.here / "hosts.json"
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(ports(len(programs)))
            hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(len(programs))]))
            begun = []
            for rank, program in enumerate(programs):
                own = furnished(self.here / f"rank{rank}")
                where = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "TMPDIR": str(own / "tmp")}
                begun.append(stack.enter_context(started(program, own, **where)))
            said = [process.communicate() for process in begun]
        return [Said(process.returncode, *words) for process, words in zip(begun, said, strict=True)]

    def resumed_alone(self) -> Path:
        """Go on with the first rank's run in this process, and return its folder."""
        return finished(self.model, self.here / "rank0", RUN, resume=True)


def command(*words: str) -> list[str]:
    """A command as it is typed."""
    return [sys.executable, "-m", "mlx_dpo", *words]


def program(commands: Sequence[list[str]], method: str = "summed", number: str = "") -> list[str]:
    """A process that runs several commands and sends itself a signal where one is named."""
    return [sys.executable, "-c", PROGRAM, json.dumps(commands), method, number]


def furnished(here: Path) -> Path:
    """Make a folder with five pairs to learn, three held out, questions, and a TMPDIR but for what MLX compiles."""
    runs.write_pairs(here / "data" / "train.jsonl", parity.PAIRS[:5])
    runs.write_pairs(here / "data" / "valid.jsonl", parity.PAIRS[5:])
    runs.write_pairs(here / "questions.jsonl", [{"prompt": pair["prompt"]} for pair in parity.PAIRS[3:5]])
    compiled = Path(tempfile.gettempdir()) / "mlx"  # which takes longer than the runs
    compiled.mkdir(exist_ok=True)
    (here / "tmp").mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (here / "tmp" / "mlx").symlink_to(compiled)
    return here


def finished(model: Path, here: Path, run: dict[str, Any], **more: Any) -> Path:
    """The folder of a run that this process made by itself."""
    places = {"data": here / "data", "questions": here / "questions.jsonl", "out": here / "out"}
    assert isinstance(runs.run(TrainOptions(model=model, **places, **run, **more))[-1], Finished)
    return here / "out"


@pytest.fixture
def place(tiny_folder: Folder, tmp_path: Path) -> Place:
    return Place(tmp_path, tiny_folder("llama"))


@pytest.fixture(scope="module")
def alone(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A function from a name in RUNS to the folder in which one process made it; tests must not write there."""

    @functools.cache
    def made(name: str) -> Path:
        return finished(tiny_folder("llama"), furnished(tmp_path_factory.mktemp("alone")), RUNS[name])

    return made


@pytest.fixture(scope="module")
def launched(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str, str]]:
    """By the number of ranks, the folder in which mlx.launch was called and what was said, of all RUNS with three.

    Each run has the --out of its name; tests must not write there.
    """

    def launch(size: int, chosen: list[str]) -> tuple[Path, str, str]:
        here = furnished(tmp_path_factory.mktemp(f"launched-{size}"))
        with ports(size) as port:
            options = ["-n", str(size), "--backend", "ring", "--starting-port", str(port), "--"]
            with started([str(LAUNCH), *options, *chosen], here, TMPDIR=str(here / "tmp")) as process:
                kept_open, process.stdin = process.stdin, None
                assert kept_open is not None
                with kept_open:  # full, or mlx.launch would keep a core busy by asking whether there is room in it
                    kept_open.write("." * 100_000)
                    kept_open.flush()
                    said = process.communicate()
        return here, *said

    place = Place(Path(), tiny_folder("llama"))
    tracked = ("--track", "tensorboard") if TRACKS else ()
    one = command(*place.words(RUN, out="sigmoid"), *tracked)
    return {2: launch(2, one), 3: launch(3, program([place.words(run, out=name) for name, run in RUNS.items()]))}


@pytest.fixture(scope="module")
def in_turn(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, list[dict[str, Said]]]:
    """What each of two ranks says of one command after the other: REFUSED, a dry run, a run, and its second half.

    The second rank gets a Ctrl-C in the third step of the run.
    """
    place = Place(tmp_path_factory.mktemp("in-turn"), tiny_folder("llama"))
    second = place.here / "rank1"
    runs.write_pairs(second / "other" / "train.jsonl", parity.PAIRS[2:])
    tiny.write_model(second / "model", "llama", seed=5)
    refused = RUN | {"out": "refused"}
    commands = [[place.words(refused | both[rank]) for *both, _ in REFUSED.values()] for rank in (0, 1)]
    for rank, own in enumerate(commands):
        furnished(place.here / f"rank{rank}")
        (place.here / f"rank{rank}" / "stages.toml").write_text("[[stage]]\n[[stage]]\n")
        own += [place.words(refused, dry_run=True), place.words(RUN), place.words(RUN, resume=True)]
    ended = place.ranks([program(commands[0]), program(commands[1], number="SIGINT")])
    return place, [apart(rank, [*REFUSED, "both dry", "interrupted", "resumed"]) for rank in ended]


def apart(said: Said, names: list[str]) -> dict[str, Said]:
    """What a rank said of each of several commands."""
    outputs, messages = (
        re.split(r"^status (\d+)\n", text, flags=re.MULTILINE) for text in (said.output, said.messages)
    )
    parts = zip(map(int, outputs[1::2]), outputs[:-1:2], messages[:-1:2], strict=True)
    return dict(zip(names, (Said(*part) for part in parts), strict=True))


def assert_close(out: Path, whole: Path) -> None:
    """Raise AssertionError unless two runs are the same but for the order of additions."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        found, expected = (
            [{key: value for key, value in row.items() if key not in runs.TIMES} for row in read_rows(folder / name)]
            for folder in (out, whole)
        )
        for key in ("step", "answers"):
            assert [row.pop(key, None) for row in found] == [row.pop(key, None) for row in expected]
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=5e-4)  # nats, of sums of hundreds
            losses = [{key: value for key, value in numbers.items() if "loss" in key} for numbers in (row, wanted)]
            assert losses[0] == pytest.approx(losses[1], rel=5e-5, abs=1e-5)  # of the same nats, beta times
    weights, wanted = (safetensors.numpy.load_file(folder / "adapters.safetensors") for folder in (out, whole))
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-5)


def assert_same(out: Path, whole: Path) -> None:
    """Raise AssertionError unless two runs are the same to the bit."""
    assert runs.adapter_bytes(out) == runs.adapter_bytes(whole)
    assert runs.rows(out) == runs.rows(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(("size", "name"), [(2, "sigmoid"), *((3, name) for name in RUNS)])
def test_the_run_is_that_of_one_process(launched: dict[int, tuple[Path, str, str]], alone: Alone, size: int, name: str):
    here, _, messages = launched[size]
    assert (here / name / "manifest.json").exists(), messages
    assert_close(here / name, alone(name))


def test_the_first_rank_alone_writes_and_speaks(launched: dict[int, tuple[Path, str, str]], alone: Alone):
    here, output, messages = launched[2]
    files, expected = (
        {path.relative_to(out) for path in out.rglob("*") if "tensorboard" not in path.parts}
        for out in (here / "sigmoid", alone("sigmoid"))
    )
    assert files == expected
    assert not TRACKS or len(list((here / "sigmoid" / "tensorboard").iterdir())) == 1
    assert {path.name for path in here.iterdir()} == {"data", "questions.jsonl", "tmp", "sigmoid"}
    assert list((here / "tmp").glob("mlx_dpo*")) == []
    assert re.fullmatch(r"Adapter: sigmoid\nReport:  sigmoid/report.html\n\(\d\.\d minutes\)\n", output)
    for said in ("Loading the model", "Scoring the reference", "step 1/6", "Writing the report"):
        assert messages.count(said) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_ranks_that_do_not_go_together_are_refused_by_all(in_turn: tuple[Place, list[dict[str, Said]]], name: str):
    place, ranks = in_turn
    for said in ranks:
        assert (said[name].status, said[name].output, said[name].told) == (1, "", [REFUSED[name][-1]])
    assert not (place.here / "rank0" / "refused").exists()


def test_a_plan_is_told_once(in_turn: tuple[Place, list[dict[str, Said]]]):
    first, second = (said["both dry"] for said in in_turn[1])
    assert first.status == second.status == 0
    assert first.output.startswith("5 pairs, 3 held out; ")
    assert second.output + second.messages == ""


def test_one_interrupted_rank_stops_all_and_all_go_on(
    in_turn: tuple[Place, list[dict[str, Said]]], launched: dict[int, tuple[Path, str, str]]
):
    place, (first, second) = in_turn
    assert (first["interrupted"].status, second["interrupted"].status) == (130, 130)
    assert "Stopped after step 3; everything is saved." in first["interrupted"].messages
    assert first["interrupted"].output == "mlx_dpo train --resume --config out/run.toml\n"
    assert (first["resumed"].status, second["resumed"].status) == (0, 0), (first, second)
    assert "Going on after step 3 " in first["resumed"].messages
    assert second["interrupted"][1:] == second["resumed"][1:] == ("", "")
    assert_same(place.out, launched[2][0] / "sigmoid")
    assert not (place.here / "rank1" / "out").exists()
    assert [path.name for path in (place.here / "rank1" / "tmp").iterdir()] == ["mlx"]


# The others lose it where they add gradients up, where they hear the step's numbers, and where all ask who was told to
# stop; from where a run of the same number of ranks, or one process, goes on.
@pytest.mark.parametrize(("method", "size"), [("summed", 3), ("from_first", 2), ("any_of", 2)])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(
    place: Place, alone: Alone, launched: dict[int, tuple[Path, str, str]], method: str, size: int
):
    words = place.words(RUN)
    *others, killed = place.ranks([*[command(*words)] * (size - 1), program([words], method, "SIGKILL")])
    assert killed.status == -signal.SIGKILL
    for rank, other in enumerate(others):
        assert (other.status, other.output) == (1, "")
        assert "Traceback" not in other.messages
        (sentence,) = other.told
        assert re.match(rf"Rank {rank} of {size} has lost another one .* and go on with --resume\.", sentence)
    assert not (place.out / "manifest.json").exists()
    assert [path.name for path in (place.here / "rank1").glob("out*")] == []
    if method == "summed":
        shutil.copytree(place.out, place.here / "copy")
        ended = place.ranks([command(*words, "--resume")] * size)
        assert [rank.status for rank in ended] == [0] * size, ended
        assert "Going on after step 2 " in ended[0].messages
        assert_same(place.out, launched[3][0] / "sigmoid")
        shutil.rmtree(place.out)
        (place.here / "copy").rename(place.out)
    assert_close(place.resumed_alone(), alone("sigmoid"))
