"""Tiny random sentence encoders of both kinds, in sentence-transformers' layout, made without torch."""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

KINDS = ("bert", "mpnet")
HIDDEN, INNER, LAYERS, HEADS, LONGEST = 32, 64, 3, 4, 60
_SPECIAL = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "mpnet": ("<s>", "<pad>", "</s>", "[UNK]")}
_ENDS = {"bert": ("[CLS]", "[SEP]"), "mpnet": ("<s>", "</s>")}
_PADDING = {"bert": ("[PAD]", 0), "mpnet": ("<pad>", 1)}
TEXTS = [
    "My mother asks the same question again and again.",
    "",
    "Wash the cup.",
    "  Zürich, 3 a.m.: she wandered off – what now?  ",
    " ".join(["He sleeps in the day and walks about at night, so I am awake as well."] * 4),
]


def write_encoder(folder: Path, kind: str, pooling: str = "mean", *, normalises: bool = True) -> Path:
    """Write an encoder whose numbers depend on `kind` alone."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.numpy.save_file(_weights(kind, tokenizer.get_vocab_size()), folder / "model.safetensors")
    _write(folder / "config.json", _config(kind, tokenizer.get_vocab_size()))
    pad, _ = _PADDING[kind]
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": False})
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalises else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{step}"}
        for i, step in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in paths[1 : len(steps)]:
        (folder / path).mkdir()
    modes = {"mean": "mean_tokens", "first": "cls_token", "max": "max_tokens"}
    table: dict[str, Any] = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    _write(folder / "1_Pooling" / "config.json", table | {"word_embedding_dimension": HIDDEN})
    return folder


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _config(kind: str, vocabulary: int) -> dict[str, Any]:
    common = {
        "architectures": ["BertModel" if kind == "bert" else "MPNetModel"],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "vocab_size": vocabulary,
        "max_position_embeddings": LONGEST + 4,
        "pad_token_id": _PADDING[kind][1],
    }
    more = {"bert": {"layer_norm_eps": 1e-12, "type_vocab_size": 2}}
    return common | more.get(kind, {"layer_norm_eps": 1e-5, "relative_attention_num_buckets": 32})


def _tokenizer(kind: str) -> Tokenizer:
    pieces = [*_SPECIAL[kind], *ascii_lowercase, *"0123456789.,:?!–", *(f"##{letter}" for letter in ascii_lowercase)]
    pieces += ["the", "##ing", "mother", "night", "question", "again"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    first, last = _ENDS[kind]
    ids = [(token, made.token_to_id(token)) for token in (first, last)]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{first} $A {last}", special_tokens=ids
    )
    return made


def _weights(kind: str, vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(len(kind))
    found: dict[str, np.ndarray] = {}

    def table(name: str, *shape: int, scale: float = 0.3) -> None:
        found[name] = (scale * random.standard_normal(shape)).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int) -> None:
        table(f"{name}.weight", outputs, inputs)
        table(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        table(f"{name}.weight", HIDDEN)
        found[f"{name}.weight"] += 1
        table(f"{name}.bias", HIDDEN)

    table("embeddings.word_embeddings.weight", vocabulary, HIDDEN, scale=1.0)
    table("embeddings.position_embeddings.weight", LONGEST + 4, HIDDEN, scale=1.0)
    norm("embeddings.LayerNorm")
    own = ("attn.q", "attn.k", "attn.v", "attn.o")
    if kind == "bert":
        table("embeddings.token_type_embeddings.weight", 2, HIDDEN, scale=1.0)
        own = ("self.query", "self.key", "self.value", "output.dense")
    else:
        table("encoder.relative_attention_bias.weight", 32, HEADS, scale=1.0)
    for layer in range(LAYERS):
        block = f"encoder.layer.{layer}"
        for name in own:
            linear(f"{block}.attention.{name}", HIDDEN, HIDDEN)
        norm(f"{block}.attention.{'output.LayerNorm' if kind == 'bert' else 'LayerNorm'}")
        linear(f"{block}.intermediate.dense", HIDDEN, INNER)
        linear(f"{block}.output.dense", INNER, HIDDEN)
        norm(f"{block}.output.LayerNorm")
    return found
