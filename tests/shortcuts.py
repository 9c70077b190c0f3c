"""A run on the parity pairs with a place of its own to remember, and what two such runs have to have alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import runs
import tiny

from mlx_dpo.align.options import TrainOptions
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.lora import adapted_layers

Folder = Callable[[str], Path]
Row = dict[str, Any]
PLACE = "reference.sqlite"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for what is remembered."""
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path, cache: Path) -> TrainOptions:
    data = runs.write_pairs(tmp_path / "pairs.jsonl")
    return runs.options(tiny_folder("llama"), data, tmp_path / "out", holdout=0.3, batch_size=2)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, "deep", tiny.FAMILIES["llama"] | {"num_hidden_layers": 4})
        return tiny.write_model(tmp_path_factory.mktemp("deep") / "model", "deep")


@pytest.fixture
def deep(options: TrainOptions, deep_model: Path) -> TrainOptions:
    return replace(options, model=deep_model, layers=1, epochs=2)


@pytest.fixture
def reference_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass without the adapter has gone over, filled as the runs go."""
    original, passes = Forward.token_logps, []

    def counting(self: Forward, rows: Any, *args: Any, **kwargs: Any) -> mx.array:
        if not adapted_layers(self.model):
            passes.append(len(rows.said))
        return original(self, rows, *args, **kwargs)

    monkeypatch.setattr(Forward, "token_logps", counting)
    return passes


def numbers(out: Path) -> list[Row]:
    kept = [{name: v for name, v in row.items() if isinstance(v, int | float)} for row in runs.rows(out)]
    # A quotient of differences, and the sign of one, in which rounding is anything.
    still = [abs(row.get("rewards/margins", 1)) < 5e-4 for row in kept]
    return [
        {name: v for name, v in row.items() if "opening_share" not in name and not ("accuracies" in name and at_rest)}
        for row, at_rest in zip(kept, still, strict=True)
    ]


def assert_close(rows: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        # Rewards are differences of sums of some 400 nats.
        assert row == pytest.approx(other, rel=1e-4, abs=5e-4)
        losses = [(row[name], other[name]) for name in ("loss", "eval_loss") if name in row]
        assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in losses)


def assert_same_adapter(one: Path, other: Path) -> None:
    mine, theirs = (read_arrays(out / "adapters.safetensors")[0] for out in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert mx.allclose(value, theirs[name], rtol=1e-3, atol=1e-5), name


# The reference
