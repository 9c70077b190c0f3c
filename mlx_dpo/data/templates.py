"""From messages to token ids, by the model's own chat template; and from plain text, without it."""

from collections.abc import Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from jinja2.exceptions import SecurityError, TemplateSyntaxError

from mlx_dpo.data.allowance import ExceededError, allowance
from mlx_dpo.models.load import one_line
from mlx_dpo.refusal import Refusal

# Characters that a template may add to a conversation, and how often it may repeat one.
_LARGEST_FRAME, _LARGEST_GROWTH = 1_000_000, 16


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    name: NotRequired[str]


class UnusableTokenizer(Refusal):
    """The tokenizer or its chat template is itself at fault, whatever the row."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer here; mlx-lm's wrapper and transformers' both have it."""

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> str: ...  # noqa: D102


def instructed(turns: Sequence[Message], system: str) -> list[Message]:
    """A conversation under a system prompt; one that it has already comes behind it."""
    if turns and turns[0]["role"] == "system":
        system, turns = f"{system} {turns[0]['content']}", turns[1:]
    return [Message(role="system", content=system), *turns]


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation with the generation prompt, BOS included once where the template has it."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a finished conversation."""
    return _render(tokenizer, messages, add_generation_prompt=False)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text with the tokenizer's own special tokens, and its EOS where none stands there already.

    Raises Refusal where the tokenizer names no EOS, or makes nothing of the text. The same as mlx-lm's TextDataset.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UnusableTokenizer("The model's tokenizer names no eos_token, so no text would end: name it in its files.")
    # Not verbose: a text longer than the model's longest input is parted afterwards, and no cause for a warning.
    nothing, ids = tokenizer.encode(""), tokenizer.encode(text, verbose=False)
    if ids in (nothing, [*nothing, end]):
        raise Refusal("text has no token of its own")
    return ids if ids[-1] == end else [*ids, end]


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    if not getattr(tokenizer, "has_chat_template", True):
        raise UnusableTokenizer("The model's tokenizer has no chat template: use an instruction-tuned model.")
    try:
        with allowance():
            # Thinking stays off, in training as in chat: the same prompt for both.
            text = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, enable_thinking=False, tokenize=False
            )
    except (ExceededError, MemoryError):
        raise UnusableTokenizer(
            "The model's chat template takes more time or memory than any honest one: do not use this model."
        ) from None
    except (TemplateSyntaxError, SecurityError) as error:
        raise UnusableTokenizer(
            f"The model's chat template is broken or hostile ({one_line(error)}): do not use this model."
        ) from None
    except Exception as error:  # whatever a program from elsewhere runs into
        raise Refusal(f"The model's chat template failed on this conversation: {one_line(error)}.") from None
    if len(text) > _LARGEST_FRAME + _LARGEST_GROWTH * sum(len(str(message)) for message in messages):
        raise UnusableTokenizer(
            f"The model's chat template makes {len(text)} characters of a conversation: do not use this model."
        )
    if not text:
        raise UnusableTokenizer("The model's chat template makes nothing of a conversation: use another model.")
    return tokenizer.encode(text, add_special_tokens=False)
