"""A model folder, loaded without executing anything in it."""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, get_total_parameters, load_model, load_tokenizer

from mlx_dpo import machine
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.weights import read_json, weight_files
from mlx_dpo.refusal import Refusal


class Loaded(NamedTuple):
    """A model ready to compute, its tokenizer, its configuration and where it came from."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    folder: Path


def load(folder: Path) -> Loaded:
    """Load an MLX model folder.

    Raises Refusal, naming the file, for anything that is not a whole model of a known architecture.
    """
    config = read_config(folder)
    weight_files(folder)
    try:
        model, config = load_model(folder, lazy=True)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"{folder} cannot be loaded as a {config['model_type']} model: {one_line(error)}") from error
    mx.eval(model.parameters())
    return Loaded(model, read_tokenizer(folder, config), config, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, refused where it is missing, unreadable or asks to run code."""
    if not folder.exists():
        raise Refusal(f"There is no folder {folder}: give the path of a converted model.")
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder} holds no config.json, so it is no model folder: run mlx_dpo convert first.")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise Refusal(f"{folder / 'config.json'} names no model_type: restore it from the model's source.")
    if "model_file" in config:
        raise Refusal(f"{folder / 'config.json'} asks to run {config['model_file']}: no code of a model is run.")
    return config


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model folder, with the streaming detokenizer that mlx-lm chooses for it."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise Refusal(f"{settings} asks to run code of its own (auto_map): no code of a model is run.")
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json")
    try:
        return load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise Refusal(f"The tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, from the bottom up."""
    return list(model.layers)  # type: ignore[arg-type]


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def load_to_compute(folder: Path) -> Loaded:
    """Load a model folder for long computations, in the form that this device multiplies fast.

    On the CPU that is float32 with nothing packed (16-bit and packed products are some 30 times slower there), the
    very numbers that the packed weights stand for; elsewhere, and where memory is too small for that, it is the
    folder's own form.
    """
    loaded = load(folder)
    if on_cpu() and 4 * get_total_parameters(loaded.model) < machine.describe().memory_limit:
        loaded.model.set_dtype(mx.float32)
        dequantize_model(loaded.model)
        mx.eval(loaded.model.parameters())
    return loaded


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The floating-point type that the model computes in."""
    for name, value in named_arrays(model.parameters()).items():
        if mx.issubdtype(value.dtype, mx.floating) and "lora" not in name:
            return value.dtype
    return mx.float32


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
