"""The demo's own run, shortened, on the real model."""

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo import cli
from mlx_dpo.align.record import read_metrics


@pytest.mark.real_model
def test_the_whole_loop_runs_and_leaves_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "demo"
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--quick", "--out", str(out)])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "reads back with the same logits" in said
    assert re.search(r"Held-out reward accuracy: \d+% of 4 pairs \(95% interval \d+% to \d+%\)", said)
    assert said.rstrip().endswith("report.html")
    steps = [row for row in read_metrics(out / "adapter") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    prompt = mx.array([[1, 9690, 198, 2]])
    adapted = mlx_lm.load(str(out / "model"), adapter_path=str(out / "adapter"))[0]
    fused = mlx_lm.load(str(out / "fused"))[0]
    assert adapted(prompt).shape == fused(prompt).shape == (1, 4, 49152)
