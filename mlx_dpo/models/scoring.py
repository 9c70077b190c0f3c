"""Log-probabilities from hidden states: in float32 from the head on, in chunks, and no logits are kept.

The gradient of log p with respect to its hidden state is (1[target] - p) through the head; it is found while the
logits are there anyway, so that the backward pass is one multiplication.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.models import lanes
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.exponentials import exp
from mlx_dpo.models.load import blocks, on_cpu
from mlx_dpo.models.lora import adapted_layers
from mlx_dpo.models.recomputing import computed_again
from mlx_dpo.models.standing_in import called_as

# Of float32 logits alive at once: small chunks stay in a processor's cache, a GPU wants more rows a product.
LOGIT_BYTES = 2**24 if on_cpu() else 2**27


class Parts(NamedTuple):
    """A model cut before its head: token ids to hidden states, hidden states (places, width) to logits.

    `head` is None where the model cannot be cut; the trunk is then all of it, and gives logits.
    """

    model: nn.Module
    trunk: nn.Module
    head: Callable[[mx.array], mx.array] | None

    @property
    def head_learns(self) -> bool:
        """Whether there is an adapter outside of the blocks, as on the head or on the embedding tied to it."""
        inside = {id(module) for block in blocks(self.model) for module in block.modules()}
        return any(id(layer) not in inside for layer in adapted_layers(self.model).values())


def parts(model: nn.Module) -> Parts:
    """Cut a model before its head, which is then the model itself with its trunk standing aside.

    So scaled and capped logits are the model's own doing. The cut is tried on a few tokens, not assumed. It holds as
    well for the same model with other layers in some places: merged ones, or its adapters switched off or on.
    """
    core = model.get("language_model", model)
    whole = Parts(model, model, None)
    trunk = core.get("model")
    if not isinstance(trunk, nn.Module):
        return whole

    def head(hidden: mx.array) -> mx.array:
        with called_as([trunk], lambda *_, **__: hidden[None]):
            return model(mx.zeros((1, hidden.shape[0]), dtype=mx.int32))[0]

    probe = mx.array([[0, 1, 2, 3]])
    try:
        expected, halves = model(probe)[0], head(trunk(probe)[0])
        fits = expected.shape == halves.shape and mx.allclose(expected, halves, rtol=1e-3, atol=1e-3).item()
    except (AttributeError, TypeError, ValueError, IndexError):
        return whole
    return Parts(model, trunk, head) if fits else whole


class Counted(NamedTuple):
    """How log-probabilities are wanted: with a gradient, with log Σ p² beside, in chunks of so many bytes of logits."""

    learning: bool
    squares: bool = False
    logit_bytes: int = LOGIT_BYTES


def log_p(hidden: mx.array, cut: Parts) -> mx.array:
    """Log-probabilities of every token after each hidden state, (places, vocabulary) float32."""
    logits = (hidden if cut.head is None else cut.head(hidden)).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def token_logps(hidden: mx.array, targets: mx.array, cut: Parts, how: Counted) -> mx.array:
    """log p of the tokens `targets` after their hidden states, and perhaps log Σ p², (1 or 2, places) float32.

    The first row is differentiable where that is asked for, the second never. hidden: (places, width).
    """
    # Lazily: the shape alone is asked for, nothing is computed.
    vocabulary = (hidden if cut.head is None else cut.head(hidden[:1])).shape[-1]
    step = max(1, how.logit_bytes // (4 * vocabulary))
    spans = [slice(start, start + step) for start in range(0, targets.size, step)]
    found = []
    for place, span in enumerate(spans):
        with lanes.lane(place):
            given = hidden[span]
            if place >= lanes.count():
                given = mx.depends([given], [found[place - lanes.count()]])[0]
            found.append(_numbers(cut, how.learning)(given, targets[span], how.squares))
    return mx.concatenate(found, axis=-1)


_Head = Callable[[mx.array], mx.array]
_Numbers = Callable[[mx.array, mx.array, bool], mx.array]  # (places, width) and (places,) targets to (1 or 2, places)


def _numbers(cut: Parts, learning: bool) -> _Numbers:
    if cut.head is None:
        return _plain
    if not learning:
        return _no_slopes(cut.head)
    return _learning_head(cut.model, cut.head) if cut.head_learns else _slopes(cut.head)


def _plain(logits: mx.array, targets: mx.array, squares: bool) -> mx.array:
    """Of logits, differentiable by MLX itself."""
    logits = logits.astype(mx.float32)
    normaliser = mx.logsumexp(logits, axis=-1)
    found = [mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - normaliser]
    if squares:
        found.append(mx.stop_gradient(mx.logsumexp(2 * logits, axis=-1) - 2 * normaliser))
    return mx.stack(found)


class _Shares(NamedTuple):
    """Softmax of logits before it is divided: e^(logit - highest), its sums, and log p of the targets."""

    powers: mx.array
    totals: mx.array
    logps: mx.array

    def stacked(self, squares: bool) -> mx.array:
        if not squares:
            return self.logps[None]
        return mx.stack([self.logps, mx.log(self.powers.square().sum(axis=-1)) - 2 * mx.log(self.totals[:, 0])])


def _shares(logits: mx.array, targets: mx.array) -> _Shares:
    logits = logits.astype(mx.float32)
    highest = logits.max(axis=-1, keepdims=True)
    powers = exp(logits - highest)
    totals = powers.sum(axis=-1, keepdims=True)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return _Shares(powers, totals, (picked - highest - mx.log(totals))[:, 0])


def _no_slopes(head: _Head) -> _Numbers:
    return lambda hidden, targets, squares: _shares(head(hidden), targets).stacked(squares)


def _learning_head(model: nn.Module, head: _Head) -> _Numbers:
    """With a head that has an adapter: its logits are computed again in the backward pass."""
    outside = model.trainable_parameters()
    names = list(named_arrays(outside))

    def numbers(hidden: mx.array, targets: mx.array, squares: bool) -> mx.array:
        def inner(arrays: Sequence[mx.array]) -> list[mx.array]:
            model.update(tree_unflatten(list(zip(names, arrays[1:], strict=True))))
            return [_plain(head(arrays[0]), targets, squares)]

        (found,) = computed_again(inner)([hidden, *named_arrays(outside).values()])
        model.update(outside)
        return found

    return numbers


def _slopes(head: _Head) -> _Numbers:
    """With a frozen head: the gradient by each hidden state is found at once and kept in place of the logits."""
    stream = mx.default_stream(mx.default_device())

    def numbers(hidden: mx.array, targets: mx.array, squares: bool) -> mx.array:
        @mx.custom_function
        def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
            logits = head(hidden)
            shares = _shares(logits, targets)
            residual = shares.powers * (-1 / shares.totals)
            residual = residual.at[mx.arange(targets.size), targets].add(1.0)
            _, (slopes,) = mx.vjp(head, [hidden], [residual.astype(logits.dtype)])
            return mx.depends([shares.stacked(squares)], [slopes])[0], slopes

        @forward.vjp
        def backward(_: Any, cotangents: Any, outputs: Any) -> mx.array:
            with mx.stream(stream):
                return cotangents[0][0][:, None].astype(outputs[1].dtype) * outputs[1]

        return cast("tuple[mx.array, mx.array]", forward(hidden))[0]

    return numbers
