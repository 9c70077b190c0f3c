"""The Python environments that the contestants run in, made where they are not there yet."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.cases import LORA, OURS

ROOT = Path(__file__).parents[1]
HOME = ROOT / "runs" / "bench"
_LORA, _TRL = "5.10.2", "1.16.0"
_MLX_BUILDS = {"mlx-cuda-13": "[cuda13]", "mlx-cuda-12": "[cuda12]", "mlx-cpu": "[cpu]"}
_HAS_GPU = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"


def interpreter(contestant: str, *, on_gpu: bool) -> Path:
    """The Python that runs a contestant: ours, this one with TRL in it, or one below runs/bench."""
    if contestant == OURS:
        return Path(sys.executable)
    if contestant == LORA:
        # The same build of MLX as ours, so that only the programs differ.
        build = next((extra for name, extra in _MLX_BUILDS.items() if _version(name)), "")
        return _environment(f"mlx-lm-lora-{_LORA}", [[f"mlx-lm-lora=={_LORA}", f"mlx{build}=={version('mlx')}"]])
    if _version("trl") == _TRL and _version("peft") and (not on_gpu or _has_gpu(sys.executable)):
        return Path(sys.executable)
    torch = [["torch"]] if on_gpu else [["torch==2.13.0+cpu"], ["torch"]]
    return _environment(f"trl-{_TRL}-{'gpu' if on_gpu else 'cpu'}", torch, [f"trl=={_TRL}", "peft>=0.19"])


def variables(threads: int, scratch: Path) -> dict[str, str]:
    """The environment variables of every contestant: the same threads, nothing fetched, nothing kept."""
    return dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(scratch),
    }


def _environment(name: str, first: list[list[str]], then: list[str] | None = None) -> Path:
    """Make an environment with one of the alternatives in `first` and with `then`."""
    folder = HOME / name
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    print(f"Installing {name} below {HOME.relative_to(ROOT)} ...", file=sys.stderr, flush=True)
    uv = shutil.which("uv")
    create = [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable] if uv else None
    subprocess.run([*(create or [sys.executable, "-m", "venv"]), str(folder)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python)] if uv else None
    install = install or [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    *tried, last = first
    if not any(subprocess.run([*install, *packages], stderr=subprocess.DEVNULL).returncode == 0 for packages in tried):
        subprocess.run([*install, *last], check=True)
    if then:
        subprocess.run([*install, *then], check=True)
    (folder / "ready").touch()
    return python


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _has_gpu(python: str) -> bool:
    return subprocess.run([python, "-c", _HAS_GPU], stderr=subprocess.DEVNULL).returncode == 0
