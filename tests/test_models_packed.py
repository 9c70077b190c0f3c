"""Packed and 16-bit bases: an adapter on them says and learns what it does on the same numbers in float32."""

import copy
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model, quantize_model
from test_models_adapters import KINDS, moved

from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.models.rows import rows_of

Folder = Callable[[str], Path]
ROWS = rows_of([([5, 6, 7], [8, 9, 10, 11]), ([20], [21, 22]), ([30, 31, 32, 33, 34], [36, 37])])
BITS = (2, 3, 4, 5, 6, 8)


def packed(folder: Path, bits: int, dtype: mx.Dtype = mx.float32) -> Loaded:
    """The tiny model in blocks of 32 numbers whose scales are `dtype`, embedding and head included."""
    loaded = load(folder)
    loaded.model.set_dtype(dtype)
    quantize_model(loaded.model, loaded.config, 32, bits)
    return loaded


def in_float32(loaded: Loaded) -> Loaded:
    """The very numbers that a model's weights stand for, in float32 and not packed."""
    wide = loaded._replace(model=copy.deepcopy(loaded.model))
    wide.model.set_dtype(mx.float32)
    dequantize_model(wide.model)
    return wide


def attached(loaded: Loaded, kind: adapters.Kind) -> Loaded:
    shape = adapters.AdapterShape(4, 2.0, 0.0, adapters.chosen_keys(loaded.model, ()), 2, kind)
    adapters.attach(loaded.model, shape, seed=3)
    return loaded


def learnt(loaded: Loaded, kind: adapters.Kind) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """log p of each response token, and the gradient of their sum in the adapter, of a model with a used adapter."""
    model = moved(attached(loaded, kind), 1).model
    forward = Forward.of(model)

    def total() -> tuple[mx.array, mx.array]:
        log_p = forward.token_logps(ROWS, learning=True)[0]
        return log_p.sum(), log_p

    (_, log_p), gradients = nn.value_and_grad(model, total)()
    found = named_arrays(gradients)
    assert {value.dtype for value in found.values()} == {mx.float32}
    return np.array(log_p), {name: np.array(value) for name, value in found.items()}


def assert_same(ours: Loaded, kind: adapters.Kind, value: float, gradient: float) -> None:
    """Compare with the same numbers in float32: the errors' norm over the norm, of the log p and of each gradient."""
    wide = in_float32(ours)
    (log_p, gradients), (expected, wanted) = learnt(ours, kind), learnt(wide, kind)
    assert np.linalg.norm(log_p - expected) < value * np.linalg.norm(expected)
    assert gradients.keys() == wanted.keys()
    for name, found in gradients.items():
        assert np.linalg.norm(found - wanted[name]) < gradient * np.linalg.norm(wanted[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_on_a_packed_base_it_is_what_it_is_on_the_unpacked_one(tiny_folder: Folder, bits: int, kind: adapters.Kind):
    # Both sum the same products in float32, in another order; measured are at most 3e-7 and 3e-6.
    assert_same(packed(tiny_folder("llama-untied"), bits), kind, value=1e-5, gradient=1e-4)


# In units of the type's rounding, 2⁻¹¹ or 2⁻⁸, the errors are the same for both types, as those of rounding alone are:
# measured are up to 3 of them in log p, 13 in gradients, and 46 on packed bases, since the CPU sums packed products of
# 16-bit numbers in 16 bits.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "unit"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
@pytest.mark.parametrize("bits", [None, *BITS])
def test_in_16_bit_it_is_the_same_but_for_rounding(
    tiny_folder: Folder, bits: int | None, dtype: mx.Dtype, unit: float, kind: adapters.Kind
):
    folder = tiny_folder("llama-untied")
    if bits is None:
        loaded = load(folder)
        loaded.model.set_dtype(dtype)
    else:
        loaded = packed(folder, bits, dtype)
    assert_same(loaded, kind, value=6 * unit, gradient=(30 if bits is None else 80) * unit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("bits", BITS)
def test_it_learns(tiny_folder: Folder, bits: int, dtype: mx.Dtype, kind: adapters.Kind):
    model = attached(packed(tiny_folder("llama"), bits, dtype), kind).model
    forward = Forward.of(model)
    optimizer = optimizers.AdamW(learning_rate=5e-3)
    before = {name: np.array(value) for name, value in named_arrays(model.parameters()).items()}
    losses = []
    for _ in range(5):
        loss, gradients = nn.value_and_grad(model, lambda: -forward.token_logps(ROWS, learning=True)[0].mean())()
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    after = named_arrays(model.parameters())
    moved_on = {name for name, value in after.items() if not np.array_equal(np.array(value), before[name])}
    assert moved_on == adapters.adapter_weights(model).keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_same_after_a_round_trip(tiny_folder: Folder, tmp_path: Path, bits: int, kind: adapters.Kind):
    first, second = (packed(tiny_folder("llama"), bits) for _ in range(2))
    moved(attached(first, kind), 1)
    shape = adapters.AdapterShape(4, 2.0, 0.0, adapters.chosen_keys(second.model, ()), 2, kind)
    adapters.save_adapter(tmp_path, adapters.adapter_weights(first.model), shape, "somewhere")
    adapters.load_adapter(second.model, tmp_path)
    tokens = mx.array([[5, 6, 7, 8, 9, 10]])
    assert mx.array_equal(second.model(tokens), first.model(tokens))
