"""Log-probabilities of responses under a model: sums over response tokens, in float32 from the head on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

LOGIT_BYTES = 256 * 2**20  # of float32 logits alive at once


class Rows(NamedTuple):
    """Token sequences side by side, padded on the right, with the places of their responses.

    tokens: (rows, length) int32. places: (responses,) flat positions whose output predicts `targets`.
    targets, row_of, ordinals: (responses,) int32, the token predicted, the row it belongs to and its number in that
    row's response, from 0.
    """

    tokens: mx.array
    places: mx.array
    targets: mx.array
    row_of: mx.array
    ordinals: mx.array


def rows_of(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
    """Lay (prompt, response) token sequences side by side; causal attention keeps padding out of the numbers."""
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    tokens = np.zeros((len(sequences), length), dtype=np.int32)
    places, targets, row_of, ordinals = [], [], [], []
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens[row, :end] = [*prompt, *response]
        places.append(np.arange(len(prompt), end) - 1 + row * length)
        targets.append(np.asarray(response, dtype=np.int32))
        row_of.append(np.full(len(response), row, dtype=np.int32))
        ordinals.append(np.arange(len(response), dtype=np.int32))
    return Rows(
        mx.array(tokens),
        *(mx.array(np.concatenate(part).astype(np.int32)) for part in (places, targets, row_of, ordinals)),
    )


class Parts(NamedTuple):
    """A model cut before its head: token ids to hidden states, hidden states to logits.

    `head_learns` says whether the head has an adapter, which recomputed in chunks would get no gradient.
    """

    trunk: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]
    head_learns: Callable[[], bool]


def parts(model: nn.Module) -> Parts | None:
    """Cut a model before its head, or None where the two halves together do not equal the whole.

    mlx-lm's models mostly are head(trunk(ids)), tied or not; the cut is tried on a few tokens, not assumed. It holds
    as well for the same model with other layers in some places: merged ones, or its adapters switched off or on.
    """
    core = model.get("language_model", model)
    if "model" not in core:
        return None
    trunk = core["model"]
    untied = "lm_head" in core
    if not untied and not hasattr(trunk.get("embed_tokens"), "as_linear"):
        return None

    def last() -> Any:  # looked up each time: another layer may stand in its place by then
        return core["lm_head"] if untied else trunk["embed_tokens"]

    def head(hidden: mx.array) -> mx.array:
        return last()(hidden) if untied else last().as_linear(hidden)

    probe = mx.array([[0, 1, 2, 3]])
    whole = model(probe)
    halves = head(trunk(probe))
    if whole.shape != halves.shape or not mx.allclose(whole, halves, rtol=1e-3, atol=1e-3).item():
        return None
    return Parts(trunk, head, lambda: "lora_a" in last())


def response_logits(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """Logits at the response positions, (responses, vocabulary), in the model's own type."""
    if cut is None:
        logits = model(rows.tokens)
        return logits.reshape(-1, logits.shape[-1])[rows.places]
    hidden = cut.trunk(rows.tokens)
    return cut.head(hidden.reshape(-1, hidden.shape[-1])[rows.places])


def response_log_p(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """Log-probabilities of every token at the response positions, (responses, vocabulary) float32, computed."""
    logits = response_logits(model, rows, cut).astype(mx.float32)
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(log_p)
    return log_p


def token_logps(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """log p of each response token, (responses,) float32; `cut` is what `parts(model)` gave.

    Only response positions reach the head. Logits are recomputed in the backward pass where there are many.
    """
    return _of_tokens(_picked, model, rows, cut)


def token_logps_and_squares(model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    """log p of each response token, and log Σ p² over the vocabulary at its place, (2, responses) float32."""
    return _of_tokens(_picked_with_squares, model, rows, cut)


_Head = Callable[[mx.array], mx.array]
_Numbers = Callable[[mx.array, mx.array], mx.array]  # (places, vocabulary) logits and (places,) targets to (…, places)


def _of_tokens(numbers: _Numbers, model: nn.Module, rows: Rows, cut: Parts | None) -> mx.array:
    if cut is None:
        return numbers(response_logits(model, rows, cut), rows.targets)
    hidden = cut.trunk(rows.tokens)
    hidden = hidden.reshape(-1, hidden.shape[-1])[rows.places]
    count = rows.places.size
    vocabulary = cut.head(hidden[:1]).shape[-1]  # lazily: the shape alone is asked for, nothing is computed
    step = max(1, LOGIT_BYTES // (4 * vocabulary))

    spans = [slice(start, start + step) for start in range(0, count, step)]
    chunks = [_after_head(cut.head, numbers, rows.targets[span]) for span in spans]
    if len(chunks) > 1 and not cut.head_learns():
        chunks = [mx.checkpoint(chunk) for chunk in chunks]
    return mx.concatenate([chunk(hidden[span]) for chunk, span in zip(chunks, spans, strict=True)], axis=-1)


def _after_head(head: _Head, numbers: _Numbers, targets: mx.array) -> _Head:
    return lambda hidden: numbers(head(hidden), targets)


def _picked(logits: mx.array, targets: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)


def _picked_with_squares(logits: mx.array, targets: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    squares = mx.logsumexp(2 * logits, axis=-1) - 2 * mx.logsumexp(logits, axis=-1)
    return mx.stack([_picked(logits, targets), squares])


def row_sums(values: mx.array, rows: Rows) -> mx.array:
    """Sums of per-token values over each row, (rows,)."""
    return mx.zeros((rows.tokens.shape[0],), dtype=values.dtype).at[rows.row_of].add(values)
