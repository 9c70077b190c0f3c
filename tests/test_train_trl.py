"""Step for step the same numbers as TRL 1.16, from the same start adapter and in the same order."""

import json
from pathlib import Path

import parity
import pytest

from mlx_dpo import train
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "trl.json").read_text())


def _ours(folder: Path, run: str) -> list[dict[str, float]]:
    model, adapter, data = folder / "model", folder / "adapter", folder / "pairs.jsonl"
    steps, batch, accumulation, _, more = parity.RUNS[run]
    options = TrainOptions(
        model=model, adapter=adapter, data=data, out=folder / "out", steps=steps, batch_size=batch,
        grad_accumulation=accumulation, beta=parity.BETA, learning_rate=parity.RATE, schedule="linear",
        max_grad_norm=parity.CLIP, shuffle=False, samples=0, **more,
    )  # fmt: skip
    list(train.run(options))
    return read_metrics(folder / "out")


def _assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        for key in parity.KEYS:
            # Rewards are small differences of sums of some 400 nats, and zero at first: hence the absolute part.
            assert mine[key] == pytest.approx(yours[key], rel=1e-3, abs=1e-4), (mine["step"], key)


@pytest.mark.parametrize("run", parity.RUNS)
def test_every_step_equals_the_golden(tmp_path: Path, run: str):
    parity.write(tmp_path)
    _assert_same(_ours(tmp_path, run), GOLDEN[run])


@pytest.mark.reference
@pytest.mark.parametrize("run", parity.RUNS)
@pytest.mark.filterwarnings("ignore")
def test_every_step_equals_trl_live(tmp_path: Path, run: str):
    pytest.importorskip("trl")
    from goldens.make_trl import trl_rows

    parity.write(tmp_path)
    _assert_same(_ours(tmp_path, run), trl_rows(tmp_path, run))
