"""A GGUF model evaluated the long way round, to hold the repacked one against.

Everything is dequantised to float32 by the gguf package; llama's query and key rows stay interleaved, and the
rotation is the interleaved one that llama.cpp uses; Gemma's norm factors are used as they stand in the file.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.gemma3_text import RMSNorm as AddedToOne
from mlx_lm.utils import _get_classes

from mlx_dpo.convert.gguf import Gguf
from mlx_dpo.convert.gguf_weights import dequantised, mlx_name
from mlx_dpo.convert.rotations import Rotation


def reference_model(file: Gguf, config: dict[str, Any], layers: int) -> nn.Module:
    """The first `layers` layers of the file's model in float32, with embeddings, last norm and head."""
    shortened = config | {"num_hidden_layers": layers}
    model_class, args_class = _get_classes(shortened)
    model = model_class(args_class.from_dict(shortened))
    weights = {}
    for tensor in file.tensors.values():
        name = mlx_name(file, tensor.name)
        if name is not None and not _beyond(name, layers):
            weights[name] = mx.array(dequantised(file, tensor))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    _use_factors_as_they_stand(model)
    _use_rotations_of_the_file(model, file, config)
    model.load_weights(list(weights.items()), strict=True)
    return model.eval()


def _beyond(name: str, layers: int) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= layers


def _use_factors_as_they_stand(model: nn.Module) -> None:
    norms = {
        path: nn.RMSNorm(module.weight.size, eps=module.eps)
        for path, module in model.named_modules()
        if isinstance(module, AddedToOne)
    }
    if norms:
        model.update_modules(tree_unflatten(list(norms.items())))


def _use_rotations_of_the_file(model: nn.Module, file: Gguf, config: dict[str, Any]) -> None:
    if file.parameter("rope.scaling.type", "none") not in ("none", "linear"):
        return  # stretched by a rule that llama.cpp applies at run time: mlx-lm's own is used on both sides
    half = config["head_dim"] // 2
    gemma = file.architecture == "gemma3"
    theta = float(file.parameter("rope.freq_base", 1e6 if gemma else 10_000.0))
    plain = theta ** (-np.arange(half) / half)
    slower = plain / float(file.parameter("rope.scaling.factor", 1.0))
    if "rope_freqs.weight" in file.tensors:
        slower = slower / dequantised(file, file.tensors["rope_freqs.weight"]).astype(np.float64)
    everywhere = Rotation(slower, interleaved=file.architecture == "llama")
    local = Rotation(float(file.parameter("rope.freq_base_swa", 10_000.0)) ** (-np.arange(half) / half))
    layers: list[Any] = model.layers  # pyright: ignore[reportAssignmentType]
    for place, layer in enumerate(layers):
        sees_all = not gemma or (place + 1) % config["sliding_window_pattern"] == 0
        layer.self_attn.rope = everywhere if sees_all else local
