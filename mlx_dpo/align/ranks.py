"""Several processes on one run: every rank does the same, and the first one's folder is the run's."""

import base64
import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_dpo.align import record
from mlx_dpo.align.options import TrainOptions, as_toml
from mlx_dpo.models.group import Group, joined
from mlx_dpo.storage import write_whole

# May differ from machine to machine, as may the folder that a relative --out is looked for in.
_OWN = {"model", "data", "adapter", "questions", "out", "memory-limit", "disk-limit"}


@functools.cache
def group() -> Group:
    """The processes that this one was started with, by mlx.launch or mpirun; alone where there are none."""
    return joined()


@contextlib.contextmanager
def own_folder(options: TrainOptions, ranks: Group) -> Iterator[TrainOptions]:
    """The options of this rank: all but the first work in a folder that goes with the block, and track nothing.

    It begins with what the first rank's --out holds where a run goes on. Raises Refusal where ranks were not given the
    same.
    """
    ranks.agree("version of mlx_dpo and its libraries", json.dumps(record.versions()))
    given = as_toml(options)
    same = {name: value for name, value in given.items() if name not in _OWN}
    ranks.agree("options", json.dumps([same, options.resume, options.dry_run]))
    before: dict[str, str] = {}
    if options.resume:
        before = ranks.from_first(_packed(options.out) if ranks.is_first else None)
    if ranks.is_first:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="mlx_dpo-") as folder:
        out = Path(folder) / "run"
        for name, text in before.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out / name, base64.b64decode(text))
        if record.RUN in before:  # with this rank's own places, since they will be compared
            record.write_options(out, record.read_options(out) | {name: given[name] for name in _OWN})
        yield replace(options, out=out, track=())


def refuse_other_files(origin: dict[str, Any], ranks: Group) -> None:
    """Raise Refusal where the ranks have other weights, data or questions, whatever their files are called."""
    for name, value in origin.items():
        ranks.agree(name, json.dumps(value))


def _packed(out: Path) -> dict[str, str]:
    """What a run needs to go on, as text by file name."""
    names = [record.RUN, record.METRICS, record.SAMPLES]
    files = [out / name for name in names] + sorted((out / record.CHECKPOINTS).rglob("*.safetensors"))
    there = [path for path in files if path.is_file()]
    return {path.relative_to(out).as_posix(): base64.b64encode(path.read_bytes()).decode() for path in there}
