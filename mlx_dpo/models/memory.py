"""Memory: what a run will take, and the exchange of time for it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.models import lanes
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.load import blocks, on_cpu
from mlx_dpo.models.prompts import Fed, Taken
from mlx_dpo.models.sizes import Sizes, sizes
from mlx_dpo.models.standing_in import called_as

# Fitted to measured peaks, which the sum below meets within a quarter; see tests/test_models_memory.py.
_CHUNK_COPIES = 3.0


class _Copies(NamedTuple):
    """How often a block's width, inner width and attention scores are in memory at the peak."""

    hidden: float
    inner: float
    scores: float


_KEPT = _Copies(10.4, 5.6, 1.3)  # by each block for its backward pass
_RECOMPUTED = _Copies(10.0, 20.0, 3.0)  # by one block while its forward pass is repeated and taken back
_DROPPED = _Copies(8.0, 1.3, 0.0)  # besides, with dropout, by each block


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing for as long as the block lasts: only the input of each block of `model` is kept.

    With it, where a prompt is shared, its keys and values: they go through the recomputed function as inputs and
    outputs, since what it did to a cache beside would have no gradient.
    """
    with called_as(blocks(model), _recomputed):
        yield


def _recomputed(kind: type[nn.Module], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    outside = block.trainable_parameters()
    caches = [given for given in (*args, *kwargs.values()) if isinstance(given, Taken | Fed)]
    before = [cache.arrays for cache in caches]
    stream = mx.default_stream(mx.default_device())
    high, low = np.array(mx.random.state).ravel().tolist()

    def inner(parameters: dict, arrays: list, *args: Any, **kwargs: Any) -> Any:
        # Dropout has to draw the same the second time, or the gradient belongs to another network.
        mx.random.seed(high << 32 | low)
        block.update(parameters)
        for cache, given in zip(caches, arrays, strict=True):
            cache.arrays = tuple(given)
        with mx.stream(stream):
            result = kind.__call__(block, *args, **kwargs)
        return result, [cache.kept for cache in caches]

    result, kept = mx.checkpoint(inner)(outside, before, *args, **kwargs)
    block.update(outside)
    for cache, given, taken in zip(caches, before, kept, strict=True):
        cache.arrays, cache.kept = given, tuple(taken)
    return result


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take."""
    return sum(value.nbytes for value in named_arrays(model.parameters()).values())


class Adapting(NamedTuple):
    """What learns: LoRA of this rank in so many blocks from the top (None: all), and whether with dropout."""

    rank: int
    layers: int | None = None
    dropout: bool = False


class Load(NamedTuple):
    """A batch as it is computed: tokens in all, the most in one piece, attention scores a head, scored tokens."""

    tokens: int
    piece: int
    scores: int
    piece_scores: int
    prompts: int
    responses: int

    @classmethod
    def of(cls, texts: Sequence[Any], *, shared: bool) -> "Load":
        """The load of examples with a prompt and one or two answers (`prompt`, `chosen`, `rejected`)."""
        pieces, tokens, scores, prompts, responses = [], 0, 0, 0, 0
        for text in texts:
            prompt, answers = len(text.prompt), [len(a) for a in (text.chosen, text.rejected) if a]
            once = shared and len(answers) > 1
            rows = [(a, prompt + a) for a in answers] if once else [(prompt + a, prompt + a) for a in answers]
            if once:
                rows.append((prompt, prompt))
                prompts += prompt
            tokens += sum(row for row, _ in rows)
            scores += sum(row * seen for row, seen in rows)
            responses += sum(answers)
            pieces += [(row, row * seen) for row, seen in rows]
        return cls(tokens, max(t for t, _ in pieces), scores, max(s for _, s in pieces), prompts, responses)


def peak_bytes(
    config: dict[str, Any], weights: int, load: Load, adapting: Adapting, recompute: bool, logit_bytes: int
) -> float:
    """Estimate the peak memory of a training step in bytes, from the model's configuration alone.

    Counts weights, adapter with gradient and two moments, and what the backward pass keeps: of every adapted block;
    or, with recomputed blocks, their inputs and what one piece of text leaves while its block is computed again.
    """
    size = sizes(config)
    is_float32 = (config.get("torch_dtype") or config.get("dtype")) == "float32"
    number = 4 if on_cpu() or is_float32 else 2
    if on_cpu():  # nothing is packed there: four bytes a parameter
        weights = 4 * _parameters(size, tied=_tied(config))
    learning = min(adapting.layers or size.layers, size.layers)
    adapter = learning * adapting.rank * (6 * size.hidden + 3 * (size.hidden + size.inner)) * 16
    chunk = min(load.responses * size.vocabulary * 4, logit_bytes * lanes.count()) * _CHUNK_COPIES
    if recompute:
        inputs = learning * number * (load.tokens * size.hidden + 2 * load.prompts * size.kv_width)
        again = min(lanes.count(), 2) * number * _kept(size, load.piece, load.piece_scores, adapting, _RECOMPUTED)
        return weights + adapter + inputs + max(again, chunk)
    kept = learning * number * _kept(size, load.tokens, load.scores, adapting, _KEPT)
    return weights + adapter + kept + chunk


def _kept(size: Sizes, tokens: int, scores: int, adapting: Adapting, copies: _Copies) -> float:
    if adapting.dropout:
        copies = _Copies(*(a + b for a, b in zip(copies, _DROPPED, strict=True)))
    wide = tokens * (copies.hidden * size.hidden + copies.inner * size.inner)
    return wide + size.heads * scores * copies.scores


def _parameters(size: Sizes, *, tied: bool) -> int:
    attention = 2 * size.hidden * size.hidden * (size.heads + size.kv_heads) // size.heads
    block = attention + 3 * size.hidden * size.inner
    return size.layers * block + size.vocabulary * size.hidden * (1 if tied else 2)


def _tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["model_type"].startswith(("llama", "gemma"))))
