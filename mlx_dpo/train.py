"""One training run, from options to adapter (`python -m mlx_dpo.train` is `mlx_dpo train`)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo import machine
from mlx_dpo.align import checkpoint, record, report
from mlx_dpo.align.evaluation import evaluated
from mlx_dpo.align.options import TrainOptions, as_toml, refuse_absurd
from mlx_dpo.align.plan import Plan, planned
from mlx_dpo.align.reference import PairLogps, Progress, scored
from mlx_dpo.align.schedule import warmup_steps
from mlx_dpo.align.trainer import Settings, Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.data.examples import Example
from mlx_dpo.data.reading import Splits, fingerprint, read, split_off
from mlx_dpo.data.templates import prompt_ids
from mlx_dpo.data.tokenised import CutCounts, TokenisedPair, tokenise
from mlx_dpo.models import adapters
from mlx_dpo.models.answers import greedy_answers
from mlx_dpo.models.load import Loaded, load, read_config, read_tokenizer, training_dtype
from mlx_dpo.models.scoring import Parts, parts
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import refuse_occupied


class Phase(NamedTuple):
    """A part of the run that takes a while, and how far it has come."""

    name: str
    done: int
    total: int


class Note(NamedTuple):
    """Something that the user should read."""

    text: str


class Planned(NamedTuple):
    """What is going to happen."""

    plan: Plan


class Stepped(NamedTuple):
    """A step was taken."""

    numbers: dict[str, float]
    steps: int


class Evaluated(NamedTuple):
    """Held-out pairs were scored."""

    numbers: dict[str, float]


class Interrupted(NamedTuple):
    """The run was stopped; everything is saved and `command` goes on."""

    steps_done: int
    command: str


class Finished(NamedTuple):
    """The adapter is in `out`."""

    out: Path
    report: Path
    seconds: float


Event = Phase | Note | Planned | Stepped | Evaluated | Interrupted | Finished


class _Prepared(NamedTuple):
    train: list[TokenisedPair]
    valid: list[TokenisedPair]
    held_out: list[Example]
    splits: Splits
    cut: CutCounts


def run(options: TrainOptions, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Train, yielding what happens; `stop` is asked after each step, and True ends the run with all saved.

    Raises Refusal, before the model is loaded where that is possible, for anything that cannot be right.
    """
    started = time.perf_counter()
    refuse_absurd(options)
    _check_out(options)
    config = read_config(options.model)
    prepared = _prepared(options, config)
    yield from _cut_notes(prepared.cut, options)
    options, shape_given = _with_adapter_shape(options)
    order = _order(options, len(prepared.train))
    plan = planned(options, config, prepared.train, prepared.valid, order)
    yield Planned(plan)
    if options.dry_run:
        return
    limit = options.memory_limit or machine.describe().memory_limit / 1e9
    if plan.memory_gb > limit:
        raise Refusal(
            f"The run would take about {plan.memory_gb:.1f} GB and {limit:.1f} GB may be used: lower --batch-size or "
            "--max-length, add --grad-checkpoint, or raise --memory-limit."
        )
    yield Phase("Loading the model", 0, 1)
    loaded = load(options.model)
    loaded = load(options.model, dtype) if (dtype := training_dtype(loaded.model)) else loaded
    options = _attach(loaded, options, shape_given)
    yield from _trained(options, loaded, prepared, order, plan, stop, started)


def _check_out(options: TrainOptions) -> None:
    if options.out.resolve() == options.model.resolve():
        raise Refusal("--out is the model's own folder: choose another, so that the model stays as it is.")
    if options.resume:
        if (options.out / adapters.WEIGHTS).exists():
            raise Refusal(f"The run in {options.out} is finished: there is nothing to resume.")
        record.read_options(options.out)
    elif (options.out / record.RUN).exists():
        raise Refusal(f"{options.out} holds a run already: add --resume to go on with it, or choose another --out.")
    elif not options.dry_run:
        refuse_occupied(options.out)


def _prepared(options: TrainOptions, config: dict[str, Any]) -> _Prepared:
    splits = read(options.data, pairs=options.method == "dpo")
    train, valid = splits.train, splits.valid
    if options.holdout and valid:
        raise Refusal(f"--holdout is given, but {options.data} has a valid file: leave one of them away.")
    if options.holdout:
        train, valid = split_off(train, options.holdout, options.seed)
    if not train:
        raise Refusal(f"{options.data} leaves nothing to train on: give more pairs, or a smaller --holdout.")
    tokenizer = read_tokenizer(options.model, config)
    if options.method == "sft":
        train = [example._replace(rejected=None) for example in train]
        valid = [example._replace(rejected=None) for example in valid]
    tokenised = tokenise(train, tokenizer, options.max_length)
    held_out = tokenise(valid, tokenizer, options.max_length)
    _refuse_foreign_tokens(tokenised.items + held_out.items, config)
    return _Prepared(
        tokenised.items, held_out.items, valid or train, splits._replace(train=train, valid=valid), tokenised.cut
    )


def _refuse_foreign_tokens(pairs: list[TokenisedPair], config: dict[str, Any]) -> None:
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    for pair in pairs:
        highest = max(max(pair.prompt), max(pair.chosen), max(pair.rejected, default=0))
        if size and highest >= size:
            raise Refusal(
                f"{pair.source} has the token {highest}, but the model knows {size}: the tokenizer in the model's "
                "folder belongs to another model."
            )


def _cut_notes(cut: CutCounts, options: TrainOptions) -> Iterator[Note]:
    if cut.pairs:
        yield Note(
            f"--max-length {options.max_length} cut {cut.pairs} pairs: {cut.prompts} prompts from the left, "
            f"{cut.responses} answers at their end, {cut.tokens} tokens in all."
        )


def _with_adapter_shape(options: TrainOptions) -> tuple[TrainOptions, adapters.AdapterShape | None]:
    """Fill rank, alpha and dropout from the start adapter, or from the defaults."""
    if options.adapter is None:
        rank = options.rank or 8
        alpha = options.alpha or 16.0
        return replace(options, rank=rank, alpha=alpha, dropout=options.dropout or 0.0), None
    shape = adapters.read_shape(options.adapter)
    for name, own in (("rank", shape.rank), ("alpha", shape.alpha)):
        given = getattr(options, name)
        if given is not None and abs(given - own) > 1e-6:
            raise Refusal(f"--{name} is {given:g}, but the adapter {options.adapter} has {own:g}: leave it away.")
    if options.targets or options.layers:
        raise Refusal("--targets and --layers are those of the adapter that training starts from: leave them away.")
    dropout = shape.dropout if options.dropout is None else options.dropout
    return replace(options, rank=shape.rank, alpha=shape.alpha, dropout=dropout), shape


def _order(options: TrainOptions, examples: int) -> Order:
    return Order(examples, options.batch_size, options.grad_accumulation, options.seed, options.shuffle)


def _attach(loaded: Loaded, options: TrainOptions, shape: adapters.AdapterShape | None) -> TrainOptions:
    """Put the adapter to be trained into the model."""
    if shape is not None and options.adapter is not None:
        record.refuse_other_base(options.adapter, options.model)
        adapters.load_adapter(loaded.model, options.adapter)
        adapters.set_dropout(loaded.model, options.dropout or 0.0)
    else:
        adapters.attach(loaded.model, _fresh_shape(loaded, options), options.seed)
    adapters.unfreeze(loaded.model)
    return options


def _fresh_shape(loaded: Loaded, options: TrainOptions) -> adapters.AdapterShape:
    blocks = len(loaded.model.layers)
    if options.layers and options.layers > blocks:
        raise Refusal(f"--layers is {options.layers}, but this model has {blocks} blocks: give at most {blocks}.")
    rank, alpha = options.rank or 8, options.alpha or 16.0
    keys = adapters.chosen_keys(loaded.model, options.targets)
    return adapters.AdapterShape(rank, alpha / rank, options.dropout or 0.0, keys, options.layers or blocks)


def _trained(
    options: TrainOptions,
    loaded: Loaded,
    prepared: _Prepared,
    order: Order,
    plan: Plan,
    stop: Callable[[], bool],
    started: float,
) -> Iterator[Event]:
    run = _Run(options, loaded, prepared, order, plan.steps)
    yield from run.begin()
    while run.trainer.steps_done < plan.steps:
        yield Stepped(run.stepped(), plan.steps)
        done = run.trainer.steps_done
        if options.eval_every and done % options.eval_every == 0 and done < plan.steps:
            yield from run.evaluation()
        if stop() and done < plan.steps:
            run.save()
            yield Interrupted(done, f"mlx_dpo train --resume --config {options.out / record.RUN}")
            return
        if options.save_every and done % options.save_every == 0:
            run.save()
    yield from run.finish()
    yield Finished(options.out, options.out / report.REPORT, time.perf_counter() - started)


class _Run:
    """A run on disk and in memory: trainer, held-out reference, samples and metrics."""

    def __init__(self, options: TrainOptions, loaded: Loaded, prepared: _Prepared, order: Order, steps: int):
        self.options, self.loaded, self.prepared, self.order = options, loaded, prepared, order
        self.cut: Parts | None = parts(loaded.model)
        self.settings = _settings(options, steps)
        self.valid_reference: PairLogps | None = None
        self.before: list[str] = []
        self.scores: dict[str, float] = {}

    def begin(self) -> Iterator[Event]:
        """Score the reference, check the start, answer the sample questions, take up a checkpoint."""
        reference = None
        if self.options.method == "dpo":
            reference = yield from self._scores("Scoring the reference", self.prepared.train)
        if self.prepared.valid:
            self.valid_reference = yield from self._scores("Scoring held-out pairs", self.prepared.valid)
        self.trainer = Trainer(
            self.loaded.model, self.cut, self.prepared.train, self.order, reference, self.settings
        )
        self.trainer.check_start()
        yield Phase("Answers before training", 0, 1)
        self.before = self._answers()
        self.options.out.mkdir(parents=True, exist_ok=True)
        if self.options.resume:
            yield from self._resumed()
        else:
            record.write_options(self.options.out, as_toml(self.options))
        self.metrics = record.Metrics(self.options.out, self.trainer.steps_done)

    def _resumed(self) -> Iterator[Event]:
        record.refuse_other_options(self.options.out, as_toml(self.options))
        found = checkpoint.newest(self.options.out / record.CHECKPOINTS)
        if found is None:
            yield Note("There is no checkpoint yet: starting from the first step.")
            return
        state, path, damaged = found
        if state.numbers["data"] != fingerprint(self.prepared.splits.train):
            raise Refusal(f"{self.options.data} is not what this run was begun with: restore it, or start anew.")
        for file in damaged:
            yield Note(f"{file} is damaged and was passed over.")
        self.trainer.restore(state)
        yield Note(f"Going on after step {self.trainer.steps_done} ({path.name}).")

    def _scores(self, name: str, pairs: list[TokenisedPair]) -> Iterator[Any]:
        self.loaded.model.eval()
        yield Phase(name, 0, len(pairs))
        for event in scored(self.loaded.model, self.cut, pairs, self.options.batch_size):
            if isinstance(event, Progress):
                yield Phase(name, event.done, event.total)
            else:
                return event
        return None

    def stepped(self) -> dict[str, float]:
        """Take a step and write its row."""
        numbers = self.trainer.step()
        self.metrics.add(numbers)
        return numbers

    def evaluation(self) -> Iterator[Event]:
        """Score the held-out pairs under the adapter as it is, over all of them at once."""
        if not self.prepared.valid or self.valid_reference is None:
            return
        policy = yield from self._scores("Evaluating held-out pairs", self.prepared.valid)
        self.scores = evaluated(policy, self.valid_reference, self.prepared.valid, self.settings)
        self.metrics.add({"step": self.trainer.steps_done} | self.scores)
        yield Evaluated(self.scores)

    def save(self) -> None:
        """Write a checkpoint."""
        state = self.trainer.checkpoint()
        state.numbers["data"] = fingerprint(self.prepared.splits.train)
        checkpoint.save(self.options.out / record.CHECKPOINTS, self.trainer.steps_done, state)

    def finish(self) -> Iterator[Event]:
        """Evaluate, answer again, and write the adapter with its manifest and report."""
        self.save()
        yield from self.evaluation()
        yield Phase("Answers after training", 0, 1)
        after = self._answers()
        out = self.options.out
        shape = self._shape()
        facts = {
            "kind": "adapter",
            "base": record.base_facts(self.options.model),
            "data": {"path": str(self.options.data), "sha256": fingerprint(self.prepared.splits.train)},
            "options": as_toml(self.options),
            "scores": self.scores,
        }
        page = report.page(self.options, self.metrics.rows, self._samples(after), facts)
        report.write(out, page)
        weights = adapters.adapter_weights(self.loaded.model)
        adapters.check_finite(weights, "The trained adapter")
        adapters.save_adapter(out, weights, shape, str(self.options.model))
        record.write_manifest(out, facts)

    def _shape(self) -> adapters.AdapterShape:
        if self.options.adapter is not None:
            shape = adapters.read_shape(self.options.adapter)
            return replace(shape, dropout=self.options.dropout or 0.0)
        return _fresh_shape(self.loaded, self.options)

    def _sample_examples(self) -> list[Example]:
        seen: dict[Any, Example] = {}
        for example in self.prepared.held_out:
            seen.setdefault(str(example.prompt), example)
        return list(seen.values())[: self.options.samples]

    def _answers(self) -> list[str]:
        self.loaded.model.eval()
        prompts = [prompt_ids(self.loaded.tokenizer, e.prompt) for e in self._sample_examples()]
        return greedy_answers(self.loaded, prompts, self.options.sample_tokens) if prompts else []

    def _samples(self, after: list[str]) -> list[report.Sample]:
        held_out = bool(self.prepared.valid)
        return [
            report.Sample(example.prompt[-1]["content"], before, now, held_out)
            for example, before, now in zip(self._sample_examples(), self.before, after, strict=True)
        ]


def _settings(options: TrainOptions, steps: int) -> Settings:
    return Settings(
        method=options.method,
        loss=options.loss,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        sft_weight=options.sft_weight,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_steps=warmup_steps(options.warmup, steps),
        steps=steps,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        grad_checkpoint=options.grad_checkpoint,
    )


if __name__ == "__main__":
    import sys

    from mlx_dpo.cli import main

    main(["train", *sys.argv[1:]])
