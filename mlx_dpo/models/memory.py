"""Memory: what a step will take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo.models import lanes
from mlx_dpo.models.attention import scores_of
from mlx_dpo.models.load import on_cpu
from mlx_dpo.models.sizes import Sizes, sizes


class _Copies(NamedTuple):
    """How often a batch's tokens times width, times inner width, and its attention scores are in memory at the peak."""

    hidden: float
    inner: float
    scores: float


# Fitted to the peaks of 99 steps of models of many shapes on two cores; see tests/test_models_memory.py.
_KEPT = _Copies(16.9, 1.0, 1.34)  # by each block for its backward pass
_DROPPED = _Copies(1.5, 3.7, 0.0)  # besides, with dropout, by each block
_AGAIN = _Copies(19.2, 5.9, 3.0)  # by one block while its forward pass is repeated and taken back
_PROMPTS = 2.9  # of the keys, and as often of the values, of shared prompts, by each block that is recomputed
_FIRST_CHUNK, _OTHER_CHUNKS = 7.8, 9.1  # of the head's logits: the first lane's chunk, the other lanes'


class Adapting(NamedTuple):
    """What learns: LoRA of this rank in so many blocks from the top (None: all), and whether with dropout."""

    rank: int
    layers: int | None = None
    dropout: bool = False


class Load(NamedTuple):
    """A batch as it is computed: tokens in all, attention scores a head, tokens of shared prompts, scored tokens."""

    tokens: int
    scores: int
    prompts: int
    responses: int

    @classmethod
    def of(cls, texts: Sequence[Any], *, shared: bool) -> "Load":
        """The load of examples with a prompt and one or two answers (`prompt`, `chosen`, `rejected`)."""
        total = np.zeros(4, dtype=int)
        for text in texts:
            prompt, answers = len(text.prompt), [len(a) for a in (text.chosen, text.rejected) if a]
            once = shared and len(answers) > 1
            rows = [(a, prompt) for a in answers] + [(prompt, 0)] if once else [(prompt + a, 0) for a in answers]
            scores = sum(scores_of(length, before) for length, before in rows)
            total += (sum(length for length, _ in rows), scores, prompt * once, sum(answers))
        return cls(*total.tolist())


def peak_bytes(
    config: dict[str, Any], weights: int, load: Load, adapting: Adapting, recompute: bool, logit_bytes: int
) -> float:
    """Estimate the peak memory of a training step in bytes, from the model's configuration alone.

    Counts weights, adapter with gradient and two moments, and what the backward pass keeps: of every adapted block,
    with chunks of the head; or, with recomputed blocks, their inputs and the larger of one block and those chunks.
    """
    size = sizes(config)
    is_float32 = (config.get("torch_dtype") or config.get("dtype")) == "float32"
    number = 4 if on_cpu() or is_float32 else 2
    if on_cpu():  # nothing is packed there: four bytes a parameter
        weights = 4 * _parameters(size, tied=_tied(config))
    learning = min(adapting.layers or size.layers, size.layers)
    adapter = learning * adapting.rank * (6 * size.hidden + 3 * (size.hidden + size.inner)) * 16
    head = _head_bytes(4 * load.responses * size.vocabulary, logit_bytes)
    if recompute:
        inputs = learning * (load.tokens * size.hidden + _PROMPTS * load.prompts * size.kv_width)
        return weights + adapter + number * inputs + max(number * _floats(size, load, adapting, _AGAIN), head)
    return weights + adapter + learning * number * _floats(size, load, adapting, _KEPT) + head


def _floats(size: Sizes, load: Load, adapting: Adapting, copies: _Copies) -> float:
    if adapting.dropout:
        copies = _Copies(*(a + b for a, b in zip(copies, _DROPPED, strict=True)))
    wide = load.tokens * (copies.hidden * size.hidden + copies.inner * size.inner)
    return wide + size.heads * load.scores * copies.scores


def _head_bytes(logits: float, chunk: int) -> float:
    others = min(max(0.0, logits - chunk), chunk * (lanes.count() - 1))
    return _FIRST_CHUNK * min(logits, chunk) + _OTHER_CHUNKS * others


def _parameters(size: Sizes, *, tied: bool) -> int:
    attention = 2 * size.hidden * size.hidden * (size.heads + size.kv_heads) // size.heads
    block = attention + 3 * size.hidden * size.inner
    return size.layers * block + size.vocabulary * size.hidden * (1 if tied else 2)


def _tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["model_type"].startswith(("llama", "gemma"))))
