"""Preference alignment for Apple silicon, and the private assistant that comes of it."""

from mlx_dpo import machine

__version__ = "0.1.0"

machine.load_fast_blas()  # has to happen before the first `import mlx.core`
machine.keep_freed_memory()
machine.order_work_by_breadth()
