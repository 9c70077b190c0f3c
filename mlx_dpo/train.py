"""One training run, from options to adapter (`python -m mlx_dpo.train` is `mlx_dpo train`)."""

import runpy
import sys

if __name__ == "__main__":  # ahead of the other imports, because the entry point decides what may reach out
    sys.argv.insert(1, "train")
    runpy.run_module("mlx_dpo", run_name="__main__", alter_sys=True)

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mlx_dpo import storage
from mlx_dpo.align import ranks, record
from mlx_dpo.align.adapting import attached, with_adapter_shape
from mlx_dpo.align.demands import refuse_absurd, resolved
from mlx_dpo.align.events import Event, Note, Phase, Planned
from mlx_dpo.align.examples import Prepared, prepared
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.plan import Plan, limit_gb, planned, refuse_too_large
from mlx_dpo.align.run import Run
from mlx_dpo.align.schedule import default_rate
from mlx_dpo.align.tracking import refuse_missing
from mlx_dpo.data.batches import Order
from mlx_dpo.data.tokenised import CutCounts
from mlx_dpo.models.adapters import AdapterShape
from mlx_dpo.models.load import load_to_compute, read_config
from mlx_dpo.models.sizes import sizes
from mlx_dpo.refusal import Refusal


class Checked(NamedTuple):
    """A run that may begin: its options with nothing left open, its examples, their order, and the plan."""

    options: TrainOptions
    examples: Prepared
    order: Order
    plan: Plan

    def announced(self) -> Iterator[Event]:
        """What there is to say before the model is loaded."""
        yield from _cut_note(self.examples.cut, self.options)
        yield Planned(self.plan)

    def refuse_too_large(self) -> None:
        """Raise Refusal where the plan takes more memory than may be used."""
        refuse_too_large(self.plan, self.options, read_config(self.options.model), self.examples.train)


def run(
    options: TrainOptions, stop: Callable[[], bool] = lambda: False, *, home: Path | None = None
) -> Iterator[Event]:
    """Train, yielding what happens; `stop` is asked after each step, and True ends the run with all saved.

    `home` is the folder whose run.toml goes on with the run, where that is not --out. Started by mlx.launch, the
    processes share the work, and the first one's events and folder are the run's. Raises Refusal, before the model is
    loaded where that is possible, for anything that cannot be right.
    """
    group = ranks.group()
    with ranks.own_folder(options, group) as own:
        _refuse_finished(own)
        ready = checked(own)
        yield from ready.announced()
        if own.dry_run:
            return
        ready.refuse_too_large()
        yield Phase("Loading the model", 0, 1)
        loaded = load_to_compute(own.model)
        shape = attached(loaded, ready.options)
        with storage.writing(home or own.out, "make room there, and go on with --resume"):
            begun = Run(ready.options, loaded, shape, ready.examples, ready.order, ready.plan, group=group, home=home)
            yield from begun.events(stop)


def checked(options: TrainOptions, start: AdapterShape | None = None) -> Checked:
    """Check all of a run that can be known before its model is loaded.

    `start` is the shape of --adapter where that is still to be trained. Raises Refusal for anything that cannot be
    right.
    """
    refuse_absurd(options)
    options = resolved(options)
    for kind in options.track:
        refuse_missing(kind)
    config = read_config(options.model)
    if options.learning_rate is None:
        options = replace(options, learning_rate=default_rate(sizes(config).hidden))
    options = with_adapter_shape(options, start)
    if options.resume and options.holdout is None:
        options = replace(options, holdout=record.read_options(options.out).get("holdout"))
    _check_out(options)
    examples = prepared(options, config)
    options = replace(options, holdout=examples.holdout)
    order = Order(len(examples.train), options.batch_size, options.grad_accumulation, options.seed, options.shuffle)
    plan = planned(options, config, examples.train, examples.valid, order, limit_gb(options))
    _refuse_endless_warmup(options, plan.steps)
    return Checked(options, examples, order, plan)


def _refuse_finished(options: TrainOptions) -> None:
    out = options.out
    if options.resume and (out / record.RUN).exists() and (out / record.MANIFEST).exists():
        raise Refusal(f"The run in {out} is finished: there is nothing to resume.")


def _check_out(options: TrainOptions) -> None:
    out = options.out
    if out.resolve() == options.model.resolve():
        raise Refusal("--out is the model's own folder: choose another, so that the model stays as it is.")
    if options.resume:
        if "stage" in record.read_options(out):
            raise Refusal(f"The run in {out} is one in stages: go on with it by {record.resume_command(out)}.")
        record.refuse_other_options(out, as_toml(options))
    elif (out / record.RUN).exists():
        raise Refusal(f"{out} holds a run already: add --resume to go on with it, or choose another --out.")
    elif not options.dry_run:
        storage.refuse_occupied(out)
        storage.refuse_unwritable(out)


def _cut_note(cut: CutCounts, options: TrainOptions) -> Iterator[Note]:
    if cut.pairs:
        yield Note(
            f"--max-length {options.max_length} cut {cut.pairs} pairs: {cut.prompts} prompts from the left, "
            f"{cut.responses} answers at their end, {cut.tokens} tokens in all."
        )


def _refuse_endless_warmup(options: TrainOptions, steps: int) -> None:
    if options.warmup >= 1 and options.warmup > steps:
        raise Refusal(
            f"--warmup {options.warmup:g} is longer than the whole run ({steps} steps): give fewer steps, or a share "
            "below 1."
        )
