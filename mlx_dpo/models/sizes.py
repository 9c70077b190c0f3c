"""The sizes of a model, as its configuration states them: believed only where they are possible."""

from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.refusal import Refusal

# What no model of today comes near; a file that says more is damaged, or means to use up the machine.
_LARGEST = {
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}


class Sizes(NamedTuple):
    """Width, inner width, blocks, heads, heads of keys and values, the width of all of these, and tokens known."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    kv_width: int
    vocabulary: int


def sizes(config: dict[str, Any]) -> Sizes:
    """The sizes of a language model, GPT-2's names and the usual shares where some are left to defaults.

    Raises Refusal where width or depth are not stated.
    """
    text = config.get("text_config") or config
    hidden = text.get("hidden_size") or text.get("n_embd")
    layers = text.get("num_hidden_layers") or text.get("n_layer")
    if not hidden or not layers:
        raise Refusal("The model's config.json names no hidden_size or num_hidden_layers: run mlx_dpo convert on it.")
    heads = text.get("num_attention_heads") or text.get("n_head") or max(1, hidden // 64)
    kv_heads = _largest(text.get("num_key_value_heads") or heads)
    return Sizes(
        hidden=hidden,
        inner=_largest(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        kv_width=kv_heads * (text.get("head_dim") or hidden // heads),
        vocabulary=config.get("vocab_size") or text.get("vocab_size") or 0,
    )


def _largest(size: int | list[int]) -> int:
    return max(size) if isinstance(size, list) else size


def refuse_impossible_sizes(config: dict[str, Any], path: Path) -> None:
    """Raise Refusal, naming file and key, for a size that is no whole number above 0, or beyond any model's."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key, largest in _LARGEST.items():
            for size in part[key] if isinstance(part.get(key), list) else [part.get(key)]:
                possible = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= largest
                if size is not None and not possible:
                    raise Refusal(f"{path} has an impossible {key} ({size!r:.40}): restore it from the model's source.")
