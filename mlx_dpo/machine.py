"""What this computer is: its fast matrix products, its memory, its name.

Imports nothing of MLX while being imported, because the BLAS has to be in the process first.
"""

import ctypes
import os
import platform
import sys
from importlib import metadata
from typing import NamedTuple

_BLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
_loaded_blas: str | None = None


def load_fast_blas() -> str | None:
    """Load OpenBLAS ahead of MLX on Linux without CUDA and return its name, or None where there is none.

    The mlx-cpu wheel links a slow reference BLAS; symbols of a library loaded with RTLD_GLOBAL win over it.
    """
    global _loaded_blas
    if _loaded_blas or not sys.platform.startswith("linux") or _has_cuda_build():
        return _loaded_blas
    for name in _BLAS_NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded_blas = name
        break
    return _loaded_blas


def _has_cuda_build() -> bool:
    names = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions(name="mlx-cuda-13")}
    return bool(names) or any(True for _ in metadata.distributions(name="mlx-cuda-12"))


class Machine(NamedTuple):
    """Where the work runs. Memory in bytes."""

    name: str
    system: str
    device: str
    cores: int
    memory: int
    memory_limit: int
    blas: str


def describe() -> Machine:
    """This machine as MLX sees it; the memory limit is 75% of what the machine recommends for MLX."""
    import mlx.core as mx

    info = mx.device_info()
    device = mx.default_device().type.name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    recommended = int(info.get("max_recommended_working_set_size") or info.get("total_memory") or memory)
    return Machine(
        name=str(info.get("device_name", platform.processor() or platform.machine())),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        device=device,
        cores=os.cpu_count() or 1,
        memory=memory,
        memory_limit=recommended * 3 // 4,
        blas=_blas_in_words(device),
    )


def _blas_in_words(device: str) -> str:
    if not device.startswith("cpu"):
        return "not used (GPU)"
    if sys.platform == "darwin":
        return "Accelerate"
    return _loaded_blas or "reference BLAS (slow; install libopenblas0-pthread for about 30 times the speed)"
