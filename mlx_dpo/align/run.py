"""A run in memory and on disk: from a model with its adapter to a folder that holds the result."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mlx_dpo.align import checkpoint, record, report
from mlx_dpo.align.evaluation import evaluated
from mlx_dpo.align.events import Evaluated, Event, Finished, Interrupted, Note, Phase, Stepped
from mlx_dpo.align.examples import Prepared
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.reference import PairLogps, scored
from mlx_dpo.align.trainer import Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.data.templates import prompt_ids
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models import adapters
from mlx_dpo.models.answers import greedy_answers
from mlx_dpo.models.load import Loaded
from mlx_dpo.models.scoring import parts


class Run:
    """Trainer, held-out reference, sample answers and metrics of one run."""

    def __init__(
        self,
        options: TrainOptions,
        loaded: Loaded,
        shape: adapters.AdapterShape,
        prepared: Prepared,
        order: Order,
        steps: int,
    ):
        """Take a model whose adapter is attached; nothing is written yet."""
        self.options, self.loaded, self.shape, self.prepared, self.order = options, loaded, shape, prepared, order
        self.started = time.perf_counter()
        self.steps = steps
        self.cut = parts(loaded.model)
        self.origin = record.origin(options.model, options.adapter, prepared.fingerprint)
        self.valid_reference: PairLogps | None = None
        self.before: list[str] = []
        self.scores: dict[str, float] = {}

    def events(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Train from where the run stands to its end, or until `stop` says so after a step."""
        yield from self._begin()
        trainer, options = self.trainer, self.options
        while trainer.steps_done < self.steps:
            numbers = trainer.step()
            self.metrics.add(numbers)
            yield Stepped(numbers, self.steps)
            done = trainer.steps_done
            if options.eval_every and done % options.eval_every == 0 and done < self.steps:
                yield from self._evaluation()
            if stop() and done < self.steps:
                self._save()
                yield Interrupted(done, record.resume_command(options.out))
                return
            if options.save_every and done % options.save_every == 0:
                self._save()
        yield from self._finish()

    def _begin(self) -> Iterator[Event]:
        """Find the checkpoint, score the reference, check the start, answer the sample questions."""
        found = self._found() if self.options.resume else None
        reference = None
        if self.options.method == "dpo":
            with self._as_reference():
                reference = yield from self._scored("Scoring the reference", self.prepared.train)
        if self.prepared.valid:
            with self._as_reference():
                self.valid_reference = yield from self._scored("Scoring held-out pairs", self.prepared.valid)
        self.trainer = Trainer(
            self.loaded.model, self.cut, self.prepared.train, self.order, reference, self.options, self.steps
        )
        self.trainer.check_start()
        yield Phase("Answers before training", 0, 1)
        self.before = self._answers()
        if self.options.resume:
            yield from self._resumed(found)
        self.options.out.mkdir(parents=True, exist_ok=True)
        record.write_options(self.options.out, as_toml(self.options))
        self.metrics = record.Metrics(self.options.out, self.trainer.steps_done, self.steps)

    def _as_reference(self) -> AbstractContextManager[None]:
        """The model as the reference: as it starts from an adapter, or without any."""
        return nullcontext() if self.options.adapter else adapters.switched_off(self.loaded.model)

    def _found(self) -> checkpoint.Found | None:
        found = checkpoint.newest(self.options.out / record.CHECKPOINTS)
        if found is not None:
            record.refuse_other_origin(found.state.numbers["origin"], self.origin)
        return found

    def _resumed(self, found: checkpoint.Found | None) -> Iterator[Event]:
        if found is None:
            yield Note("There is no checkpoint yet: starting from the first step.")
            return
        for file in found.damaged:
            yield Note(f"{file} is damaged and was passed over.")
        self.trainer.restore(found.state)
        yield Note(f"Going on after step {self.trainer.steps_done} ({found.path.name}).")

    def _scored(self, name: str, pairs: list[TokenisedPair]) -> Iterator[Any]:
        self.loaded.model.eval()
        yield Phase(name, 0, len(pairs))
        for event in scored(self.loaded.model, self.cut, pairs, self.options.batch_size):
            if isinstance(event, PairLogps):
                return event
            yield Phase(name, event.done, event.total)
        return None

    def _evaluation(self) -> Iterator[Event]:
        """Score the held-out pairs under the adapter as it is, over all of them at once."""
        if self.valid_reference is None:
            return
        policy = yield from self._scored("Evaluating held-out pairs", self.prepared.valid)
        self.scores = evaluated(policy, self.valid_reference, self.prepared.valid, self.options)
        self.metrics.add({"step": self.trainer.steps_done} | self.scores)
        yield Evaluated(self.scores)

    def _save(self) -> None:
        state = self.trainer.checkpoint()
        state.numbers["origin"] = self.origin
        checkpoint.save(self.options.out / record.CHECKPOINTS, self.trainer.steps_done, state)

    def _finish(self) -> Iterator[Event]:
        """Evaluate, answer again, and write the report, the adapter and, last, the manifest, which ends a run."""
        weights = adapters.adapter_weights(self.loaded.model)
        adapters.check_finite(weights, "The trained adapter")
        self._save()
        yield from self._evaluation()
        yield Phase("Answers after training", 0, 1)
        after = self._answers()
        out = self.options.out
        facts = {
            "kind": "adapter",
            "base": record.base_facts(self.options.model),
            "data": {"path": str(self.options.data), "sha256": self.prepared.fingerprint},
            "options": as_toml(self.options),
            "scores": self.scores,
        }
        samples = self._samples(after)
        report.write(out, report.page(self.options, self.metrics.rows, samples, facts))
        adapters.save_adapter(out, weights, self.shape, str(self.options.model))
        record.write_manifest(out, facts)
        yield Finished(out, out / report.REPORT, self.scores, samples, time.perf_counter() - self.started)

    def _answers(self) -> list[str]:
        self.loaded.model.eval()
        prompts = [prompt_ids(self.loaded.tokenizer, question) for question in self.prepared.questions]
        return greedy_answers(self.loaded, prompts, self.options.sample_tokens) if prompts else []

    def _samples(self, after: list[str]) -> list[report.Sample]:
        return [
            report.Sample(question[-1]["content"], before, now, self.prepared.unseen)
            for question, before, now in zip(self.prepared.questions, self.before, after, strict=True)
        ]
