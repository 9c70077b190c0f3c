"""Adapters that are not whole, not finite or not of this model: chat, training and fuse refuse them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from commands import FUSE, PAIRS, TRAIN, Kind, World, nothing, refused, trained, write_pairs

COMMANDS = {
    "chat": "chat --model {model} --adapter {adapter} --max-tokens 4 hello",
    "train": TRAIN + " --adapter {adapter}",
    "fuse": FUSE,
}
Damage = Callable[[World], object]


def _config(**entries: Any) -> Damage:
    def damage(world: World) -> None:
        path = world.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return damage


def _shape(**entries: Any) -> Damage:
    def damage(world: World) -> None:
        path = world.adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        config["lora_parameters"] |= entries
        path.write_text(json.dumps(config))

    return damage


def _weights(change: Callable[[dict[str, mx.array]], object]) -> Damage:
    def damage(world: World) -> None:
        path = str(world.adapter / "adapters.safetensors")
        arrays: Any = mx.load(path)
        mx.eval(arrays)
        change(arrays)
        mx.save_safetensors(path, arrays)

    return damage


def _cut(world: World) -> None:
    path = world.adapter / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def _peft(world: World) -> None:
    (world.adapter / "adapters.safetensors").rename(world.adapter / "adapter_model.safetensors")
    (world.adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')


def _write(name: str, data: bytes) -> Damage:
    return lambda world: (world.adapter / name).write_bytes(data)


def _remove(name: str) -> Damage:
    return lambda world: (world.adapter / name).unlink()


def _lost(arrays: dict[str, mx.array]) -> None:
    arrays[B] = mx.where(mx.arange(arrays[B].size).reshape(arrays[B].shape) == 5, mx.nan, arrays[B])


B = "model.layers.1.self_attn.q_proj.lora_b"
BROKEN: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no such folder": (lambda world: shutil.rmtree(world.adapter), ("adapter",)),
    "an empty folder": (
        lambda world: (shutil.rmtree(world.adapter), world.adapter.mkdir()), ("adapter_config.json",),
    ),
    "no configuration": (_remove("adapter_config.json"), ("adapter_config.json",)),
    "no weights": (_remove("adapters.safetensors"), ("adapters.safetensors",)),
    "a PEFT adapter": (_peft, ("PEFT",)),
    "a configuration that is no JSON": (_write("adapter_config.json", b"{'a': 1}"), ("adapter_config.json", "JSON")),
    "a configuration without parameters": (_config(lora_parameters=None), ("adapter_config.json", "lora_parameters")),
    "rank 0": (_shape(rank=0), ("adapter_config.json", "rank")),
    "rank a word": (_shape(rank="many"), ("adapter_config.json", "many")),
    "rank 10^12": (_shape(rank=10**12), ("adapter_config.json", "rank")),
    "another rank": (_shape(rank=5), ("adapter", "shape")),
    "no scale": (_shape(scale=None), ("adapter_config.json",)),
    "an endless scale": (_shape(scale=float("inf")), ("adapter_config.json", "scale")),
    "a dropout of 1": (_shape(dropout=1.0), ("adapter_config.json", "dropout")),
    "layers a word": (_config(num_layers="all"), ("adapter_config.json", "all")),
    "keys that name nothing": (_shape(keys=["self_attn.nonsense"]), ("adapter",)),
    "an unknown kind": (_config(fine_tune_type="bone"), ("adapter_config.json", "bone")),
    "weights cut off": (_cut, ("adapters.safetensors",)),
    "weights that are text": (_write("adapters.safetensors", b"version 1\n" * 9), ("adapters.safetensors",)),
    "a tensor short": (_weights(lambda arrays: arrays.pop(B)), ("adapter", B)),
    "a tensor too many": (_weights(lambda arrays: arrays.update({"model.extra.lora_a": arrays[B]})), ("extra",)),
    "a tensor of the base": (
        _weights(lambda arrays: arrays.update({"model.norm.weight": mx.zeros(64)})), ("model.norm.weight",),
    ),
    "NaN": (_weights(_lost), ("not finite", B)),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused(name: str, command: str, world: World, capfd: pytest.CaptureFixture[str]):
    damage, names = BROKEN[name]
    refused(Kind(COMMANDS[command], damage, names), world, capfd)


NOT_OF_THIS_MODEL = {"chat": "does not fit this model", "train": "other weights", "fuse": "other weights"}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_model_is_refused(
    command: str, world: World, tiny_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
):
    def damage(place: World) -> None:
        shutil.rmtree(place.adapter)
        trained(tiny_folder("gemma3_text"), write_pairs(place.here / "other.jsonl", PAIRS[:2]), place.adapter)

    refused(Kind(COMMANDS[command], damage, ("adapter", NOT_OF_THIS_MODEL[command])), world, capfd)


@pytest.mark.parametrize("command", ["train", "fuse"])
def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(
    command: str, world: World, capfd: pytest.CaptureFixture[str]
):
    def damage(place: World) -> None:
        path = str(place.model / "model.safetensors")
        arrays: Any = mx.load(path)
        mx.save_safetensors(path, {name: value + 0.001 for name, value in arrays.items()})

    refused(Kind(COMMANDS[command], damage, ("adapter", "trained on other weights")), world, capfd)


CONTRADICTED = {
    "--rank 4": ("--rank", "4"),
    "--alpha 3": ("--alpha", "3"),
    "--targets q_proj": ("--targets",),
    "--layers 1": ("--layers",),
}


@pytest.mark.parametrize("option", CONTRADICTED)
def test_an_option_that_contradicts_the_start_adapter_is_refused(
    option: str, world: World, capfd: pytest.CaptureFixture[str]
):
    refused(Kind(f"{COMMANDS['train']} {option}", nothing, CONTRADICTED[option]), world, capfd)
