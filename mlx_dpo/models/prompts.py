"""Prompts computed once: their keys and values, taken up in one pass and fed to the answers in the next.

Both kinds stand where mlx-lm's models expect a cache, so that no architecture is touched; nothing is written into
them but by the model's own pass, and gradients flow through both.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_dpo.models.rows import Block, Piece


class Taken:
    """Stands in for one layer's cache while prompts are computed, and keeps their keys and values."""

    offset = 0

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self.arrays: tuple[mx.array, ...] = ()  # what the layer is given, of which prompts need nothing
        self.kept: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep what is given, (rows, heads, length, width) each."""
        self.kept = (keys, values)
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask that a model makes without a cache."""
        if length == 1:
            return None
        if return_array or (window_size and length > window_size):
            return create_causal_mask(length, window_size=window_size)
        return "causal"


class Fed:
    """Stands in for one layer's cache while answers are computed: each row goes on from its prompt."""

    def __init__(self, kept: Sequence[mx.array], lengths: mx.array, longest: int):
        """Take the keys and values of the rows' prompts, padded to `longest`, and their lengths, (rows,) int32."""
        self.arrays, self.longest = tuple(kept), longest
        self.kept: tuple[mx.array, ...] = ()
        self.offset = lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prompts' keys and values, then the answers' own."""
        before = self.arrays
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """What each place of an answer sees, (rows, 1, length, prompt + length) bool: padding is in no window."""
        prompt, ends = self.longest, self.offset[:, None, None, None]
        seen = mx.arange(prompt)[None, None, None, :]
        own = mx.arange(length)
        causal = own[:, None] >= own[None, :]
        padding = mx.broadcast_to(seen < ends, (ends.shape[0], 1, length, prompt))
        if window_size:
            padding = padding & (ends + own[None, None, :, None] < seen + window_size)
            causal = causal & (own[:, None] < own[None, :] + window_size)
        causal = mx.broadcast_to(causal[None, None], (ends.shape[0], 1, length, length))
        return mx.concatenate([padding, causal], axis=-1)


def fed(taken: Sequence[Taken], piece: Piece, block: Block) -> list[Fed]:
    """A cache a layer for a piece of answers, from what the layers took up of the block's prompts."""
    if block.prompts is None or block.lengths is None or piece.prompt_of is None:
        raise ValueError("these rows hold their prompts themselves")
    of, longest = piece.prompt_of, block.prompts.shape[1]
    return [Fed([array[of] for array in layer.kept], block.lengths[of], longest) for layer in taken]
