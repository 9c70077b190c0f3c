"""A source in Hugging Face layout: written anew for MLX, and evaluated to compare with."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model, save_config, save_model
from sentencepiece import SentencePieceProcessor

from mlx_dpo.convert.events import Event, Phase
from mlx_dpo.convert.huggingface import (
    TOKENIZER_FILES,
    copy_texts,
    model_folder,
    rebuilt_tokenizer,
    transformers_config,
    written_config,
)
from mlx_dpo.convert.quantize import dequantised, quantised, quantised_layers, recast
from mlx_dpo.convert.request import Request
from mlx_dpo.convert.rotations import use_rotations
from mlx_dpo.convert.verify import Encode, in_float32, keep_first_layers, not_whole
from mlx_dpo.models.load import read_config, read_tokenizer
from mlx_dpo.models.weights import read_json
from mlx_dpo.refusal import Refusal


@dataclass(frozen=True)
class FolderSource:
    """`folder` as it was given, `weights` the folder with its numbers in safetensors, `config` as mlx-lm needs it."""

    folder: Path
    weights: Path
    config: dict[str, Any]

    def write(self, out: Path, request: Request) -> Iterator[Event]:
        """Write weights, configuration and tokenizer to `out`."""
        yield Phase("Writing the weights")
        rewrite(self.weights, self.config, out, request, str(self.folder))
        copied = copy_texts(self.folder, out)
        if not set(copied) & set(TOKENIZER_FILES[:3]):
            raise Refusal(
                f"{self.folder} holds no tokenizer (tokenizer.json or tokenizer.model): add it from the source."
            )
        rebuilt_tokenizer(self.folder, out)

    def token_peer(self) -> tuple[Encode, str]:
        """The source's own tokenizer: transformers', or SentencePiece's where there is only its model."""
        piece_model = self.folder / "tokenizer.model"
        if piece_model.exists() and not (self.folder / "tokenizer.json").exists():
            processor = SentencePieceProcessor(model_file=str(piece_model))
            return _pieces_of(processor), "SentencePiece"
        tokenizer = read_tokenizer(self.folder, read_config(self.folder))
        return lambda text: tokenizer.encode(text, add_special_tokens=False), "transformers"

    def model(self, layers: int) -> nn.Module:
        """The source in float32, its first `layers` layers, with rotations from its own configuration where known."""
        model, _ = opened(self.weights, self.config, str(self.folder))
        use_rotations(model, transformers_config(self.weights))
        keep_first_layers(model, layers)
        return in_float32(model)

    def logits_peer(self) -> str:
        """What the logits are compared with, in words."""
        return "the source's weights in float32"

    def licence(self) -> str | None:
        """The licence that the folder names, in an earlier manifest or at the head of its README."""
        manifest = self.folder / "manifest.json"
        if manifest.exists() and isinstance(found := read_json(manifest).get("licence"), str):
            return found
        readme = self.folder / "README.md"
        if not readme.exists():
            return None
        head = readme.read_text(encoding="utf-8", errors="replace").removeprefix("---\n").partition("\n---")[0]
        match = re.search(r"^license:[ \t]*(\S.*)$", head, re.MULTILINE)
        return match[1].strip() if match else None

    def files(self) -> list[Path]:
        """The files whose hashes say what was converted."""
        weights = [*self.folder.glob("model*.safetensors")] or [*self.folder.glob("pytorch_model*.bin")]
        texts = [self.folder / name for name in ("config.json", *TOKENIZER_FILES)]
        return sorted(path for path in (*weights, *texts) if path.is_file())


def open_folder(folder: Path, scratch: Path) -> FolderSource:
    """Read the configuration of a model folder; PyTorch files are rewritten to `scratch`."""
    weights = model_folder(folder, scratch)
    return FolderSource(folder, weights, written_config(folder))


def opened(folder: Path, config: dict[str, Any], where: str) -> tuple[nn.Module, dict[str, Any]]:
    """The lazy MLX model of a folder and its configuration; Refusal where the weights do not make one."""
    try:
        return load_model(folder, lazy=True, model_config=config)
    except Exception as error:
        raise not_whole(where, config, error) from None


def rewrite(folder: Path, config: dict[str, Any], out: Path, request: Request, where: str) -> None:
    """Write the weights and the configuration of `folder` to `out` as requested."""
    model, config = opened(folder, config, where)
    packed = bool(quantised_layers(model))
    if packed and request.quantize != "keep":
        model, config = dequantised(model, config)
    if request.mlx_dtype is not None:
        model = recast(model, request.mlx_dtype, where)
    if request.bits is not None:
        model, config = quantised(model, config, request.bits)
    if "quantization" not in config:
        config.pop("quantization_config", None)
    if request.dtype != "keep":
        config.pop("dtype", None)
        config["torch_dtype"] = request.dtype
    save_model(out, model, donate_model=True)
    save_config(config, out / "config.json")


def _pieces_of(processor: SentencePieceProcessor) -> Encode:
    apart = [
        processor.id_to_piece(place)
        for place in range(processor.get_piece_size())
        if processor.is_control(place) or processor.is_unknown(place)
    ]  # SentencePiece never finds these in a text, tokenizers always do

    def ids(text: str) -> list[int] | None:
        return None if any(token in text for token in apart) else processor.encode(text)

    return ids
