"""Rotary position embeddings written out plainly, as transformers defines them, to hold mlx-lm's against.

The check after a conversion builds the source's side with these, from the source's own configuration: a rope setting
that was lost on the way then shows as different logits.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PretrainedConfig


class Rotation(nn.Module):
    """Rotates pairs of numbers by position times frequency, and scales them by a factor.

    `frequencies`: radians a position, shape (rotated / 2,). A pair is (i, i + rotated / 2), or neighbours where
    `interleaved`. Numbers beyond the rotated ones pass unchanged.
    """

    def __init__(self, frequencies: np.ndarray, factor: float = 1.0, interleaved: bool = False) -> None:
        """Take the frequencies as they are."""
        super().__init__()
        self._frequencies = np.asarray(frequencies, dtype=np.float64)
        self._factor, self._interleaved = factor, interleaved

    @property
    def rotated(self) -> int:
        """How many of a head's numbers are rotated."""
        return 2 * self._frequencies.size

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """Rotate x of shape (batch, heads, positions, head dimension), the first position being `offset`."""
        angles = np.arange(offset, offset + x.shape[-2])[:, None] * self._frequencies
        cos = mx.array((np.cos(angles) * self._factor).astype(np.float32))
        sin = mx.array((np.sin(angles) * self._factor).astype(np.float32))
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        if self._interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
            pairs = mx.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
            return mx.concatenate([pairs.reshape(turned.shape), rest], axis=-1)
        first, second = mx.split(turned, 2, axis=-1)
        return mx.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


def rotation(parameters: dict[str, Any], head_dim: int) -> Rotation | None:
    """The rotation of one set of transformers 5's rope parameters; None for a kind that is not written out here.

    Source: the rope functions of transformers 5 (default, linear, llama3, yarn).
    """
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    theta = float(parameters["rope_theta"])
    plain = theta ** (-np.arange(0, rotated, 2) / rotated)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return Rotation(plain)
    if kind == "linear":
        return Rotation(plain / parameters["factor"])
    if kind == "llama3":
        return Rotation(plain / llama3_factors(parameters, theta, rotated))
    if kind == "yarn" and parameters.get("factor") and not parameters.get("mscale"):
        return _yarn(parameters, plain, theta, rotated)
    return None


def _yarn(parameters: dict[str, Any], plain: np.ndarray, theta: float, rotated: int) -> Rotation:
    """Peng et al. 2023, section 3.4 (arXiv:2309.00071): fast rotations stay, slow ones are stretched."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]

    def place(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(parameters.get("beta_fast") or 32), place(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    stretched = np.clip((np.arange(rotated // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = parameters.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotation(plain * (1 - stretched) + plain / factor * stretched, scale)


def llama3_factors(settings: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """By how much Llama 3.1 slows each rotation: 1 for the fast ones, `factor` for the slow, between for the rest.

    Shape (head_dim / 2,). Source: Llama 3.1's reference code for scaled rotary embeddings.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, factor = settings["original_max_position_embeddings"], settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    share = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - share) / factor + share)


def use_rotations(model: nn.Module, config: PretrainedConfig | None) -> bool:
    """Replace the model's rotations by those of transformers' `config`; False, and no change, where that cannot be."""
    text: Any = config.get_text_config() if config is not None else None
    parameters = getattr(text, "rope_parameters", None)
    layers: list[Any] = list(getattr(model, "layers", []))
    if not parameters or not all(hasattr(getattr(layer, "self_attn", None), "rope") for layer in layers):
        return False
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    try:
        made = [rotation(parameters.get(kind, parameters), head_dim) for kind in kinds[: len(layers)]]
    except (TypeError, ValueError, KeyError, ArithmeticError):
        return False
    fits = [
        new is not None and getattr(layer.self_attn.rope, "dims", None) == new.rotated and not _is_interleaved(layer)
        for new, layer in zip(made, layers, strict=True)
    ]
    if not all(fits):
        return False
    for new, layer in zip(made, layers, strict=True):
        layer.self_attn.rope = new
    return True


def _is_interleaved(layer: Any) -> bool:
    return bool(getattr(layer.self_attn.rope, "traditional", False))
