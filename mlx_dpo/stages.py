"""Several training runs as one: each stage starts from the adapter of the one before, which is its reference too."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_dpo import storage, train
from mlx_dpo.align import checkpoint, ranks, record
from mlx_dpo.align.adapting import shape_to_be
from mlx_dpo.align.events import Event, Finished, Interrupted, Note, Phase, Stage
from mlx_dpo.align.options import TrainOptions, as_toml, flag
from mlx_dpo.align.report import REPORT
from mlx_dpo.models.adapters import CONFIG, WEIGHTS, AdapterShape
from mlx_dpo.models.weights import read_json
from mlx_dpo.refusal import Refusal

_RESULT = (WEIGHTS, CONFIG, REPORT, record.MANIFEST)  # the manifest last: it ends a run
_SHARED = ("model", "out")
_Table = dict[str, Any]


def run(stages: Sequence[TrainOptions], stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Train one stage after the other, each in a folder of its own below --out, which gets the last one's result.

    Raises Refusal where the stages do not fit together and where `train.run` does, for all of them before the first
    is trained.
    """
    if ranks.group().size > 1:
        raise Refusal("Stages are trained by one process: start each stage by itself to share it among several.")
    _refuse_misfits(stages)
    out, placed = stages[0].out, _placed(stages)
    _check_out(stages)
    if stages[0].dry_run:
        yield from _checked(placed)
        return
    with storage.writing(out, "make room there, and go on with --resume"):
        _clear(placed)
        yield from _checked(placed)
        _write_record(out, stages)
        ends: list[Finished] = []
        for number, options in enumerate(placed, start=1):
            yield Stage(number, len(placed), options.method)
            if (options.out / record.MANIFEST).exists():
                yield Note("This stage is finished.")
                continue
            for event in train.run(replace(options, resume=_is_begun(options)), stop, home=out):
                if isinstance(event, Finished):
                    ends.append(event)
                else:
                    yield event
                if isinstance(event, Interrupted):
                    return
        _take_result(out, placed)
    yield _ended(out, ends)


def _ended(out: Path, ends: Sequence[Finished]) -> Finished:
    """The end of the last stage that was trained; none was where only the result had not been taken."""
    last = ends[-1] if ends else Finished(out, out / REPORT, {}, [], 0.0)
    return last._replace(out=out, report=out / REPORT, seconds=sum(end.seconds for end in ends))


def _refuse_misfits(stages: Sequence[TrainOptions]) -> None:
    first = stages[0]
    for number, options in enumerate(stages[1:], start=2):
        for name in (*_SHARED, "resume", "dry_run"):
            if getattr(options, name) != getattr(first, name):
                raise Refusal(f"Stage {number} has another {flag(name)} than stage 1: give it once, above the stages.")
        if options.adapter is not None:
            raise Refusal(f"Stage {number} starts from stage {number - 1}: give --adapter in the first [[stage]] only.")


def _placed(stages: Sequence[TrainOptions]) -> list[TrainOptions]:
    """The stages with a folder each, and each but the first with the adapter of the one before."""
    result: list[TrainOptions] = []
    for number, options in enumerate(stages, start=1):
        own = replace(options, out=options.out / f"stage-{number}-{options.method}")
        result.append(replace(own, adapter=result[-1].out) if result else own)
    return result


def _check_out(stages: Sequence[TrainOptions]) -> None:
    out, begun = stages[0].out, (stages[0].out / record.RUN).exists()
    if stages[0].resume:
        _refuse_other_stages(out, [_own(options) for options in stages])
    elif begun:
        raise Refusal(f"{out} holds a run already: add --resume to go on with it, or choose another --out.")
    elif not stages[0].dry_run:
        storage.refuse_occupied(out)
        storage.refuse_unwritable(out)


def _refuse_other_stages(out: Path, stages: Sequence[_Table]) -> None:
    """Raise Refusal where there is nothing to go on with, or where other stages were begun."""
    before = record.read_options(out).get("stage")
    if before is None:
        raise Refusal(
            f"{out} holds a run that has no stages: go on with it by {record.resume_command(out)}, or choose another "
            "--out."
        )
    if (out / record.MANIFEST).exists():
        raise Refusal(f"The run in {out} is finished: there is nothing to resume.")
    if len(before) != len(stages):
        raise Refusal(
            f"There are {len(stages)} stages here and {len(before)} in {out / record.RUN}: resume with the run's own, "
            "or start anew in another --out."
        )
    for number, (old, new) in enumerate(zip(before, stages, strict=True), start=1):
        record.refuse_changes(old, new, out / record.RUN, f" of stage {number}")


def _is_begun(options: TrainOptions) -> bool:
    return options.resume and (options.out / record.RUN).exists()


def _clear(placed: Sequence[TrainOptions]) -> None:
    """Remove what a kill left of a record before there was one."""
    for options in placed:
        if not (options.out / record.RUN).exists():
            for partial in options.out.glob(f".{record.RUN}.part-*"):
                partial.unlink()


def _checked(placed: Sequence[TrainOptions]) -> Iterator[Event]:
    """Check every stage before one is trained; a dry run tells of each."""
    shape: AdapterShape | None = None
    # Which modules targets come to, only the model can tell.
    exact = any(options.targets for options in placed[1:])
    for number, options in enumerate(placed, start=1):
        count = len(placed)
        yield Stage(number, count, options.method) if options.dry_run else Phase("Checking", number - 1, count)
        try:
            ready = train.checked(replace(options, resume=_is_begun(options)), shape)
            if _is_begun(options):
                _refuse_other_files(ready)
            if not options.dry_run:
                ready.refuse_too_large()
            shape = shape_to_be(ready.options, shape, exact=exact)
        except Refusal as fault:
            raise Refusal(f"Stage {number}: {fault}") from fault
        if options.dry_run:
            yield from ready.announced()


def _refuse_other_files(ready: train.Checked) -> None:
    """Raise Refusal where a stage that was begun, or is finished, saw other files than those that are there now."""
    options, examples = ready.options, ready.examples
    manifest = options.out / record.MANIFEST
    found = checkpoint.newest(options.out / record.CHECKPOINTS)
    if found is not None and (options.adapter is None or (options.adapter / WEIGHTS).exists()):
        *data, questions = examples.origin
        now = record.origin(options.model, options.adapter, data, questions)
        record.refuse_other_origin(found.state.numbers["origin"], now)
    elif manifest.exists():
        record.refuse_other_origin({"data": read_json(manifest)["data"]["sha256"]}, {"data": examples.fingerprint})


def _own(options: TrainOptions) -> _Table:
    """What a stage's own table says."""
    return {name: value for name, value in as_toml(options).items() if name not in _SHARED and value is not None}


def _write_record(out: Path, stages: Sequence[TrainOptions]) -> None:
    shared = {name: value for name, value in as_toml(stages[0]).items() if name in _SHARED}
    record.write_options(out, shared | {"stage": [_own(options) for options in stages]})


def _take_result(out: Path, placed: Sequence[TrainOptions]) -> None:
    """Put the last stage's files, and every stage's numbers and answers, into `out`."""
    for name in (record.METRICS, record.SAMPLES):
        rows: list[_Table] = []
        for number, options in enumerate(placed, start=1):
            rows += [{"stage": number} | row for row in record.read_rows(options.out / name)]
        record.write_rows(out / name, rows)
    for name in _RESULT:
        partial = out / f".part-{name}"
        shutil.copyfile(placed[-1].out / name, partial)
        storage.put_in_place(partial, out / name)
