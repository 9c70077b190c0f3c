"""mlx-lm's adapted layers: put into a model, found in it again, and what they stand on."""

import contextlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dpo.models.standing_in import called_as
from mlx_dpo.refusal import Refusal

_READ_BACK = (LoRALinear, LoRAEmbedding, LoRASwitchLinear)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have an adapter, by path."""
    return {name: module for name, module in model.named_modules() if "lora_a" in module}


def base_of(layer: nn.Module) -> nn.Module:
    """The layer that an adapted layer stands on: it computes what the model did before the adapter."""
    return layer["linear"] if "linear" in layer else layer["embedding"]


def scaled_while_small(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let LoRA layers multiply by their scale at the width of the rank, and add in the product with B, in this block.

    That is x W + (s x A) B; mlx-lm's layers pass over their whole output twice more for x W + s ((x A) B).
    """
    return called_as([module for module in model.modules() if type(module) is LoRALinear], _adapted)


def _adapted(_: type[nn.Module], layer: Any, x: mx.array) -> mx.array:
    base = layer.linear(x)
    small = layer.scale * (layer.dropout(x) @ layer.lora_a)
    if base.dtype == small.dtype == layer.lora_b.dtype:
        return mx.addmm(base, small, layer.lora_b)
    return base + (small @ layer.lora_b).astype(base.dtype)


def put_in(model: nn.Module, layers: int, parameters: dict[str, Any], *, dora: bool) -> None:
    """Put fresh adapters where mlx-lm puts them: A random, B zero, the same for both kinds; for DoRA the magnitudes m.

    `parameters` are mlx-lm's lora_parameters, `layers` counts blocks from the top. Raises Refusal, naming the layer,
    for a kind of layer that cannot be adapted so.
    """
    linear_to_lora_layers(model, layers, parameters)
    fresh = adapted_layers(model)
    for name, layer in fresh.items():
        if not isinstance(layer, _READ_BACK):
            kind = type(base_of(layer)).__name__
            raise Refusal(f"{name} is a {kind}, whose adapter mlx-lm cannot read back: leave it out of --targets.")
    if dora:
        made = {name: _with_magnitudes(name, layer, parameters) for name, layer in fresh.items()}
        _refuse_empty_rows(made)
        model.update_modules(tree_unflatten(list(made.items())))


def _with_magnitudes(name: str, layer: Any, parameters: dict[str, Any]) -> nn.Module:
    """The DoRA layer for a fresh LoRA layer, with its A and B."""
    # Not by DoRALinear.from_base, which counts 32 // bits numbers a word: a row of 3, 5 or 6 bits comes out too
    # narrow (LoRALinear counts right, so that A has the true width). DoRAEmbedding takes packed rows as they are.
    base, how = base_of(layer), {"r": parameters["rank"], "scale": parameters["scale"]}
    if isinstance(layer, LoRALinear):
        dora = DoRALinear(layer.lora_a.shape[0], layer.lora_b.shape[1], **how)
        dora.set_linear(base)
    elif isinstance(base, nn.Embedding):
        dora = DoRAEmbedding(layer.lora_a.shape[0], layer.lora_b.shape[1], **how)
        dora.set_embedding(base)
        dora.m = mx.linalg.norm(base.weight.astype(mx.float32), axis=1)
    else:
        raise Refusal(f"{name} is a {type(base).__name__}, which DoRA cannot adapt: use lora, or leave it out.")
    dora.lora_a, dora.lora_b, dora.dropout = layer.lora_a, layer.lora_b, layer.dropout
    return dora


def _refuse_empty_rows(layers: dict[str, nn.Module]) -> None:
    magnitudes = {name: layer["m"] for name, layer in layers.items()}
    mx.eval(magnitudes)
    for name, magnitude in magnitudes.items():
        if mx.any(magnitude == 0).item():
            raise Refusal(f"{name} has a row of zeros, which has no direction for DoRA to keep: use lora.")
