"""Loads OpenBLAS on Linux while being imported, as mlx_dpo does, and nothing else that mlx_dpo does for its speed."""

import contextlib
import ctypes
import sys

if sys.platform.startswith("linux"):
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
