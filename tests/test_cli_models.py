"""Model folders that are broken, lying or hostile: every command that takes one refuses it in one sentence."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from commands import CHAT, CONVERT, FUSE, TRAIN, Kind, World, refused

COMMANDS = {"train": TRAIN, "chat": CHAT, "fuse": FUSE, "convert": CONVERT}
Damage = Callable[[World], object]


def _config(**entries: Any) -> Damage:
    return lambda world: _changed(world.model / "config.json", entries)


def _changed(path: Path, entries: dict[str, Any]) -> None:
    found = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def _write(name: str, data: bytes) -> Damage:
    return lambda world: (world.model / name).write_bytes(data)


def _remove(name: str) -> Damage:
    return lambda world: (world.model / name).unlink()


def _weights(change: Callable[[dict[str, mx.array]], object]) -> Damage:
    def damage(world: World) -> None:
        path = str(world.model / "model.safetensors")
        arrays: Any = mx.load(path)
        mx.eval(arrays)
        change(arrays)
        mx.save_safetensors(path, arrays)
        (world.adapter / "manifest.json").unlink()  # it would tell at once that these are other weights

    return damage


def _header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Damage:
    """Rewrite the header of the weights, with the truth about its own length or another."""

    def damage(world: World) -> None:
        path = world.model / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])

    return damage


def _cut(world: World) -> None:
    path = world.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _index(**entries: Any) -> Damage:
    return _write("model.safetensors.index.json", json.dumps(entries).encode())


def _renamed(name: str, other: str) -> Damage:
    return lambda world: (world.model / name).rename(world.model / other)


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def _not_a_number(arrays: dict[str, mx.array]) -> None:
    arrays[UP] = mx.where(mx.arange(64) == 3, mx.nan, arrays[UP])


def _overlapping(header: dict[str, Any]) -> None:
    header[UP]["data_offsets"] = header[DOWN]["data_offsets"]


BROKEN: dict[str, tuple[Damage, str]] = {
    "no config.json": (_remove("config.json"), "config.json"),
    "config.json is no JSON": (_write("config.json", b'{"model_type": '), "config.json"),
    "config.json is a list": (_write("config.json", b"[]"), "config.json"),
    "config.json is empty": (_write("config.json", b""), "config.json"),
    "config.json in UTF-16": (_write("config.json", '{"model_type": "llama"}'.encode("utf-16")), "config.json"),
    "config.json nested without end": (_write("config.json", b'{"a":' * 100_000), "config.json"),
    "no model_type": (_config(model_type=None), "model_type"),
    "model_type a number": (_config(model_type=7), "model_type"),
    "model_type unknown": (_config(model_type="martian"), "martian"),
    "model_type a path": (_config(model_type="../../os"), "../../os"),
    "hidden_size 0": (_config(hidden_size=0), "hidden_size"),
    "hidden_size negative": (_config(hidden_size=-64), "hidden_size"),
    "hidden_size a word": (_config(hidden_size="x"), "hidden_size"),
    "hidden_size missing": (_config(hidden_size=None), "model"),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "no layers": (_config(num_hidden_layers=0), "num_hidden_layers"),
    "a vocabulary of 10^15": (_config(vocab_size=10**15), "vocab_size"),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads"),
    "code to run in config.json": (_config(model_file="evil.py"), "evil.py"),
    "no weights": (_remove("model.safetensors"), "safetensors"),
    "weights of another name": (_renamed("model.safetensors", "weights.safetensors"), "safetensors"),
    "weights empty": (_write("model.safetensors", b""), "model.safetensors"),
    "weights that are text": (_write("model.safetensors", b"<html>Not found</html>" * 50), "model.safetensors"),
    "weights cut off": (_cut, "model.safetensors"),
    "a header longer than the file": (_header(lambda header: None, 2**40), "model.safetensors"),
    "a header cut short": (_header(lambda header: None, 100), "model.safetensors"),
    "tensors that overlap": (_header(_overlapping), "overlap"),
    "a shape beyond the file": (_header(lambda header: header[UP].update(shape=[2**31, 2**31])), UP),
    "a negative shape": (_header(lambda header: header[UP].update(shape=[-128, -64])), "model.safetensors"),
    "an unknown number format": (_header(lambda header: header[UP].update(dtype="F3")), "F3"),
    "a header of other things": (_header(lambda header: header.update({UP: 3})), "model.safetensors"),
    "a shard that is missing": (
        _index(weight_map={UP: "model-00002-of-00002.safetensors"}), "model-00002-of-00002.safetensors",
    ),
    "an index of other things": (_index(weight_map=[1, 2]), "index.json"),
    "an index that leads elsewhere": (_index(weight_map={UP: "../../secret"}), "../../secret"),
    "weights of another shape": (_config(intermediate_size=256), "shape"),
    "a tensor that is missing": (_weights(lambda arrays: arrays.pop(UP)), UP),
    "a tensor too many": (_weights(lambda arrays: arrays.update({"model.extra.weight": arrays[UP]})), "extra"),
    "no tokenizer.json": (_remove("tokenizer.json"), "tokenizer"),
    "tokenizer.json cut off": (_write("tokenizer.json", b'{"version": "1.0", "added_tok'), "tokenizer.json"),
    "tokenizer.json of other things": (_write("tokenizer.json", b'{"version": "1.0"}'), "tokenizer"),
    "tokenizer_config.json is no JSON": (_write("tokenizer_config.json", b"{{"), "tokenizer_config.json"),
    "code to run in tokenizer_config.json": (
        lambda world: _changed(world.model / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.X", None]}}),
        "auto_map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused(name: str, command: str, world: World, capfd: pytest.CaptureFixture[str]):
    damage, said = BROKEN[name]
    refused(Kind(COMMANDS[command], damage, (said,)), world, capfd)


NOT_FINITE = {"train": "not finite", "chat": "NaN", "fuse": "not finite", "convert": "not finite"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_a_lost_number_is_refused(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    refused(Kind(COMMANDS[command], _weights(_not_a_number), (NOT_FINITE[command],)), world, capfd)


@pytest.mark.parametrize("command", ["train", "chat", "fuse", "convert"])
def test_a_folder_that_is_not_there_is_named(command: str, world: World, capfd: pytest.CaptureFixture[str]):
    gone = Kind(COMMANDS[command].replace("{model}", "{here}/none"), lambda _: None, ("none",))
    refused(gone, world, capfd)
    file = Kind(COMMANDS[command].replace("{model}", "{pairs}"), lambda _: None, ("pairs.jsonl",))
    refused(file, world, capfd)


def test_a_file_cannot_draw_on_the_screen(world: World, capfd: pytest.CaptureFixture[str]):
    harm = _config(model_type="evil\x1b[2J\nmlx_dpo: all is well")
    sentence = refused(Kind(CHAT, harm, ("evil",)), world, capfd)
    assert "\x1b" not in sentence
