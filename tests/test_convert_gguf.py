"""GGUF: blocks kept as they are, names and rows in MLX's order, hyperparameters and tokenizer from the metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
import tiny_gguf
from conversions import converted, logits
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from sentencepiece import SentencePieceProcessor
from tiny_gguf import interleaved

from mlx_dpo.convert.gguf_weights import rows_restored
from mlx_dpo.convert.verify import AWKWARD_TEXTS

FAMILIES = ["llama", "llama-untied", "mistral", "qwen3", "gemma3_text"]
Folder = Callable[[str], Path]


@pytest.fixture
def wide_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama whose rows hold the 256 numbers that a K-quant's block has."""
    wide = tiny.FAMILIES["llama"] | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    monkeypatch.setitem(tiny.FAMILIES, "wide", wide)
    return tiny.write_model(tmp_path / "wide", "wide")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_gguf_gives_the_logits_and_tokens_of_the_folder_that_it_came_from(
    family: str, tiny_folder: Folder, tmp_path: Path
):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder(family))
    done = converted(file, tmp_path / "out")
    ids = [5, 80, 300, 7, 7, 200, 31, 99] * 5  # longer than Gemma's window of 24
    assert np.abs(logits(tmp_path / "out", ids) - logits(tiny_folder(family), ids)).max() < 2e-4
    assert done.checks.layers == done.checks.all_layers
    old: Any = mlx_lm.load(str(tiny_folder(family)))[1]
    new: Any = mlx_lm.load(str(tmp_path / "out"))[1]
    for text in AWKWARD_TEXTS:
        assert new.encode(text) == old.encode(text), text
    messages = [{"role": "user", "content": "Hello 12"}]
    assert new.apply_chat_template(messages) == old.apply_chat_template(messages)
    assert new.eos_token_ids == {2}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_blocks_stay_the_same_numbers_bit_for_bit(kind: Kind, tiny_folder: Folder, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("qwen3"), kind)
    converted(file, tmp_path / "out")
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert settings["group_size"] == 32
    for gguf, mlx in (("token_embd", "model.embed_tokens"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj")):
        tensor = next(t for t in GGUFReader(file).tensors if t.name == f"{gguf}.weight")
        parts = [held[f"{mlx}.{part}"] for part in ("weight", "scales", "biases")]
        assert parts[1].dtype == mx.float16
        scales, biases = (part.astype(mx.float32) for part in parts[1:])
        ours = mx.dequantize(parts[0], scales, biases, 32, settings["bits"])
        assert np.array_equal(np.array(ours), dequantize(tensor.data, tensor.tensor_type))


def test_a_bias_that_float16_cannot_hold_is_held_in_float32(tiny_folder: Folder, tmp_path: Path):
    folder = tmp_path / "wide"
    folder.mkdir()
    for path in tiny_folder("qwen3").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights: Any = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"] * 0 + 1e5
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    converted(tiny_gguf.write(tmp_path / "m.gguf", folder, Kind.Q8_0), tmp_path / "out")
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    # 127 steps to 100,000 are 787.5 each, and 128 of them are beyond float16's 65,504
    assert held["model.layers.0.mlp.up_proj.biases"].dtype == mx.float32
    assert held["model.layers.0.mlp.down_proj.biases"].dtype == mx.float16


def test_mixed_bits_are_named_layer_by_layer(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = tiny_gguf.blocks
    # llama.cpp keeps the embedding in 8 bits when the rest goes to 4
    monkeypatch.setattr(tiny_gguf, "blocks", lambda v, k: plain(v, Kind.Q8_0 if v.shape[0] == 400 else k))
    original_add = tiny_gguf.GGUFWriter.add_tensor

    def add(self: Any, name: str, data: np.ndarray, raw_dtype: Kind | None = None) -> None:
        original_add(self, name, data, raw_dtype=Kind.Q8_0 if name == "token_embd.weight" else raw_dtype)

    monkeypatch.setattr(tiny_gguf.GGUFWriter, "add_tensor", add)
    done = converted(tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama"), Kind.Q4_0), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert settings["bits"] == 4
    assert settings["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert done.quantisation == "4 bit (group 32), 8 bit (group 32)"


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, mx.float16), (Kind.BF16, mx.bfloat16)])
def test_sixteen_bit_numbers_stay_what_they_are(kind: Kind, dtype: mx.Dtype, tiny_folder: Folder, tmp_path: Path):
    converted(tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("qwen3"), kind), tmp_path / "out")
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    source: Any = mx.load(str(tiny_folder("qwen3") / "model.safetensors"))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert held[name].dtype == dtype
    assert mx.array_equal(held[name], source[name].astype(dtype)).item()
    # norms are ones here: nothing is lost in 16 bits, and MLX then computes in them
    assert held["model.norm.weight"].dtype == dtype


def test_other_kinds_become_sixteen_bit(tiny_folder: Folder, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("qwen3"), Kind.Q5_0)
    done = converted(file, tmp_path / "out")
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    tensor = next(t for t in GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
    assert np.array_equal(np.array(held["model.layers.0.mlp.up_proj.weight"]), expected)
    assert done.quantisation == "none (float16)"


def test_k_quants_become_sixteen_bit_or_what_is_asked(wide_llama: Path, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", wide_llama, Kind.Q4_K)
    done = converted(file, tmp_path / "out")
    held: Any = mx.load(str(tmp_path / "out" / "model.safetensors"))
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    down, query = (dequantize(tensors[f"blk.0.{n}.weight"].data, Kind.Q4_K) for n in ("ffn_down", "attn_q"))
    assert np.array_equal(np.array(held["model.layers.0.mlp.down_proj.weight"]), down.astype(np.float16))
    rows = np.array(held["model.layers.0.self_attn.q_proj.weight"])
    assert np.array_equal(interleaved(rows, 4), query.astype(np.float16))
    assert done.quantisation == "none (float16)"
    assert converted(file, tmp_path / "six", quantize="6").quantisation == "6 bit (group 64)"


@pytest.mark.parametrize("bits", ["4", "6", "8"])
def test_blocks_are_quantised_anew_on_request(bits: Any, tiny_folder: Folder, tmp_path: Path):
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama"), Kind.Q8_0)
    done = converted(file, tmp_path / "out", quantize=bits)
    assert done.quantisation == f"{bits} bit (group 64)"
    assert done.checks.tolerance is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []


def test_rows_come_back_from_llama_cpps_order():
    rows = np.arange(16.0)[:, None]
    assert np.array_equal(rows_restored(interleaved(rows, 2), 2), rows)
    # two heads of 4: the file holds rows 0 2 1 3, then 4 6 5 7
    assert interleaved(np.arange(8)[:, None], 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_3s_stretched_positions_are_read_back_from_their_factors(tiny_folder: Folder, tmp_path: Path):
    converted(tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("llama-untied")), tmp_path / "out")
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    original = json.loads((tiny_folder("llama-untied") / "config.json").read_text())["rope_scaling"]
    assert scaling == original


@pytest.mark.parametrize("space_first", [True, False])
def test_a_sentence_piece_vocabulary_gives_sentence_pieces_ids(space_first: bool, tiny_folder: Folder, tmp_path: Path):
    pieces = tiny_gguf.trained_pieces(add_dummy_prefix=space_first)
    file = tiny_gguf.write(tmp_path / "m.gguf", tiny_folder("mistral"), pieces=pieces, space_first=space_first)
    done = converted(file, tmp_path / "out")
    assert done.checks.tokenizer_peer == "SentencePiece"
    processor: Any = SentencePieceProcessor(model_proto=pieces)
    tokenizer: Any = mlx_lm.load(str(tmp_path / "out"))[1]
    compared = 0
    for text in AWKWARD_TEXTS:
        if "<s>" in text or "</s>" in text or "<unk>" in text:
            continue
        compared += 1
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text
        assert tokenizer.decode(processor.encode(text)) == text.replace("▁", " ")
    assert compared >= 20
    assert tokenizer.encode("a")[0] == 1  # the beginning is put first, as llama.cpp does unless told otherwise
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "in 1987", ["in", "Ġ", "1", "9", "8", "7"]),
        ("gpt-2", "in 1987's", ["in", "Ġ1987", "'s"]),
        ("qwen2", "IN 19'S", ["IN", "Ġ", "1", "9", "'S"]),
        ("llama-bpe", "a 19871", ["a", "Ġ", "198", "71"]),
        ("default", "a,b 19871", ["a", ",", "b", "Ġ", "198", "71"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_name_says(pre: str, text: str, words: list[str]):
    from mlx_dpo.convert.byte_level import byte_level

    tokenizer = byte_level(["a"], [], pre, "here")
    cut: Any = tokenizer.pre_tokenizer
    assert [word for word, _ in cut.pre_tokenize_str(text)] == words
