"""What is told about an answer besides its text."""

from collections.abc import Iterator

from mlx_dpo.chat.engine import Answer
from mlx_dpo.chat.options import ChatOptions


def remarks(answer: Answer, context: int | None) -> Iterator[str]:
    """Sentences for what a reader would otherwise wonder at; none for an ordinary answer."""
    if answer.finish_reason == "interrupted":
        yield "(stopped)" if answer.text.strip() else "(stopped before the first word: nothing is kept)"
    if answer.finish_reason == "length":
        yield f"(cut off after {answer.tokens} tokens; --max-tokens sets the limit)"
    if answer.dropped_turns:
        yield (
            f"(the conversation no longer fits into the model's {context} tokens: "
            f"its oldest {answer.dropped_turns} turns were left out)"
        )


def record(question: str, answer: Answer, seed: int, options: ChatOptions) -> dict[str, object]:
    """One answer as the JSON object of `--json`; its fields are an interface."""
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "reused_tokens": answer.reused_tokens,
        "answer_tokens": answer.tokens,
        "seconds_to_first_token": round(answer.seconds_to_first_token, 4),
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "seed": seed,
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
    }
