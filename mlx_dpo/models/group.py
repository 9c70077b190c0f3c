"""The processes that train one model together, through MLX's own distributed layer; a process alone needs none of it.

Every exchange is one that all ranks make, in the same order: what decides whether there is one has to be the same
everywhere.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.refusal import Refusal

Item = TypeVar("Item")
PATIENCE = 1800.0  # seconds; rank 0 may evaluate and answer for some minutes while the others wait
_TERM_PATIENCE, _AGAIN_PATIENCE = 60.0, 1.0  # seconds after a polite kill, and after the second Ctrl-C
_KEEP_ALIVE = {  # seconds, a count, and milliseconds: a machine that is silent for some 90 seconds is gone
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPALIVE": 30,  # macOS's name of it
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 6,
    "TCP_USER_TIMEOUT": 90_000,
}


class Gone(Refusal):
    """Another rank has ended or cannot be reached; nothing was changed here since the exchange before."""


@dataclass(frozen=True)
class Group:
    """One process, `rank` of `size`, and what it does together with the others; alone it is rank 0 of 1.

    Each method that exchanges something raises Gone where another rank is gone, and Refusal where the ranks do not go
    together.
    """

    rank: int = 0
    size: int = 1
    _link: "_Link | None" = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def summed(self, tree: Any) -> Any:
        """The sum over ranks of a tree of float32 arrays, evaluated and, with the ring, bit for bit the same on all.

        Trees have the same paths and shapes on all ranks. They travel as one message, whose size and the number of
        ranks decide the order of the additions; of two ranks it does not matter.
        """
        named = named_arrays(tree)
        if wrong := [name for name, value in named.items() if value.dtype != mx.float32]:
            raise TypeError(f"{wrong[0]} is not in float32")
        if self._link is None or not named:
            return tree
        paths = sorted(named)  # ranks may have put their trees together in different orders
        joint = mx.concatenate([named[path].reshape(-1) for path in paths])
        self._meet(joint.size)
        total = self._link.exchanged(mx.distributed.all_sum, joint)
        ends = np.cumsum([named[path].size for path in paths])[:-1].tolist()
        parts = dict(zip(paths, mx.split(total, ends), strict=True))
        # Not tree_unflatten, which would leave out what holds no arrays.
        result = tree_map_with_path(lambda path, value: parts[path or ""].reshape(value.shape), tree)
        mx.eval(result)
        return result

    def _meet(self, numbers: int) -> None:
        """Wait for all before a long message, which the system takes for lost where it finds no reader."""
        if self._link is None:
            return
        found = self._link.exchanged(mx.distributed.all_gather, mx.array([numbers], mx.int64))
        if np.any(np.array(found) != numbers):
            raise Refusal(f"The {self.size} ranks add up arrays of different sizes: start them with the same options.")

    def share(self, items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
        """This rank's part of `items`, in their order; parts cost about the same, and one may be empty."""
        return [items[place] for place in shares(costs, self.size)[self.rank]]

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's value on every rank, as JSON gives it back; what the others hand in is not looked at."""
        text = json.dumps(value).encode() if self.is_first else b""
        if self._link is not None:
            (length,) = np.array(self._link.exchanged(mx.distributed.all_sum, mx.array([len(text)], mx.int64)))
            padded = np.frombuffer(text.ljust(length, b"\0"), np.uint8)
            text = bytes(np.array(self._link.exchanged(mx.distributed.all_sum, mx.array(padded))))
        return json.loads(text)

    def any_of(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self._link is None:
            return flag
        return self._link.exchanged(mx.distributed.all_sum, mx.array([flag], mx.int32)).item() != 0

    def agree(self, name: str, value: str) -> None:
        """Raise the same Refusal on every rank where `value`, text or digest of what is called `name`, is not one."""
        if self._link is None:
            return
        own = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        found = np.array(self._link.exchanged(mx.distributed.all_gather, mx.array(own))).reshape(self.size, -1)
        others = [str(rank) for rank in range(self.size) if not np.array_equal(found[rank], found[0])]
        if others:
            ranks = f"Ranks {', '.join(others)} have" if len(others) > 1 else f"Rank {others[0]} has"
            raise Refusal(f"{ranks} not the same {name} as rank 0: give all of them the same, and start them again.")


def joined(patience: float = PATIENCE) -> Group:
    """Meet the other ranks that `mlx.launch` or `mpirun` started, once a process; a process started alone is alone.

    `patience` is the longest wait in seconds for the others in one exchange, after which this process ends with a
    sentence and status 1. Call it in the main thread. While it waits for the others to come, Ctrl-C and a polite kill
    end the process at once. Raises Refusal where they cannot be met.
    """
    if _is_alone():
        return Group()
    with _interruptible():
        try:
            group = mx.distributed.init()
        except (RuntimeError, ValueError) as error:
            raise Refusal(
                f"Rank {os.environ.get('MLX_RANK', '?')} cannot meet the others ({error}): start all of them within "
                "half a minute, with addresses and ports that are free, as mlx.launch does."
            ) from error
    if group.size() == 1:
        _refuse_unmet()
        return Group()
    _keep_alive()
    return Group(group.rank(), group.size(), _Link(group, patience))


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """Places of `costs` for each of `size` ranks, ascending: all of them once, the dearest given first.

    No two parts differ in cost by more than the dearest item (Graham 1969, doi:10.1137/0117039). The same on every
    rank, since it depends on nothing else.
    """
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        lightest = min(range(size), key=lambda rank: (loads[rank], len(parts[rank]), rank))
        parts[lightest].append(place)
        loads[lightest] += costs[place]
    return [sorted(part) for part in parts]


class _Link:
    """MLX's group, the watch over its exchanges, and whether one has failed."""

    def __init__(self, group: mx.distributed.Group, patience: float):
        self.group, self.who = group, f"Rank {group.rank()} of {group.size()}"
        self.watch = _Watch(self.who, patience)
        self.gone: Gone | None = None

    def exchanged(self, operation: Callable[..., mx.array], value: mx.array) -> mx.array:
        """The result of one exchange, evaluated; raises Gone where it fails, and at once in any after that."""
        if self.gone is not None:  # MLX would wait for ever
            raise self.gone
        # By itself, because Metal gives up work of the GPU that waits some five seconds for the network.
        mx.eval(value)
        with self.watch.waiting():
            try:
                result = operation(value, group=self.group)
                mx.eval(result)
            except RuntimeError as error:
                self.gone = Gone(
                    f"{self.who} has lost another one ({error}): see what the one that ended first said, start all of "
                    "them again, and go on with --resume."
                )
                raise self.gone from error
        return result


class _Watch:
    """Ends the process where an exchange never does: until then Python neither raises nor hears a signal."""

    def __init__(self, who: str, patience: float):
        self.who, self.patience = who, patience
        self.since: float | None = None
        self.ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="other ranks", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Watch over what is done in the block."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _watch(self) -> None:
        told: dict[int, list[float]] = {signal.SIGINT: [], signal.SIGTERM: []}
        while True:
            heard = select.select([self.ear], [], [], 0.5)[0]
            for number in os.read(self.ear, 64) if heard else b"":
                told.setdefault(number, []).append(time.monotonic())
            since, now = self.since, time.monotonic()
            if since is None:
                continue
            if now - since > self.patience:
                self._end(1, f"has waited {self.patience / 60:.3g} minutes for another one that is silent")
            if told[signal.SIGTERM] and now - max(since, told[signal.SIGTERM][0]) > _TERM_PATIENCE:
                self._end(1, "was told to end while it waited for another one that is silent")
            if told[signal.SIGINT][1:] and now - max(since, told[signal.SIGINT][1]) > _AGAIN_PATIENCE:
                self._end(130, "was interrupted while it waited for another one")

    def _end(self, status: int, why: str) -> NoReturn:
        """End without a clean-up, which would wait as well."""
        with contextlib.suppress(OSError):
            os.write(2, f"{self.who} {why}: end them all, and go on with --resume.\n".encode())
        os._exit(status)


def _is_alone() -> bool:
    if not os.environ.keys() & {"MLX_RANK", "OMPI_COMM_WORLD_SIZE"}:
        return True
    hosts = Path(os.environ.get("MLX_HOSTFILE", os.devnull))
    return hosts.is_file() and not hosts.read_text().strip()  # `mlx.launch -n 1`


def _refuse_unmet() -> None:
    size = os.environ.get("MLX_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    if size != "1":
        raise Refusal(
            "This process was started as one of several, and MLX knows no way to the others: start them by mlx.launch "
            "with a --backend that this installation of MLX has (ring is always there)."
        )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Give Ctrl-C and a polite kill their plain effect, as MLX keeps Python's lock while it waits in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_alive() -> None:
    """Have the system ask after the machine at the other end of each connection; MLX alone would wait for ever."""
    for name in os.listdir("/dev/fd"):
        try:
            connection = socket.socket(fileno=int(name))
        except OSError:
            continue
        try:
            if connection.family == socket.AF_INET and connection.type == socket.SOCK_STREAM:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option in _KEEP_ALIVE.keys() & vars(socket).keys():
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), _KEEP_ALIVE[option])
        finally:
            connection.detach()  # it is MLX's to close
