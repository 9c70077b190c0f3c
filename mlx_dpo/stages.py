"""Several training runs as one: each stage starts from the adapter of the one before, which is its reference too."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_dpo import storage, train
from mlx_dpo.align import record
from mlx_dpo.align.events import Event, Finished, Interrupted, Note, Stage
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.align.report import REPORT
from mlx_dpo.models.adapters import CONFIG, WEIGHTS
from mlx_dpo.refusal import Refusal

_RESULT = (WEIGHTS, CONFIG, REPORT, record.MANIFEST)  # the manifest last: it ends a run
_SHARED = ("model", "out", "adapter")


def run(stages: Sequence[TrainOptions], stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Train one stage after the other, each in a folder of its own below --out, which gets the last one's result.

    Raises Refusal where the stages do not fit together, and where `train.run` does.
    """
    out, resume = stages[0].out, stages[0].resume
    _refuse_misfits(stages)
    if not stages[0].dry_run:
        _check_out(out, resume)
    placed = _placed(stages)
    end: Finished | None = None
    for number, (given, options) in enumerate(zip(stages, placed, strict=True), start=1):
        yield Stage(number, len(stages), given.method)
        if resume and (options.out / record.MANIFEST).exists():
            yield Note("This stage is finished.")
            continue
        if not options.dry_run:
            with storage.writing(out):
                _write_record(out, stages)
        resuming = resume and (options.out / record.RUN).exists()
        for event in train.run(replace(options, resume=resuming), stop):
            if isinstance(event, Interrupted):
                yield Interrupted(event.steps_done, record.resume_command(out))
                return
            if isinstance(event, Finished):
                end = event
            else:
                yield event
    if not stages[0].dry_run:
        with storage.writing(out, "make room there, and go on with --resume"):
            _take_result(out, placed)
        yield _ended(out, end)


def _ended(out: Path, end: Finished | None) -> Finished:
    if end is None:  # every stage was finished before, and only its result had not been taken
        return Finished(out, out / REPORT, {}, [], 0.0)
    return end._replace(out=out, report=out / REPORT)


def _refuse_misfits(stages: Sequence[TrainOptions]) -> None:
    first = stages[0]
    for number, options in enumerate(stages[1:], start=2):
        for name in ("model", "out"):
            if getattr(options, name) != getattr(first, name):
                raise Refusal(f"Stage {number} has another --{name} than stage 1: give it once, above the stages.")
        if options.adapter is not None:
            raise Refusal(f"Stage {number} starts from stage {number - 1}: leave its --adapter away.")


def _check_out(out: Path, resume: bool) -> None:
    begun = (out / record.RUN).exists()
    if resume and not begun:
        raise Refusal(f"{out} holds no {record.RUN}, so there is no run to resume: leave --resume away.")
    if resume and (out / record.MANIFEST).exists():
        raise Refusal(f"The run in {out} is finished: there is nothing to resume.")
    if begun and not resume:
        raise Refusal(f"{out} holds a run already: add --resume to go on with it, or choose another --out.")
    if not begun:
        storage.refuse_occupied(out)
        storage.refuse_unwritable(out)


def _placed(stages: Sequence[TrainOptions]) -> list[TrainOptions]:
    """The stages with a folder each, and each but the first with the adapter of the one before."""
    result: list[TrainOptions] = []
    for number, options in enumerate(stages, start=1):
        own = replace(options, out=options.out / f"stage-{number}-{options.method}")
        if result and options.dry_run:
            # There is no adapter yet: its shape is that of the stage that will make it.
            before = result[-1]
            own = replace(own, rank=own.rank or before.rank, layers=own.layers or before.layers)
        elif result:
            own = replace(own, adapter=result[-1].out)
        result.append(own)
    return result


def _write_record(out: Path, stages: Sequence[TrainOptions]) -> None:
    shared = {name: value for name, value in as_toml(stages[0]).items() if name in _SHARED}
    own = [{n: v for n, v in as_toml(options).items() if n not in _SHARED and v is not None} for options in stages]
    record.write_options(out, shared | {"stage": own})


def _take_result(out: Path, placed: Sequence[TrainOptions]) -> None:
    """Put the last stage's files, and every stage's numbers, into `out`."""
    rows: list[dict[str, Any]] = []
    for number, options in enumerate(placed, start=1):
        rows += [{"stage": number} | row for row in record.read_metrics(options.out)]
    record.write_rows(out / record.METRICS, rows)
    for name in _RESULT:
        partial = out / f".part-{name}"
        shutil.copyfile(placed[-1].out / name, partial)
        partial.replace(out / name)
