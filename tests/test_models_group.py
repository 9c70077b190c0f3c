"""Processes that train together, over the loopback: what they exchange, and how they end when one of them does."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.models.group import Group, joined, shares
from mlx_dpo.refusal import Refusal

LAUNCH = Path(sys.executable).with_name("mlx.launch")
LIMIT = 30.0  # seconds; each takes one to three
COSTS = [300, 7, 7, 120, 260, 90, 31, 5, 5, 5, 400]
SIZES = (1, 2, 3, 7, 300_000)

TOGETHER = """
    import contextlib, json, os, socket, sys
    import mlx.core as mx, numpy as np
    from mlx_dpo.models.group import joined
    from mlx_dpo.refusal import Refusal

    group, sizes, costs = joined(), json.loads(sys.argv[1]), json.loads(sys.argv[2])
    drawn = np.random.default_rng(group.rank)
    arrays = [mx.array(drawn.standard_normal(size, np.float32)) for size in sizes]
    halves = [("nothing", {}), ("layers", [{}, *({"w": array.reshape(1, -1)} for array in arrays)])]
    tree = dict(halves[:: -1 if group.rank == 1 else 1]) | {"loss": mx.array(float(group.rank))}
    total = group.summed(tree)
    np.savez(f"{group.rank}.npz", *(np.array(layer["w"]) for layer in total["layers"][1:]))

    def refusal(method, *arguments):
        try:
            method(*arguments)
        except Refusal as sentence:
            return str(sentence)

    def kept_alive():
        for name in os.listdir("/dev/fd"):
            try:
                connection = socket.socket(fileno=int(name))
            except OSError:
                continue
            with contextlib.suppress(OSError):  # MLX leaves sockets open that found nobody
                connection.getpeername()
                yield connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            connection.detach()

    print(json.dumps({
        "rank": group.rank, "size": group.size, "first": group.is_first, "kept_alive": list(kept_alive()),
        "loss": total["loss"].item(), "nothing": total["nothing"], "empty": total["layers"][0],
        "share": group.share(range(len(costs)), costs), "few": group.share(["a"], [1]), "none": group.share([], []),
        "from_first": group.from_first({"rank": group.rank, "text": "é" * 1000 * (1 - group.rank), "x": 0.1}),
        "any": [group.any_of(False), group.any_of(group.rank == 1), group.any_of(True)],
        "same": refusal(group.agree, "data", "x"),
        "other": refusal(group.agree, "data", "x" if group.is_first else "y"),
        "sizes": refusal(group.summed, {"w": mx.ones(1 + group.rank)}),
        "after": group.from_first(group.rank),
    }))
"""
ENDING = """
    import os, signal, sys, threading, time
    import mlx.core as mx
    from mlx_dpo.models.group import joined
    from mlx_dpo.refusal import Refusal

    how, patience = sys.argv[1], float(sys.argv[2])
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    print("here", flush=True)
    group = joined(patience)
    if how == "SIGKILL in it" and group.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for number in range(100_000):
        if number == 5:
            print(f"rank {group.rank} is at 5", flush=True)
            if group.rank == 1 and how in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, how))
        try:
            group.summed({"w": mx.ones(1_000_000 if how == "SIGKILL in it" else 10)})
        except Refusal as first:
            try:
                group.any_of(True)
            except Refusal as again:
                sys.exit(str(again) if again is first else "another one")
"""
LATE = """
    import time
    import mlx.core as mx
    from mlx_dpo.models import group as room

    room._KEEP_ALIVE["TCP_USER_TIMEOUT"] = 300  # milliseconds
    group = room.joined()
    time.sleep(1.5 * group.rank)
    print(group.summed({"w": mx.ones(5_000_000)})["w"].max().item())
"""


@contextlib.contextmanager
def ports(count: int) -> Iterator[int]:
    """The first of `count` free ports in a row, kept from other tests for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        while True:
            start = random.randrange(20_000, 32_000)  # below those that the system gives out by itself
            try:
                for port in range(start, start + count):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", port))
                for port in range(start, start + count):
                    held = stack.enter_context(socket.socket())
                    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as MLX has it, which may bind as well
                    held.bind(("127.0.0.1", port))
            except OSError:
                continue
            yield start
            return


@contextlib.contextmanager
def started(command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose whole family is gone when the block ends, or after LIMIT."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)} | environment, start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    guard = threading.Timer(LIMIT, end)
    guard.start()
    with process:
        try:
            yield process
        finally:
            guard.cancel()
            end()


def launched(size: int, program: str, folder: Path, *arguments: str) -> tuple[str, str, float]:
    """What `size` ranks of a program write, and the seconds they take, under mlx.launch."""
    script, began = folder / "program.py", time.monotonic()
    script.write_text(dedent(program))
    with ports(size) as port:
        command = [str(LAUNCH), "-n", str(size), "--backend", "ring", "--starting-port", str(port), "--"]
        with started([*command, sys.executable, str(script), *arguments], folder) as process:
            spoken, complained = process.communicate()
    return spoken, complained, time.monotonic() - began


@contextlib.contextmanager
def by_hand(
    size: int, program: str, folder: Path, *arguments: str, ranks: int = 2
) -> Iterator[list[subprocess.Popen[str]]]:
    """The first `ranks` of `size`, started without mlx.launch, so that nobody ends one when another ends."""
    script = folder / "program.py"
    script.write_text(dedent(program))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(ports(size))
        (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
        command = [sys.executable, str(script), *arguments]
        yield [
            stack.enter_context(started(command, folder, MLX_HOSTFILE="hosts.json", MLX_RANK=str(rank)))
            for rank in range(ranks)
        ]


def said(process: subprocess.Popen[str], lines: int) -> list[str]:
    """The first lines that a process writes."""
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(lines)]


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What each rank says of its exchanges, by rank, and the folder with its sums."""
    folder = tmp_path_factory.mktemp("ranks")
    spoken, complained, _ = launched(request.param, TOGETHER, folder, json.dumps(SIZES), json.dumps(COSTS))
    rows = sorted((json.loads(line) for line in spoken.splitlines()), key=lambda row: row["rank"])
    assert [row["rank"] for row in rows] == list(range(request.param)), complained
    return rows, folder


def test_sums_are_the_same_bits_on_all_ranks_and_the_sum(together: tuple[list[dict], Path]):
    rows, folder = together
    ranks = range(len(rows))
    draws = [np.random.default_rng(rank) for rank in ranks]
    found = [np.load(folder / f"{rank}.npz") for rank in ranks]
    for number, size in enumerate(SIZES):
        parts = [drawn.standard_normal(size, np.float32) for drawn in draws]
        sums = [arrays[f"arr_{number}"] for arrays in found]
        assert {array.tobytes() for array in sums} == {sums[0].tobytes()}
        assert sums[0].shape == (1, size)
        np.testing.assert_allclose(sums[0][0], np.sum(parts, axis=0, dtype=np.float64), rtol=0, atol=2e-6)
        if len(rows) == 2:
            assert np.array_equal(sums[0][0], parts[0] + parts[1])
    assert {row["loss"] for row in rows} == {sum(ranks)}
    assert all(row["nothing"] == row["empty"] == {} for row in rows)


def test_shares_are_those_of_all_ranks(together: tuple[list[dict], Path]):
    rows, _ = together
    assert [row["share"] for row in rows] == shares(COSTS, len(rows))
    assert [row["few"] for row in rows] == [["a"], *([[]] * (len(rows) - 1))]
    assert [row["none"] for row in rows] == [[]] * len(rows)


def test_what_one_says_all_hear(together: tuple[list[dict], Path]):
    rows, _ = together
    assert [row["first"] for row in rows] == [True, *([False] * (len(rows) - 1))]
    for row in rows:
        assert row["size"] == len(rows)
        assert row["from_first"] == {"rank": 0, "text": "é" * 1000, "x": 0.1}
        assert row["any"] == [False, True, True]


def test_another_value_is_refused_by_all_and_breaks_nothing(together: tuple[list[dict], Path]):
    rows, _ = together
    others = "Rank 1 has" if len(rows) == 2 else "Ranks 1, 2 have"
    sentence = f"{others} not the same data as rank 0: give all of them the same, and start them again."
    assert [row["same"] for row in rows] == [None] * len(rows)
    assert [row["other"] for row in rows] == [sentence] * len(rows)
    sizes = f"The {len(rows)} ranks add up arrays of different sizes: start them with the same options."
    assert [row["sizes"] for row in rows] == [sizes] * len(rows)
    assert [row["after"] for row in rows] == [0] * len(rows)


def test_the_system_asks_after_the_neighbours(together: tuple[list[dict], Path]):
    rows, _ = together
    assert [row["kept_alive"] for row in rows] == [[1, 1]] * len(rows)  # one to the left, one to the right


def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path: Path):
    _, complained, seconds = launched(3, ENDING, tmp_path, "SIGKILL", "600")
    assert "Node with rank 1 exited with code -9" in complained
    for rank in (0, 2):
        assert f"Rank {rank} of 3 has lost another one ([ring] connection to a peer was lost): see" in complained
        # 1 is its own; mlx.launch ends the others as soon as it sees the first, and may come in between.
        assert re.search(rf"Node with rank {rank} exited with code (1|-15) ", complained)
    assert seconds < 15


def test_one_killed_while_it_adds_is_missed_without_a_launcher(tmp_path: Path):
    with by_hand(2, ENDING, tmp_path, "SIGKILL in it", "600") as (first, other):
        assert other.wait() == -signal.SIGKILL
        assert first.wait(10) == 1
        assert first.stderr is not None
        assert re.search(r"^Rank 0 of 2 has lost another one", first.stderr.read(), re.MULTILINE)


def test_a_long_message_waits_for_who_comes_late(tmp_path: Path):
    with by_hand(2, LATE, tmp_path) as ranks:
        assert [said(rank, 1) for rank in ranks] == [["2.0"], ["2.0"]]


def test_a_frozen_rank_is_waited_for_with_patience(tmp_path: Path):
    with by_hand(2, ENDING, tmp_path, "SIGSTOP", "0.6") as (first, _):
        assert first.wait() == 1
        assert first.stderr is not None
        assert re.search(r"^Rank 0 of 2 has waited 0\.01 minutes .* --resume\.$", first.stderr.read(), re.MULTILINE)


def test_the_second_interrupt_ends_what_waits_for_a_frozen_rank(tmp_path: Path):
    with by_hand(2, ENDING, tmp_path, "SIGSTOP", "600") as (first, other):
        assert said(other, 2)[-1] == "rank 1 is at 5"
        for _ in range(2):
            time.sleep(0.6)  # past what the watch needs to hear each by itself
            assert first.poll() is None
            first.send_signal(signal.SIGINT)
        assert first.wait() == 130
        assert first.stderr is not None
        assert "Rank 0 of 2 was interrupted while it waited" in first.stderr.read()


def test_a_polite_kill_ends_what_waits_for_the_others_to_come(tmp_path: Path):
    with by_hand(2, ENDING, tmp_path, "SIGKILL", "600", ranks=1) as (first,):
        assert said(first, 1) == ["here"]
        time.sleep(0.3)
        assert first.poll() is None
        first.terminate()
        assert first.wait(5) == -signal.SIGTERM


def test_alone_everything_stays_as_it_is():
    group, tree = joined(), {"w": mx.array([1.0, 2.0]), "nothing": {}}
    assert (group.rank, group.size, group.is_first) == (0, 1, True)
    assert group == Group()
    assert group.summed(tree) is tree
    assert group.share("abc", [3, 1, 2]) == ["a", "b", "c"]
    assert group.from_first({"answers": ["a", None], "x": 0.1}) == {"answers": ["a", None], "x": 0.1}
    assert [group.any_of(flag) for flag in (False, True)] == [False, True]
    group.agree("data", "x")


def test_only_float32_is_summed():
    with pytest.raises(TypeError, match=r"layers\.0\.w"):
        Group().summed({"layers": [{"w": mx.array([1], mx.int32)}]})


def test_one_process_under_mlx_launch_is_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert joined() == Group()


def test_ranks_that_cannot_meet_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(Refusal, match="MLX knows no way to the others: start them by"):
        joined()
    (tmp_path / "hosts").write_text("[[")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    with pytest.raises(Refusal, match="Rank 1 cannot meet the others"):
        joined()


def test_shares_by_hand():
    assert shares([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert shares([1, 1], 3) == [[0], [1], []]


def test_shares_cover_and_balance():
    drawn = random.Random(3)
    for _ in range(200):
        costs, size = [drawn.randint(1, 500) for _ in range(drawn.randint(0, 30))], drawn.randint(1, 6)
        parts = shares(costs, size)
        assert sorted(place for part in parts for place in part) == list(range(len(costs)))
        assert all(part == sorted(part) for part in parts)
        loads = [sum(costs[place] for place in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs, default=0)
