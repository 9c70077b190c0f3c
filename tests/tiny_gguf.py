"""Tiny GGUF files made in code from the tiny folders, as llama.cpp's converter would lay them out."""

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny import CORPUS

Kind = GGMLQuantizationType
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write(
    path: Path, folder: Path, kind: Kind = Kind.F32, changes: dict[str, Any] | None = None, **tokens: Any
) -> Path:
    """Write the model in `folder` to `path`, its matrices as `kind`; `changes` override hyperparameters by key.

    `tokens` choose the tokenizer: none for the folder's own byte-level one, or `pieces=` SentencePiece's model.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = _ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, architecture)
    _hyperparameters(writer, config, architecture, changes or {})
    if "pieces" in tokens:
        sentence_pieces(writer, **tokens)
    else:
        byte_level(writer, folder, **tokens)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    for name, tensor in weights.items():
        values = np.array(tensor.astype(mx.float32))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = interleaved(values, heads)
        if architecture == "gemma3" and "norm" in name:
            values = values + 1
        used = kind if values.ndim == 2 else Kind.F32
        data = values if used == Kind.F32 else blocks(values, used)
        writer.add_tensor(gguf_name(name, architecture), data, raw_dtype=None if used == Kind.F32 else used)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_rope_factors(config).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(values: np.ndarray, kind: Kind) -> np.ndarray:
    """The values in blocks; random blocks for K-quants, which the gguf package reads and does not write."""
    if kind != Kind.Q4_K:
        return quantize(values, kind)
    rows, columns = values.shape
    made = np.random.default_rng(rows).integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    made[..., 0:4] = np.array([2e-4, 1e-3], dtype=np.float16).view(np.uint8)  # scale of scales, scale of minima
    return made.reshape(rows, -1)


def gguf_name(name: str, architecture: str) -> str:
    stem, _, ending = name.rpartition(".")
    table = _NAMES | (_GEMMA if architecture == "gemma3" else {})
    if stem in table:
        return f"{table[stem]}.{ending}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{table[inner]}.{ending}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: of each head, row 0 of the first half, row 0 of the second half, row 1 of the first, …"""
    size = rows.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def llama3_rope_factors(config: dict[str, Any]) -> np.ndarray:
    scaling, size = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for i in range(size // 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (2 * i / size)
        original = scaling["original_max_position_embeddings"]
        if wavelength < original / scaling["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors)


def _hyperparameters(writer: GGUFWriter, config: dict[str, Any], architecture: str, changes: dict[str, Any]) -> None:
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if "head_dim" in config:
        values["attention.key_length"] = config["head_dim"]
    if architecture == "gemma3":
        values |= {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": config["sliding_window_pattern"],
            "rope.freq_base_swa": config["rope_local_base_freq"],
        }
    for key, value in (values | changes).items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)


def byte_level(writer: GGUFWriter, folder: Path, pre: str = "gpt-2", model: str = "gpt2") -> None:
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(made["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in made["added_tokens"]}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template(settings["chat_template"])


def trained_pieces(size: int = 400, **options: Any) -> bytes:
    """A SentencePiece model of `size` pieces with byte fallback."""
    model = io.BytesIO()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def sentence_pieces(writer: GGUFWriter, pieces: bytes, space_first: bool = True, model: str = "llama") -> None:
    processor: Any = SentencePieceProcessor(model_proto=pieces)
    count = processor.get_piece_size()
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in range(count)
    ]
    writer.add_tokenizer_model(model)
    writer.add_token_list([processor.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([processor.get_score(i) for i in range(count)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space_first)
