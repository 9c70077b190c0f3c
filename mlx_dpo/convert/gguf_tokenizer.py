"""The tokenizer and the chat template, rebuilt from a GGUF file's metadata."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from mlx_dpo.convert.byte_level import BEGINNING_BY_DEFAULT, byte_level
from mlx_dpo.convert.gguf import Gguf
from mlx_dpo.convert.sentence_pieces import APART, NORMAL, USER_DEFINED, Piece, Pieces, sentence_pieces
from mlx_dpo.convert.tokenizer_files import Special, token_at, write_tokenizer
from mlx_dpo.refusal import Refusal

_SENTENCE_PIECE = ("llama", "gemma")


class GgufTokenizer(NamedTuple):
    """The rebuilt tokenizer, its special tokens, its control tokens, and its pieces where SentencePiece made it."""

    tokenizer: Tokenizer
    special: Special
    controls: frozenset[str]
    pieces: Pieces | None


def read_tokenizer(file: Gguf) -> GgufTokenizer:
    """Rebuild the tokenizer that llama.cpp would use.

    Raises Refusal, naming what is missing or not known, for every kind but byte-level BPE and SentencePiece BPE.
    """
    where, kind = str(file.path), _entry(file, "model")
    tokens = _texts(file, "tokens")
    types = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise Refusal(f"{where} has {len(tokens)} tokens and {len(types)} token types: fetch the file again.")
    pieces = None
    if kind == "gpt2":
        pre = str(_entry(file, "pre", "default"))
        tokenizer = byte_level(tokens, _texts(file, "merges"), pre, where)
        add_tokens_apart(tokenizer, tokens, types)
        add_bos = pre in BEGINNING_BY_DEFAULT
    elif kind in _SENTENCE_PIECE:
        pieces = _pieces(file, tokens, types)
        tokenizer = sentence_pieces(pieces, where)
        add_bos = True
    else:
        raise Refusal(
            f"{where} has a tokenizer of the kind {kind}, and gpt2, llama and gemma are rebuilt here: "
            "convert the model from its safetensors."
        )
    controls = frozenset(token for token, type_ in zip(tokens, types, strict=True) if type_ in APART)
    return GgufTokenizer(tokenizer, _special(file, tokens, add_bos), controls, pieces)


def write_gguf_tokenizer(file: Gguf, read: GgufTokenizer, folder: Path) -> None:
    """Write the tokenizer's files, the chat template among them, to `folder`."""
    template = file.metadata.get("tokenizer.chat_template")
    settings: dict[str, Any] = {"chat_template": template} if isinstance(template, str) else {}
    write_tokenizer(folder, read.tokenizer, read.special, settings)


def add_tokens_apart(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Have control and user-defined tokens found in a text before it is cut into words."""
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in APART:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _entry(file: Gguf, key: str, default: Any = None) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if value is None:
        raise Refusal(f"{file.path} does not give tokenizer.ggml.{key}: get a GGUF file with its tokenizer.")
    return value


def _texts(file: Gguf, key: str) -> list[str]:
    values = _entry(file, key)
    if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
        raise Refusal(f"{file.path} has something else than texts in tokenizer.ggml.{key}: fetch the file again.")
    return values


def _pieces(file: Gguf, tokens: list[str], types: list[int]) -> Pieces:
    scores = _entry(file, "scores")
    if len(scores) != len(tokens):
        raise Refusal(f"{file.path} has {len(tokens)} tokens and {len(scores)} scores: fetch the file again.")
    pieces = tuple(Piece(*row) for row in zip(tokens, scores, types, strict=True))
    return Pieces(pieces, space_first=bool(_entry(file, "add_space_prefix", True)))


def _special(file: Gguf, tokens: list[str], add_bos: bool) -> Special:
    def named(key: str) -> str | None:
        return token_at(tokens, file.metadata.get(f"tokenizer.ggml.{key}_token_id"), key, str(file.path))

    return Special(
        bos=named("bos"),
        eos=named("eos"),
        unk=named("unknown"),
        pad=named("padding"),
        add_bos=bool(_entry(file, "add_bos_token", add_bos)),
        add_eos=bool(_entry(file, "add_eos_token", False)),
    )
