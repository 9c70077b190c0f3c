"""SentencePiece tokenizers of the BPE kind, rebuilt for the `tokenizers` library."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_dpo.refusal import Refusal

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
APART = (UNKNOWN, CONTROL)  # found whole in a text by tokenizers and llama.cpp, and never by SentencePiece
_SPACE = "▁"
_BPE = 2


class Piece(NamedTuple):
    """A token: its text with ▁ for a space, its score (higher merges first), its SentencePiece type."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """A vocabulary by id, and whether a space is put before a text, and before what follows a special token."""

    pieces: tuple[Piece, ...]
    space_first: bool
    space_after_special: bool = True


def sentence_pieces(vocabulary: Pieces, where: str) -> Tokenizer:
    """The tokenizer that merges, of all neighbours that form a piece, the best scored first, and falls back to bytes.

    Raises Refusal, naming the file `where`, where the pieces cannot be a vocabulary.
    """
    texts = [piece.text for piece in vocabulary.pieces]
    ids = {text: place for place, text in enumerate(texts)}
    if len(ids) != len(texts):
        raise Refusal(f"{where} holds the same token twice: fetch the file again.")
    unknown = next((piece.text for piece in vocabulary.pieces if piece.kind == UNKNOWN), None)
    model = models.BPE(
        vocab=ids,
        merges=_merges(vocabulary.pieces, ids),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in vocabulary.pieces),
    )
    result = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_first:
        steps.append(decoders.Strip(" ", 1, 0))
    if vocabulary.space_first and vocabulary.space_after_special:
        result.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    elif vocabulary.space_first:
        result.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        result.normalizer = spaces
    result.decoder = decoders.Sequence(steps)
    # Where nothing is put before a text, a symbol like ▁▁ is to be found in the text as it stands with ▁ for a space.
    result.add_tokens(
        [
            AddedToken(piece.text, special=False, normalized=not vocabulary.space_first)
            for piece in vocabulary.pieces
            if piece.kind == USER_DEFINED
        ]
    )
    result.add_special_tokens(
        [AddedToken(piece.text, special=True, normalized=False) for piece in vocabulary.pieces if piece.kind in APART]
    )
    return result


def _merges(pieces: Sequence[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first; among equals, as the ids of the parts stand."""
    mergeable = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    ways = [
        (-piece.score, ids[left], ids[right], left, right)
        for piece in pieces
        if piece.kind == NORMAL
        for left, right in _halves(piece.text)
        if left in mergeable and right in mergeable
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _halves(text: str) -> Iterator[tuple[str, str]]:
    return ((text[:cut], text[cut:]) for cut in range(1, len(text)))


def read_pieces(path: Path) -> Pieces:
    """The vocabulary in a SentencePiece model file; Refusal for a damaged file or one that is not of the BPE kind."""
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's error class depends on its build
        raise Refusal(f"{path} is not a SentencePiece model ({error}): restore it from the model's source.") from None
    if not proto.pieces:
        raise Refusal(f"{path} holds no tokens: restore it from the model's source.")
    if proto.trainer_spec.model_type != _BPE:
        raise Refusal(f"{path} is a SentencePiece model of another kind than BPE: get the model's tokenizer.json.")
    pieces = tuple(Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces)
    return Pieces(pieces, proto.normalizer_spec.add_dummy_prefix)


def peer(vocabulary: Pieces) -> SentencePieceProcessor:
    """SentencePiece's own tokenizer of the same vocabulary, to compare ids with."""
    proto = ModelProto()
    proto.trainer_spec.model_type = _BPE
    proto.trainer_spec.byte_fallback = any(piece.kind == BYTE for piece in vocabulary.pieces)
    proto.normalizer_spec.add_dummy_prefix = vocabulary.space_first
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    for place, piece in enumerate(vocabulary.pieces):
        text = piece.text.replace(" ", _SPACE) if piece.kind == USER_DEFINED else piece.text
        proto.pieces.add(piece=text, score=piece.score, type=piece.kind)
        if piece.kind == UNKNOWN:
            proto.trainer_spec.unk_id = place
    return SentencePieceProcessor(model_proto=proto.SerializeToString())
