"""Sentence encoders in MLX: a text becomes a vector whose angle to another's says how alike they are in meaning.

BERT and MPNet kinds, in the folders that sentence-transformers writes. Nothing is fetched and nothing leaves.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.attention import attention
from mlx_dpo.models.exponentials import slow_here
from mlx_dpo.models.weights import check_safetensors, read_json
from mlx_dpo.refusal import Refusal

_AT_ONCE = 32  # texts
_POOLINGS: dict[str, "Pooling"] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
}
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {"gelu": nn.gelu, "relu": nn.relu}
_FURTHEST = 128  # places apart, beyond which MPNet tells no distances

Pooling = Literal["mean", "first", "max"]


class Encoder(NamedTuple):
    """A sentence encoder in float32; `longest` is the number of tokens after which a text is cut."""

    weights: dict[str, mx.array]
    config: dict[str, Any]
    tokenizer: Tokenizer
    pooling: Pooling
    normalises: bool
    longest: int

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.config["hidden_size"]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The texts' vectors, (texts, width) float32, as `SentenceTransformer.encode` gives them."""
        found = np.zeros((len(texts), self.width), dtype=np.float32)
        ids = [self.tokenizer.encode(text.strip()).ids for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for first in range(0, len(order), _AT_ONCE):
            some = order[first : first + _AT_ONCE]
            found[some] = np.array(self._vectors([ids[i] for i in some]))
        return found

    def _vectors(self, ids: list[list[int]]) -> mx.array:
        longest = max(map(len, ids))
        padding = self.config.get("pad_token_id") or 0
        tokens = mx.array([row + [padding] * (longest - len(row)) for row in ids])
        there = mx.arange(longest)[None] < mx.array([len(row) for row in ids])[:, None]
        states = _STATES[self.config["model_type"]](self, tokens, there)
        vectors = _pooled(states, there, self.pooling)
        if self.normalises:
            vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        mx.eval(vectors)
        return vectors

    def linear(self, name: str, x: mx.array) -> mx.array:
        """A linear layer of the model."""
        return mx.addmm(self.weights[f"{name}.bias"], x, self.weights[f"{name}.weight"].T)

    def norm(self, name: str, x: mx.array) -> mx.array:
        """A layer norm of the model."""
        eps = self.config.get("layer_norm_eps", 1e-12)
        return mx.fast.layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)


def load_encoder(folder: Path) -> Encoder:
    """Read a folder in sentence-transformers' layout.

    Raises Refusal for what is missing, damaged, or of another kind than BERT and MPNet.
    """
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder} holds no config.json: give the folder of a sentence encoder.")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in _STATES:
        kinds = " and ".join(_STATES)
        raise Refusal(f"{folder} holds a {config.get('model_type')} model: sentence encoders are of the kinds {kinds}.")
    if (
        config.get("hidden_act", "gelu") not in _ACTIVATIONS
        or config.get("position_embedding_type", "absolute") != "absolute"
    ):
        raise Refusal(f"{folder} has an activation or positions that are not known here: use another encoder.")
    pooling, normalises = _steps(folder)
    file = folder / "model.safetensors"
    check_safetensors(file)
    arrays, _ = read_arrays(file)
    weights = {_plain(name): value.astype(mx.float32) for name, value in arrays.items() if value.dtype != mx.int64}
    settings = folder / "sentence_bert_config.json"
    longest = (read_json(settings) if settings.exists() else {}).get("max_seq_length") or config[
        "max_position_embeddings"
    ]
    encoder = Encoder(weights, config, _tokenizer(folder, longest), pooling, normalises, longest)
    try:
        encoder.encode(["one", "and another"])
    except KeyError as fault:
        raise Refusal(f"{file} lacks {fault.args[0]}: restore it from its source.") from None
    return encoder


def _steps(folder: Path) -> tuple[Pooling, bool]:
    """How token states become a sentence's vector: the pooling, and whether it is brought to length 1."""
    if not (folder / "modules.json").exists():
        return "mean", True
    pooling: Pooling = "mean"
    kinds = []
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        kind = module["type"].rsplit(".", 1)[-1]
        kinds.append(kind)
        if kind == "Pooling":
            table = read_json(folder / module["path"] / "config.json")
            modes = [name for name, on in table.items() if name.startswith("pooling_mode") and on is True]
            if len(modes) != 1 or modes[0] not in _POOLINGS:
                raise Refusal(f"{folder} pools by {', '.join(modes)}: mean, first token and maximum are known here.")
            pooling = _POOLINGS[modes[0]]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise Refusal(
            f"{folder} has a step {min(unknown)} after its model, which is not known here: use another encoder."
        )
    return pooling, "Normalize" in kinds


def _tokenizer(folder: Path, longest: int) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise Refusal(f"{folder} holds no tokenizer.json: save the encoder with a newer sentence-transformers.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as fault:  # its own kinds are not exported
        raise Refusal(f"{file} is no tokenizer ({fault}): restore it from its source.") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return tokenizer


def _plain(name: str) -> str:
    return name.removeprefix("bert.").removeprefix("mpnet.")


def _pooled(states: mx.array, there: mx.array, pooling: Pooling) -> mx.array:
    if pooling == "first":
        return states[:, 0]
    weight = there[..., None].astype(states.dtype)
    if pooling == "max":
        return mx.where(there[..., None], states, -math.inf).max(axis=1)
    return (states * weight).sum(axis=1) / mx.maximum(weight.sum(axis=1), 1e-9)


def _bert(encoder: Encoder, tokens: mx.array, there: mx.array) -> mx.array:
    """Devlin et al. 2019 (arXiv:1810.04805): token states, (texts, length, width)."""
    weights = encoder.weights
    states = weights["embeddings.word_embeddings.weight"][tokens]
    states = states + weights["embeddings.token_type_embeddings.weight"][0]
    states = states + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    return _blocks(encoder, states, _hiding(there), names, "attention.output.LayerNorm")


def _mpnet(encoder: Encoder, tokens: mx.array, there: mx.array) -> mx.array:
    """Song et al. 2020 (arXiv:2004.09297): token states, (texts, length, width)."""
    weights, padding = encoder.weights, encoder.config.get("pad_token_id", 1)
    places = mx.where(there, mx.cumsum(there.astype(mx.int32), axis=1) + padding, padding)
    states = weights["embeddings.word_embeddings.weight"][tokens]
    states = states + weights["embeddings.position_embeddings.weight"][places]
    table = weights["encoder.relative_attention_bias.weight"]
    distances = table[_buckets(tokens.shape[1], table.shape[0])].transpose(2, 0, 1)[None]
    names = ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o")
    return _blocks(encoder, states, _hiding(there) + distances, names, "attention.LayerNorm")


_STATES = {"bert": _bert, "mpnet": _mpnet}


def _hiding(there: mx.array) -> mx.array:
    return mx.where(there[:, None, None], 0.0, -1e9)


def _buckets(length: int, count: int) -> mx.array:
    """Which learnt distance lies between two places: exact ones up to a quarter of them, then ever wider, each way.

    Raffel et al. 2020, the relative positions of T5 (arXiv:1910.10683).
    """
    apart = np.arange(length)[None] - np.arange(length)[:, None]
    half = count // 2
    exact = half // 2
    far = np.abs(apart)
    with np.errstate(divide="ignore"):
        grown = np.log(far.astype(np.float32) / exact) / math.log(_FURTHEST / exact) * (half - exact)
    wide = np.minimum(exact + np.maximum(grown, 0).astype(int), half - 1)
    return mx.array(np.where(apart > 0, half, 0) + np.where(far < exact, far, wide))


def _blocks(encoder: Encoder, states: mx.array, mask: mx.array, names: tuple[str, ...], norm: str) -> mx.array:
    act = _ACTIVATIONS[encoder.config.get("hidden_act", "gelu")]
    states = encoder.norm("embeddings.LayerNorm", states)
    for number in range(encoder.config["num_hidden_layers"]):
        block = f"encoder.layer.{number}."
        *inputs, back = (block + name for name in names)
        queries, keys, values = (encoder.linear(name, states) for name in inputs)
        seen = _attended(queries, keys, values, mask, encoder.config["num_attention_heads"])
        states = encoder.norm(block + norm, states + encoder.linear(back, seen))
        inner = act(encoder.linear(f"{block}intermediate.dense", states))
        states = encoder.norm(f"{block}output.LayerNorm", states + encoder.linear(f"{block}output.dense", inner))
    return states


def _attended(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array, heads: int) -> mx.array:
    queries, keys, values = (mx.unflatten(x, -1, (heads, -1)).transpose(0, 2, 1, 3) for x in (queries, keys, values))
    scale = queries.shape[-1] ** -0.5
    if slow_here():
        mask = mx.broadcast_to(mask, (len(queries), mask.shape[1], queries.shape[2], keys.shape[2]))
        seen = attention(queries, keys, values, None, scale, mask)
    else:
        seen = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    return seen.transpose(0, 2, 1, 3).flatten(-2)
