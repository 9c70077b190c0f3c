"""Memory: what a run will take, and the exchange of time for it."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.load import blocks
from mlx_dpo.models.scoring import LOGIT_BYTES
from mlx_dpo.models.sizes import sizes

# How often a block's width, its inner width and its attention scores are kept for the backward pass: measured.
_HIDDEN_COPIES, _INNER_COPIES, _SCORE_COPIES, _LOGIT_COPIES = 8, 5.7, 1.28, 3.6


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing for as long as the block lasts: only the input of each block of `model` is kept.

    Works on the instances, not on their class, so that another model of the same kind is left alone.
    """
    kinds = [type(block) for block in blocks(model)]
    for block, kind in zip(blocks(model), kinds, strict=True):
        block.__class__ = _recomputing(kind)
    try:
        yield
    finally:
        for block, kind in zip(blocks(model), kinds, strict=True):
            block.__class__ = kind


def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outside = self.trainable_parameters()
        high, low = np.array(mx.random.state).ravel().tolist()

        def inner(parameters: dict, *args: Any, **kwargs: Any) -> Any:
            # Dropout has to draw the same the second time, or the gradient belongs to another network.
            mx.random.seed(high << 32 | low)
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)

        result = mx.checkpoint(inner)(outside, *args, **kwargs)
        self.update(outside)
        return result

    return type(kind.__name__, (kind,), {"__call__": call})


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take."""
    return sum(value.nbytes for value in named_arrays(model.parameters()).values())


class Load(NamedTuple):
    """The largest batch of a run: rows, their padded length and response tokens in all."""

    rows: int
    length: int
    responses: int
    rank: int
    grad_checkpoint: bool


def peak_bytes(config: dict[str, Any], weights: int, load: Load, *, on_cpu: bool) -> float:
    """Estimate the peak memory of a training step in bytes, from the model's configuration alone.

    Counts weights, adapter with gradient and two moments, what the backward pass keeps of each block, attention
    probabilities and the logits of one chunk. Fitted to measured peaks; see benchmarks/RESULTS.md.
    """
    hidden, inner, depth, heads, kv_heads, vocabulary = sizes(config)
    is_float32 = (config.get("torch_dtype") or config.get("dtype")) == "float32"
    number = 4 if on_cpu or is_float32 else 2
    if on_cpu:  # nothing is packed there: four bytes a parameter
        block_weights = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads / heads + 3 * hidden * inner
        weights = round(4 * (depth * block_weights + vocabulary * hidden * (1 if _tied(config) else 2)))
    tokens = load.rows * load.length
    block = tokens * (_HIDDEN_COPIES * hidden + _INNER_COPIES * inner) * number
    block += load.rows * heads * load.length**2 * _SCORE_COPIES * number
    kept = depth * tokens * hidden * number + block if load.grad_checkpoint else depth * block
    logits = min(load.responses * vocabulary * 4, LOGIT_BYTES) * _LOGIT_COPIES
    adapter = depth * load.rank * (6 * hidden + 3 * (hidden + inner)) * 16
    return weights + adapter + kept + logits


def _tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["model_type"].startswith(("llama", "gemma"))))
