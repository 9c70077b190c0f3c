"""Quantising, dequantising and recasting a model; nothing is computed before it is saved."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import dequantize_model, quantize_model

from mlx_dpo.refusal import Refusal

_WIDE, _NARROW = 64, 32  # numbers that share a scale; the narrow group where the wide one does not divide
Config = dict[str, Any]


def quantised(model: nn.Module, config: Config, bits: int) -> tuple[nn.Module, Config]:
    """Quantise every layer that MLX can to `bits`, in groups of 64, or of 32 where 64 does not divide the rows.

    Returns the model, changed in place, and the configuration that names what was done.
    """
    own = getattr(model, "quant_predicate", None)
    narrow = any(_needs_narrow(module) for _, module in model.named_modules())
    group = _NARROW if narrow else _WIDE

    def wanted(path: str, module: Any) -> bool | dict[str, Any]:
        asked = own(path, module) if own else True
        if asked is not True:
            return asked
        wide = narrow and module.weight.shape[-1] % _WIDE == 0
        return {"group_size": _WIDE, "bits": bits, "mode": "affine"} if wide else True

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        return quantize_model(model, config, group, bits, quant_predicate=wanted)


def _needs_narrow(module: Any) -> bool:
    if not hasattr(module, "to_quantized") or "weight" not in module:
        return False
    width = module.weight.shape[-1]
    return width % _WIDE != 0 and width % _NARROW == 0


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are packed, by path."""
    return {path: module for path, module in model.named_modules() if "scales" in module}


def named_arrays(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Every array of a model by path."""
    return [(path, value) for path, value in tree_flatten(model.parameters()) if isinstance(value, mx.array)]


def dequantised(model: nn.Module, config: Config) -> tuple[nn.Module, Config]:
    """Unpack every packed layer, computed in float32 and rounded once, to the 16-bit type of its scales.

    Scales that are no 16-bit floats give bfloat16. Returns the model, changed in place, and its configuration.
    """
    targets: dict[str, mx.Dtype] = {}
    for path, layer in quantised_layers(model).items():
        held = layer.scales.dtype
        targets[path] = held if held in (mx.float16, mx.bfloat16) else mx.bfloat16
        if mx.issubdtype(held, mx.floating):
            layer.scales, layer.biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    model = dequantize_model(model)
    for path, module in model.named_modules():
        if path in targets:
            module.weight = module.weight.astype(targets[path])
    return model, {key: value for key, value in config.items() if not key.startswith("quantization")}


def recast(model: nn.Module, dtype: mx.Dtype, where: str) -> nn.Module:
    """Cast every floating-point number to `dtype`; scales and biases of packed layers only where that is exact.

    Raises Refusal, naming the source `where`, where the blocks would not stay the same.
    """
    keeps: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    packed = quantised_layers(model)

    def cast(path: str, value: mx.array) -> mx.array:
        if not (keeps(path) and mx.issubdtype(value.dtype, mx.floating)):
            return value
        result = value.astype(dtype)
        layer, _, last = path.rpartition(".")
        if layer in packed and last in ("scales", "biases"):
            same = mx.array_equal(result.astype(mx.float32), value.astype(mx.float32))
            if not same.item():
                name = str(dtype).removeprefix("mlx.core.")
                raise Refusal(
                    f"{where} is quantised, and {name} cannot hold the scales of {layer} exactly: "
                    "leave --dtype away, or choose --quantize none."
                )
        return result

    model.update(tree_map_with_path(cast, model.parameters()))
    return model


def described(config: Config, model: nn.Module) -> str:
    """The quantisation in words, like `4 bit (group 32), 8 bit (group 32)`, or `none`."""
    kinds = {f"{layer.bits} bit (group {layer.group_size})" for layer in quantised_layers(model).values()}
    if kinds:
        return ", ".join(sorted(kinds))
    dtypes = {str(value.dtype).removeprefix("mlx.core.") for _, value in named_arrays(model) if value.ndim > 1}
    return f"none ({', '.join(sorted(dtypes))})"
