"""Log-probabilities of whole data sets: the reference's, taken once before the first step, and held-out scores."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.data.batches import by_length
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.scoring import Parts, Rows, row_sums, rows_of, token_logps


class PairLogps(NamedTuple):
    """Sums of log p over response tokens, in nats: one number a pair, float32; rejected is empty for SFT."""

    chosen: np.ndarray
    rejected: np.ndarray


class Progress(NamedTuple):
    """How far a pass over the data has come."""

    done: int
    total: int


def pair_rows(pairs: Sequence[TokenisedPair]) -> Rows:
    """The rows of a batch: all chosen answers, then all rejected ones."""
    chosen = [(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.rejected) for pair in pairs if pair.rejected]
    return rows_of(chosen + rejected)


def batch_logps(model: nn.Module, cut: Parts | None, rows: Rows) -> mx.array:
    """Sum of log p of each row's response, (rows,) float32."""
    return row_sums(token_logps(model, rows, cut), rows)


def scored(
    model: nn.Module, cut: Parts | None, pairs: Sequence[TokenisedPair], batch_size: int
) -> Iterator[Progress | PairLogps]:
    """Score all pairs, yielding progress after each batch and the PairLogps at the end."""
    chosen = np.zeros(len(pairs), dtype=np.float32)
    rejected = np.zeros(len(pairs), dtype=np.float32)
    lengths = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
    done = 0
    for batch in by_length(lengths, batch_size):
        logps = np.array(batch_logps(model, cut, pair_rows([pairs[i] for i in batch])))
        chosen[batch] = logps[: len(batch)]
        if len(logps) > len(batch):
            rejected[batch] = logps[len(batch) :]
        mx.clear_cache()
        done += len(batch)
        yield Progress(done, len(pairs))
    yield PairLogps(chosen, rejected if any(p.rejected for p in pairs) else rejected[:0])
