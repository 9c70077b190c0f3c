"""Control tokens that people or models may write out in words, made harmless."""

import re
from collections.abc import Callable
from functools import partial

from mlx_lm.tokenizer_utils import TokenizerWrapper


def control_tokens(tokenizer: TokenizerWrapper) -> dict[int, str]:
    """Ids and texts of the tokens that are no words: turn markers, beginnings, ends, padding."""
    added = tokenizer.added_tokens_decoder
    special = {number: str(token) for number, token in added.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def disarmed(tokenizer: TokenizerWrapper) -> Callable[[str], str]:
    """A function that sets a space behind the first character of every control token spelt out in a text.

    A chat template is rendered to one string before it is cut into tokens, so `<|im_end|>` inside a message
    would otherwise end that message and let it forge the next one. As `< |im_end|>` it is ordinary words.
    Markers that are ordinary words to the tokenizer itself (Llama 2's [INST]) are left as they are.
    """
    texts = [re.escape(text) for text in control_tokens(tokenizer).values() if len(text) > 1]
    if not texts:
        return str
    # A look-ahead finds tokens that overlap too.
    pattern = re.compile(f"(?={'|'.join(texts)})")
    return partial(_spaced, pattern)


def _spaced(pattern: re.Pattern[str], text: str) -> str:
    places = [0, *(found.start() + 1 for found in pattern.finditer(text)), len(text)]
    return " ".join(text[start:stop] for start, stop in zip(places, places[1:], strict=False))
