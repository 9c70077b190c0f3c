"""PyTorch's files: the numbers that torch saved, and no code."""

import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.pytorch import pytorch_tensors
from mlx_dpo.refusal import Refusal

GOLDEN = Path(__file__).parent / "goldens" / "convert" / "llama"
NUMBERS = np.arange(12, dtype="<f4")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def table(
    shape: tuple[int, ...] = (3, 4), strides: tuple[int, ...] = (4, 1), start: int = 0, count: int = 12,
    function: str = "torch._utils _rebuild_tensor_v2", storage: str = "torch FloatStorage",
) -> bytes:  # fmt: skip
    """The pickle of {"w": tensor}, in the opcodes that torch writes."""
    named = [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in (function, storage)]
    place = several(text("storage"), named[1], text("0"), text("cpu"), whole(count)) + b"Q"
    numbers = [several(*map(whole, values)) for values in (shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text("w") + named[0] + several(place, whole(start), *numbers, b"\x89", hooks) + b"Rs."


def saved(path: Path, pickled: bytes, data: bytes = NUMBERS.tobytes(), compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
    return path


def test_a_file_that_torch_saved_gives_the_numbers_that_pytorch_computed_with(tmp_path: Path):
    source = Path(shutil.copytree(GOLDEN, tmp_path / "source"))
    tiny.write_tokenizer(source)
    list(convert(str(source), tmp_path / "out"))
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    read = dict(pytorch_tensors(source / "pytorch_model.bin"))
    assert held.keys() == read.keys()
    assert all(mx.array_equal(held[name], read[name]).item() for name in held)
    assert {str(value.dtype) for value in held.values()} == {"mlx.core.bfloat16"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NUMBERS.reshape(3, 4)),
        ({"shape": (4, 3), "strides": (1, 4)}, NUMBERS.reshape(3, 4).T),
        ({"shape": (2, 2), "strides": (4, 1), "start": 5}, [[5, 6], [9, 10]]),
        ({"shape": (2, 3), "strides": (0, 1)}, [[0, 1, 2], [0, 1, 2]]),
        ({"shape": (), "strides": (), "start": 7}, np.float32(7)),
    ],
)
def test_views_of_a_storage_are_what_torch_means_by_them(options: dict[str, Any], expected: Any, tmp_path: Path):
    (name, tensor), *rest = pytorch_tensors(saved(tmp_path / "w.bin", table(**options)))
    assert (name, rest) == ("w", [])
    assert np.array_equal(np.array(tensor), np.array(expected))


class Touch:
    """Pickles to a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path):
    trace = tmp_path / "trace"
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    tiny.write_tokenizer(source)
    saved(source / "pytorch_model.bin", pickle.dumps({"w": Touch(trace)}, protocol=2))
    with pytest.raises(Refusal, match="system"):
        list(convert(str(source), tmp_path / "out"))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Touch(trace)))  # the same bytes do run where nobody forbids it
    assert trace.exists()
    assert not (tmp_path / "out").exists()


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "builtins": (lambda p: saved(p, table(function="builtins eval")), "builtins.eval"),
    "another torch function": (lambda p: saved(p, table(function="torch load")), "torch.load"),
    "attribute of a known one": (lambda p: saved(p, table(function="collections OrderedDict.fromkeys")), "fromkeys"),
    "storage of code": (lambda p: saved(p, table(storage="os system")), "os.system"),
    "past the end": (lambda p: saved(p, table(shape=(4, 4))), "past the end"),
    "start past the end": (lambda p: saved(p, table(start=1)), "past the end"),
    "negative": (lambda p: saved(p, table(strides=(-4, 1))), "numbers"),
    "more than the file holds": (lambda p: saved(p, table(shape=(10**6,), strides=(1,), count=10**6)), "long"),
    "compressed": (lambda p: saved(p, table(), compression=zipfile.ZIP_DEFLATED), "damaged"),
    "giant memo": (lambda p: saved(p, b"\x80\x02}r\xff\xff\xff\x7f."), "memo"),
    "half a pickle": (lambda p: saved(p, table()[:40]), "damaged"),
    "no table": (lambda p: saved(p, pickle.dumps([1, 2], protocol=2)), "no table"),
    "no tensor": (lambda p: saved(p, pickle.dumps({"w": 1}, protocol=2)), "no tensor"),
    "another zip": (lambda p: (zipfile.ZipFile(p, "w").close(), p)[1], "zip"),
    "old format": (lambda p: (p.write_bytes(pickle.dumps({"w": 1}, protocol=2)), p)[1], "1.6"),
    "cut off": (lambda p: (p.write_bytes(saved(p, table()).read_bytes()[:-60]), p)[1], "cut off"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(what: str, tmp_path: Path):
    make, said = HOSTILE[what]
    path = make(tmp_path / "pytorch_model.bin")
    started = time.monotonic()
    with pytest.raises(Refusal, match=said) as caught:
        list(pytorch_tensors(path))
    assert time.monotonic() - started < 5
    assert "pytorch_model.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_anywhere_is_a_refusal_or_harmless(tmp_path: Path):
    good = saved(tmp_path / "good.bin", table()).read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for place in draw.integers(0, len(data), 2):
            data[place] = draw.integers(0, 256)
        (tmp_path / "w.bin").write_bytes(data)
        try:
            list(pytorch_tensors(tmp_path / "w.bin"))
        except Refusal:
            refused += 1
    assert refused > 100


def test_safetensors_are_preferred_where_both_are_there(tiny_folder: Any, tmp_path: Path):
    source = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"not even a zip")
    list(convert(str(source), tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
