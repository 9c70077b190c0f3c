"""The forward pass of a model over laid-out answers: whatever way is taken, the numbers stay the same."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models import exponentials, lanes, scoring
from mlx_dpo.models.load import blocks
from mlx_dpo.models.prompts import Taken, fed
from mlx_dpo.models.rows import Block, Rows, Text, rows_of
from mlx_dpo.models.scoring import LOGIT_BYTES, Counted, Parts, parts


@dataclass(frozen=True)
class Forward:
    """A model, cut before its head, and the way it is computed.

    `shares` says that a prompt may be computed once for several answers; `logit_bytes` is the size of a chunk of the
    head.
    """

    model: nn.Module
    cut: Parts
    shares: bool = False
    logit_bytes: int = LOGIT_BYTES

    @classmethod
    def plain(cls, model: nn.Module) -> "Forward":
        """The whole model at every place, with nothing shared: what every other way has to equal."""
        return cls(model, Parts(model, model, None))

    @classmethod
    def of(cls, model: nn.Module) -> "Forward":
        """The best way for `model`, each shortcut tried on a few tokens before it is taken."""
        cut = parts(model)
        ways = (cls(model, cut, shares=True), cls(model, cut))
        return ways[0] if same(*ways, _PROBE) else ways[1]

    def rows_of(self, texts: Sequence[Text]) -> Rows:
        """Texts laid out for this way: prompts are shared where that saves anything."""
        distinct = len({tuple(text[0]) for text in texts})
        return rows_of(texts, shared=self.shares and distinct < len(texts), lanes=lanes.count())

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Wrap what traces and computes this pass, backward included: so the processor is put to full use."""
        with exponentials.by_arithmetic(self.model), lanes.open_to_all():
            yield

    def hidden(self, rows: Rows) -> mx.array:
        """Outputs of the trunk at the scored places, (scored, width): hidden states, or logits of an uncut model."""
        outputs = []
        for number, block in enumerate(rows.blocks):
            with lanes.lane(number):
                outputs += self._outputs(block)
        return mx.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])[rows.places]

    def _outputs(self, block: Block) -> list[mx.array]:
        outputs, taken = [], []
        if block.prompts is not None:
            taken = [Taken() for _ in blocks(self.model)]
            outputs.append(self.cut.trunk(block.prompts, cache=taken))
        for piece in block.pieces:
            if piece.prompt_of is None or block.lengths is None:
                outputs.append(self.cut.trunk(piece.tokens))
            else:
                outputs.append(self.cut.trunk(piece.tokens, cache=fed(taken, piece.prompt_of, block.lengths)))
        return outputs

    def token_logps(self, rows: Rows, *, learning: bool = False, squares: bool = False) -> mx.array:
        """log p of each scored token, (1, scored) float32, and with `squares` log Σ p² in a second row.

        Differentiable by the adapter where `learning` says so.
        """
        how = Counted(learning, squares, self.logit_bytes)
        return scoring.token_logps(self.hidden(rows), rows.targets, self.cut, how)

    def log_p(self, rows: Rows) -> mx.array:
        """Log-probabilities of every token at the scored places, (scored, vocabulary) float32, computed."""
        with self.at_work():
            found = scoring.log_p(self.hidden(rows), self.cut)
            mx.eval(found)
        return found


_ROUNDING = 1e-3
_PROBE: list[Text] = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [6, 4]), ([7], [1, 2, 3, 4])]
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def same(one: Forward, other: Forward, texts: Sequence[Text]) -> bool:
    """Whether two ways give the same log-probabilities of (prompt, answer) texts, but for rounding."""

    try:
        expected, found = (way.token_logps(rows_of(texts, shared=way.shares)) for way in (one, other))
        return bool(mx.allclose(expected, found, rtol=_ROUNDING, atol=_ROUNDING).item())
    except _FAULTS:
        return False
