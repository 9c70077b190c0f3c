"""Greedy answers to a few questions at once, for looking at a model before, during and after training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler

from mlx_dpo.models.attention import by_arithmetic
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded
from mlx_dpo.models.rows import rows_of

_LIKELIEST = 0.9  # of the probability


class Answer(NamedTuple):
    """What a model said, as text and as token ids; a text cut off at the most tokens ends with " …"."""

    text: str
    tokens: list[int]


def greedy_answers(loaded: Loaded, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """The model's most likely answer to each prompt (token ids)."""
    return drawn_answers(loaded, prompts, max_tokens, temperature=0.0, seed=0)


def drawn_answers(
    loaded: Loaded, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float, seed: int
) -> list[Answer]:
    """An answer to each prompt (token ids), drawn from the likeliest nine tenths; at temperature 0 the likeliest."""
    if not prompts:
        return []
    given = [list(prompt) for prompt in prompts]
    how: dict[str, Any] = {}
    if temperature:
        mx.random.seed(seed)
        how["sampler"] = make_sampler(temp=temperature, top_p=_LIKELIEST)
    with by_arithmetic(loaded.model):
        answers = batch_generate(
            loaded.model, loaded.tokenizer, given, max_tokens=max_tokens, return_token_ids=True, **how
        )
    mx.clear_cache()
    return [
        Answer(text.strip() + (" …" if len(tokens) == max_tokens else ""), list(tokens))
        for text, tokens in zip(answers.texts, answers.token_ids or [], strict=True)
    ]


def divergence(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    as_reference: Callable[[nn.Module], AbstractContextManager[None]],
) -> float | None:
    """KL(model ‖ reference) along the model's own answers, the mean over their tokens in nats; None without tokens.

    Exact over the vocabulary at each place. `as_reference(model)` makes the model its reference for a block.
    """
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.tokens:
            rows = rows_of([(prompt, answer.tokens)])
            here = forward.log_p(rows)
            with as_reference(forward.model):
                total += float((mx.exp(here) * (here - forward.log_p(rows))).sum())
            tokens += len(answer.tokens)
            mx.clear_cache()
    return total / tokens if tokens else None
