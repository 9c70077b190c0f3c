"""LoRA adapters in mlx-lm's own format: attached, read, written and switched off."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_dpo.models.arrays import named_arrays, read_arrays, write_arrays
from mlx_dpo.models.load import blocks
from mlx_dpo.models.weights import check_safetensors, read_json
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import write_whole

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
_LEAVES = ("lora_a", "lora_b", "m")
_LORA = (LoRALinear, LoRAEmbedding, LoRASwitchLinear)
_LARGEST_RANK = 65536  # what no layer is wide enough for
_ADAPTABLE = (nn.Linear, nn.QuantizedLinear)


@dataclass(frozen=True)
class AdapterShape:
    """Where adapters sit and how large they are; `scale` is alpha / rank, `layers` counts from the top."""

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    layers: int

    @property
    def alpha(self) -> float:
        """PEFT's alpha."""
        return self.scale * self.rank


def adaptable_keys(model: nn.Module) -> list[str]:
    """The linear modules of a block, by their path in it, e.g. `self_attn.q_proj`."""
    names: dict[str, None] = {}
    for block in blocks(model):
        names.update({n: None for n, m in block.named_modules() if isinstance(m, _ADAPTABLE)})
    return list(names)


def chosen_keys(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The adaptable modules that `targets` name, by whole path or by its last part; all of them for none.

    Raises Refusal for a target that names no linear module.
    """
    known = adaptable_keys(model)
    for target in targets:
        if not any(_names(target, key) for key in known):
            raise Refusal(f"--targets {target} names no linear module; this model has {', '.join(known)}.")
    return tuple(key for key in known if not targets or any(_names(target, key) for target in targets))


def are_named(targets: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether `targets` name all of `keys` and nothing else."""
    every = all(any(_names(target, key) for target in targets) for key in keys)
    return every and all(any(_names(target, key) for key in keys) for target in targets)


def _names(target: str, key: str) -> bool:
    return key == target or key.rsplit(".", 1)[-1] == target


def attach(model: nn.Module, shape: AdapterShape, seed: int) -> None:
    """Freeze `model` and put fresh adapters into it: A uniform in ±1/√in from `seed` alone, B zero.

    As after `load_adapter`, dropout is off until `model.train()`.
    """
    model.freeze()
    mx.random.seed(seed)
    with _one_line_errors("The adapter does not fit this model"):
        linear_to_lora_layers(model, shape.layers, _mlx_lm_parameters(shape))
    model.eval()
    mx.eval(model.parameters())


def _mlx_lm_parameters(shape: AdapterShape) -> dict[str, Any]:
    return {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout, "keys": list(shape.keys)}


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # Of the tensors that do not fit, mlx-lm names each on a line of its own; the last will do.
        last_line = (str(error).splitlines() or [type(error).__name__])[-1]
        raise Refusal(f"{what}: {last_line.strip()}; give the model that it was made for.") from error


def read_shape(folder: Path) -> AdapterShape:
    """The shape that an adapter folder declares.

    Raises Refusal where the folder holds no LoRA adapter in mlx-lm's format, or one with impossible numbers.
    """
    config = read_folder(folder)
    if config.get("fine_tune_type", "lora") != "lora":
        raise Refusal(
            f"{folder / CONFIG} is of the kind {config['fine_tune_type']}; only lora can be trained on or used."
        )
    parameters = config["lora_parameters"]
    try:
        shape = AdapterShape(
            rank=int(parameters["rank"]),
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            keys=tuple(parameters.get("keys") or ()),
            layers=int(config["num_layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{folder / CONFIG} lacks a usable number ({error}): restore it from its source.") from None
    if not 1 <= shape.rank <= _LARGEST_RANK or not math.isfinite(shape.scale) or not 0 <= shape.dropout < 1:
        raise Refusal(f"{folder / CONFIG} has an impossible rank, scale or dropout: restore it from its source.")
    return shape


def read_folder(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder, both of whose files are there and whole."""
    if not folder.is_dir():
        raise Refusal(f"There is no adapter folder {folder}: give the --out folder of a training run.")
    if (folder / "adapter_model.safetensors").exists():
        raise Refusal(f"{folder} is a PEFT adapter, which cannot be read yet: give one in mlx-lm's format.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refusal(f"{folder} holds no {name}, so it is no finished adapter: give another folder.")
    check_safetensors(folder / WEIGHTS)
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("lora_parameters"), dict) or "num_layers" not in config:
        raise Refusal(f"{folder / CONFIG} has no lora_parameters or num_layers: restore it from its source.")
    return config


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in `folder` to `model`, frozen but for the adapter.

    Raises Refusal for an adapter of another model, with missing tensors or with numbers that are not finite.
    """
    read_shape(folder)
    model.freeze()
    with _one_line_errors(f"The adapter {folder} does not fit this model"):
        load_adapters(model, str(folder))
    model.eval()  # the layers that mlx-lm puts in come with dropout on
    given, _ = read_arrays(folder / WEIGHTS)
    wanted = adapter_weights(model)
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        raise Refusal(
            f"The adapter {folder} does not fit this model: it lacks {missing[0]}; give the model that it was made for."
        )
    check_finite(wanted, str(folder / WEIGHTS))


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Give every adapter in `model` this dropout, a probability."""
    for _, module in model.named_modules():
        if isinstance(module, _LORA):
            module.dropout = nn.Dropout(p=dropout)
            module.train(module.training)


def check_finite(weights: dict[str, mx.array], where: str) -> None:
    """Raise Refusal, naming the tensor, where a number is not finite."""
    for name, value in weights.items():
        if not mx.all(mx.isfinite(value)).item():
            raise Refusal(f"{where}: {name} holds numbers that are not finite, so it must not be used.")


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors by their path in the model."""
    return {k: v for k, v in named_arrays(model.parameters()).items() if k.rsplit(".", 1)[-1] in _LEAVES}


def save_adapter(folder: Path, weights: dict[str, mx.array], shape: AdapterShape, model: str) -> None:
    """Write `weights` as mlx-lm reads them, configuration first; each file is replaced whole."""
    config = {
        "fine_tune_type": "lora",
        "num_layers": shape.layers,
        "lora_parameters": _mlx_lm_parameters(shape),
        "model": model,
    }
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_arrays(folder / WEIGHTS, weights, {"format": "mlx"})


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The same model without what its adapters add, for as long as the block lasts."""
    layers = [m for _, m in model.named_modules() if isinstance(m, _LORA)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
