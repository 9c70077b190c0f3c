"""Step for step the same numbers as TRL 1.16, from the same start adapter and in the same order."""

import json
from itertools import combinations
from pathlib import Path

import parity
import pytest

from mlx_dpo import train
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.align.record import read_metrics

Rows = list[dict[str, float]]


def _read(name: str) -> dict[str, Rows]:
    return json.loads((Path(__file__).parent / "goldens" / name).read_text())


GOLDEN = _read("trl.json") | _read("trl_others.json")
del GOLDEN["made_with"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the model, the start adapter and the data of every run; tests must not write there."""
    folder = tmp_path_factory.mktemp("parity")
    parity.write(folder)
    return folder


def _ours(start: Path, out: Path, run: parity.Run) -> Rows:
    data = start / ("labelled.jsonl" if run.trainer == "KTO" else "pairs.jsonl")
    strength = {} if run.ours.get("method") == "sft" else {"beta": run.beta}
    options = TrainOptions(
        model=start / "model", adapter=start / "adapter", data=data, out=out, steps=run.steps, batch_size=run.batch,
        grad_accumulation=run.accumulation, learning_rate=run.rate, schedule="linear", max_grad_norm=parity.CLIP,
        shuffle=False, samples=0, **strength, **run.ours,
    )  # fmt: skip
    list(train.run(options))
    return read_metrics(out)


def _differences(ours: Rows, theirs: Rows, keys: tuple[str, ...], beta: float = parity.BETA) -> list[str]:
    """Where two runs part; a reward is β times a small difference of sums of some 400 nats, hence its tolerance."""
    assert len(ours) == len(theirs)
    return [
        f"step {step}: {key} {mine[key]} is not {yours[key]}"
        for step, (mine, yours) in enumerate(zip(ours, theirs, strict=True), 1)
        for key in keys
        if mine[key] != pytest.approx(yours[key], rel=1e-3, abs=4e-4 * beta if key.startswith("rewards/") else 1e-4)
        and not _is_rounding(step, key, yours)
    ]


def _is_rounding(step: int, key: str, row: dict[str, float]) -> bool:
    """Before the first step policy and reference are equal, and rounding alone decides which answer is ahead."""
    return step == 1 and key == "rewards/accuracies" and row["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", parity.RUNS)
def test_every_step_equals_the_golden(start: Path, tmp_path: Path, name: str):
    run = parity.RUNS[name]
    assert _differences(_ours(start, tmp_path / "out", run), GOLDEN[name], run.keys, run.beta) == []


def test_the_goldens_tell_every_two_runs_apart():
    assert GOLDEN.keys() == parity.RUNS.keys()
    for name, other in combinations(parity.RUNS, 2):
        if parity.RUNS[name].steps == parity.RUNS[other].steps:
            assert _differences(GOLDEN[name], GOLDEN[other], ("loss", "logps/chosen", "grad_norm")), (name, other)


@pytest.mark.reference
@pytest.mark.parametrize("name", parity.RUNS)
@pytest.mark.filterwarnings("ignore")
def test_every_step_equals_trl_live(start: Path, tmp_path: Path, name: str):
    pytest.importorskip("trl")
    from goldens import make_trl, make_trl_others

    run = parity.RUNS[name]
    theirs = (make_trl if run.trainer == "DPO" else make_trl_others).trl_rows(start, name)
    assert _differences(_ours(start, tmp_path / "out", run), theirs, run.keys, run.beta) == []
