"""A GGUF source: written anew for MLX, and evaluated the long way round to compare with."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import save_config

from mlx_dpo.convert.events import Event, Phase, Progress
from mlx_dpo.convert.folder_source import rewrite
from mlx_dpo.convert.gguf import Gguf, read_gguf
from mlx_dpo.convert.gguf_config import config_of
from mlx_dpo.convert.gguf_reference import reference_model
from mlx_dpo.convert.gguf_tokenizer import GgufTokenizer, read_tokenizer, write_gguf_tokenizer
from mlx_dpo.convert.gguf_weights import GROUP, packed_tensors
from mlx_dpo.convert.request import Request
from mlx_dpo.convert.sentence_pieces import USER_DEFINED, peer
from mlx_dpo.convert.shards import ShardWriter
from mlx_dpo.convert.verify import Encode


@dataclass(frozen=True)
class GgufSource:
    """A file that was read, its configuration and its tokenizer; `scratch` is a folder to work in."""

    file: Gguf
    config: dict[str, Any]
    tokenizer: GgufTokenizer
    scratch: Path

    def write(self, out: Path, request: Request) -> Iterator[Event]:
        """Write weights, configuration and tokenizer to `out`."""
        write_gguf_tokenizer(self.file, self.tokenizer, out)
        target = out
        if request.bits is not None:
            self.scratch.mkdir()
            target = self.scratch
        yield Phase("Writing the weights")
        yield from self._weights(target, request)
        if request.bits is not None:
            yield Phase(f"Quantising to {request.bits} bits")
            rewrite(target, {}, out, request, str(self.file.path))

    def _weights(self, target: Path, request: Request) -> Iterator[Event]:
        writer, bits = ShardWriter(target), {}
        total = len(self.file.tensors)
        keep = request.quantize == "keep"
        for done, packed in enumerate(packed_tensors(self.file, self.config, keep, request.mlx_dtype), 1):
            for name, array in packed.arrays.items():
                writer.add(name, array)
            if packed.bits:
                bits[packed.name.removesuffix(".weight")] = packed.bits
            yield Progress(done, total, "tensors")
        writer.finish()
        save_config(self.config | _quantisation(bits), target / "config.json")

    def token_peer(self) -> tuple[Encode, str]:
        """SentencePiece where the vocabulary is its, the tokenizer rebuilt in memory otherwise."""
        if self.tokenizer.pieces is None:
            rebuilt = self.tokenizer.tokenizer
            return lambda text: rebuilt.encode(text, add_special_tokens=False).ids, "the file's vocabulary and merges"
        processor = peer(self.tokenizer.pieces)
        apart = {piece.text for piece in self.tokenizer.pieces.pieces if piece.kind == USER_DEFINED}
        # SentencePiece never finds a control token in a text, and puts no space after a symbol; llama.cpp does both.
        apart = (apart if self.tokenizer.pieces.space_first else set()) | self.tokenizer.controls
        return lambda text: None if any(token in text for token in apart) else processor.encode(text), "SentencePiece"

    def model(self, layers: int) -> nn.Module:
        """The file's first `layers` layers in float32, without anything that the conversion does."""
        return reference_model(self.file, self.config, layers)

    def logits_peer(self) -> str:
        """What the logits are compared with, in words."""
        return "the file's tensors dequantised to float32 by the gguf package"

    def licence(self) -> str | None:
        """The licence that the metadata name."""
        found = self.file.metadata.get("general.license")
        return found if isinstance(found, str) else None

    def files(self) -> list[Path]:
        """The file whose hash says what was converted."""
        return [self.file.path]


def open_gguf(path: Path, scratch: Path) -> GgufSource:
    """Read a GGUF file's metadata; Refusal where no MLX model and tokenizer can be made of them."""
    file = read_gguf(path)
    return GgufSource(file, config_of(file), read_tokenizer(file), scratch)


def _quantisation(bits: dict[str, int]) -> dict[str, Any]:
    """The configuration's quantisation: the commonest bits at the top, the layers that differ by path."""
    if not bits:
        return {}
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {path: _group(count) for path, count in bits.items() if count != usual}
    return {"quantization": _group(usual) | others}


def _group(bits: int) -> dict[str, Any]:
    return {"group_size": GROUP, "bits": bits, "mode": "affine"}
