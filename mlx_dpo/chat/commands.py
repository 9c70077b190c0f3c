"""What can be done in a conversation besides asking."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mlx_dpo.chat.engine import Answer, Conversation
from mlx_dpo.refusal import Refusal


class Effect(NamedTuple):
    """What a command brought about: something to say, an answer to show, or the end."""

    message: str = ""
    answer: Iterator[str | Answer] | None = None
    leave: bool = False


class Command(NamedTuple):
    """A word after a slash; `argument` is empty where it takes none."""

    argument: str
    help: str
    effect: Callable[[Conversation, str], Effect]


def effect_of(line: str, conversation: Conversation) -> Effect:
    """Do what a line such as `/undo` asks for.

    Raises Refusal for an unknown command, and for words after one that takes none.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise Refusal(f"There is no /{name}: /help lists the commands, and // begins a text with a slash.")
    if argument.strip() and not command.argument:
        raise Refusal(f"/{name} takes nothing after it: write /{name} alone.")
    return command.effect(conversation, argument.strip())


def _help(_: Conversation, __: str) -> Effect:
    calls = {f"/{name} {command.argument}".rstrip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, calls))
    return Effect("\n".join(f"{call:<{width}}  {text}" for call, text in calls.items()))


def _system(conversation: Conversation, argument: str) -> Effect:
    if argument:
        conversation.instruct(None if argument == "none" else argument)
        return Effect("From the next question on.")
    return Effect(conversation.system or "There is no system prompt.")


def _clear(conversation: Conversation, _: str) -> Effect:
    conversation.clear()
    return Effect("All turns are forgotten.")


def _regenerate(conversation: Conversation, _: str) -> Effect:
    always = "The temperature is 0, so it will be the same." if conversation.sampling.temperature == 0 else ""
    return Effect(always, conversation.regenerate())


def _undo(conversation: Conversation, _: str) -> Effect:
    return Effect(f"Taken back: {conversation.undo().question}")


def _stats(conversation: Conversation, _: str) -> Effect:
    answer = conversation.last
    if answer is None:
        raise Refusal("There is nothing to count yet: ask something first.")
    context = f" of {conversation.context}" if conversation.context else ""
    lines = [
        f"turns {len(conversation.turns)}, seed {conversation.seed}",
        f"prompt {answer.prompt_tokens}{context} tokens, {answer.reused_tokens} of them reused",
        f"answer {answer.tokens} tokens, ended by {answer.finish_reason}",
        f"first token after {answer.seconds_to_first_token:.2f} s, then {answer.tokens_per_second:.1f} tokens a second",
    ]
    if answer.restarted:
        lines.append("the model's sliding window has wrapped: the prompt was computed from its beginning")
    return Effect("\n".join(lines))


def _quit(_: Conversation, __: str) -> Effect:
    return Effect(leave=True)


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT]", "show the system prompt, or set it; none removes it", _system),
    "regenerate": Command("", "another answer to the last question", _regenerate),
    "undo": Command("", "take the last question and its answer back", _undo),
    "clear": Command("", "forget all turns, keep the system prompt", _clear),
    "stats": Command("", "tokens, reuse and speed of the last answer", _stats),
    "quit": Command("", "leave, as Ctrl-D does", _quit),
}
