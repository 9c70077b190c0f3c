"""Parts of a training step that MLX compiles into few passes over their numbers, whatever the step's shape.

`mx.compile` passes over a function that is called while a gradient is being traced, and compiling whole steps costs
more than it saves where nearly every batch has a shape of its own (benchmarks/PROFILE.md). What MLX traces belongs to
a thread: called from another one, the same function is compiled.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_tracing: ContextVar[bool] = ContextVar("_tracing", default=False)


@contextlib.contextmanager
def in_gradients() -> Iterator[None]:
    """Compile what is `fused` also where a gradient is traced in this block; that costs some 50 µs a call."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def fused(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """`function` of arrays alone, compiled. No gradient goes through it: its caller gives one by mx.custom_function."""
    compiled = cast("Callable[_Given, _Found]", mx.compile(function))

    @functools.wraps(function)
    def call(*given: _Given.args, **named: _Given.kwargs) -> _Found:
        if not _tracing.get():
            return compiled(*given, **named)
        stream = mx.default_stream(mx.default_device())

        def there() -> _Found:
            with mx.stream(stream):
                return compiled(*given, **named)

        return _in_another_thread(there)

    return call


def _in_another_thread(work: Callable[[], _Found]) -> _Found:
    # An answer that a Ctrl-C kept from being taken is no later call's.
    reply: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    _orders().put((work, reply))
    found, fault = reply.get()
    if fault is not None:
        raise fault
    return found


@functools.cache
def _orders() -> SimpleQueue[tuple[Callable[[], Any], SimpleQueue]]:
    """Where a thread takes what it is to do, each with the place for what comes of it."""
    orders: SimpleQueue[tuple[Callable[[], Any], SimpleQueue]] = SimpleQueue()

    def work() -> None:
        while True:
            wanted, reply = orders.get()
            try:
                reply.put((wanted(), None))
            except BaseException as fault:
                reply.put((None, fault))

    # It waits for ever and is never joined: a thread that ends takes apart what MLX compiled for it, for which Python
    # may be gone by then.
    threading.Thread(target=work, name="compiled", daemon=True).start()
    return orders
