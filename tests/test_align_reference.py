"""What is remembered of a reference: recalled to the bit or not at all, whatever becomes of the file."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo.align import reference
from mlx_dpo.align.reference import Remembered
from mlx_dpo.models.rows import Said

ORIGIN = {"model": ["aa", "bb"], "adapter": None, "data": ["1", "2"], "questions": "3"}
CONFIG = {"rope_theta": 1e4}
NAME = reference.identity(ORIGIN, CONFIG, None, "mlx.core.float32", "cpu")
NOBODY = 65534


def text(number: int, answer: int = 5, lead: int = 0) -> Said:
    return Said([number, 2, 3], [7 + i for i in range(answer)], lead)


TEXTS = [text(number, 3 + number % 7, lead=number % 3) for number in range(200)]
VALUES = [
    np.random.default_rng(number).normal(-3.0, 2.0, len(said.answer) + said.lead).astype(np.float32)
    for number, said in enumerate(TEXTS)
]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder in which all TEXTS are known."""
    closed(Remembered(tmp_path, NAME)).remember(TEXTS, VALUES)
    return tmp_path


@pytest.fixture
def open_to_nobody() -> Iterator[Path]:
    """A folder that a user without rights comes to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


_opened: list[Remembered] = []


def closed(remembered: Remembered) -> Remembered:
    """The same, whose connection ends with the test."""
    _opened.append(remembered)
    return remembered


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    while _opened:
        database = _opened.pop().database
        if database is not None:
            database.close()


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Let the rights of files count, as they do not for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def recalled(folder: Path, texts: list[Said], name: bytes = NAME) -> list[np.ndarray | None]:
    return list(closed(Remembered(folder, name)).recalled(texts))


def assert_true_or_nothing(folder: Path) -> int:
    """Nothing that is recalled is wrong; returns how much is."""
    found = recalled(folder, TEXTS)
    known = [(mine, value) for mine, value in zip(found, VALUES, strict=True) if mine is not None]
    assert all(np.array_equal(mine, value) for mine, value in known)
    return len(known)


def assert_all_known(folder: Path) -> None:
    assert assert_true_or_nothing(folder) == len(TEXTS)


def test_what_was_remembered_is_recalled_to_the_bit_by_another_connection_too(tmp_path: Path):
    first = closed(Remembered(tmp_path, NAME))
    assert list(first.recalled(TEXTS)) == [None] * len(TEXTS)
    first.remember(TEXTS, VALUES)
    for found in (list(first.recalled(TEXTS)), recalled(tmp_path, TEXTS)):
        assert all(a is not None and a.tobytes() == b.tobytes() for a, b in zip(found, VALUES, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        reference.identity(ORIGIN | {"model": ["aa", "bc"]}, CONFIG, None, "mlx.core.float32", "cpu"),
        reference.identity(ORIGIN | {"adapter": "dd"}, CONFIG, None, "mlx.core.float32", "cpu"),
        reference.identity(ORIGIN, CONFIG, None, "mlx.core.bfloat16", "cpu"),
        reference.identity(ORIGIN, CONFIG, None, "mlx.core.float32", "gpu"),
        reference.identity(ORIGIN, {"rope_theta": 1e5}, None, "mlx.core.float32", "cpu"),
        reference.identity(ORIGIN, CONFIG, {"lora_parameters": {"scale": 2.0}}, "mlx.core.float32", "cpu"),
    ],
    ids=["weights", "start adapter", "number format", "device", "config", "adapter config"],
)
def test_another_reference_knows_nothing_of_it(filled: Path, name: bytes):
    assert recalled(filled, TEXTS, name) == [None] * len(TEXTS)
    closed(Remembered(filled, name)).remember(TEXTS[:1], [VALUES[0] - 1])
    assert_all_known(filled)


def test_other_data_with_the_same_texts_is_known(filled: Path):
    name = reference.identity(ORIGIN | {"data": ["8", "9"], "questions": "7"}, CONFIG, None, "mlx.core.float32", "cpu")
    assert None not in [found if found is None else True for found in recalled(filled, TEXTS, name)]


@pytest.mark.parametrize(
    "other",
    [
        Said([1, 2, 4], [7, 8, 9], 1),
        Said([1, 2, 3], [7, 8, 10], 1),
        Said([1, 2, 3], [7, 8, 9, 10], 0),  # as many scored tokens
        Said([1, 2], [3, 7, 8, 9], 0),  # the same tokens in all
        Said([1, 2, 3, 7], [8, 9], 2),
    ],
    ids=["prompt", "answer", "lead", "cut elsewhere", "cut elsewhere with a lead"],
)
def test_another_text_is_not_known(tmp_path: Path, other: Said):
    closed(Remembered(tmp_path, NAME)).remember(
        [Said([1, 2, 3], [7, 8, 9], 1)], [np.array([-1, -2, -3, -4], dtype=np.float32)]
    )
    assert recalled(tmp_path, [other]) == [None]


@pytest.mark.parametrize(
    "value",
    [[-1.0, -2.0], [-1.0] * 6, [], [-1.0, np.nan, -1.0, -1.0, -1.0], [-1.0, -1.0, -np.inf, -1.0, -1.0]],
    ids=["truncated", "too long", "empty", "nan", "infinite"],
)
def test_numbers_that_cannot_be_are_not_believed(tmp_path: Path, value: list[float]):
    closed(Remembered(tmp_path, NAME)).remember([text(1)], [np.array(value, dtype=np.float32)])
    assert recalled(tmp_path, [text(1)]) == [None]
    closed(Remembered(tmp_path, NAME)).remember([text(1)], [np.array([-1, -2, -3, -4, -5], dtype=np.float32)])
    assert recalled(tmp_path, [text(1)])[0] is not None


@pytest.mark.parametrize("value", ["NULL", "'twenty letters in all'", "17", "1.5", "zeroblob(19)", "''"])
def test_a_row_of_another_kind_is_not_believed(filled: Path, value: str):
    database = sqlite3.connect(filled / "reference.sqlite", isolation_level=None)
    (table,) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'logps'").fetchone()
    database.execute("PRAGMA writable_schema = ON")
    database.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'logps'", (table.replace("NOT NULL", ""),))
    database.close()
    database = sqlite3.connect(filled / "reference.sqlite", isolation_level=None)
    database.execute(f"UPDATE logps SET tokens = {value}")
    database.close()
    assert assert_true_or_nothing(filled) == 0


def cut(size: float) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, int(path.stat().st_size * size))


@pytest.mark.parametrize(
    "damage",
    [
        cut(0),
        cut(0.3),
        cut(0.9),
        lambda path: path.write_bytes(b"not a database at all " * 500),
        lambda path: path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100)),
    ],
    ids=["emptied", "a third is there", "the end is missing", "other bytes", "a head and zeros"],
)
def test_a_damaged_file_is_never_wrong_and_serves_again(filled: Path, damage: Callable[[Path], object]):
    damage(filled / "reference.sqlite")
    assert_true_or_nothing(filled)
    closed(Remembered(filled, NAME)).remember(TEXTS, VALUES)
    assert_true_or_nothing(filled)


def test_a_flipped_byte_anywhere_is_never_a_wrong_number(filled: Path):
    path = filled / "reference.sqlite"
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 300).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert_true_or_nothing(filled)
        closed(Remembered(filled, NAME)).remember(TEXTS[:2], VALUES[:2])


def test_where_there_can_be_no_folder_it_is_as_if_empty(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        remembered = closed(Remembered(folder, NAME))
        remembered.remember(TEXTS, VALUES)
        assert list(remembered.recalled(TEXTS)) == [None] * len(TEXTS)
    (tmp_path / "reference.sqlite").mkdir()
    assert recalled(tmp_path, TEXTS[:1]) == [None]


def test_a_folder_that_cannot_be_read_is_as_if_empty(open_to_nobody: Path):
    closed(Remembered(open_to_nobody, NAME)).remember(TEXTS, VALUES)
    open_to_nobody.chmod(0o000)
    with without_rights():
        remembered = closed(Remembered(open_to_nobody, NAME))
        remembered.remember(TEXTS, VALUES)
        assert list(remembered.recalled(TEXTS)) == [None] * len(TEXTS)


def test_what_is_in_a_read_only_folder_is_recalled_and_nothing_is_added(open_to_nobody: Path):
    closed(Remembered(open_to_nobody, NAME)).remember(TEXTS[:100], VALUES[:100])
    (open_to_nobody / "reference.sqlite").chmod(0o444)
    open_to_nobody.chmod(0o555)
    with without_rights():
        remembered = closed(Remembered(open_to_nobody, NAME))
        remembered.remember(TEXTS[100:], VALUES[100:])
        assert assert_true_or_nothing(open_to_nobody) == 100


def test_the_folder_is_for_its_owner_alone(tmp_path: Path):
    closed(Remembered(tmp_path / "cache", NAME))
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_the_oldest_go_when_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_FULL", 2**16)
    remembered = closed(Remembered(tmp_path, NAME))
    texts = [text(number, 40) for number in range(2000)]
    values = [np.full(40, -1.0 - number / 7, dtype=np.float32) for number in range(2000)]
    for start in range(0, 2000, 20):
        remembered.remember(texts[start : start + 20], values[start : start + 20])
        found = list(remembered.recalled(texts[start : start + 20]))
        assert all(a is not None and np.array_equal(a, b) for a, b in zip(found, values[start:], strict=False))
        assert (tmp_path / "reference.sqlite").stat().st_size < 1.3 * 2**16
    known = [number for number, value in enumerate(remembered.recalled(texts)) if value is not None]
    assert known == list(range(known[0], 2000))
    assert len(known) > 100


def test_a_full_disk_loses_what_is_new_alone(filled: Path):
    remembered = closed(Remembered(filled, NAME))
    assert remembered.database is not None
    (pages,) = remembered.database.execute("PRAGMA page_count").fetchone()
    remembered.database.execute(f"PRAGMA max_page_count = {pages}")
    more = [text(1000 + number, 40) for number in range(500)]
    remembered.remember(more, [np.ones(40, dtype=np.float32)] * 500)
    assert list(remembered.recalled(more)) == [None] * 500
    assert_all_known(filled)
    remembered.database.execute(f"PRAGMA max_page_count = {100 * pages}")
    remembered.remember(more[:1], [np.ones(40, dtype=np.float32)])
    assert list(remembered.recalled(more[:1]))[0] is not None


_WRITER = """
import sys
import numpy as np
from pathlib import Path
from mlx_dpo.align.reference import Remembered
from mlx_dpo.models.rows import Said

folder, first = Path(sys.argv[1]), int(sys.argv[2])
remembered = Remembered(folder, b"reference")
for start in range(first, first + 400, 10):
    texts = [Said([i // 2, 1], [i // 2, 5, 6]) for i in range(start, start + 10)]
    values = [np.float32([-1, -2, -(i // 2) - 1]) for i in range(start, start + 10)]
    remembered.remember(texts, values)
    for found, value in zip(remembered.recalled(texts), values):
        assert found is not None and np.array_equal(found, value)
"""


def test_two_processes_write_at_once(tmp_path: Path):
    arguments = [[sys.executable, "-c", _WRITER, str(tmp_path), first] for first in ("0", "200")]
    writers = [subprocess.Popen(words) for words in arguments]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    texts = [Said([i, 1], [i, 5, 6]) for i in range(300)]
    for i, found in enumerate(recalled(tmp_path, texts, b"reference")):
        assert found is not None
        assert found.tolist() == [-1, -2, -i - 1]


def test_a_database_in_use_is_not_taken_for_a_damaged_one(filled: Path, monkeypatch: pytest.MonkeyPatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, **more: connect(path, 0.1, **more))
    holder = connect(filled / "reference.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    meanwhile = closed(Remembered(filled, NAME))
    meanwhile.remember(TEXTS[:1], VALUES[:1])
    list(meanwhile.recalled(TEXTS))
    holder.execute("COMMIT")
    holder.close()
    assert_all_known(filled)
