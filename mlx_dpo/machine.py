"""What this computer is: its fast matrix products, its memory, its name.

Imports nothing of MLX while being imported, because the BLAS has to be in the process first.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_BLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
_MMAP_FROM, _TRIM_FROM = (-3, 2**25), (-1, 2**30)  # options of glibc's mallopt, bytes
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


def order_work_by_breadth() -> None:
    """Let MLX take up all that is ready before it goes deeper, where each core has a stream of work of its own.

    In its usual order one stream would be full and the other empty. MLX reads this once, before its first computation.
    """
    if _loaded_blas is not None:
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "10000")


def cache_folder() -> Path:
    """Where fetched weights and numbers that save work are kept: the system's place for it, or MLX_DPO_CACHE."""
    if own := os.environ.get("MLX_DPO_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_dpo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_dpo"


def keep_freed_memory() -> None:
    """Let the C library of Linux keep freed memory for the next array, instead of giving each large one back.

    MLX's CPU backend asks for its arrays one by one, and new pages from the system cost as much as a pass over them.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, size in (_MMAP_FROM, _TRIM_FROM):
            library.mallopt(option, size)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_split_products() -> bool:
    """Whether matrix products can be told how many cores to take."""
    return _loaded_blas is not None


@contextlib.contextmanager
def products_on_one_core() -> Iterator[None]:
    """Let each matrix product take one core in this block, where OpenBLAS is loaded; several can run side by side."""
    if _loaded_blas is None:
        yield
        return
    blas = ctypes.CDLL(_loaded_blas)
    before = blas.openblas_get_num_threads()
    blas.openblas_set_num_threads(1)
    try:
        yield
    finally:
        blas.openblas_set_num_threads(before)


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
        cores=cores(),
        memory=memory,
        memory_limit=recommended * 3 // 4,
        blas=_blas_in_words(device),
    )


def _blas_in_words(device: str) -> str:
    if not device.startswith("cpu"):
        return "not used (GPU)"
    if sys.platform == "darwin":
        return "Accelerate"
    if _loaded_blas is None:
        return "reference BLAS (slow; install libopenblas0-pthread for about 30 times the speed)"
    kernels = ctypes.CDLL(_loaded_blas).openblas_get_corename
    kernels.restype = ctypes.c_char_p
    return f"{_loaded_blas}, {kernels().decode()} kernels"
