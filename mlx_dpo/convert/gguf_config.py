"""The config.json that a GGUF file's metadata stand for."""

from typing import Any

import numpy as np
from gguf.quants import dequantize

from mlx_dpo.convert.gguf import Gguf
from mlx_dpo.convert.rotations import llama3_factors
from mlx_dpo.refusal import Refusal

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA3_PATTERN = 6  # every sixth layer sees everything, where the file does not say
_GEMMA3_27B_LAYERS = 62  # the one size whose attention is scaled by hidden size over heads
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_of(file: Gguf) -> dict[str, Any]:
    """The configuration as mlx-lm and transformers read it, rope settings at the top.

    Raises Refusal where the file lacks a hyperparameter, or has a setting that the MLX architecture cannot follow.
    """
    try:
        return _config(file)
    except (TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise Refusal(f"{file.path} has hyperparameters that make no sense ({error}): fetch the file again.") from None


def _config(file: Gguf) -> dict[str, Any]:
    heads = _one_number(file, "attention.head_count")
    kind = _MODEL_TYPES[file.architecture]
    hidden = int(file.required("embedding_length"))
    head_dim = int(file.parameter("attention.key_length", hidden // heads))
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": int(file.required("block_count")),
        "intermediate_size": _one_number(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _one_number(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": int(file.required("context_length")),
        "rms_norm_eps": _decimal(file.required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(file.parameter("rope.freq_base", 1e6 if kind == "gemma3_text" else 10_000.0)),
        "rope_scaling": _rope_scaling(file, head_dim),
        "vocab_size": int(_tensor_shape(file, "token_embd.weight")[0]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    if kind == "gemma3_text":
        config |= _gemma3(file, config)
    if "blk.0.attn_q.bias" in file.tensors and kind == "llama":
        config["attention_bias"] = True
    _check_rotation(file, head_dim)
    return config | _token_ids(file)


def _one_number(file: Gguf, key: str, default: int | None = None) -> int:
    value = file.required(key) if default is None else file.parameter(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise Refusal(
            f"{file.path} gives {file.architecture}.{key} a different value in every layer, which no MLX "
            f"{file.architecture} model can follow: use another model."
        )
    value = int(values.pop())
    if value < 1:
        raise ValueError(f"{key} is {value}")
    return value


def _tensor_shape(file: Gguf, name: str) -> list[int]:
    if name not in file.tensors:
        raise Refusal(f"{file.path} holds no tensor {name}: get a complete GGUF file of a language model.")
    return [int(extent) for extent in reversed(file.tensors[name].shape)]


def _decimal(value: float) -> float:
    """The short decimal that a 32-bit float was written from (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _check_rotation(file: Gguf, head_dim: int) -> None:
    rotated = int(file.parameter("rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise Refusal(
            f"{file.path} rotates {rotated} of {head_dim} dimensions of a head, which MLX's "
            f"{file.architecture} does not: use another model."
        )


def _gemma3(file: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    by_heads = layers == _GEMMA3_27B_LAYERS
    pattern = file.parameter("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if isinstance(pattern, list):
        pattern = pattern.index(False) + 1 if False in pattern else layers + 1
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if by_heads else config["head_dim"],
        "sliding_window": int(file.required("attention.sliding_window")),
        "sliding_window_pattern": int(pattern),
        "rope_local_base_freq": _decimal(file.parameter("rope.freq_base_swa", 10_000.0)),
    }


def _rope_scaling(file: Gguf, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        tensor = file.tensors["rope_freqs.weight"]
        factors = dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
        return _llama3_scaling(file, factors, head_dim)
    kind = file.parameter("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = _decimal(file.required("rope.scaling.factor"))
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and file.architecture in ("qwen2", "qwen3", "llama"):
        original = int(file.required("rope.scaling.original_context_length"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise Refusal(f"{file.path} stretches its positions by {kind}, which is not read from GGUF: use another file.")


def _llama3_scaling(file: Gguf, factors: np.ndarray, head_dim: int) -> dict[str, Any]:
    """The llama3 settings whose factors the tensor rope_freqs holds, found by trying the original lengths."""
    theta = float(file.parameter("rope.freq_base", 10_000.0))
    if factors.size != head_dim // 2 or not np.isfinite(factors).all() or factors.max() < 1:
        raise Refusal(f"{file.path} has a damaged tensor rope_freqs.weight: fetch the file again.")
    for original in (8192, *(2**power for power in range(5, 21))):
        settings = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_factors(settings, theta, head_dim), factors, rtol=1e-3):
            return settings
    raise Refusal(
        f"{file.path} stretches its positions by factors of its own (rope_freqs.weight), which no setting of "
        "Llama 3 gives: convert the model from its safetensors."
    )


def _token_ids(file: Gguf) -> dict[str, Any]:
    read = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in (*_END_KEYS, "bos_token_id")}
    ends = list(dict.fromkeys(int(value) for key in _END_KEYS if (value := read[key]) is not None))
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if read["bos_token_id"] is not None:
        ids["bos_token_id"] = int(read["bos_token_id"])
    padding = file.metadata.get("tokenizer.ggml.padding_token_id")
    return ids if padding is None else ids | {"pad_token_id": int(padding)}
