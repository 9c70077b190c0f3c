"""Adapters merged into the weights they were trained on, in float32, then stored in a chosen number format."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_dpo.models.load import compute_dtype
from mlx_dpo.models.lora import adapted_layers
from mlx_dpo.refusal import Refusal


class Format(NamedTuple):
    """How a layer's weight is stored: `bits` None is floating point, otherwise blocks of `group_size` numbers."""

    bits: int | None = None
    group_size: int = 0
    mode: str = "affine"

    def as_config(self) -> dict[str, Any] | bool:
        """The entry for this layer in config.json's quantization map."""
        if self.bits is None:
            return False
        return {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}


FLOATING = Format()


def adapted(model: nn.Module) -> dict[str, LoRALinear | DoRALinear]:
    """The adapted layers of a model by path; Refusal for a kind of adapter that cannot be merged here."""
    found = {}
    for name, layer in adapted_layers(model).items():
        if not isinstance(layer, (LoRALinear, DoRALinear)):
            raise Refusal(f"The adapter changes {name} by a {type(layer).__name__}, which cannot be merged here.")
        found[name] = layer
    return found


def format_of(module: nn.Module) -> Format:
    """How a linear layer or embedding is stored now."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return Format(module.bits, module.group_size, module.mode)
    return FLOATING


def fitting(bits: int, width: int) -> Format:
    """Affine blocks of `bits` bits for rows of `width` numbers: groups of 64, or 32 where 64 does not divide.

    Where neither divides, the layer stays floating.
    """
    for group_size in (64, 32):
        if width % group_size == 0:
            return Format(bits, group_size)
    return FLOATING


def merged_weight(layer: LoRALinear | DoRALinear) -> mx.array:
    """W + scale·(A·B)ᵀ in float32, (out, in); for DoRA its rows are then given the lengths m.

    Liu et al. 2024, eq. 5 (arXiv:2402.09353).
    """
    delta = layer.scale * (layer.lora_b.astype(mx.float32).T @ layer.lora_a.astype(mx.float32).T)
    weight = plain_weight(layer.linear) + delta
    if isinstance(layer, LoRALinear):
        return weight
    return (layer.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None] * weight


def plain_weight(module: nn.Module) -> mx.array:
    """The weight of a layer in float32, unpacked in float32 where it is stored in blocks."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        scales, biases = module.scales, module.get("biases")
        if biases is not None:  # affine blocks: in 16 bit the product of code and scale would be rounded
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits, module.mode)
        return weight.astype(mx.float32)
    return module.weight.astype(mx.float32)  # type: ignore[union-attr]


def stored(weight: mx.array, like: nn.Module, into: Format, dtype: mx.Dtype) -> nn.Module:
    """A layer of the kind of `like` (linear or embedding) that holds `weight` in a format; scales are `dtype`."""
    embedding = isinstance(like, (nn.Embedding, nn.QuantizedEmbedding))
    if into.bits is None:
        layer = nn.Embedding(1, 1) if embedding else nn.Linear(1, 1, bias=False)
        layer.weight = weight.astype(dtype)
    else:
        layer = _quantised(weight, into, dtype, embedding)
    if "bias" in like:
        layer.bias = like["bias"]
    return layer


def _quantised(weight: mx.array, into: Format, dtype: mx.Dtype, embedding: bool) -> nn.Module:
    how = {"group_size": into.group_size, "bits": into.bits, "mode": into.mode}
    width = into.group_size  # of a smallest layer, whose weights are replaced below
    layer = nn.QuantizedEmbedding(1, width, **how) if embedding else nn.QuantizedLinear(width, 1, bias=False, **how)
    packed = mx.quantize(weight, into.group_size, into.bits, into.mode)
    floating = [part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part for part in packed[1:]]
    layer.weight, layer.scales = packed[0], floating[0]
    if len(floating) > 1:
        layer.biases = floating[1]
    layer.freeze()
    return layer


class Layers(NamedTuple):
    """New layers by path, with the adapter merged in, and the same in the same formats without it.

    `rounded` says whether the formats are others than the base's, so that `plain` is not the base itself.
    """

    merged: dict[str, nn.Module]
    plain: dict[str, nn.Module]
    rounded: bool


def layers(model: nn.Module, formats: Mapping[str, Format]) -> Layers:
    """New layers for every path in `formats`; what is in its format already stays as it is, to the bit."""
    dtype = compute_dtype(model)
    lora = adapted(model)
    modules = dict(model.named_modules())
    merged, plain, rounded = {}, {}, False
    for name, into in formats.items():
        adapter = lora.get(name)
        base = modules[name] if adapter is None else adapter.linear
        same = format_of(base) == into
        rounded |= not same
        plain[name] = base if same else stored(plain_weight(base), base, into, dtype)
        merged[name] = plain[name] if adapter is None else stored(merged_weight(adapter), base, into, dtype)
        mx.eval(plain[name].parameters(), merged[name].parameters())
    return Layers(merged, plain, rounded)
