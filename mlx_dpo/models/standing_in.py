"""A module of a model that is called otherwise for a while: nothing of the architecture is written again."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.nn as nn


@contextlib.contextmanager
def called_as(modules: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Let `call(kind, module, *args, **kwargs)` answer for each of `modules`, of the class `kind`, in this block.

    Works on the instances, not on their class, so that another model of the same kind is left alone.
    """
    kinds = [type(module) for module in modules]
    calling = {kind: _calling(kind, call) for kind in set(kinds)}
    for module, kind in zip(modules, kinds, strict=True):
        module.__class__ = calling[kind]
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind


def _calling(kind: type[nn.Module], call: Callable[..., Any]) -> type[nn.Module]:
    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(kind, self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": answer, "__module__": kind.__module__})
