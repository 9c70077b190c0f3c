"""How much time and memory a model's own chat template may take: it is a program from elsewhere."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS = 10.0
BYTES = 2**31  # beyond what the process has already
_SIZES = Path("/proc/self/statm")


class ExceededError(Exception):
    """The time is over."""


@contextlib.contextmanager
def allowance() -> Iterator[None]:
    """Raise ExceededError or MemoryError in the block once it has taken more.

    Time is watched in the main thread only, which alone gets signals; memory where Linux says how much there is.
    """
    with _watched_time(SECONDS), _watched_memory(BYTES):
        yield


@contextlib.contextmanager
def _watched_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise ExceededError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _watched_memory(more_bytes: int) -> Iterator[None]:
    if not _SIZES.exists():
        yield
        return
    taken = int(_SIZES.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = resource.RLIM_INFINITY
    limit = min([taken + more_bytes] + [value for value in (soft, hard) if value != unlimited])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
