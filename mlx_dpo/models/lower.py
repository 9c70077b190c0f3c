"""What lies below the lowest adapter: the same for policy and reference, computed once and kept.

Those blocks are the model's own, called as usual; for the rest of the pass they hand on what was kept.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.models.load import blocks
from mlx_dpo.models.lora import adapted_layers
from mlx_dpo.models.rows import Block, Rows, Said
from mlx_dpo.models.standing_in import called_as


def depth_below(model: nn.Module) -> int:
    """How many blocks lie below the lowest adapter; 0 where one sits outside of the blocks."""
    inside = [{id(module) for module in block.modules()} for block in blocks(model)]
    lowest = len(inside)
    for layer in adapted_layers(model).values():
        lowest = min(lowest, next((place for place, ids in enumerate(inside) if id(layer) in ids), 0))
    return lowest if adapted_layers(model) else 0


def handing_on(model: nn.Module, depth: int, states: mx.array) -> Any:
    """Let the lowest `depth` blocks of `model` answer with `states`, (rows, length, width), in a block."""
    return called_as(blocks(model)[:depth], lambda *_, **__: states)


class Reaching:
    """Takes up what reaches the block above the lowest `depth` ones, and computes nothing from there on."""

    def __init__(self, model: nn.Module, depth: int):
        """Nothing has been reached yet."""
        self.model, self.depth = model, depth
        self.states: list[mx.array] = []

    def __enter__(self) -> "Reaching":
        """Stop the model below the adapters."""
        above = blocks(self.model)[self.depth :]
        self._way = called_as(above, lambda kind, block, states, *_, **__: self._reached(block is above[0], states))
        self._way.__enter__()
        return self

    def _reached(self, first: bool, states: mx.array) -> mx.array:
        if first:
            self.states.append(states)
        return states

    def __exit__(self, *fault: Any) -> None:
        """Let it go on."""
        self._way.__exit__(*fault)


class Kept:
    """Hidden states by the tokens that they belong to, in a file without a name, up to so many bytes.

    The file goes when it is closed or the process ends: what is in it could be read back into words.
    """

    def __init__(self, folder: Path, limit: float):
        """Keep up to `limit` bytes in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.limit, self.end = tempfile.TemporaryFile(dir=folder), limit, 0  # noqa: SIM115 (open as long as this is)
        self.places: dict[bytes, tuple[int, tuple[int, ...], mx.Dtype]] = {}

    def close(self) -> None:
        """Forget all of it."""
        self.file.close()

    def put(self, key: bytes, states: mx.array) -> None:
        """Keep (tokens, width) states, if there is room."""
        if key in self.places or self.end + states.nbytes > self.limit:
            return
        try:
            written = os.pwrite(self.file.fileno(), np.array(mx.contiguous(states).view(mx.uint8)).data, self.end)
        except OSError:
            written = -1
        if written < states.nbytes:  # the disk is full: what is there still serves
            self.limit = 0
            return
        self.places[key] = (self.end, states.shape, states.dtype)
        self.end += states.nbytes

    def get(self, key: bytes) -> mx.array | None:
        """The states kept under `key`, or None."""
        if key not in self.places:
            return None
        start, shape, dtype = self.places[key]
        size = shape[0] * shape[1] * dtype.size
        try:
            raw = np.frombuffer(os.pread(self.file.fileno(), size, start), dtype=np.uint8)
        except OSError:
            return None
        return mx.array(raw.reshape(shape[0], shape[1] * dtype.size)).view(dtype) if len(raw) == size else None


def keys_of(text: Said) -> tuple[bytes, bytes]:
    """The names of a text's two parts: its prompt, and its answer after that prompt."""
    prompt = hashlib.blake2b(np.array(text.prompt, dtype=np.int32).tobytes(), digest_size=16)
    answer = prompt.copy()
    answer.update(b"answer")
    answer.update(np.array(text.answer, dtype=np.int32).tobytes())
    return prompt.digest(), answer.digest()


def taken_apart(rows: Rows, reached: Sequence[mx.array]) -> dict[bytes, mx.array]:
    """States by name, (tokens, width) each, from what was reached of each block's prompts and pieces in turn."""
    found, given = {}, iter(reached)
    for block in rows.blocks:
        if block.prompts is not None:
            states = next(given)
            for row, number in enumerate(block.prompt_texts):
                found[keys_of(rows.said[number])[0]] = states[row, : len(rows.said[number].prompt)]
        for piece in block.pieces:
            states = next(given)
            for row, number in enumerate(piece.texts):
                text, start = rows.said[number], 0
                if block.prompts is None:
                    start = len(text.prompt)
                    found[keys_of(text)[0]] = states[row, :start]
                found[keys_of(text)[1]] = states[row, start : start + len(text.answer) - 1]
    return found


def put_together(rows: Rows, block: Block, known: dict[bytes, mx.array]) -> list[mx.array]:
    """States as a block's prompts and pieces take them, (rows, length, width) each, padded with zeros."""
    laid = []
    if block.prompts is not None:
        prompts = [known[keys_of(rows.said[number])[0]] for number in block.prompt_texts]
        laid.append(_padded(prompts, block.prompts.shape[1]))
    for piece in block.pieces:
        keys = [keys_of(rows.said[number]) for number in piece.texts]
        whole = block.prompts is None
        parts = [mx.concatenate([known[a], known[b]]) if whole else known[b] for a, b in keys]
        laid.append(_padded(parts, piece.tokens.shape[1]))
    return laid


def _padded(parts: list[mx.array], length: int) -> mx.array:
    return mx.stack([mx.pad(part, [(0, length - part.shape[0]), (0, 0)]) for part in parts])
