"""Byte-level BPE tokenizers, rebuilt from a vocabulary, merges and the name of a pre-tokenizer."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_dpo.refusal import Refusal

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_CASELESS.replace("DIGITS", r"\p{N}{1,3}"),)
_QWEN2 = (_CASELESS.replace("DIGITS", r"\p{N}"),)
_DIGITS_ALONE = (r"\p{N}", _GPT2)
# How each kind cuts a text into words before merging. Source: the pre-tokenizers that llama.cpp lists by name.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_ALONE),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
}
# Kinds in which a word that is itself a token is taken whole, whatever the merges would make of it.
WHOLE_WORDS = frozenset(("llama-bpe", "llama3", "llama-v3"))
BEGINNING_BY_DEFAULT = WHOLE_WORDS


def byte_level(tokens: Sequence[str], merges: Sequence[str], kind: str, where: str) -> Tokenizer:
    """A tokenizer whose ids are the places in `tokens`; `merges` are pairs with a space between.

    Raises Refusal, naming the file `where`, for a kind of pre-tokenizer that is not known or merges that do not fit.
    """
    if kind not in _PATTERNS:
        raise Refusal(
            f"{where} wants the pre-tokenizer {kind}, which is not known here: convert the model from its safetensors."
        )
    vocabulary = {token: place for place, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise Refusal(f"{where} holds the same token twice: fetch the file again.")
    try:
        pairs = [_pair(merge) for merge in merges]
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=kind in WHOLE_WORDS)
    except Exception as error:  # the library raises plain Exception here
        raise Refusal(f"{where} has merges that do not fit its tokens ({error}): fetch the file again.") from None
    result = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[kind]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    result.decoder = decoders.ByteLevel()
    return result


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise ValueError(f"{merge!r} is no pair")
    return left, right
