"""The key-value cache of a conversation, and the tokens that it truly holds."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.models.cache import (
    CacheList,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

# Kinds that hold every token up to their offset, so that cutting the end off leaves exactly the beginning.
# Others (recurrent states, chunks that drop their front) may only grow.
_EXACT = (KVCache, QuantizedKVCache, ConcatenateKVCache)


class Reuse(NamedTuple):
    """How many tokens of a prompt need no computing, and whether a known beginning was given up."""

    tokens: int
    restarted: bool


class TrackedCache:
    """mlx-lm's cache layers together with the tokens in them, kept in step."""

    def __init__(self, model: nn.Module) -> None:
        """Start empty, with the layers that `model` asks for."""
        self._model = model
        self.layers: list[Any] = make_prompt_cache(model)
        self.tokens: list[int] = []

    def reuse(self, ids: Sequence[int]) -> Reuse:
        """Cut the cache back to the longest beginning of `ids` that it holds.

        At least one token is left to compute. Where the layers cannot be cut back exactly (a sliding
        window that has wrapped), starts anew.
        """
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, ids, strict=False)))
        same = min(same, len(ids) - 1)
        surplus = len(self.tokens) - same
        if not self._in_step() or (surplus and not all(map(_can_be_cut, self.layers))):
            self.drop()
            return Reuse(0, restarted=same > 0)
        if surplus:
            for layer in self.layers:
                layer.trim(surplus)
            del self.tokens[same:]
        if not self._in_step():
            self.drop()
            return Reuse(0, restarted=True)
        return Reuse(same, restarted=False)

    def drop(self) -> None:
        """Empty the cache."""
        self.layers = make_prompt_cache(self._model)
        self.tokens = []

    def _in_step(self) -> bool:
        return all(offset == len(self.tokens) for layer in self.layers for offset in _offsets(layer))


def _offsets(layer: Any) -> list[int]:
    if isinstance(layer, CacheList):
        return [offset for part in layer.caches for offset in _offsets(part)]
    offset = getattr(layer, "offset", None)
    return [offset] if isinstance(offset, int) else []


def _can_be_cut(layer: Any) -> bool:
    if isinstance(layer, CacheList):
        return all(map(_can_be_cut, layer.caches))
    return type(layer) in _EXACT or (type(layer) is RotatingKVCache and layer.is_trimmable())
