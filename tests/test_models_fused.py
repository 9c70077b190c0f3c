"""What is fused is compiled, also where a gradient is traced."""

import subprocess
import sys
from typing import cast

import mlx.core as mx
import pytest

from mlx_dpo.models.fused import fused, in_gradients

calls: list[tuple[int, ...]] = []


@fused
def shifted(x: mx.array) -> mx.array:
    calls.append(tuple(x.shape))
    return 2 * x + mx.square(x)


def loss(x: mx.array) -> mx.array:
    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return shifted(x)

    @forward.vjp
    def backward(primals: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return cotangent * (2 + 2 * primals)

    return cast("mx.array", forward(3 * x)).sum()


@pytest.mark.parametrize("lane", [False, True])
def test_a_function_is_traced_once_a_shape_also_within_gradients(lane: bool):
    stream = mx.new_stream(mx.default_device()) if lane else mx.default_stream(mx.default_device())
    calls.clear()
    found = []
    with in_gradients(), mx.stream(stream):
        for length in (3, 4, 3, 4, 3):
            value, slope = mx.value_and_grad(loss)(mx.arange(length).astype(mx.float32))
            found.append((value.item(), slope.tolist()))
    assert sorted(set(calls)) == [(3,), (4,)]
    assert len(calls) <= 2
    assert found[0] == (6.0 * 3 + 9 * 5, [6.0, 24.0, 42.0])
    assert found[0] == found[2] == found[4]


def test_what_goes_wrong_is_raised_and_the_next_call_is_right():
    @fused
    def wrong(x: mx.array) -> mx.array:
        raise ValueError("no")

    with in_gradients():
        with pytest.raises(ValueError, match="no"):
            wrong(mx.zeros(3))
        assert shifted(mx.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("own", [False, True])
def test_a_program_that_used_it_ends_well(own: bool):
    stream = "mx.new_stream(mx.default_device())" if own else "mx.default_stream(mx.default_device())"
    program = (
        "import mlx_dpo, mlx.core as mx; from mlx_dpo.models.fused import fused, in_gradients\n"
        "f = fused(lambda x: mx.sin(x) * 2)\n"
        f"with in_gradients(), mx.stream({stream}): print(f(mx.zeros(3)).tolist())"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "[0.0, 0.0, 0.0]\n", "")


def test_a_gradient_that_is_traced_outside_gives_the_same():
    value, slope = mx.value_and_grad(loss)(mx.arange(3).astype(mx.float32))
    assert (value.item(), slope.tolist()) == (63.0, [6.0, 24.0, 42.0])
