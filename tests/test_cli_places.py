"""Places that cannot be written, or must not be: nothing there changes, and nothing half-written is left."""

import contextlib
import io
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import CHAT, CONVERT, FUSE, PAIRS, TRAIN, Kind, World, nothing, refused, said, state, typed, write_pairs

COMMANDS = {"train": TRAIN, "convert": CONVERT, "fuse": FUSE}


def _folder_with(name: str, text: str) -> Callable[[World], object]:
    def damage(world: World) -> None:
        world.out.mkdir()
        (world.out / name).write_text(text)

    return damage


OCCUPIED: dict[str, tuple[Callable[[World], object], str]] = {
    "a folder with something in it": (_folder_with("notes.txt", "mine"), "out"),
    "a folder with something hidden in it": (_folder_with(".notes", "mine"), "out"),
    "another run": (lambda world: shutil.copytree(world.adapter, world.out), "out"),
    "a file": (lambda world: world.out.write_text("mine"), "is a file"),
    "a link to nothing": (lambda world: world.out.symlink_to(world.here / "gone"), "link"),
    "a link to a file": (lambda world: world.out.symlink_to(world.pairs), "is a file"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", OCCUPIED)
def test_a_place_that_is_taken_is_left_as_it_is(
    name: str, command: str, world: World, capfd: pytest.CaptureFixture[str]
):
    damage, said = OCCUPIED[name]
    refused(Kind(COMMANDS[command], damage, ("out", said)), world, capfd)


PLACES = {"{model}": "model", "{adapter}": "adapter", "{pairs}/below": "pairs.jsonl", "/proc/below": "/proc"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_is_named(place: str, command: str, world: World, capfd: pytest.CaptureFixture[str]):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    refused(Kind(COMMANDS[command].replace("{out}", place), nothing, (PLACES[place],)), world, capfd)


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_made_on_the_way_are_taken_away_again(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    wanted = COMMANDS[command].replace("{out}", "{here}/some/where/else")
    refused(Kind(wanted, lambda place: (place.model / "model.safetensors").unlink(), ("safetensors",)), world, capfd)


def test_a_link_to_an_empty_folder_is_filled(world: World, capfd: pytest.CaptureFixture[str]):
    (world.here / "disk").mkdir()
    world.out.symlink_to(world.here / "disk")
    assert said(CONVERT, world, capfd).status == 0
    assert (world.here / "disk" / "model.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_written_is_named(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> None:
        (place.here / "mine").mkdir(mode=0o500)

    refused(Kind(COMMANDS[command].replace("{out}", "{here}/mine/out"), damage, ("mine/out",)), world, capfd)


@contextlib.contextmanager
def _room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which to a program is like a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [4_000, 100_000])
@pytest.mark.parametrize("command", ["convert", "fuse"])
def test_a_full_disk_leaves_nothing(command: str, size: int, world: World, capfd: pytest.CaptureFixture[str]):
    before = state(world.here)
    with _room(size):
        found = said(COMMANDS[command], world, capfd)
    assert found.status == 1
    assert "out could not be written" in found.sentence or "out cannot be written" in found.sentence
    assert "room" in found.sentence
    assert state(world.here) == before


@pytest.mark.parametrize("size", [4_000, 70_000])
def test_a_run_on_a_full_disk_looks_unfinished_and_goes_on(size: int, world: World, capfd: pytest.CaptureFixture[str]):
    command = f"{TRAIN.replace('--steps 1', '--steps 3')} --save-every 1"
    with _room(size):
        found = said(command, world, capfd)
    assert found.status == 1
    assert "out cannot be written" in found.sentence
    assert "--resume" in found.sentence
    assert not {path.name for path in world.out.iterdir()} & {"adapters.safetensors", "manifest.json", "report.html"}
    assert not list(world.out.rglob("*part*"))
    chat = said("chat --model {model} --adapter {out} hello", world, capfd)
    assert (chat.status, chat.output) == (1, "")
    assert "no finished adapter" in chat.sentence
    assert said(f"{command} --resume", world, capfd).status == 0
    assert (world.out / "manifest.json").exists()


def _begun(change: Callable[[bytes], bytes] = bytes, damage: Callable[[World], object] = nothing) -> Callable:
    """A run that was stopped, its record changed, and something else broken after it."""

    def make(world: World) -> None:
        shutil.copytree(world.adapter, world.out)
        (world.out / "manifest.json").unlink()
        record = world.out / "run.toml"
        record.write_bytes(change(record.read_bytes()))
        damage(world)

    return make


def _cut_checkpoint(world: World) -> None:
    (path,) = (world.out / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-8])


def _other_weights(world: World) -> None:
    path = world.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x3f")


RESUMED: dict[str, tuple[Callable[[World], object], tuple[str, ...]]] = {
    "where there is no run": (nothing, ("out", "run.toml", "--resume")),
    "where there is another thing": (_folder_with("notes", "mine"), ("out", "run.toml", "--resume")),
    "a finished run": (lambda world: shutil.copytree(world.adapter, world.out), ("out", "finished")),
    "with other options": (_begun(lambda text: text.replace(b"beta = 0.1", b"beta = 0.3")), ("--beta", "0.3")),
    "of a damaged record": (_begun(lambda text: b"beta = = 1"), ("run.toml", "TOML")),
    "of a record in another encoding": (_begun(lambda text: b"# caf\xe9"), ("run.toml", "UTF-8")),
    "with other pairs": (_begun(damage=lambda world: write_pairs(world.pairs, PAIRS[:3])), ("--data", "begun with")),
    "with another model": (_begun(damage=_other_weights), ("--model", "begun with")),
    "whose only checkpoint is cut off": (_begun(damage=_cut_checkpoint), ("step-00000002", "damaged")),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_cannot_be_resumed_is_left_as_it_is(name: str, world: World, capfd: pytest.CaptureFixture[str]):
    damage, names = RESUMED[name]
    command = "train --model {model} --data {pairs} --out {out} --steps 2 --samples 0 --rank 2 --resume"
    refused(Kind(command, damage, names), world, capfd)


QUESTIONS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "nothing to --json": ("chat --model {model} --json", b"", ("question", "empty")),
    "blanks": ("chat --model {model}", b" \n\t\n", ("question", "empty")),
    "no UTF-8": ("chat --model {model}", b"caf\xe9?", ("UTF-8",)),
    "a book": ("chat --model {model}", b"tea " * 300_000, ("1000000 bytes",)),
    "more than the model takes": ("chat --model {model}", b"tea and bread " * 400, ("tokens", "shorten")),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_cannot_be_asked_is_refused(
    name: str, world: World, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command, data, names = QUESTIONS[name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    refused(Kind(command, nothing, names), world, capfd)


def test_an_empty_question_is_refused(world: World, capfd: pytest.CaptureFixture[str]):
    found = said(["chat", "--model", str(world.model), ""], world, capfd)
    assert (found.status, found.output) == (1, "")
    assert "question is empty" in found.sentence


def test_a_name_in_another_encoding_is_refused(world: World, capfd: pytest.CaptureFixture[str]):
    found = said([*typed(TRAIN, world), "--adapter", os.fsdecode(b"caf\xe9")], world, capfd)
    assert (found.status, found.output) == (2, "")
    assert "caf\\udce9" in found.sentence


def test_the_demo_leaves_a_place_that_is_taken(world: World, capfd: pytest.CaptureFixture[str]):
    refused(Kind("demo --out {adapter}", nothing, ("adapter", "already holds")), world, capfd)


def test_a_system_prompt_that_the_template_leaves_out_is_refused(world: World, capfd: pytest.CaptureFixture[str]):
    def damage(place: World) -> None:
        path = place.model / "tokenizer_config.json"
        path.write_text(path.read_text().replace("in messages %}", "in messages if message['role'] != 'system' %}"))

    refused(Kind(f"{CHAT} --system Kindly.", damage, ("system prompts",)), world, capfd)
