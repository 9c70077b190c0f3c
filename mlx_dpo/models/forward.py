"""The forward pass of a model over laid-out answers: whatever way is taken, the numbers stay the same."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models import attention, lanes, lower, scoring
from mlx_dpo.models.fused import in_gradients
from mlx_dpo.models.load import blocks
from mlx_dpo.models.lora import scaled_while_small
from mlx_dpo.models.lower import Kept
from mlx_dpo.models.prompts import Taken, fed
from mlx_dpo.models.rows import Block, Rows, Text, rows_of
from mlx_dpo.models.scoring import LOGIT_BYTES, Counted, Parts, parts

States = list[list[mx.array]]  # for each block of rows, what its prompts and pieces begin with above the lowest blocks


@dataclass(frozen=True)
class Forward:
    """A model, cut before its head, and the way it is computed.

    `shares` says that a prompt may be computed once for several answers; the lowest `depth` blocks are computed once
    for all passes and remembered in `kept`, where there is one. `logit_bytes` is the size of a chunk of the head.
    """

    model: nn.Module
    cut: Parts
    shares: bool = False
    depth: int = 0
    kept: Kept | None = None
    logit_bytes: int = LOGIT_BYTES

    @classmethod
    def plain(cls, model: nn.Module) -> "Forward":
        """The whole model at every place, with nothing shared: what every other way has to equal."""
        return cls(model, Parts(model, model, None))

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        """The best way for `model`, each shortcut tried on a few tokens before it is taken."""
        best = cls(model, parts(model))
        for further in ({"shares": True}, {"depth": lower.depth_below(model)}):
            tried = replace(best, **further)
            if same(best, tried, _PROBE):
                best = tried
        return best

    def keeping(self, kept: Kept | None) -> "Forward":
        """The same with a memory for what lies below the adapters, where that pays."""
        return replace(self, kept=kept) if self.depth else self

    def rows_of(self, texts: Sequence[Text]) -> Rows:
        """Texts laid out for this way: prompts are shared where that saves anything."""
        distinct = len({tuple(text[0]) for text in texts})
        return rows_of(texts, shared=self.shares and distinct < len(texts), lanes=lanes.count())

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Wrap what traces and computes this pass, backward included: so the processor is put to full use."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.by_arithmetic(self.model))
            stack.enter_context(scaled_while_small(self.model))
            stack.enter_context(in_gradients())
            stack.enter_context(lanes.open_to_all())
            stack.enter_context(_no_collection())
            yield

    def states(self, rows: Rows) -> States:
        """What the lowest blocks make of the texts, from memory or computed now; empty where none is remembered."""
        if not self.depth:
            return []
        known = {key: self.kept and self.kept.get(key) for text in rows.said for key in lower.keys_of(text)}
        missing = [text for text in rows.said if any(known[key] is None for key in lower.keys_of(text))]
        found = {key: states for key, states in known.items() if states is not None}
        if missing:
            found |= self._below(self.rows_of(missing))
        return [lower.put_together(rows, block, found) for block in rows.blocks]

    def _below(self, rows: Rows) -> dict[bytes, mx.array]:
        with self.at_work(), lower.Reaching(self.model, self.depth) as reaching:
            for number, block in enumerate(rows.blocks):
                with lanes.lane(number):
                    self._outputs(block)
            mx.eval(reaching.states)
        found = lower.taken_apart(rows, reaching.states)
        mx.eval(found)
        if self.kept is not None:
            for key, states in found.items():
                self.kept.put(key, states)
        return found

    def hidden(self, rows: Rows, states: States) -> mx.array:
        """Outputs of the trunk at the scored places, (scored, width): hidden states, or logits of an uncut model."""
        outputs = []
        for number, block in enumerate(rows.blocks):
            with lanes.lane(number):
                outputs += self._outputs(block, states[number] if states else None)
        return mx.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])[rows.places]

    def _outputs(self, block: Block, states: list[mx.array] | None = None) -> list[mx.array]:
        """The trunk's outputs for a block's prompts and pieces, (rows, length, width) each."""
        outputs, given = [], iter(states or [])

        def trunk(tokens: mx.array, caches: list | None) -> mx.array:
            with contextlib.ExitStack() as stack:
                if states is not None:
                    stack.enter_context(lower.handing_on(self.model, self.depth, next(given)))
                return self.cut.trunk(tokens) if caches is None else self.cut.trunk(tokens, cache=caches)

        if block.prompts is None:
            return [trunk(piece.tokens, None) for piece in block.pieces]
        taken = [Taken() for _ in blocks(self.model)]
        outputs.append(trunk(block.prompts, taken))
        for piece in block.pieces:
            outputs.append(trunk(piece.tokens, fed(taken, piece, block)))
        return outputs

    def token_logps(
        self, rows: Rows, states: States | None = None, *, learning: bool = False, squares: bool = False
    ) -> mx.array:
        """log p of each scored token, (1, scored) float32, and with `squares` log Σ p² in a second row.

        Differentiable by the adapter where `learning` says so; `states` are what `states(rows)` gave before.
        """
        how = Counted(learning, squares, self.logit_bytes)
        known = self.states(rows) if states is None else states
        return scoring.token_logps(self.hidden(rows, known), rows.targets, self.cut, how)

    def log_p(self, rows: Rows) -> mx.array:
        """Log-probabilities of every token at the scored places, (scored, vocabulary) float32, computed."""
        with self.at_work():
            found = scoring.log_p(self.hidden(rows, self.states(rows)), self.cut)
            mx.eval(found)
        return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Put off the search for garbage, which a graph of many arrays sets off again and again, until the block ends."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.collect(0)  # what the block itself has left, so that it holds no array any longer
            gc.enable()


_ROUNDING = 1e-3
_PROBE: list[Text] = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [6, 4, 2]), ([7], [1, 2, 3]), ([7], [4])]
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def same(one: Forward, other: Forward, texts: Sequence[Text]) -> bool:
    """Whether two ways give the same log-probabilities of (prompt, answer) texts, but for rounding."""
    try:
        expected, found = (way.token_logps(rows_of(texts, shared=way.shares)) for way in (one, other))
        return bool(mx.allclose(expected, found, rtol=_ROUNDING, atol=_ROUNDING).item())
    except _FAULTS:
        return False
