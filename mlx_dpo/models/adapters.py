"""LoRA and DoRA adapters in mlx-lm's own format: attached, read, written and switched off."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.models.arrays import named_arrays, read_arrays, write_arrays
from mlx_dpo.models.lora import adapted_layers, base_of, put_in
from mlx_dpo.models.targets import are_named as are_named
from mlx_dpo.models.targets import chosen_keys as chosen_keys
from mlx_dpo.models.weights import check_safetensors, read_json
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import write_whole

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
_LEAVES = ("lora_a", "lora_b", "m")
_LARGEST_RANK = 65536  # what no layer is wide enough for

Kind = Literal["lora", "dora"]


@dataclass(frozen=True)
class AdapterShape:
    """Where adapters sit and how large they are; `scale` is alpha / rank, `layers` counts from the top.

    `keys` are mlx-lm's: paths in a block, which hold for those layers, and whole paths in the model, which hold
    wherever they lie; none means all that mlx-lm can adapt in a block.
    """

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    layers: int
    kind: Kind = "lora"

    @property
    def alpha(self) -> float:
        """PEFT's alpha of this scale; that of an rsLoRA, which divides by √rank, is √rank times smaller."""
        return self.scale * self.rank


def attach(model: nn.Module, shape: AdapterShape, seed: int) -> None:
    """Freeze `model` and put fresh adapters into it: A uniform in ±1/√in from `seed` alone, B zero.

    DoRA's magnitudes m are the lengths of the base's rows. All of the adapter is float32, whatever the base is. As
    after `load_adapter`, dropout is off until `model.train()`. Raises Refusal for a layer that cannot be adapted.
    """
    model.freeze()
    mx.random.seed(seed)
    with _one_line_errors("The adapter does not fit this model"):
        put_in(model, shape.layers, _mlx_lm_parameters(shape), dora=shape.kind == "dora")
    model.eval()
    mx.eval(model.parameters())


def _mlx_lm_parameters(shape: AdapterShape) -> dict[str, Any]:
    parameters = {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout}
    return parameters | {"keys": list(shape.keys)} if shape.keys else parameters


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

    Raises Refusal where the folder holds no adapter of a known kind in mlx-lm's format, or one with impossible numbers.
    """
    config = read_folder(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in get_args(Kind):
        raise Refusal(f"{folder / CONFIG} is of the kind {kind}; only lora and dora can be trained on or used.")
    parameters = config["lora_parameters"]
    try:
        shape = AdapterShape(
            rank=int(parameters["rank"]),
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            keys=tuple(parameters.get("keys") or ()),
            layers=int(config["num_layers"]),
            kind=kind,
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
    shape = read_shape(folder)
    given, _ = read_arrays(folder / WEIGHTS)
    model.freeze()
    # Not by mlx-lm's load_adapters, which builds DoRA too narrow on 3, 5 and 6 bits.
    with _one_line_errors(f"The adapter {folder} does not fit this model"):
        put_in(model, shape.layers, _mlx_lm_parameters(shape), dora=shape.kind == "dora")
        _check_fit(given, adapter_weights(model))
        model.update(tree_unflatten(list(given.items())))
    model.eval()  # fresh layers come with dropout on
    check_finite(given, str(folder / WEIGHTS))


def _check_fit(given: Mapping[str, mx.array], wanted: Mapping[str, mx.array]) -> None:
    for name, value in sorted(given.items()):
        if name not in wanted:
            raise ValueError(f"it has no place for {name}")
        if value.shape != wanted[name].shape:
            raise ValueError(f"{name} has the shape {value.shape}, which should be {wanted[name].shape}")
    for name in sorted(wanted.keys() - given.keys()):
        raise ValueError(f"the adapter lacks {name}")


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Give every adapter in `model` this dropout, a probability."""
    for layer in adapted_layers(model).values():
        layer.dropout = nn.Dropout(p=dropout)
        layer.train(layer.training)


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
        "fine_tune_type": shape.kind,
        "num_layers": shape.layers,
        "lora_parameters": _mlx_lm_parameters(shape),
        "model": model,
    }
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_arrays(folder / WEIGHTS, weights, {"format": "mlx"})


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base itself, bit for bit, for as long as the block lasts: its layers stand where the adapted ones did.

    Within the block the model has no adapter weights, and nothing in it learns.
    """
    layers = adapted_layers(model)
    model.update_modules(tree_unflatten([(name, base_of(layer)) for name, layer in layers.items()]))
    try:
        yield
    finally:
        for layer in layers.values():  # `train()` and `eval()` did not reach them
            layer.train(base_of(layer).training)
        model.update_modules(tree_unflatten(list(layers.items())))
