"""Ctrl-C, readers that go away and disks that are full, in processes as a shell starts them."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from commands import FUSE, PAIRS, TRAIN, World, state, typed, write_pairs

PROGRAM = [sys.executable, "-m", "mlx_dpo"]
PATIENCE = 60.0  # seconds


def _started(command: str, place: World, program: list[str] = PROGRAM) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, *typed(command, place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a shell does it, so that Ctrl-C reaches this process and not the test
    )


def _lines(stream: IO[str] | None) -> Iterator[str]:
    assert stream
    return iter(stream.readline, "")


def _interrupted_at(words: str, process: subprocess.Popen[str], times: int = 1) -> tuple[int, str, str]:
    """Press Ctrl-C when a line with `words` comes; the status, and what was still said."""
    before = ""
    for line in _lines(process.stderr):
        before += line
        if words in line:
            break
    else:
        raise AssertionError(before)
    for _ in range(times):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    output, messages = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in messages
    return process.returncode, output, messages


def _many_pairs(world: World, count: int = 600) -> None:
    write_pairs(world.pairs, [PAIRS[0] | {"prompt": f"{PAIRS[0]['prompt']} {number}"} for number in range(count)])


LONG = TRAIN.replace("--steps 1", "--steps 100 --rank 2")


def test_an_interrupted_run_goes_on_with_the_command_that_it_prints(world: World):
    status, output, messages = _interrupted_at("step 10/100", _started(LONG, world))
    assert status == 130
    assert "everything is saved" in messages
    assert output.startswith("mlx_dpo train --resume --config ")
    assert not (world.out / "manifest.json").exists()
    command = [*PROGRAM, *shlex.split(output)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Going on after step" in done.stderr
    assert len((world.out / "metrics.jsonl").read_text().splitlines()) == 100


def test_a_second_interrupt_does_not_wait(world: World):
    _many_pairs(world, 100)
    slow = LONG.replace("--steps 100", "--steps 3 --batch-size 1 --grad-accumulation 100")
    status, output, messages = _interrupted_at("step 1/3", _started(slow, world), times=2)
    assert (status, output) == (130, "")
    assert "Stopping after this step" in messages
    last = messages.splitlines()[-1]
    assert last.startswith("mlx_dpo: Interrupted. To go on from the last checkpoint: mlx_dpo train --resume")


def test_an_interrupt_before_the_first_step_ends_at_once(world: World):
    _many_pairs(world)
    started = time.monotonic()
    status, output, messages = _interrupted_at("Scoring the reference", _started(f"{LONG} --batch-size 1", world))
    assert (status, output) == (130, "")
    assert messages.splitlines() == ["mlx_dpo: Interrupted."]
    assert time.monotonic() - started < PATIENCE / 2
    assert not world.out.exists()


def test_an_interrupted_fuse_leaves_nothing(world: World):
    _many_pairs(world)
    before = state(world.here)
    command = f"{FUSE} --data {{pairs}}".replace("--pairs 2", "--pairs 600")
    status, output, messages = _interrupted_at("Merging, and measuring", _started(command, world))
    assert (status, output) == (130, "")
    assert messages.splitlines()[-1] == "mlx_dpo: Interrupted."
    assert state(world.here) == before


PRESSED = """
import os, runpy, signal, sys

def hook(event, arguments):
    if event == "import" and arguments[0] in libraries:
        libraries.remove(arguments[0])
        os.kill(os.getpid(), signal.SIGINT)

libraries = {sys.argv.pop(1)}
sys.addaudithook(hook)
runpy.run_module("mlx_dpo", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("library", "status", "messages"),
    [("cyclopts", -signal.SIGINT, ""), ("mlx_lm.utils", 130, "mlx_dpo: Interrupted.\n")],
)
def test_an_interrupt_while_libraries_are_read_shows_no_traceback(
    library: str, status: int, messages: str, world: World
):
    words = [sys.executable, "-c", PRESSED, library, *typed(TRAIN, world)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", messages)


QUIET = ["models", "doctor --json", "train --help", "--version"]


@pytest.mark.parametrize("command", QUIET)
def test_a_reader_that_has_gone_is_no_reason_to_complain(command: str, world: World):
    read, write = os.pipe()
    os.close(read)
    words = [*PROGRAM, *typed(command, world)]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=PATIENCE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_an_output_without_room_is_named(world: World):
    with open("/dev/full", "w") as full:
        words = [*PROGRAM, "doctor", "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "No space left" in done.stderr


@pytest.mark.parametrize("program", [["-m", "mlx_dpo"], ["-m", "mlx_dpo.train"]])
def test_every_way_in_says_the_same(program: list[str], world: World):
    word = [] if program[-1].endswith("train") else ["train"]
    command = [sys.executable, *program, *word, "--model", "none", "--data", "none", "--out", str(world.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mlx_dpo: There is no folder none: give the path of a converted model.\n"
