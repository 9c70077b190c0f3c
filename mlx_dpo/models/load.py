"""A model folder, loaded without executing anything in it."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import MODEL_REMAPPING, dequantize_model, get_total_parameters, load_model, load_tokenizer

from mlx_dpo import machine
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.sizes import refuse_impossible_sizes
from mlx_dpo.models.weights import read_json, refuse_no_folder, weight_files
from mlx_dpo.refusal import Refusal

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LONGEST_TEXT = 200  # of a library's error in a sentence of ours


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
    _refuse_too_large(folder, weight_files(folder))
    try:
        model, config = load_model(folder, lazy=True)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"{folder} does not hold a whole {config['model_type']} model ({one_line(error)}): convert it again from "
            "its source."
        ) from error
    mx.eval(model.parameters())
    return Loaded(model, read_tokenizer(folder, config), config, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, refused where it is missing, unreadable or asks to run code."""
    refuse_no_folder(folder)
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder} holds no config.json, so it is no model folder: run mlx_dpo convert first.")
    config = read_json(folder / "config.json")
    path, kind = folder / "config.json", config.get("model_type")
    if not isinstance(kind, str):
        raise Refusal(f"{path} names no model_type: restore it from the model's source.")
    if "model_file" in config:
        raise Refusal(f"{path} asks to run {config['model_file']}: no code of a model is run.")
    if not _known(kind):
        raise Refusal(
            f"{path} is of the kind {kind}, which mlx-lm {version('mlx-lm')} does not know: use another model."
        )
    refuse_impossible_sizes(config, path)
    return config


def _known(kind: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w-]+", kind))
        and find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is not None
    )


def _refuse_too_large(folder: Path, files: list[Path]) -> None:
    weights, memory = sum(file.stat().st_size for file in files), machine.describe().memory
    if weights > memory:
        raise Refusal(
            f"The weights in {folder} take {weights / 1e9:.0f} GB, and this machine has {memory / 1e9:.0f} GB: use a "
            "smaller model, or convert it with --quantize 4 on a larger machine."
        )


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model folder, with the streaming detokenizer that mlx-lm chooses for it."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise Refusal(f"{settings} asks to run code of its own (auto_map): no code of a model is run.")
    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise Refusal(f"{folder} holds no tokenizer.json: copy it from the model's source.")
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json")
    try:
        return load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise Refusal(
            f"The tokenizer in {folder} cannot be loaded ({one_line(error)}): restore its files from the model's "
            "source."
        ) from error


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
    """The beginning of an error's text on one line, or its kind where it has none."""
    text = " ".join(str(error).split()).rstrip(".:")
    return (text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 2] + " …") or type(error).__name__
