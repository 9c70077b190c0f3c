"""Log-probabilities of responses under a model: sums over response tokens, in float32 from the head on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

LOGIT_BYTES = 256 * 2**20  # of float32 logits alive at once


class Rows(NamedTuple):
    """Token sequences side by side, padded on the right, with the places of their responses.

    tokens: (rows, length) int32. places: (responses,) flat positions whose output predicts `targets`.
    targets, row_of: (responses,) int32, the token predicted and the row it belongs to.
    """

    tokens: mx.array
    places: mx.array
    targets: mx.array
    row_of: mx.array


def rows_of(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
    """Lay (prompt, response) token sequences side by side; causal attention keeps padding out of the numbers."""
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int32)
    places, targets, row_of = [], [], []
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens[row, :end] = [*prompt, *response]
        places.append(np.arange(len(prompt), end) - 1 + row * length)
        targets.append(np.asarray(response, dtype=np.int32))
        row_of.append(np.full(len(response), row, dtype=np.int32))
    return Rows(
        mx.array(tokens),
        mx.array(np.concatenate(places).astype(np.int32)),
        mx.array(np.concatenate(targets)),
        mx.array(np.concatenate(row_of)),
    )


class Parts(NamedTuple):
    """A model cut before its head: token ids to hidden states, hidden states to logits."""

    trunk: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]


def parts(model: nn.Module) -> Parts | None:
    """Cut a model before its head, or None where the two halves together do not equal the whole.

    mlx-lm's models mostly are head(trunk(ids)), tied or not; the cut is tried on a few tokens, not assumed. A head
    with an adapter of its own is not cut off: recomputed in chunks it would get no gradient.
    """
    core = model.get("language_model", model)
    if "model" not in core:
        return None
    trunk = core["model"]
    last = core["lm_head"] if "lm_head" in core else trunk.get("embed_tokens", {})
    if "lora_a" in last or not ("lm_head" in core or hasattr(last, "as_linear")):
        return None

    def head(hidden: mx.array) -> mx.array:
        # Looked up each time: another layer may stand in its place by then, as a merged one does.
        return core["lm_head"](hidden) if "lm_head" in core else trunk["embed_tokens"].as_linear(hidden)

    probe = mx.array([[0, 1, 2, 3]])
    whole = model(probe)
    halves = head(trunk(probe))
    if whole.shape != halves.shape or not mx.allclose(whole, halves, rtol=1e-3, atol=1e-3).item():
        return None
    return Parts(trunk, head)


def response_logits(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """Logits at the response positions, (responses, vocabulary), in the model's own type."""
    if cut is None:
        logits = model(rows.tokens)
        return logits.reshape(-1, logits.shape[-1])[rows.places]
    hidden = cut.trunk(rows.tokens)
    return cut.head(hidden.reshape(-1, hidden.shape[-1])[rows.places])


def token_logps(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """log p of each response token, (responses,) float32; `cut` is what `parts(model)` gave.

    Only response positions reach the head. Logits are recomputed in the backward pass where there are many.
    """
    if cut is None:
        return _picked(response_logits(model, rows, cut), rows.targets)
    hidden = cut.trunk(rows.tokens)
    hidden = hidden.reshape(-1, hidden.shape[-1])[rows.places]
    count = rows.places.size
    vocabulary = cut.head(hidden[:1]).shape[-1]  # lazily: the shape alone is asked for, nothing is computed
    step = max(1, LOGIT_BYTES // (4 * vocabulary))

    spans = [slice(start, start + step) for start in range(0, count, step)]
    chunks = [_head_logps(cut.head, rows.targets[span]) for span in spans]
    if len(chunks) > 1:
        chunks = [mx.checkpoint(chunk) for chunk in chunks]
    return mx.concatenate([chunk(hidden[span]) for chunk, span in zip(chunks, spans, strict=True)])


def _head_logps(head: Callable[[mx.array], mx.array], targets: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda hidden: _picked(head(hidden), targets)


def _picked(logits: mx.array, targets: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)


def row_sums(values: mx.array, rows: Rows) -> mx.array:
    """Sums of per-token values over each row, (rows,)."""
    return mx.zeros((rows.tokens.shape[0],), dtype=values.dtype).at[rows.row_of].add(values)


def row_lengths(rows: Rows) -> mx.array:
    """Response tokens in each row, (rows,) float32."""
    return row_sums(mx.ones(rows.targets.shape), rows)
