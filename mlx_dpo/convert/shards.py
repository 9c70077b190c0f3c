"""Weights written as safetensors, a shard at a time, so that memory holds one shard and not the model."""

import json
from pathlib import Path

import mlx.core as mx

from mlx_dpo.refusal import Refusal

_SHARD_BYTES = 2 << 30


class ShardWriter:
    """Collects tensors in the order given and writes a shard whenever enough have come together."""

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        """Write into `folder`, shards of about `shard_bytes` bytes."""
        self.folder, self.shard_bytes = folder, shard_bytes
        self.waiting: dict[str, mx.array] = {}
        self.waiting_bytes = 0
        self.names: dict[str, int] = {}
        self.shards: list[Path] = []
        self.total = 0

    def add(self, name: str, tensor: mx.array) -> None:
        """Take one tensor; a name that comes twice is refused."""
        if name in self.names or name in self.waiting:
            raise Refusal(f"The source holds the tensor {name} twice: fetch it again.")
        if self.waiting and self.waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self.waiting[name] = tensor
        self.waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the shards their final names and write the index."""
        self._write()
        count = len(self.shards)
        finals = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            finals = ["model.safetensors"]
        for shard, final in zip(self.shards, finals, strict=True):
            shard.rename(self.folder / final)
        weight_map = {name: finals[place] for name, place in sorted(self.names.items())}
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        if not self.waiting:
            return
        path = self.folder / f"model.part-{len(self.shards)}.safetensors"
        mx.save_safetensors(str(path), self.waiting, metadata={"format": "mlx"})
        self.names |= dict.fromkeys(self.waiting, len(self.shards))
        self.shards.append(path)
        self.total += self.waiting_bytes
        self.waiting, self.waiting_bytes = {}, 0
