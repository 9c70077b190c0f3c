"""How fast this device multiplies large matrices in MLX, and what it is: `python -m benchmarks.peers.limit cpu|gpu`."""

import json
import statistics
import sys
import time

import mlx_dpo  # noqa: F401  # ahead of MLX

# isort: split
import mlx.core as mx

from mlx_dpo import machine

_RUNS = 7


def main() -> None:
    """Multiply in the number format that the steps compute in."""
    on_gpu = sys.argv[1] == "gpu"
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    size, kind = (8192, mx.bfloat16) if on_gpu else (2048, mx.float32)
    left, right = (mx.random.normal((size, size)).astype(kind) for _ in range(2))
    mx.eval(left, right, left @ right)
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        mx.eval(left @ right)
        seconds.append(time.perf_counter() - started)
    limit = 2 * size**3 / statistics.median(seconds)
    words = f"{size} x {size} {'bfloat16' if on_gpu else 'float32'}"
    print(json.dumps({"limit": limit, "product": words, "machine": machine.describe()._asdict()}))


if __name__ == "__main__":
    main()
