"""A GGUF file: its metadata as values, its tensors as they lie in the file."""

from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader, ReaderTensor

from mlx_dpo.convert.gguf_header import check_header
from mlx_dpo.refusal import Refusal

# Each writes its query and key rows in one of two orders; see gguf_weights.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


class Gguf(NamedTuple):
    """Metadata by key, tensors by name; the tensors' data stay in the memory-mapped file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        """The name that begins the keys of the hyperparameters."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def parameter(self, key: str, default: Any = None) -> Any:
        """The hyperparameter `key` of this architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def required(self, key: str) -> Any:
        """The hyperparameter `key`, or Refusal where the file does not give it."""
        value = self.parameter(key)
        if value is None:
            raise Refusal(f"{self.path} does not give {self.architecture}.{key}: get a complete GGUF file.")
        return value


def read_gguf(path: Path) -> Gguf:
    """Read the metadata and the table of tensors of a checked file of a known architecture."""
    check_header(path)
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise Refusal(f"{path} has damaged metadata ({error}): fetch the file again.") from None
    result = Gguf(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if result.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Refusal(
            f"{path} holds a model of the architecture {result.architecture}, and {known} are read from GGUF: "
            "convert that model from its safetensors instead."
        )
    if "split.count" in metadata and int(metadata["split.count"]) > 1:
        raise Refusal(f"{path} is one of {metadata['split.count']} parts: merge them into one GGUF file first.")
    if int(result.parameter("expert_count", 0) or 0):
        raise Refusal(f"{path} holds a mixture of experts, which is not read from GGUF: use its safetensors.")
    return result
