"""What is looked at during a run: held-out examples scored, questions answered, the best evaluation kept."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_dpo.align import checkpoint
from mlx_dpo.align.checkpoint import Checkpoint
from mlx_dpo.align.evaluation import evaluated
from mlx_dpo.align.events import Event, Phase
from mlx_dpo.align.examples import Prepared
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.reference import Remembered
from mlx_dpo.align.scores import Scores, mismatched, scored
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import adapters
from mlx_dpo.models.answers import divergence, greedy_answers
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.group import Group
from mlx_dpo.models.load import Loaded

Row = dict[str, Any]
_BEST = "best"
_MOST_KEPT = 100
# The held-out number of --best-by, and whether more of it is better.
_MEASURES = {
    "loss": ("eval_loss", -1),
    "accuracy": ("eval_rewards/accuracies", 1),
    "margin": ("eval_rewards/margins", 1),
    "chosen": ("eval_logps/chosen", 1),
}


class Scorer(NamedTuple):
    """A model with its adapter, and how it scores and answers."""

    loaded: Loaded
    forward: Forward
    options: TrainOptions
    at_once: float | None = None
    remembered: Remembered | None = None
    group: Group = Group()

    def scores(self, name: str, pairs: list[TokenisedPair], loss: Loss, *, as_reference: bool = False) -> Iterator[Any]:
        """Score examples under the adapter as it is, yielding Phases called `name` and returning the Scores.

        `as_reference` says that the model is the run's reference now, which may be remembered.
        """
        self.loaded.model.eval()
        yield Phase(name, 0, len(pairs))
        remembered = self.remembered if as_reference else None
        for event in scored(
            self.forward, pairs, self.options.batch_size, loss.sums, self.at_once, remembered, self.group
        ):
            if isinstance(event, Scores):
                return event
            yield Phase(name, event.done, event.total)
        return None

    def with_reference(self, name: str, pairs: list[TokenisedPair], loss: Loss) -> Iterator[Any]:
        """Return `loss` with what the model as it is says of `pairs`, where the loss needs a reference."""
        if not loss.terms.needs_reference:
            return loss
        reference = yield from self.scores(name, pairs, loss, as_reference=True)
        if not loss.terms.is_unpaired:
            return replace(loss, reference=reference)
        strangers = mismatched(pairs, self.options.batch_size * self.options.grad_accumulation)
        found = yield from self.scores(f"{name}: other answers", strangers, loss, as_reference=True)
        return replace(loss, reference=reference, strangers=strangers, strangers_reference=found.chosen.plain)


class HeldOut:
    """The held-out examples and questions of a run, with what the model said of them at the start."""

    def __init__(self, scorer: Scorer, prepared: Prepared, loss: Loss):
        """Take the run's loss; its reference's numbers are the training examples' and are not used here."""
        self.scorer, self.pairs, self.asked = scorer, prepared.valid, prepared.asked
        self.loss = replace(loss, reference=None, strangers=None, strangers_reference=None)
        self.start: Scores | None = None

    def begin(self) -> Iterator[Event]:
        """Score the held-out examples under the model as it is, which is the reference."""
        if not self.pairs:
            return
        self.loss = yield from self.scorer.with_reference("Scoring held-out pairs", self.pairs, self.loss)
        self.start = self.loss.reference
        if self.start is None:  # which is looked at also where the loss needs no reference
            self.start = yield from self.scorer.scores(
                "Scoring held-out pairs", self.pairs, self.loss, as_reference=True
            )

    def evaluation(self, step: int) -> Iterator[Any]:
        """Score under the adapter as it is, and return the row of metrics.jsonl; None where nothing is held out."""
        if self.start is None:
            return None
        policy = yield from self.scorer.scores("Evaluating held-out pairs", self.pairs, self.loss)
        kl = None
        if self.loss.strangers is not None:
            found = yield from self.scorer.scores("Evaluating other answers", list(self.loss.strangers), self.loss)
            kl = self.loss.divergence(found.chosen.plain, list(range(len(self.pairs))))
        return self.scorer.group.from_first({"step": step} | evaluated(policy, self.start, self.pairs, self.loss, kl))

    def answers(self, step: int) -> Iterator[Any]:
        """Answer the questions, and return the row of samples.jsonl; None where there are none.

        `kl` is the mean KL from the base along the answers, in nats a token; `tokens` their mean length.
        """
        if not self.asked:
            return None
        yield Phase("Answering sample questions", 0, 1)
        return self.scorer.group.from_first(self._answers(step) if self.scorer.group.is_first else None)

    def _answers(self, step: int) -> Row:
        loaded, options = self.scorer.loaded, self.scorer.options
        loaded.model.eval()
        answers = greedy_answers(loaded, self.asked, options.sample_tokens)
        kl = divergence(self.scorer.forward, self.asked, answers, adapters.switched_off)
        tokens = float(np.mean([len(answer.tokens) for answer in answers]))
        return {"step": step, "tokens": tokens, "kl": kl, "answers": [answer.text for answer in answers]}


class Best:
    """The best evaluation of a run by one number, and the adapter of that step."""

    def __init__(self, out: Path, options: TrainOptions):
        """Look for it below the run's checkpoints."""
        self.folder = out / _BEST
        self.options = options
        self.name, self.sign = _MEASURES[options.best_by]

    def row(self, rows: list[Row]) -> Row | None:
        """The row of the best evaluation so far, the first of equals."""
        known = [row for row in rows if math.isfinite(row.get(self.name, math.nan))]
        return max(known, key=lambda row: self.sign * row[self.name], default=None)

    def is_over(self, rows: list[Row]) -> bool:
        """Whether --patience has run out: so many evaluations after the best one."""
        if self.options.patience is None or (best := self.row(rows)) is None:
            return False
        later = [row for row in rows if self.name in row and row["step"] > best["step"]]
        return len(later) >= self.options.patience

    def consider(self, rows: list[Row], state: Checkpoint) -> None:
        """Keep the adapter in `state` where the evaluation just made is the best."""
        best = self.row(rows)
        if self.options.keep == "best" and best is not None and best["step"] == state.numbers["steps_done"]:
            adapter = {name: value for name, value in state.arrays.items() if name.startswith("adapter.")}
            checkpoint.save(self.folder, best["step"], Checkpoint(adapter, state.numbers), keep=_MOST_KEPT)

    def prune(self, rows: list[Row]) -> None:
        """Drop what was overtaken, now that a checkpoint has come this far.

        A rescue may take steps back, and with them the best one: where there may be one, earlier ones stay.
        """
        best = self.row(rows)
        if self.options.on_displacement != "rescue" and best is not None:
            checkpoint.keep_only(self.folder, best["step"])

    def adapter(self, rows: list[Row]) -> tuple[Checkpoint | None, str]:
        """The best step's adapter, or the best of those that can be read, and what there is to say of it.

        None where the last step's is to be kept.
        """
        best = self.row(rows)
        if self.options.keep != "best" or best is None:
            return None, ""
        for row in sorted((row for row in rows if self.name in row), key=lambda row: -self.sign * row[self.name]):
            state = checkpoint.at(self.folder, row["step"])
            if state is not None:
                of = f"Keeping the adapter of step {row['step']}"
                lost = f"{of}: that of step {best['step']}, whose evaluation was the best, is damaged or gone."
                return state, f"{of}, whose evaluation was the best." if row is best else lost
        return None, f"Keeping the last adapter: that of step {best['step']}, the best, is damaged or gone."

    def forget_after(self, step: int) -> None:
        """Drop what belongs to steps that were taken back."""
        checkpoint.drop_after(self.folder, step)
