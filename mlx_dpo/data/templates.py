"""From messages to token ids, by the model's own chat template."""

from collections.abc import Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from jinja2.exceptions import TemplateError

from mlx_dpo.refusal import Refusal


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    name: NotRequired[str]


class Tokenizer(Protocol):
    """What is asked of a tokenizer here; mlx-lm's wrapper and transformers' both have it."""

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> list[int]: ...  # noqa: D102


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation with the generation prompt, BOS included once where the template has it."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a finished conversation."""
    return _render(tokenizer, messages, add_generation_prompt=False)


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    if not getattr(tokenizer, "has_chat_template", True):
        raise Refusal("The model's tokenizer has no chat template: use an instruction-tuned model.")
    try:
        # Thinking stays off, in training as in chat: the same prompt for both.
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, enable_thinking=False, tokenize=True
        )
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise Refusal(f"The model's chat template failed on this conversation: {error}") from None
