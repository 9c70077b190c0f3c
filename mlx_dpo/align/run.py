"""A run in memory and on disk: from a model with its adapter to a folder that holds the result."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from statistics import fmean
from typing import Any

from mlx_dpo.align import checkpoint, record, report, rescue
from mlx_dpo.align.checkpoint import Checkpoint
from mlx_dpo.align.events import Evaluated, Event, Finished, Interrupted, Note, Phase, Stepped, Warned
from mlx_dpo.align.examples import Prepared
from mlx_dpo.align.held_out import Best, HeldOut, Scorer
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.monitor import PROBATION, Facts, Finding, Monitor
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.rescue import Rescue
from mlx_dpo.align.tracking import tracked
from mlx_dpo.align.trainer import NotFinite, Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.models import adapters
from mlx_dpo.models.load import Loaded
from mlx_dpo.models.scoring import parts
from mlx_dpo.refusal import Refusal

_NEEDS_RESCUE = ("displacement", "not_finite")


class Run:
    """Trainer, held-out examples, monitor and records of one run."""

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
        self.scorer = Scorer(loaded, parts(loaded.model), options)
        self.held_out = HeldOut(self.scorer, prepared, Loss.of(options))
        self.origin = record.origin(options.model, options.adapter, prepared.fingerprint)
        self.checkpoints = options.out / record.CHECKPOINTS
        self.best = Best(self.checkpoints, options)
        self.rescues: list[Rescue] = []
        self.healthy = 0

    def events(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Train from where the run stands to its end, or until `stop` says so after a step."""
        with ExitStack() as trackers:
            yield from self._begin(trackers)
            trainer, options = self.trainer, self.options
            while trainer.steps_done < self.steps and not self.best.is_over(self.metrics.rows):
                found = yield from self._stepped()
                done = trainer.steps_done
                if options.eval_every and done and done % options.eval_every == 0 and done < self.steps and not found:
                    found = yield from self._evaluation()
                if found and options.on_displacement != "warn":
                    yield from self._displaced(found)
                    continue
                if stop() and done < self.steps:
                    self._save()
                    yield Interrupted(done, record.resume_command(options.out))
                    return
                if options.save_every and done % options.save_every == 0:
                    self._save()
            yield from self._finish()

    def _begin(self, trackers: ExitStack) -> Iterator[Event]:
        """Find the checkpoint, score the reference, check the start, answer the sample questions."""
        options = self.options
        found = self._found() if options.resume else None
        with self._as_reference():
            train = self.prepared.train
            loss = yield from self.scorer.with_reference("Scoring the reference", train, Loss.of(options))
            yield from self.held_out.begin()
        model = self.loaded.model
        self.trainer = Trainer(model, self.scorer.cut, train, self.order, loss, options, self.steps)
        self.trainer.check_start()
        record.write_options(options.out, as_toml(options))
        self.rescues = rescue.from_numbers(found.state.numbers["rescues"]) if found else []
        done = found.state.numbers["steps_done"] if found else 0
        self.metrics = record.Rows(options.out / record.METRICS, done, len(self.rescues))
        self.samples = record.Rows(options.out / record.SAMPLES, done)
        for kind in options.track:
            self.metrics.listeners.append(trackers.enter_context(tracked(kind, options.out, as_toml(options))))
        if not self.samples.rows:
            yield from self._answered(0)
        if options.resume:
            yield from self._resumed(found)
        self._watch()
        if found is None and options.on_displacement == "rescue":
            self._save()  # what a rescue of the first steps goes back to

    def _as_reference(self) -> AbstractContextManager[None]:
        """The model as the reference: as it starts from an adapter, or without any."""
        return nullcontext() if self.options.adapter else adapters.switched_off(self.loaded.model)

    def _found(self) -> checkpoint.Found | None:
        found = checkpoint.newest(self.checkpoints)
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
        checkpoint.drop_after(self.checkpoints, self.trainer.steps_done)
        rescue.apply(self.trainer, self.rescues)
        yield Note(f"Going on after step {self.trainer.steps_done} ({found.path.name}).")

    def _watch(self) -> None:
        """Watch the run from the rows that there are; a healthy step is one that a rescue may go back to."""
        answers = [len(pair.chosen) for pair in self.prepared.train if pair.chosen]
        loss = self.trainer.loss
        facts = Facts(self.options.kl_budget, loss.beta, fmean(answers or [1]), loss.terms.likelihood_weight > 0)
        self.monitor = Monitor(facts)
        self.healthy = 0
        for row in self.metrics.rows:
            if "loss" in row:
                self.monitor.step(row)
                self._mark_healthy(row["step"])
        evaluations = {row["step"]: row for row in self.metrics.rows if "eval_loss" in row}
        samples = {row["step"]: row for row in self.samples.rows}
        for step in sorted(evaluations.keys() | samples.keys()):
            self.monitor.evaluation(evaluations.get(step, {}), samples.get(step, {}))

    def _mark_healthy(self, step: int) -> None:
        """Let a rescue go back to a checkpoint once the steps after it, which saw its adapter, have been well."""
        saved, every = step - PROBATION, self.options.save_every
        if every and saved > 0 and saved % every == 0 and self.monitor.is_healthy():
            self.healthy = saved

    def _stepped(self) -> Iterator[Any]:
        """Take a step; returns what was found wrong where a rescue or a stop is called for, None otherwise."""
        try:
            numbers = self.trainer.step()
        except NotFinite as fault:
            if self.options.on_displacement == "rescue":
                return Finding("not_finite", str(fault))
            self._save()
            raise Refusal(f"{fault} What was learnt until step {self.trainer.steps_done} is saved.") from fault
        serious = yield from self._recorded(numbers, self.monitor.step(numbers))
        self._mark_healthy(self.trainer.steps_done)
        yield Stepped(numbers, self.steps)
        return serious

    def _evaluation(self) -> Iterator[Any]:
        """Score the held-out pairs, over all of them at once, and answer the questions; returns as `_stepped`."""
        done = self.trainer.steps_done
        row = yield from self.held_out.evaluation(done)
        sample = yield from self._answered(done)
        findings = self.monitor.evaluation(row or {}, sample)
        if row is None and not findings:
            return None
        serious = yield from self._recorded(row or {"step": done}, findings)
        self.best.consider(self.metrics.rows, self.trainer.checkpoint())
        if row is not None:
            yield Evaluated(row)
        return serious

    def _answered(self, step: int) -> Iterator[Any]:
        sample = yield from self.held_out.answers(step)
        if sample is not None:
            self.samples.add(sample)
        return sample or {}

    def _recorded(self, row: dict[str, Any], findings: list[Finding]) -> Iterator[Any]:
        """Write a row with what was found wrong; returns the finding that calls for a rescue, if any."""
        if findings:
            row["warnings"] = [finding._asdict() for finding in findings]
        self.metrics.add(row)
        for finding in findings:
            yield Warned(row["step"], finding)
        return next((finding for finding in findings if finding.kind in _NEEDS_RESCUE), None)

    def _displaced(self, found: Finding) -> Iterator[Event]:
        """Stop with everything saved, or go back to the last healthy checkpoint and go on from there."""
        done = self.trainer.steps_done
        if self.options.on_displacement == "stop" or len(self.rescues) >= rescue.MOST:
            self._save()
            gave_up = f"{len(self.rescues)} rescues did not help. " if self.rescues else ""
            raise Refusal(
                f"Stopped after step {done}; everything is saved. {gave_up}{found.text} To go on all the same: "
                f"{record.resume_command(self.options.out)} --on-displacement warn"
            )
        state = checkpoint.at(self.checkpoints, self.healthy)
        if state is None:
            raise Refusal(f"{self.checkpoints} lacks the healthy checkpoint of step {self.healthy}: start anew.")
        made = rescue.next_rescue(done, self.healthy, self.trainer.loss.terms, self.rescues, found.text)
        self.rescues.append(made)
        # In this order a run that is killed in between finds the old checkpoint, and comes to the same rescue.
        checkpoint.drop_after(self.checkpoints, self.healthy)
        self.best.forget_after(self.healthy)
        self.metrics.take_back(self.healthy, {"rescue": len(self.rescues)} | made._asdict())
        self.samples = record.Rows(self.samples.path, self.healthy)
        self.trainer.restore(state)
        rescue.apply(self.trainer, self.rescues)
        self._save()
        self._watch()
        yield Note(f"Rescued: back to step {self.healthy}, and on {made.in_words()}.")

    def _save(self) -> None:
        state = self.trainer.checkpoint()
        state.numbers["origin"] = self.origin
        state.numbers["rescues"] = rescue.as_numbers(self.rescues)
        done, pinned = self.trainer.steps_done, set[int]()
        if self.options.on_displacement == "rescue":
            pinned = {self.healthy, *range(done - PROBATION, done)}
        checkpoint.save(self.checkpoints, done, state, self.options.keep_checkpoints, pinned)

    def _finish(self) -> Iterator[Event]:
        """Evaluate, write the report, the adapter and, last, the manifest, which ends a run."""
        adapters.check_finite(adapters.adapter_weights(self.loaded.model), "The trained adapter")
        self._save()
        if not self._is_evaluated():
            yield from self._evaluation()
        kept = yield from self._kept()
        yield Phase("Writing the report", 0, 1)
        out, rows = self.options.out, self.metrics.rows
        evaluation = next((row for row in rows if row["step"] == kept and "eval_loss" in row), {})
        facts = {
            "kind": "adapter",
            "base": record.base_facts(self.options.model),
            "start": record.start_facts(self.options.adapter),
            "data": {"path": str(self.options.data), "sha256": self.prepared.fingerprint},
            "options": as_toml(self.options),
            "step": kept,
            "steps_taken": self.trainer.steps_done,
            "rescues": rescue.as_numbers(self.rescues),
            "scores": {n: v for n, v in evaluation.items() if n.startswith("eval_") and isinstance(v, int | float)},
        }
        samples = self._samples(kept)
        report.write(out, report.page(self.options, rows, samples, facts, self.samples.rows, self.steps))
        weights = adapters.adapter_weights(self.loaded.model)
        adapters.save_adapter(out, weights, self.shape, str(self.options.model))
        record.write_manifest(out, facts)
        yield Finished(out, out / report.REPORT, facts["scores"], samples, time.perf_counter() - self.started)

    def _kept(self) -> Iterator[Any]:
        """Take the adapter that --keep asks for, and return its step."""
        best: Checkpoint | None = self.best.adapter(self.metrics.rows)
        done = self.trainer.steps_done
        if best is not None and best.numbers["steps_done"] != done:
            self.trainer.restore_adapter(best)
            yield Note(f"Keeping the adapter of step {best.numbers['steps_done']}, whose evaluation was the best.")
            return best.numbers["steps_done"]
        if done < self.steps:
            yield Note(f"Ended after {done} of {self.steps} steps: the evaluations got no better.")
        return done

    def _is_evaluated(self) -> bool:
        """Whether the step that the run stands at was evaluated before it was stopped or killed."""
        at = self.trainer.steps_done
        evaluated = any(row["step"] == at and "eval_loss" in row for row in self.metrics.rows)
        answered = any(row["step"] == at for row in self.samples.rows)
        return (evaluated or not self.held_out.pairs) and (answered or not self.held_out.questions)

    def _samples(self, step: int) -> list[report.Sample]:
        """What was answered before the first step and at `step`."""
        answers = [row["answers"] for row in self.samples.rows if row["step"] in (0, step)]
        return (
            [
                report.Sample(question[-1]["content"], before, after, self.prepared.unseen)
                for question, before, after in zip(self.prepared.questions, answers[0], answers[-1], strict=True)
            ]
            if answers
            else []
        )
