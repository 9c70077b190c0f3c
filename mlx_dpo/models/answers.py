"""Greedy answers to a few questions at once, for looking at a model before and after."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.generate import batch_generate

from mlx_dpo.models.load import Loaded


def greedy_answers(loaded: Loaded, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    """The model's most likely answer to each prompt (token ids); one cut off at `max_tokens` ends with " …"."""
    given = [list(prompt) for prompt in prompts]
    answers = batch_generate(loaded.model, loaded.tokenizer, given, max_tokens=max_tokens, return_token_ids=True)
    mx.clear_cache()
    return [
        text.strip() + (" …" if len(tokens) == max_tokens else "")
        for text, tokens in zip(answers.texts, answers.token_ids or [], strict=True)
    ]
