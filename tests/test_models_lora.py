"""The adapted layers: what DoRA computes, in which type, and where it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import quantize_model

from mlx_dpo.models import adapters
from mlx_dpo.models.load import Loaded, compute_dtype, load
from mlx_dpo.models.lora import adapted_layers, base_of, scaled_while_small
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TOKENS = mx.array([[5, 6, 7, 8, 9]])


class OneLayer(nn.Module):
    """As much of a model as adapters go by: one block with one layer in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = [nn.Module()]
        self.layers[0].layer = layer


def around(layer: nn.Module, kind: adapters.Kind = "dora", rank: int = 2, scale: float = 1.5) -> Any:
    """The layer with a fresh adapter."""
    model = OneLayer(layer)
    adapters.attach(model, adapters.AdapterShape(rank, scale, 0.0, ("layer",), 1, kind), seed=3)
    return model.layers[0].layer


def attached(folder: Path, kind: adapters.Kind, change: Callable[[Loaded], object] = lambda _: None) -> Loaded:
    loaded = load(folder)
    change(loaded)
    keys = adapters.chosen_keys(loaded.model, ())
    adapters.attach(loaded.model, adapters.AdapterShape(4, 2.0, 0.0, keys, 2, kind), seed=3)
    return loaded


def test_dora_by_hand():
    linear = nn.Linear(2, 2)
    linear.weight, linear.bias = mx.array([[3.0, 4.0], [0.0, 2.0]]), mx.array([0.5, -0.5])
    layer = around(linear, rank=1, scale=2.0)
    assert layer.m.tolist() == [5.0, 2.0]
    # W + 2·(A·B)ᵀ = [[3, 4], [0, 2]] + 2·[[1], [0]]·[[-1.5, 0]] = [[0, 4], [0, 2]], whose rows are 4 and 2 long.
    layer.lora_a, layer.lora_b = mx.array([[-1.5], [0.0]]), mx.array([[1.0, 0.0]])
    layer.m = mx.array([6.0, 1.0])
    # Rows of length 6 and 1: [[0, 6], [0, 1]]; the bias is left alone.
    assert layer(mx.array([[7.0, 10.0]])).tolist() == [[60.5, 9.5]]


def test_lora_and_dora_begin_with_the_same_a(tiny_folder: Folder):
    lora, dora = (adapters.adapter_weights(attached(tiny_folder("llama"), kind).model) for kind in ("lora", "dora"))
    assert all(mx.array_equal(value, dora[name]) for name, value in lora.items())
    assert {name.rsplit(".", 1)[1] for name in dora.keys() - lora.keys()} == {"m"}


def test_a_fresh_dora_changes_nothing(tiny_folder: Folder):
    plain = np.array(load(tiny_folder("llama")).model(TOKENS))
    assert np.array(attached(tiny_folder("llama"), "dora").model(TOKENS)) == pytest.approx(plain, rel=1e-5, abs=1e-5)


TYPES: dict[str, Callable[[Loaded], object]] = {
    "float32": lambda loaded: loaded.model.set_dtype(mx.float32),
    "float16": lambda loaded: loaded.model.set_dtype(mx.float16),
    "bfloat16": lambda loaded: loaded.model.set_dtype(mx.bfloat16),
    "5 bit with bfloat16": lambda loaded: (
        loaded.model.set_dtype(mx.bfloat16),
        quantize_model(loaded.model, loaded.config, 32, 5),
    ),
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", TYPES)
def test_adapters_are_float32_on_any_base_and_the_model_computes_in_its_own_type(
    tiny_folder: Folder, name: str, kind: adapters.Kind
):
    model = attached(tiny_folder("llama"), kind, TYPES[name]).model
    own = {"float32": mx.float32, "float16": mx.float16}.get(name, mx.bfloat16)
    assert {value.dtype for value in adapters.adapter_weights(model).values()} == {mx.float32}
    assert compute_dtype(model) == own
    assert model(TOKENS).dtype == own


def test_magnitudes_are_the_lengths_of_the_base_s_rows(tiny_folder: Folder):
    for layer in adapted_layers(attached(tiny_folder("llama"), "dora").model).values():
        weight = np.array(base_of(layer)["weight"], dtype=np.float64)
        assert np.array(layer["m"]) == pytest.approx(np.sqrt((weight**2).sum(1)), rel=1e-6)


def test_a_learnt_embedding_of_dora_has_magnitudes_in_float32():
    embedding = nn.Embedding(6, 8)
    embedding.set_dtype(mx.float16)
    layer = around(embedding)
    assert layer.m.dtype == mx.float32
    assert np.array(layer(mx.arange(6))) == pytest.approx(np.array(embedding.weight), rel=1e-3)


def zeros_in_row_1() -> nn.Linear:
    linear = nn.Linear(8, 3)
    linear.weight[1] = 0
    return linear


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (SwitchLinear(8, 8, 2), "layers.0.layer is a SwitchLinear, which DoRA cannot adapt: use lora, or leave it out"),
        (nn.Embedding(4, 32).to_quantized(32, 4), "layers.0.layer is a QuantizedEmbedding, which DoRA cannot adapt"),
        (zeros_in_row_1(), "layers.0.layer has a row of zeros, which has no direction for DoRA to keep: use lora"),
    ],
)
def test_what_dora_cannot_adapt_is_refused_and_lora_can(layer: nn.Module, reason: str):
    with pytest.raises(Refusal, match=reason) as refusal:
        around(layer)
    assert "\n" not in str(refusal.value)
    around(layer, "lora")


class Fused(nn.Linear):
    """A layer that brings a LoRA of its own, with several A's, as one architecture of mlx-lm's does."""

    def to_lora(self, r: int, dropout: float, scale: float) -> nn.Module:
        layer = nn.Module()
        layer.linear, layer.lora_a, layer.lora_b = self, [mx.zeros((8, r))], [mx.zeros((r, 8))]
        return layer


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_could_not_be_stored_is_refused(kind: adapters.Kind):
    with pytest.raises(Refusal, match="layers.0.layer is a Fused, whose adapter mlx-lm cannot read back"):
        around(Fused(8, 8), kind)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_dora_is_peft_s_dora_in_value_and_gradient():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    numbers = np.random.default_rng(0)
    shapes = {"w": (6, 8), "bias": (6,), "a": (8, 2), "b": (2, 6), "m": (6,), "x": (5, 8), "weights": (5, 6)}
    given = {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    wrapped = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 6)})
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True)
    theirs = peft.inject_adapter_in_model(config, wrapped)["layer"]
    learnt = {
        "a": theirs.lora_A["default"].weight,
        "b": theirs.lora_B["default"].weight,
        "m": theirs.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        theirs.base_layer.weight.copy_(torch.tensor(given["w"]))
        theirs.base_layer.bias.copy_(torch.tensor(given["bias"]))
        for name, parameter in learnt.items():
            parameter.copy_(torch.tensor(given[name].T))
    expected = theirs(torch.tensor(given["x"]))
    (expected * torch.tensor(given["weights"])).sum().backward()

    linear = nn.Linear(8, 6)
    linear.weight, linear.bias = mx.array(given["w"]), mx.array(given["bias"])
    ours = around(linear)
    ours.update({"lora_a": mx.array(given["a"]), "lora_b": mx.array(given["b"]), "m": mx.array(given["m"])})
    x, weights = mx.array(given["x"]), mx.array(given["weights"])
    _, gradient = nn.value_and_grad(ours, lambda: (ours(x) * weights).sum())()
    assert np.array(ours(x)) == pytest.approx(expected.detach().numpy(), rel=1e-5, abs=1e-5)
    for name, key in (("a", "lora_a"), ("b", "lora_b"), ("m", "m")):
        assert np.array(gradient[key]) == pytest.approx(learnt[name].grad.numpy().T, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scaling_while_small_is_the_same_layer(bits: int | None, dtype: mx.Dtype):
    mx.random.seed(4)
    base = nn.Linear(64, 96)
    base.set_dtype(dtype)
    below: Any = nn.QuantizedLinear.from_linear(base, 32, bits) if bits else base
    layer = LoRALinear.from_base(below, r=4, scale=7.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    x, cotangent = mx.random.normal((2, 5, 64)).astype(dtype), mx.random.normal((2, 5, 96))

    def found() -> list[mx.array]:
        def loss(x: mx.array) -> mx.array:
            return (layer(x).astype(mx.float32) * cotangent).sum()

        slopes = nn.value_and_grad(layer, lambda: loss(x))()[1]
        return [layer(x), mx.grad(loss)(x), slopes["lora_a"], slopes["lora_b"]]

    expected = found()
    with scaled_while_small(layer):
        kind, ours = type(layer), found()
    assert kind is not LoRALinear
    assert type(layer) is LoRALinear
    for value, wanted in zip(ours, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert mx.abs(value - wanted).max() <= (2e-6 if dtype == mx.float32 else 2e-2) * mx.abs(wanted).max()
