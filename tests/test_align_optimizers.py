"""The optimisers: which weights they move and how far, and that a resumed run goes on with their state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from mlx_dpo.align.events import Interrupted
from mlx_dpo.align.record import read_metrics

Folder = Callable[[str], Path]
EVERY = ["adamw", "adafactor", "muon", "lion"]


def moved(folder: Path, steps: int = 1, dora: bool = False, **options: Any) -> dict[str, np.ndarray]:
    """How far each weight of a fresh adapter has gone after a few steps."""
    loaded = runs.adapted(folder, kind="dora" if dora else "lora")
    before = runs.weights(loaded)
    trainer = runs.trainer(loaded, steps, learning_rate=1e-3, **options)
    for _ in range(steps):
        trainer.step()
    return {name: value - before[name] for name, value in runs.weights(loaded).items()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dora", [False, True])
def test_it_moves_every_weight_that_has_a_gradient(tiny_folder: Folder, name: str, dora: bool):
    for path, change in moved(tiny_folder("llama"), steps=2, optimizer=name, dora=dora).items():
        assert np.isfinite(change).all(), path
        assert np.abs(change).max() > 1e-7, path


def test_lion_moves_each_weight_by_the_rate(tiny_folder: Folder):
    for path, change in moved(tiny_folder("llama"), optimizer="lion").items():
        if path.endswith("lora_b"):
            assert np.abs(change) == pytest.approx(1e-3, rel=1e-3), path


def test_muon_moves_along_orthogonal_directions(tiny_folder: Folder):
    for path, change in moved(tiny_folder("llama"), optimizer="muon").items():
        if path.endswith("lora_b"):
            values = np.linalg.svd(change, compute_uv=False)
            assert values.max() < 2 * values.min(), path  # Newton-Schulz takes singular values to about 1


@pytest.mark.parametrize("name", EVERY)
def test_lora_plus_gives_b_its_own_rate_and_a_the_plain_one(tiny_folder: Folder, name: str):
    # After one step from B = 0 nothing of A has moved; after a second, A sees what a larger B does to its gradient.
    plain = moved(tiny_folder("llama"), optimizer=name)
    plus = moved(tiny_folder("llama"), optimizer=name, lora_plus=4.0)
    for path, change in plus.items():
        times = 4.0 if path.endswith("lora_b") else 1.0
        assert change == pytest.approx(times * plain[path], rel=1e-3, abs=1e-7), path


def test_weight_decay_shrinks_a_weight_without_a_gradient(tiny_folder: Folder):
    # A has no gradient while B is zero, so that decay alone moves it: by rate · decay of itself.
    loaded = runs.adapted(tiny_folder("llama"))
    before = runs.weights(loaded)
    runs.trainer(loaded, learning_rate=1e-3, weight_decay=0.5).step()
    for path, value in runs.weights(loaded).items():
        if path.endswith("lora_a"):
            assert value == pytest.approx((1 - 1e-3 * 0.5) * before[path], rel=1e-6), path


def test_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank(tiny_folder: Folder, tmp_path: Path):
    from mlx_dpo.models.adapters import read_shape

    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    chosen = runs.options(tiny_folder("llama"), data, tmp_path / "out", rslora=True, rank=16, alpha=8.0, steps=1)
    runs.run(chosen)
    assert read_shape(tmp_path / "out").scale == pytest.approx(8 / 4)
    runs.run(replace(chosen, rslora=False, out=tmp_path / "plain"))
    assert read_shape(tmp_path / "plain").scale == pytest.approx(8 / 16)


@pytest.mark.parametrize(
    "options", [*({"optimizer": name} for name in EVERY), {"lora_plus": 4.0}, {"dora": True}], ids=str
)
def test_a_resumed_run_ends_with_the_same_bytes(tiny_folder: Folder, tmp_path: Path, options: dict[str, Any]):
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    chosen = runs.options(tiny_folder("llama"), data, tmp_path / "out", epochs=2, batch_size=4, **options)
    runs.run(replace(chosen, out=tmp_path / "whole"))
    assert isinstance(runs.run(chosen, 2)[-1], Interrupted)
    runs.run(replace(chosen, resume=True))
    assert runs.adapter_bytes(chosen.out) == runs.adapter_bytes(tmp_path / "whole")
    assert runs.rows(chosen.out) == runs.rows(tmp_path / "whole")
    losses = [row["loss"] for row in read_metrics(chosen.out)]
    assert losses[-1] < losses[0]
