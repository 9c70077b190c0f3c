"""Lanes: on the CPU, where MLX works on one core but for matrix products, a stream of work for every core.

Each lane's products then run on its own core alone, which together is as fast, and so do all other operations at last.
On a GPU there is one lane.
"""

import contextlib
import functools
from collections.abc import Iterator

import mlx.core as mx

from mlx_dpo import machine
from mlx_dpo.models.load import on_cpu


@functools.cache
def _streams() -> list[mx.Stream]:
    extra = machine.cores() - 1
    return [mx.default_stream(mx.cpu), *(mx.new_stream(mx.cpu) for _ in range(extra))]


def count() -> int:
    """How many lanes there are on the device in use."""
    return machine.cores() if on_cpu() and machine.can_split_products() else 1


def open_to_all() -> contextlib.AbstractContextManager[None]:
    """Leave each lane's products to its own core in this block, in which what the lanes do has to be computed."""
    return machine.products_on_one_core() if count() > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def lane(number: int) -> Iterator[None]:
    """Let what is asked for in this block be computed in lane `number`, counted around."""
    if count() == 1:
        yield
    else:
        with mx.stream(_streams()[number % count()]):
            yield
