"""The check that follows every conversion: the same tokens, and the same logits, as the source gives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model

from mlx_dpo import machine
from mlx_dpo.convert.quantize import named_arrays, quantised_layers
from mlx_dpo.models.load import read_config, read_tokenizer
from mlx_dpo.refusal import Refusal

AWKWARD_TEXTS = (
    "What can I do when my mother asks the same question again and again?",
    " a leading space", "a trailing space ", "two  and   three spaces", "\ttabs\tand\n\nnewlines\r\n  and both \n ",
    "", " ", "\n", "it's I'LL you'Re don't", "In 1987 she was 42; call 0123-456789 at 3:05.", "1234567890 12 3 ٣٤",
    "naïve café Ünïcode ẞ", "cafe\u0301 n\u0303 \u0301", "记忆不好的母亲。日本語のテスト、한국어", "مرحبا שלום नमस्ते",
    "🙂 👩‍👧‍👦 🇩🇪 ☕️", "\u200b\ufeff\u00a0\u2028", "<|im_start|>user\nhello<|im_end|>", "<s>[INST] hi [/INST]</s>",
    "<|im_sta rt|> <unk> <0x0A> <pad", "def f(x):\n    return {'a': x[0] ** 2}  # ok", "https://example.org/a?b=c&d=%20",
    "▁already▁marked", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "...!!!???---",
)  # fmt: skip
PASSAGE = (
    "My mother has dementia and asks me the same question every few minutes. I answer, she thanks me, and then she "
    "asks again. Yesterday I lost my patience and I am ashamed of it. What could I say to her tonight?"
)
_POSITIONS = 48
_FEWEST_LAYERS = 6  # one round of Gemma 3's pattern of local and global layers
_SHARE_OF_MEMORY = 0.8
# Of the largest logit: float32 sums in another order differ by about 1e-5 of it, a lost rope setting by more than 1e-1.
TOLERANCE = 2e-3

Encode = Callable[[str], Sequence[int] | None]


class Figures(NamedTuple):
    """How two tables of logits (positions, vocabulary) differ; KL in nats a position, from the first to the second."""

    largest_difference: float
    largest_logit: float
    mean_kl: float
    agreement: float

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit."""
        return self.largest_difference / max(self.largest_logit, 1e-6)


def same_tokens(peer: Encode, tokenizer: TokenizerWrapper, where: str) -> int:
    """Compare ids on the awkward texts and return how many were compared; the peer gives None for one it cannot judge.

    Raises Refusal, quoting the text, at the first difference.
    """
    compared = 0
    for text in AWKWARD_TEXTS:
        expected = peer(text)
        if expected is None:
            continue
        got = tokenizer.encode(text, add_special_tokens=False)
        if list(got) != list(expected):
            raise Refusal(
                f"The converted tokenizer gives {text!r} other token ids than {where} ({_shown(got)} instead of "
                f"{_shown(expected)}): convert the model from a source with a tokenizer.json."
            )
        compared += 1
    return compared


def _shown(ids: Sequence[int]) -> str:
    return f"{list(ids[:8])}{'…' if len(ids) > 8 else ''}"


def passage_ids(tokenizer: TokenizerWrapper) -> list[int]:
    """The tokens on which logits are compared."""
    return list(tokenizer.encode(PASSAGE))[:_POSITIONS]


def load_result(folder: Path, where: str) -> tuple[nn.Module, TokenizerWrapper]:
    """Open a written folder as plain `mlx_lm.load` does; Refusal, naming the source `where`, where that fails."""
    config = read_config(folder)
    try:
        model, config = load_model(folder, lazy=True)
    except Exception as error:
        raise not_whole(where, config, error) from None
    try:
        return model, read_tokenizer(folder, config)
    except Refusal as refusal:  # the folder is gone by the time that somebody reads this
        raise Refusal(str(refusal).replace(str(folder), where)) from None


def not_whole(where: str, config: dict[str, Any], error: Exception) -> Refusal:
    """The refusal of weights that do not make the model that their configuration describes."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return Refusal(
        f"{where} does not hold a whole {config.get('model_type')} model that mlx-lm knows ({reason}): fetch it again, "
        "or choose another model."
    )


def layers_that_fit(model: nn.Module) -> tuple[int, int]:
    """How many layers can be evaluated in float32 in this machine's memory, and how many there are."""
    layers = list(getattr(model, "layers", []))
    if not layers:
        return 0, 0
    in_layers = sum(_numbers(layer) for layer in layers)
    total = _numbers(model)
    budget = machine.describe().memory_limit * _SHARE_OF_MEMORY / 4 - (total - in_layers)
    fit = int(budget / max(in_layers / len(layers), 1))
    return min(max(fit, min(_FEWEST_LAYERS, len(layers))), len(layers)), len(layers)


def _numbers(module: nn.Module) -> int:
    """How many numbers a module holds once it is unpacked; scales and biases, which then go, are counted with them."""
    held = sum(value.size for _, value in named_arrays(module))
    return held + sum(
        layer.weight.size * 32 // layer.bits - layer.weight.size for layer in quantised_layers(module).values()
    )


def keep_first_layers(model: nn.Module, count: int) -> None:
    """Cut a model down to its first layers, which then need no memory for the rest."""
    for _, module in model.named_modules():
        if isinstance(module.get("layers"), list):
            module.layers = module.layers[:count]
            return


def in_float32(model: nn.Module) -> nn.Module:
    """The model with every number in float32 and nothing packed."""
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def round_as(source: nn.Module, result: nn.Module) -> bool:
    """Round the source's float32 numbers to the types in which the result holds them, where it does not pack them.

    Returns whether that changed any; a difference that is then left is the conversion's own.
    """
    held = dict(named_arrays(result))
    packed = {f"{path}.weight" for path in quantised_layers(result)}
    changed = []
    for path, value in named_arrays(source):
        if path in held and path not in packed and held[path].dtype != mx.float32:
            rounded = value.astype(held[path].dtype).astype(mx.float32)
            if not mx.array_equal(rounded, value).item():
                changed.append((path, rounded))
    source.load_weights(changed, strict=False)
    return bool(changed)


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model's embedding has; None where it has no embedding of the usual name."""
    for path, module in model.named_modules():
        if path.endswith("embed_tokens"):
            return module.weight.shape[0]
    return None


def logits(model: nn.Module, ids: Sequence[int], where: str) -> np.ndarray:
    """float32 logits of shape (positions, vocabulary); Refusal, naming the source, where they cannot be computed."""
    try:
        result = model(mx.array(list(ids))[None])[0].astype(mx.float32)
        mx.eval(result)
    except Exception as error:  # whatever settings of the wrong type or size make mlx-lm raise
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"The model of {where} cannot be evaluated ({reason}): its config.json is wrong.") from None
    return np.array(result)


def figures(source: np.ndarray, result: np.ndarray, where: str) -> Figures:
    """Compare logits; Refusal where they are no numbers or of another vocabulary."""
    for table, whose in ((source, where), (result, "the converted model")):
        if not np.isfinite(table).all():
            raise Refusal(f"The logits of {whose} are not finite, so its weights hold NaN or overflow: fetch it again.")
    if source.shape != result.shape:
        raise Refusal(f"{where} has {source.shape[1]} logits, and the converted model {result.shape[1]}.")
    p, q = _log_probabilities(source), _log_probabilities(result)
    return Figures(
        largest_difference=float(np.abs(source - result).max()),
        largest_logit=float(np.abs(source).max()),
        mean_kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        agreement=float((source.argmax(-1) == result.argmax(-1)).mean()),
    )


def _log_probabilities(table: np.ndarray) -> np.ndarray:
    shifted = table.astype(np.float64) - table.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
