"""Whatever happens to the newest checkpoint, the one before is found, and it is what was saved."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.align import checkpoint
from mlx_dpo.align.checkpoint import Checkpoint
from mlx_dpo.models.arrays import read_arrays, write_arrays
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import put_in_place, sync_folder, write_whole, writing

Write = Callable[[Path], object]


def state(step: int, width: int = 3) -> Checkpoint:
    """Some state of every kind of number that an optimiser keeps, another one at each step."""
    arrays = {
        "adapter.a": mx.arange(width * 2, dtype=mx.float32).reshape(width, 2) / 7 + step,
        "adapter.b": mx.array([step, -0.0, 1e-30], dtype=mx.bfloat16),
        "optimizer.step": mx.array(step, dtype=mx.uint64),
        "optimizer.none": mx.zeros((0, 4)),
    }
    return Checkpoint(arrays, {"steps_done": step, "tokens_done": 7 * step, "origin": {"model": ["é", None]}})


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    """Whether two states are equal bit for bit, in their names, types and shapes too."""
    if one is None or one.numbers != other.numbers or one.arrays.keys() != other.arrays.keys():
        return False
    pairs = [(value, other.arrays[name]) for name, value in one.arrays.items()]
    return all((a.dtype, a.shape) == (b.dtype, b.shape) and _bits(a) == _bits(b) for a, b in pairs)


def _bits(value: mx.array) -> bytes:
    return np.array(value.reshape(-1).view(mx.uint8)).tobytes()


def file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(folder: Path, *numbers: int) -> Path:
    for step in numbers:
        checkpoint.save(folder, step, state(step), keep=len(numbers))
    return folder


def assert_newest(folder: Path, step: int) -> None:
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.path == file(folder, step)
    assert same(found.state, state(step))


def test_what_is_read_is_what_was_saved(tmp_path: Path):
    folder = saved(tmp_path / "made" / "here", 1, 2)
    assert_newest(folder, 2)
    assert same(checkpoint.at(folder, 1), state(1))
    assert not same(checkpoint.at(folder, 1), state(2))


@pytest.mark.parametrize(
    ("keep", "pinned", "left"),
    [(1, (), [5]), (2, (), [4, 5]), (9, (), [1, 2, 3, 4, 5]), (2, {1, 4}, [1, 4, 5]), (1, [2, 77], [2, 5])],
    ids=str,
)
def test_the_newest_stay_and_the_pinned(tmp_path: Path, keep: int, pinned: set[int], left: list[int]):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state(step), keep, pinned)
    assert checkpoint.steps(tmp_path) == left[::-1]
    assert listed(tmp_path) == [file(tmp_path, step).name for step in left]


def test_the_one_just_written_has_to_stay(tmp_path: Path):
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 1, state(1), keep=0)
    assert listed(tmp_path) == []


def test_damaged_files_of_later_steps_take_no_place(tmp_path: Path):
    saved(tmp_path, 3, 4, 8, 9)
    for step in (8, 9):
        file(tmp_path, step).write_bytes(b"")
    checkpoint.save(tmp_path, 5, state(5), keep=2)
    assert checkpoint.steps(tmp_path) == [9, 8, 5, 4]
    assert_newest(tmp_path, 5)


def test_steps_are_ordered_as_numbers_and_other_files_are_none(tmp_path: Path):
    saved(tmp_path, 99_999_999, 100_000_000)
    for name in ("step-1.safetensors", "step-000000012.safetensors", "step-last.safetensors", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert checkpoint.steps(tmp_path) == [100_000_000, 99_999_999]
    assert_newest(tmp_path, 100_000_000)


def test_where_there_is_no_checkpoint_there_is_none(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert (checkpoint.newest(folder), checkpoint.at(folder, 1), checkpoint.steps(folder)) == (None, None, [])
        checkpoint.drop_after(folder, 0)
    assert listed(tmp_path) == []


def test_what_comes_after_a_step_is_dropped(tmp_path: Path):
    saved(tmp_path, 1, 2, 3, 4)
    file(tmp_path, 4).write_bytes(b"damaged")
    checkpoint.drop_after(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [2, 1]
    assert_newest(tmp_path, 2)


def test_no_cut_and_no_flipped_byte_gives_another_state(tmp_path: Path):
    saved(tmp_path, 1, 2)
    whole = file(tmp_path, 2).read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 3)] + [whole + b"\0"]
    for place in range(len(whole)):
        for mask in (1 << place % 8, 0x80):
            damaged.append(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    for data in damaged:
        file(tmp_path, 2).write_bytes(data)
        assert_newest(tmp_path, 1)
    file(tmp_path, 2).write_bytes(whole)
    assert_newest(tmp_path, 2)


def test_what_was_passed_over_is_told(tmp_path: Path):
    saved(tmp_path, 1, 2, 3, 4)
    file(tmp_path, 2).write_bytes(b"damaged")
    file(tmp_path, 3).unlink()
    file(tmp_path, 3).mkdir()
    file(tmp_path, 4).write_bytes(file(tmp_path, 1).read_bytes())  # whole, but another step's
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.damaged == [file(tmp_path, step) for step in (4, 3, 2)]
    assert_newest(tmp_path, 1)


@pytest.mark.parametrize("change", [{"tokens_done": 15}, {"steps_done": 1}, {"more": 0}])
def test_changed_numbers_are_damage(tmp_path: Path, change: dict[str, int]):
    saved(tmp_path, 1, 2)
    arrays, metadata = read_arrays(file(tmp_path, 2))
    mx.eval(arrays)
    numbers = json.dumps(json.loads(metadata["numbers"]) | change)
    write_arrays(file(tmp_path, 2), arrays, metadata | {"numbers": numbers})
    assert_newest(tmp_path, 1)


@pytest.mark.parametrize(("version", "name"), [({"version": "3"}, "format 3"), ({}, "format 1")])
def test_another_format_is_not_taken_for_this_one(tmp_path: Path, version: dict[str, str], name: str):
    saved(tmp_path, 1, 2)
    arrays, metadata = read_arrays(file(tmp_path, 2))
    mx.eval(arrays)
    kept = {key: value for key, value in metadata.items() if key != "version"}
    write_arrays(file(tmp_path, 2), arrays, kept | version)
    assert_newest(tmp_path, 1)
    file(tmp_path, 1).write_bytes(b"")
    with pytest.raises(Refusal, match=f"step-00000002.safetensors has the {name}, this mlx_dpo reads format 2"):
        checkpoint.newest(tmp_path)


def assert_refused_and_safe(folder: Path, reason: str) -> None:
    """Saving step 2, too large for the place, is refused with the folder's name, and step 1 is what it was."""
    with pytest.raises(Refusal, match=f"^{folder} cannot be written \\(.*{reason}.*\\): make room"), writing(folder):
        checkpoint.save(folder, 2, state(2, width=30_000))
    assert listed(folder) == [file(folder, 1).name]
    assert_newest(folder, 1)


@pytest.mark.parametrize("size", [0, 100, 4_000, 200_000])
def test_a_limit_on_files_leaves_the_checkpoint_before(tmp_path: Path, size: int):
    saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert_refused_and_safe(tmp_path, "Unable to write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoint.save(tmp_path, 2, state(2))
    assert_newest(tmp_path, 2)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A disk of 64 KiB, where one may be had."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            try:
                yield
            finally:
                subprocess.run(["umount", str(folder)], check=True)
            return
    pytest.skip("no disk may be mounted here")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path):
    with _disk(tmp_path / "disk"):
        saved(tmp_path / "disk", 1)
        assert_refused_and_safe(tmp_path / "disk", "Unable to write")
        checkpoint.save(tmp_path / "disk", 2, state(2))
        assert_newest(tmp_path / "disk", 2)


def test_a_disk_that_became_read_only_leaves_the_checkpoint_before(tmp_path: Path):
    with _disk(tmp_path / "disk"):
        saved(tmp_path / "disk", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert_refused_and_safe(tmp_path / "disk", "Failed to open file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_leaves_the_checkpoint_before(tmp_path: Path):
    saved(tmp_path / "mine", 1)
    (tmp_path / "mine").chmod(0o500)
    assert_refused_and_safe(tmp_path / "mine", "Failed to open file")


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, below: str):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(Refusal, match=f"^{tmp_path}/out cannot be written"), writing(tmp_path / "out"):
        checkpoint.save(tmp_path / "out" / below, 1, state(1))
    assert (tmp_path / "out").read_text() == "mine"


NAME = "name.safetensors"
WRITERS: dict[str, Write] = {
    "write_whole": lambda path: write_whole(path, b"new"),
    "write_arrays": lambda path: write_arrays(path, {"a": mx.zeros(3)}, {}),
    "save": lambda path: checkpoint.save(path.parent, 7, state(7)),
}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the system is asked for: flushes of files and folders, and renames, in their order; all are done."""
    asked: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        asked.append("folder" if os.path.isdir(descriptor) else "file")
        fsync(descriptor)

    def renamed(*paths: Path) -> None:
        asked.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    return asked


@pytest.mark.parametrize("writer", WRITERS)
def test_the_file_is_on_the_disk_before_its_name_and_the_name_before_it_goes_on(
    tmp_path: Path, order: list[str], writer: str
):
    WRITERS[writer](tmp_path / NAME)
    assert order == ["file", "rename", "folder"]


def test_new_folders_and_removals_are_on_the_disk_too(tmp_path: Path, order: list[str]):
    saved(tmp_path / "out" / "checkpoints", 1, 2)
    assert order == ["folder", "folder", *["file", "rename", "folder"] * 2]
    order.clear()
    checkpoint.drop_after(tmp_path / "out" / "checkpoints", 1)
    assert order == ["folder"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "not known to the drive"])
def test_macos_is_asked_to_write_through_the_drive(
    tmp_path: Path, order: list[str], monkeypatch: pytest.MonkeyPatch, known: bool
):
    def control(descriptor: int, command: int) -> int:
        assert command == 51
        order.append("through")
        if not known:
            raise OSError(errno.ENOTSUP, "not supported")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    write_whole(tmp_path / "name", b"new")
    flushed = [["through"], ["through"]] if known else [["through", "file"], ["through", "folder"]]
    assert order == [*flushed[0], "rename", *flushed[1]]


@pytest.mark.parametrize("failing", ["file", "folder"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fails_while_it_is_flushed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, failing: str
):
    def broken(descriptor: int) -> None:
        if os.path.isdir(descriptor) == (failing == "folder"):
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / NAME).write_bytes(b"old")
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Refusal, match=f"^{tmp_path} cannot be written \\(Input/output error\\)"), writing(tmp_path):
        WRITERS[writer](tmp_path / NAME)
    assert not list(tmp_path.glob(".*"))
    if failing == "file":
        assert (tmp_path / NAME).read_bytes() == b"old"


def test_a_file_system_that_does_not_flush_folders_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def files_only(descriptor: int) -> None:
        if os.path.isdir(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(os, "fsync", files_only)
    (tmp_path / "part").write_bytes(b"new")
    put_in_place(tmp_path / "part", tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"new"
    sync_folder(tmp_path / "absent")
