"""GGUF files that cannot be converted: one sentence each, soon, and nothing left."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from conversions import refusal
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]


def refusal_of(source: Path, out: Path) -> str:
    sentence = refusal(source, out)
    assert source.name in sentence
    return sentence


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "too short"),
    "not a gguf": (lambda data: b"PK\x03\x04" + data[4:], "not a GGUF"),
    "version": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
    "cut in the header": (lambda data: data[:500], "cut off"),
    "cut in the tensors": (lambda data: data[:-5000], "cut off"),
    "tensor count": (lambda data: data[:8] + struct.pack("<Q", 2**40) + data[16:], "claims"),
    "metadata count": (lambda data: data[:16] + struct.pack("<Q", 2**63) + data[24:], "claims"),
    "one tensor too many": (
        lambda data: data[:8] + struct.pack("<Q", struct.unpack("<Q", data[8:16])[0] + 1) + data[16:],
        "",
    ),
    "string length": (lambda data: data[:24] + struct.pack("<Q", 2**60) + data[32:], "name of"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(what: str, tiny_folder: Folder, tmp_path: Path):
    damage, said = BROKEN[what]
    good = tiny_gguf.write(tmp_path / "good.gguf", tiny_folder("qwen3")).read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(good))
    assert said in refusal_of(broken, tmp_path / "out")


def test_no_single_changed_byte_of_the_header_gets_past_as_anything_but_a_refusal(tiny_folder: Folder, tmp_path: Path):
    from mlx_dpo.convert.gguf_source import open_gguf

    good = tiny_gguf.write(tmp_path / "good.gguf", tiny_folder("qwen3")).read_bytes()
    broken = tmp_path / "broken.gguf"
    draw = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(60):
        data = bytearray(good)
        data[draw.integers(0, 3000)] = draw.integers(0, 256)
        broken.write_bytes(data)
        try:
            open_gguf(broken, tmp_path / "scratch")
            outcomes["read"] += 1
        except Refusal:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 10


def test_a_scale_that_is_no_number_is_refused(tiny_folder: Folder, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("qwen3"), Kind.Q4_0)
    offset = next(t for t in GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight").data_offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 2] = np.float16(np.nan).tobytes()
    file.write_bytes(data)
    assert "blk.0.ffn_up.weight" in refusal_of(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention.head_count": 0}, "attention.head_count"),
        ({"block_count": 3}, "whole"),
        ({"embedding_length": None}, "embedding_length"),
        ({"attention.head_count_kv": 3}, ""),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "dynamic"),
        ({"rope.dimension_count": 8}, "rotates 8 of 16"),
        ({"expert_count": 8}, "mixture"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused(
    changes: dict[str, Any], said: str, tiny_folder: Folder, tmp_path: Path
):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama"), changes=changes)
    assert said in refusal_of(file, tmp_path / "out")


def test_unknown_tokenizers_are_refused_by_name(tiny_folder: Folder, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama"), pre="martian")
    assert "martian" in refusal_of(file, tmp_path / "out")
    file = tiny_gguf.write(tmp_path / "n.gguf", tiny_folder("llama"), model="t5")
    assert "t5" in refusal_of(file, tmp_path / "out")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path):
    writer = tiny_gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "mamba" in refusal_of(tmp_path / "m.gguf", tmp_path / "out")
