"""The tensors of a GGUF file under the names, in the row order and in the blocks that MLX has.

MLX's affine quantisation is w = scale·q + bias with q unsigned, one scale and bias a group. A group of 32 holds
GGML's blocks as they are: Q4_0 is d·(q - 8), Q4_1 is d·q + m, Q8_0 is d·q with q signed.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize

from mlx_dpo.convert.gguf import Gguf
from mlx_dpo.refusal import Refusal

Kind = GGMLQuantizationType
GROUP = 32
_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}
_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_GEMMA3_IN_BLOCK = _IN_BLOCK | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NOT_WEIGHTS = ("rope_freqs.weight",)  # read into the configuration


class Packed(NamedTuple):
    """One tensor for MLX: its arrays by name, and its blocks' bits where it stays quantised (0 where not)."""

    name: str
    arrays: dict[str, mx.array]
    bits: int


def mlx_name(file: Gguf, name: str) -> str | None:
    """The MLX name of a GGUF tensor, None for one that is no weight; Refusal for one that is not known."""
    if name in _NOT_WEIGHTS:
        return None
    stem, _, ending = name.rpartition(".")
    table = _GEMMA3_IN_BLOCK if file.architecture == "gemma3" else _IN_BLOCK
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if ending in ("weight", "bias"):
        if stem in _TOP:
            return f"{_TOP[stem]}.{ending}"
        if block and block[2] in table:
            return f"model.layers.{block[1]}.{table[block[2]]}.{ending}"
    raise Refusal(
        f"{file.path} holds the tensor {name}, which no {file.architecture} model here has: "
        "convert the model from its safetensors."
    )


def packed_tensors(file: Gguf, config: dict[str, Any], keep: bool, dtype: mx.Dtype | None) -> Iterator[Packed]:
    """Every weight in MLX's form: blocks kept where `keep` and MLX can hold them, floats otherwise.

    `dtype` recasts what is not kept in blocks; without it, 16 and 32-bit floats stay, other kinds become float16.
    """
    narrow = _compute_dtype(file)
    for tensor in file.tensors.values():
        name = mlx_name(file, tensor.name)
        if name is None:
            continue
        heads = _rotated_heads(tensor.name, file, config)
        if heads and tensor.data.shape[0] % (2 * heads):
            raise Refusal(
                f"{file.path}: tensor {tensor.name} has {tensor.data.shape[0]} rows, which are not {heads} heads: "
                "fetch the file again."
            )
        bits = _BITS.get(tensor.tensor_type, 0) if keep and _can_stay(tensor) else 0
        if bits:
            yield Packed(name, _blocks(file, tensor, name.removesuffix(".weight"), heads), bits)
        else:
            yield Packed(name, {name: _dense(file, tensor, name, heads, dtype, narrow)}, 0)


def rows_restored(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows, in which the two halves of a head are interleaved."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rotated_heads(name: str, file: Gguf, config: dict[str, Any]) -> int:
    """How many heads the rows of an interleaved tensor hold, 0 for the others; only llama's are interleaved."""
    if file.architecture != "llama":
        return 0
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
        return config["num_attention_heads"]
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
        return config["num_key_value_heads"]
    return 0


def _can_stay(tensor: ReaderTensor) -> bool:
    return tensor.data.ndim == 2 and tensor.name.endswith(".weight")


def _compute_dtype(file: Gguf) -> mx.Dtype:
    """What small float32 tensors are narrowed to where that loses nothing, so that MLX computes in 16 bit."""
    kinds = {tensor.tensor_type for tensor in file.tensors.values() if tensor.data.ndim == 2}
    if kinds == {Kind.F32}:
        return mx.float32
    return mx.bfloat16 if kinds <= {Kind.BF16, Kind.F32} else mx.float16


def _blocks(file: Gguf, tensor: ReaderTensor, path: str, heads: int) -> dict[str, mx.array]:
    data = tensor.data
    rows = rows_restored(data, heads) if heads else data
    blocks = np.ascontiguousarray(rows).reshape(data.shape[0], -1, _block_bytes(tensor))
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    if tensor.tensor_type == Kind.Q8_0:
        codes, bias = blocks[..., 2:] ^ 0x80, scale.astype(np.float32) * -128.0
    elif tensor.tensor_type == Kind.Q4_0:
        codes, bias = _nibbles(blocks[..., 2:]), scale.astype(np.float32) * -8.0
    else:
        codes, bias = _nibbles(blocks[..., 4:]), blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
    if not (np.isfinite(scale).all() and np.isfinite(bias).all()):
        raise Refusal(f"{file.path}: tensor {tensor.name} has blocks whose scale is no number: fetch the file again.")
    with np.errstate(over="ignore"):
        exact = (bias.astype(np.float16).astype(np.float32) == bias).all()
    held = np.float16 if exact else np.float32
    return {
        f"{path}.weight": mx.array(np.ascontiguousarray(codes).reshape(data.shape[0], -1).view("<u4")),
        f"{path}.scales": mx.array(scale.astype(held)),
        f"{path}.biases": mx.array(bias.astype(held)),
    }


def _block_bytes(tensor: ReaderTensor) -> int:
    return {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34}[tensor.tensor_type]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """GGML puts value i and value i + 16 of a block into one byte; MLX puts neighbours there, the first one low."""
    low, high = packed & 0x0F, packed >> 4
    values = np.concatenate([low, high], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _dense(
    file: Gguf, tensor: ReaderTensor, name: str, heads: int, dtype: mx.Dtype | None, narrow: mx.Dtype
) -> mx.array:
    values = dequantised(file, tensor)
    if heads:
        values = rows_restored(values, heads)
    if file.architecture == "gemma3" and name.endswith("norm.weight"):
        values = values - 1  # GGUF holds the factor itself, MLX and transformers what is added to one
    whole = mx.array(values)
    target = dtype or _stored_dtype(tensor, whole, narrow)
    result = whole.astype(target)
    if not mx.isfinite(result).all().item():
        raise Refusal(
            f"{file.path}: tensor {tensor.name} holds values that {str(target).removeprefix('mlx.core.')} "
            "cannot hold: choose --dtype bfloat16."
        )
    return result


def dequantised(file: Gguf, tensor: ReaderTensor) -> np.ndarray:
    """A tensor's values in float32, as the gguf package computes them; Refusal where one is no number."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise Refusal(
            f"{file.path}: tensor {tensor.name} has the type {tensor.tensor_type.name}, which cannot be "
            "dequantised here: get another quantisation of the model."
        ) from None
    if not np.isfinite(values).all():
        raise Refusal(f"{file.path}: tensor {tensor.name} holds values that are no numbers: fetch the file again.")
    return np.ascontiguousarray(values, dtype=np.float32)


def _stored_dtype(tensor: ReaderTensor, whole: mx.array, narrow: mx.Dtype) -> mx.Dtype:
    if tensor.tensor_type == Kind.BF16:
        return mx.bfloat16
    if tensor.tensor_type == Kind.F32:
        small = tensor.data.ndim == 1
        return narrow if small and mx.array_equal(whole.astype(narrow).astype(mx.float32), whole).item() else mx.float32
    return mx.float16
