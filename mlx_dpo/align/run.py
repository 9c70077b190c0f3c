"""A run in memory and on disk: from a model with its adapter to a folder that holds the result."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_dpo import storage
from mlx_dpo.align import checkpoint, computing, ranks, record, report, rescue
from mlx_dpo.align.events import Evaluated, Event, Finished, Interrupted, Note, Phase, Stepped, Warned
from mlx_dpo.align.examples import Prepared
from mlx_dpo.align.held_out import Best, HeldOut, Scorer
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.monitor import PROBATION, Facts, Finding, Monitor
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.plan import Plan, batched, limit_gb
from mlx_dpo.align.rescue import Rescue
from mlx_dpo.align.tracking import tracked
from mlx_dpo.align.trainer import NotFinite, Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.models import adapters
from mlx_dpo.models.group import Gone, Group
from mlx_dpo.models.load import Loaded
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
        plan: Plan,
        *,
        group: Group,
        home: Path | None = None,
    ):
        """Take a model whose adapter is attached; nothing is written yet.

        Every rank of `group` makes the same run, each in an --out of its own. `home` is the folder whose run.toml goes
        on with the run, where that is not --out.
        """
        self.options, self.loaded, self.shape, self.prepared, self.order = options, loaded, shape, prepared, order
        self.started = time.perf_counter()
        self.plan, self.steps, self.group = plan, plan.steps, group
        self.resume_command = record.resume_command(home or options.out)
        *data, questions = prepared.origin
        self.origin = record.origin(options.model, options.adapter, data, questions)
        self.checkpoints = options.out / record.CHECKPOINTS
        self.best = Best(self.checkpoints, options)
        self.rescues: list[Rescue] = []

    def events(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Train from where the run stands to its end, or until `stop` says so after a step."""
        with ExitStack() as stack:
            yield from self._begin(stack)
            # A run that was stopped for what is wrong with it is not let go on as if nothing had been.
            found = self._acted_on(self.monitor.displacement()) if self.options.resume else None
            while found or not (self._is_over() and self._is_evaluated()):
                if found:
                    yield from self._displaced(found)
                    found = None
                elif self._is_over():
                    self._save()
                    found = yield from self._evaluation()
                else:
                    found = yield from self._advanced()
                    if self._any_stops(stop()) and not found and not self._is_over():
                        self._save()
                        yield Interrupted(self.trainer.steps_done, self.resume_command)
                        return
            yield from self._finish()

    def _any_stops(self, stops: bool) -> bool:
        try:
            return self.group.any_of(stops)
        except Gone as fault:
            self._save()
            raise self._gone(fault) from fault

    def _gone(self, fault: Gone) -> Refusal:
        return Refusal(f"{fault} What was learnt until step {self.trainer.steps_done} is saved.")

    def _is_over(self) -> bool:
        return self.trainer.steps_done >= self.steps or self.best.is_over(self.metrics.rows)

    def _advanced(self) -> Iterator[Any]:
        """Take a step, with the evaluation and the checkpoint that are due; returns what has to be acted on."""
        found = yield from self._stepped()
        done, options = self.trainer.steps_done, self.options
        if found or done == self.steps:
            return found
        if options.eval_every and done % options.eval_every == 0:
            found = yield from self._evaluation()
        if options.save_every and done % options.save_every == 0 and not found:
            self._save()
        return found

    def _begin(self, stack: ExitStack) -> Iterator[Event]:
        """Find the checkpoint, score the reference, check the start, answer the sample questions."""
        options, train = self.options, self.prepared.train
        ranks.refuse_other_files(self.origin, self.group)
        found = self._found() if options.resume else None
        forward = yield from computing.forward_of(self.loaded, train, options)
        self.group.agree("way of sharing prompts", str(forward.shares))
        batching = self.plan.batching
        if not forward.shares:  # which could not be known before the model was there
            batching, _, _ = batched(options, self.loaded.config, train, self.order, limit_gb(options), shared=False)
        remembered = computing.remembered(self.loaded, self.origin, options)
        for kept in (forward.kept, remembered):
            if kept is not None:
                stack.callback(kept.close)
        scorer = Scorer(self.loaded, forward, options, batching.at_once, remembered, self.group)
        self.held_out = HeldOut(scorer, self.prepared, Loss.of(options))
        yield from computing.fill(forward, [*train, *self.prepared.valid], options.batch_size)
        with self._as_reference():
            loss = yield from scorer.with_reference("Scoring the reference", train, Loss.of(options))
            yield from self.held_out.begin()
        self.trainer = Trainer(forward, train, self.order, loss, options, self.steps, batching, self.group)
        self.trainer.check_start()
        self.rescues = rescue.from_numbers(found.state.numbers["rescues"]) if found else []
        done = found.state.numbers["steps_done"] if found else 0
        stack.enter_context(storage.held(options.out))
        if not options.resume and (options.out / record.RUN).exists():
            raise Refusal(f"{options.out} holds a run by now, begun since this one was: choose another --out.")
        record.refuse_lost_rows(options.out, done)
        record.write_options(options.out, as_toml(options))
        self.metrics = record.Rows(options.out / record.METRICS, done, len(self.rescues))
        self.samples = record.Rows(options.out / record.SAMPLES, done)
        for kind in options.track:
            self.metrics.listeners.append(stack.enter_context(tracked(kind, options.out, as_toml(options))))
        if not self.samples.rows:
            yield from self._answered(0)
        self._watch()
        if options.on_displacement == "rescue" and checkpoint.at(self.checkpoints, 0) is None:
            self._save()  # what a rescue of the first steps goes back to
        if options.resume:
            yield from self._resumed(found)

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
        """Watch the run from what it has written so far."""
        answers = [len(pair.chosen) for pair in self.prepared.train if pair.chosen]
        loss = self.trainer.loss
        facts = Facts(
            kl_budget=self.options.kl_budget,
            beta=loss.beta,
            chosen_tokens=fmean(answers or [1]),
            has_likelihood=loss.terms.likelihood_weight > 0,
            offers_rescue=loss.terms.needs_reference and self.options.on_displacement != "rescue",
        )
        self.monitor = Monitor(facts, self.rescues[-1].back_to if self.rescues else 0)
        self.monitor.replay(self.metrics.rows, self.samples.rows)

    def _refuges(self) -> list[int]:
        return rescue.refuges(checkpoint.steps(self.checkpoints), self.options.save_every, self.monitor.healthy)

    def _acted_on(self, found: Finding | None) -> Finding | None:
        """What --on-displacement asks to act on, None where it is only to be said."""
        acts = self.options.on_displacement != "warn" and found is not None and found.kind in _NEEDS_RESCUE
        return found if acts else None

    def _stepped(self) -> Iterator[Any]:
        """Take a step; returns what has to be acted on."""
        try:
            numbers = self.trainer.step()
            # A step that was taken has its row, whoever has gone since; the next exchange says so again.
            with suppress(Gone):
                numbers = self.group.from_first(numbers)
        except Gone as fault:
            self._save()
            raise self._gone(fault) from fault
        except NotFinite as fault:
            if self.options.on_displacement == "rescue":
                found = [Finding("not_finite", str(fault))]
                return (yield from self._recorded({"step": self.trainer.steps_done + 1}, found))
            self._save()
            raise Refusal(f"{fault} What was learnt until step {self.trainer.steps_done} is saved.") from fault
        found = yield from self._recorded(numbers, self.monitor.step(numbers))
        yield Stepped(numbers, self.steps)
        return found

    def _evaluation(self) -> Iterator[Any]:
        """Score the held-out pairs, over all of them at once, and answer the questions; returns as `_stepped`."""
        done = self.trainer.steps_done
        row = yield from self.held_out.evaluation(done)
        sample = yield from self.held_out.answers(done)
        findings = self.monitor.evaluation(row or {}, sample or {})
        found = None
        if row is not None or findings:
            found = yield from self._recorded(row or {"step": done}, findings)
            self.best.consider(self.metrics.rows, self.trainer.checkpoint())
        if sample is not None:  # last, as that says that the step was looked at
            self.samples.put(sample)
        if row is not None:
            yield Evaluated(row)
        return found

    def _answered(self, step: int) -> Iterator[Event]:
        sample = yield from self.held_out.answers(step)
        if sample is not None:
            self.samples.put(sample)

    def _recorded(self, row: dict[str, Any], findings: list[Finding]) -> Iterator[Any]:
        """Write a row with what was found wrong; returns what has to be acted on."""
        if findings:
            row["warnings"] = [finding._asdict() for finding in findings]
        if "loss" in row:
            self.metrics.add(row)
        else:
            self.metrics.put(row)
        for finding in findings:
            yield Warned(row["step"], finding)
        return next((finding for finding in findings if self._acted_on(finding)), None)

    def _displaced(self, found: Finding) -> Iterator[Event]:
        """Stop with everything saved, or go back to the last healthy checkpoint and go on from there."""
        done = self.trainer.steps_done
        if self.options.on_displacement == "stop" or len(self.rescues) >= rescue.MOST:
            self._give_up(found, f"{len(self.rescues)} rescues did not help. " if self.rescues else "")
        refuges = ((step, checkpoint.at(self.checkpoints, step)) for step in self._refuges())
        back_to, state = next(((step, state) for step, state in refuges if state is not None), (0, None))
        if state is None:
            self._give_up(found, "No healthy checkpoint is left to go back to. ")
            return
        made = rescue.next_rescue(done, back_to, self.trainer.loss.terms, self.rescues, found)
        self.rescues.append(made)
        # In this order a run that is killed in between finds the old checkpoint, and comes to the same rescue.
        checkpoint.drop_after(self.checkpoints, back_to)
        self.best.forget_after(back_to)
        self.metrics.take_back(back_to, {"rescue": len(self.rescues)} | made._asdict())
        self.samples = record.Rows(self.samples.path, back_to)
        self.trainer.restore(state)
        rescue.apply(self.trainer, self.rescues)
        self._save()
        self._watch()
        yield Note(f"Rescued: back to step {back_to}, and on {made.in_words()}.")

    def _give_up(self, found: Finding, why: str) -> None:
        self._save()
        way_out = f"To go on all the same: {self.resume_command} --on-displacement warn"
        if found.kind == "not_finite":
            way_out = "Start anew with a lower --learning-rate."
        done = self.trainer.steps_done
        raise Refusal(f"Stopped after step {done}; everything is saved. {why}{found.text} {way_out}")

    def _save(self) -> None:
        state = self.trainer.checkpoint()
        state.numbers["origin"] = self.origin
        state.numbers["rescues"] = rescue.as_numbers(self.rescues)
        done, pinned = self.trainer.steps_done, set[int]()
        if self.options.on_displacement == "rescue":
            pinned = {0, *self._refuges()[:1], *range(done - PROBATION, done)}
        self.metrics.sync()
        checkpoint.save(self.checkpoints, done, state, self.options.keep_checkpoints, pinned)
        self.best.prune(self.metrics.rows)

    def _finish(self) -> Iterator[Event]:
        """Write the report, the adapter and, last, the manifest, which ends a run."""
        adapters.check_finite(adapters.adapter_weights(self.loaded.model), "The trained adapter")
        self._save()
        kept = yield from self._kept()
        yield Phase("Writing the report", 0, 1)
        out, rows = self.options.out, self.metrics.rows
        facts = record.facts(self.options, self.prepared.fingerprint, rows, kept) | {
            "steps_taken": self.trainer.steps_done,
            "rescues": rescue.as_numbers(self.rescues),
        }
        samples = report.samples(self.samples.rows, kept, self.prepared)
        report.write(out, report.page(self.options, rows, samples, facts, self.samples.rows, self.steps))
        weights = adapters.adapter_weights(self.loaded.model)
        adapters.save_adapter(out, weights, self.shape, str(self.options.model))
        record.write_manifest(out, facts)
        yield Finished(out, out / report.REPORT, facts["scores"], samples, time.perf_counter() - self.started)

    def _kept(self) -> Iterator[Any]:
        """Take the adapter that --keep asks for, and return its step."""
        done = self.trainer.steps_done
        if done < self.steps:
            yield Note(f"Ended after {done} of {self.steps} steps: the evaluations got no better.")
        best, words = self.best.adapter(self.metrics.rows)
        if best is None or best.numbers["steps_done"] != done:
            yield from [Note(words)] if words else []
        if best is None:
            return done
        self.trainer.restore_adapter(best)
        return best.numbers["steps_done"]

    def _is_evaluated(self) -> bool:
        """Whether the step that the run stands at was evaluated before it was stopped or killed."""
        at = self.trainer.steps_done
        evaluated = any(row["step"] == at and "eval_loss" in row for row in self.metrics.rows)
        answered = any(row["step"] == at for row in self.samples.rows)
        return (evaluated or not self.held_out.pairs) and (answered or not self.held_out.asked)
