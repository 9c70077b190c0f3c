"""How a run computes: the shortcuts that its model allows on its own data, and what it remembers."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_dpo import machine
from mlx_dpo.align import reference
from mlx_dpo.align.events import Event, Note, Phase
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.scores import texts
from mlx_dpo.data.batches import by_length
from mlx_dpo.data.tokenised import TokenisedPair
from mlx_dpo.models.adapters import read_folder
from mlx_dpo.models.forward import Forward, same
from mlx_dpo.models.load import Loaded, compute_dtype
from mlx_dpo.models.lower import Kept

_SHARE_OF_DISK = 0.1
_ALONE = (
    "This model cannot go on from a prompt that was computed before: each answer is computed with its whole prompt, "
    "which gives the same numbers and takes longer."
)
_WHOLE = "What lies below the adapters cannot be computed apart in this model: it is computed in every step."


def forward_of(loaded: Loaded, pairs: Sequence[TokenisedPair], options: TrainOptions) -> Iterator[Any]:
    """Return the best forward pass for a model with its adapter, yielding a Note of each shortcut that is barred.

    Each is tried on a few tokens and then on the longest of `pairs`, where windows and position scaling would show.
    """
    best = Forward.of(loaded.model)
    longest = max(pairs, key=lambda pair: pair.longest)
    sharing = bool(longest.chosen and longest.rejected)
    plain = replace(best, shares=False, depth=0)
    said = texts([longest])
    if best.shares and sharing and not same(plain, replace(plain, shares=True), said):
        best = replace(best, shares=False)
    if best.depth and not same(plain, replace(plain, depth=best.depth), said):
        best = replace(best, depth=0)
        yield Note(_WHOLE)
    if sharing and not best.shares:
        yield Note(_ALONE)
    if best.depth and options.disk_limit != 0:
        with contextlib.suppress(OSError):  # without the disk it is computed anew in every step
            folder = machine.cache_folder()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            free = _SHARE_OF_DISK * shutil.disk_usage(folder).free
            best = best.keeping(Kept(folder, free if options.disk_limit is None else options.disk_limit * 1e9))
    return best


def fill(forward: Forward, pairs: Sequence[TokenisedPair], batch_size: int) -> Iterator[Event]:
    """Compute what lies below the adapters, always in the same batches, so that a resumed run has the same bits."""
    if forward.kept is None or not pairs:
        return
    lengths = [pair.longest for pair in pairs]
    done = 0
    for batch in by_length(lengths, batch_size):
        forward.states(forward.rows_of(texts([pairs[i] for i in batch])))
        done += len(batch)
        yield Phase("Computing what lies below the adapters", done, len(pairs))


def remembered(loaded: Loaded, origin: dict[str, Any], options: TrainOptions) -> reference.Remembered | None:
    """What is known of the reference that `origin` names, None where nothing may be kept on disk."""
    if options.disk_limit == 0:
        return None
    kind = mx.default_device().type.name
    start = None if options.adapter is None else read_folder(options.adapter)
    name = reference.identity(origin, loaded.config, start, str(compute_dtype(loaded.model)), kind)
    return reference.Remembered(machine.cache_folder(), name)
