"""Small runs for tests: their options, their pairs on disk, a trainer without a folder, what they leave behind."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import parity
from mlx.utils import tree_unflatten

from mlx_dpo import train
from mlx_dpo.align.demands import resolved
from mlx_dpo.align.events import Event
from mlx_dpo.align.loss import Loss
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.plan import Batching
from mlx_dpo.align.record import read_metrics
from mlx_dpo.align.scores import Scores, mismatched, scored
from mlx_dpo.align.trainer import Trainer
from mlx_dpo.data.batches import Order
from mlx_dpo.data.examples import example
from mlx_dpo.data.tokenised import TokenisedPair, tokenise
from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, blocks, load

TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")


def write_pairs(path: Path, rows: Iterable[dict[str, Any]] = parity.PAIRS) -> Path:
    """Pairs as JSON Lines; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(model: Path, data: Path, out: Path, **more: Any) -> TrainOptions:
    """Options that learn fast, by plain DPO, and answer no questions."""
    fast = {"rank": 4, "learning_rate": 5e-3, "batch_size": 4, "samples": 0, "sample_tokens": 8}
    if more.get("method") != "sft":
        fast["loss"] = "sigmoid"
    return TrainOptions(model=model, data=data, out=out, **(fast | more))


def run(chosen: TrainOptions, stop_after: int | None = None) -> list[Event]:
    """The events of a run that is stopped after so many calls of `stop`, or never."""
    asked = iter(range(1, 1_000_000))
    return list(train.run(chosen, lambda: next(asked) == stop_after))


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock and the memory say."""
    return [_without_times(row) for row in read_metrics(out)]


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in TIMES}
    if "abandoned" in kept:
        kept["abandoned"] = [_without_times(abandoned) for abandoned in kept["abandoned"]]
    return kept


def adapter_bytes(out: Path) -> bytes:
    """The weights of a finished run."""
    return (out / "adapters.safetensors").read_bytes()


def pairs(loaded: Loaded, count: int = len(parity.PAIRS)) -> list[TokenisedPair]:
    """The first parity pairs as token ids."""
    made = [example(row, f"row {number}", kind="pairs") for number, row in enumerate(parity.PAIRS[:count])]
    return tokenise([item for item in made if not isinstance(item, list)], loaded.tokenizer, None).items


def adapted(
    folder: Path,
    *,
    targets: Sequence[str] = (),
    layers: int | None = None,
    seed: int | None = None,
    kind: adapters.Kind = "lora",
) -> Loaded:
    """A loaded model with an adapter of rank 4; its B is random where a seed is given, zero otherwise."""
    loaded = load(folder)
    keys = adapters.chosen_keys(loaded.model, targets)
    attach(loaded, adapters.AdapterShape(4, 2.0, 0.0, keys, layers or len(blocks(loaded.model)), kind), seed)
    return loaded


def attach(loaded: Loaded, shape: adapters.AdapterShape, seed: int | None) -> None:
    """Put an adapter into a model; its B is random where a seed is given, zero otherwise."""
    adapters.attach(loaded.model, shape, seed=7)
    if seed is not None:
        named = sorted(adapters.adapter_weights(loaded.model).items())
        keys = mx.random.split(mx.random.key(seed), len(named))
        moved = [
            (name, mx.random.normal(value.shape, key=key) * 0.05)
            for (name, value), key in zip(named, keys, strict=True)
            if name.endswith("lora_b")
        ]
        loaded.model.update(tree_unflatten(moved))


def reference(loaded: Loaded, items: Sequence[TokenisedPair], loss: Loss) -> Scores:
    """What the model says without its adapter."""
    with adapters.switched_off(loaded.model):
        *_, found = scored(Forward.of(loaded.model), items, 4, loss.sums)
    assert isinstance(found, Scores)
    return found


def referring(loaded: Loaded, items: Sequence[TokenisedPair], loss: Loss, block: int) -> Loss:
    """The loss with what its reference says of the items, where it needs one."""
    if not loss.terms.needs_reference:
        return loss
    known = reference(loaded, items, loss)
    if not loss.terms.is_unpaired:
        return replace(loss, reference=known)
    strangers = mismatched(items, block)
    theirs = reference(loaded, strangers, loss).chosen.plain
    return replace(loss, reference=known, strangers=strangers, strangers_reference=theirs)


def singles(items: Sequence[TokenisedPair]) -> list[TokenisedPair]:
    """All pairs' thumbs up, then all their thumbs down."""
    return [pair._replace(rejected=[]) for pair in items] + [pair._replace(chosen=[]) for pair in items]


def trainer(loaded: Loaded, steps: int = 3, count: int = len(parity.PAIRS), **more: Any) -> Trainer:
    """A trainer on the first parity pairs, in their order, that no folder is needed for."""
    nowhere = Path("nowhere")
    still = {"schedule": "constant", "shuffle": False}
    chosen = resolved(options(nowhere, nowhere, nowhere, **(still | more)))
    if chosen.dropout:
        adapters.set_dropout(loaded.model, chosen.dropout)
    items, loss = pairs(loaded, count), Loss.of(chosen)
    if chosen.method == "sft":
        items = [pair._replace(rejected=[]) for pair in items]
    elif loss.terms.is_unpaired:
        items = singles(items)
    loss = referring(loaded, items, loss, chosen.batch_size * chosen.grad_accumulation)
    order = Order(len(items), chosen.batch_size, chosen.grad_accumulation, chosen.seed, chosen.shuffle)
    return Trainer(
        Forward.of(loaded.model), items, order, loss, chosen, steps, Batching(recompute=chosen.grad_checkpoint)
    )


def named(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree by path."""
    return sorted(named_arrays(tree).items())


def weights(loaded: Loaded) -> dict[str, np.ndarray]:
    """The adapter's tensors."""
    return {name: np.array(value) for name, value in adapters.adapter_weights(loaded.model).items()}


def naive_log_p(model: Any, prompt: Sequence[int], response: Sequence[int]) -> float:
    """log p of a response in nats: one sequence by itself, one token after the other, in float64."""
    logits = np.array(model(mx.array([[*prompt, *response]])).astype(mx.float32)).astype(np.float64)[0]
    total = 0.0
    for number, token in enumerate(response):
        row = logits[len(prompt) + number - 1]
        total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
    return total
