"""Configurations with stages, on the parity pairs."""

from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import runs
import tomli_w

Folder = Callable[[str], Path]
TEXTS = [
    {"text": "My mother asks the same question again and again, and I am tired. What can I say to her tonight? " * 2}
]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in parity.PAIRS]


def fitted(folder: Path, here: Path, *stages: dict, **shared: object) -> Path:
    """A configuration with stages on the parity pairs."""
    for name, rows in (("text", TEXTS), ("answers", ANSWERS), ("pairs", parity.PAIRS)):
        runs.write_pairs(here / f"{name}.jsonl", rows)
    places = {name: str(here / f"{name}.jsonl") for name in ("text", "answers", "pairs")}
    table = {"model": str(folder), "rank": 4, "learning-rate": 5e-3, "samples": 0, **shared}
    own = [{**stage, "data": places.get(stage["data"], stage["data"])} for stage in stages]
    path = here / "stages.toml"
    path.write_text(tomli_w.dumps(table | {"stage": own}))
    return path


THREE = (
    {"method": "sft", "data": "text", "epochs": 2},
    {"method": "sft", "data": "answers", "epochs": 2, "batch-size": 8},
    {"data": "pairs", "steps": 3, "beta": 0.3, "loss": "sigmoid"},
)


@pytest.fixture
def config(tiny_folder: Folder, tmp_path: Path) -> Path:
    return fitted(tiny_folder("llama"), tmp_path, *THREE)
