"""The conversation on a screen or in a pipe; heavy libraries are imported when they are needed."""

import contextlib
import io
import json
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from mlx_dpo.chat.options import ChatOptions
from mlx_dpo.refusal import Refusal

__all__ = ["ChatOptions", "run"]

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

    from mlx_dpo.chat.engine import Answer, Conversation

GREETING = (
    "You are talking with a machine, not with a clinician, and it can be wrong; "
    "nothing that you write leaves this computer."
)
HOW_TO_LEAVE = "Ctrl-D or /quit leaves; /help lists what else there is."
_LARGEST_PIPE = 1_000_000
# A paste into a terminal arrives faster than anybody types.
_PASTE_SECONDS = 0.05
_SECONDS_BETWEEN_DRAWINGS = 0.06
_WIDEST = 96  # columns; longer lines are hard to read
# Escape sequences in an answer could redraw the screen or write to the clipboard.
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


class _Face(Protocol):
    """Where questions come from and answers go to."""

    def ask(self) -> str: ...  # raises EOFError at the end of input, KeyboardInterrupt on Ctrl-C

    def say(self, message: str) -> None: ...

    def show(self, pieces: Iterator[str]) -> None: ...


def run(options: ChatOptions, question: str | None) -> int:
    """Hold a conversation, or answer `question` (or what is piped in) and return; 130 means interrupted.

    Raises Refusal for what keeps a conversation from beginning, and for a single question without an answer.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(options, question)
    except BrokenPipeError:
        # Whoever read has gone; Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: ChatOptions, question: str | None) -> int:
    if question is None and not sys.stdin.isatty():
        question = _piped()
    if question is not None and not question.strip():
        raise Refusal("The question is empty: write it behind the options, or pipe it in.")
    if question is None and options.json:
        raise Refusal("--json answers one question: write it behind the options, or pipe it in.")
    face = _face(options)
    face.say(GREETING)
    conversation = _conversation(options, face)
    if question is None:
        return _held(conversation, face)
    with _interruptible(conversation):
        if options.json:
            return _json_answer(conversation, options, question)
        return _shown(conversation.ask(question), conversation, face)


def _piped() -> str:
    data = sys.stdin.buffer.read(_LARGEST_PIPE + 1)
    if len(data) > _LARGEST_PIPE:
        raise Refusal(f"Standard input holds more than {_LARGEST_PIPE} bytes: pipe in one question.")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Refusal("Standard input is not UTF-8: save the question in that encoding.") from None


def _conversation(options: ChatOptions, face: _Face) -> "Conversation":
    face.say(f"Loading {options.model} …")
    from mlx_dpo.chat.engine import open_conversation

    return open_conversation(options.model, options.adapter, options.sampling, options.system)


def _held(conversation: "Conversation", face: _Face) -> int:
    face.say(HOW_TO_LEAVE)
    while True:
        try:
            line = face.ask()
            if line.strip() and not _obeyed(line, conversation, face):
                break
        except EOFError:
            break
        except KeyboardInterrupt:
            face.say(HOW_TO_LEAVE)
        except Refusal as refusal:
            face.say(str(refusal))
    face.say("Goodbye, and take care of yourself too.")
    return 0


def _obeyed(line: str, conversation: "Conversation", face: _Face) -> bool:
    from mlx_dpo.chat.commands import Effect, effect_of

    if line.startswith("/") and not line.startswith("//"):
        effect = effect_of(line.rstrip(), conversation)
    else:
        effect = Effect(answer=conversation.ask(line.removeprefix("/")))
    if effect.message:
        face.say(effect.message)
    if effect.answer is not None:
        with _interruptible(conversation):
            _shown(effect.answer, conversation, face)
    return not effect.leave


def _shown(events: "Iterator[str | Answer]", conversation: "Conversation", face: _Face) -> int:
    """Show an answer as it comes; 130 where Ctrl-C ended it."""
    answers: list[Answer] = []

    def pieces() -> Iterator[str]:
        for event in events:
            if isinstance(event, str):
                yield event.translate(_CONTROLS)
            else:
                answers.append(event)

    from mlx_dpo.chat.record import remarks

    try:
        face.show(pieces())
    except KeyboardInterrupt:
        face.say("(stopped)")
        return 130
    for remark in remarks(answers[-1], conversation.context):
        face.say(remark)
    return 130 if answers[-1].finish_reason == "interrupted" else 0


def _json_answer(conversation: "Conversation", options: ChatOptions, question: str) -> int:
    from mlx_dpo.chat.record import record

    answer = conversation.answer(question)
    print(json.dumps(record(question, answer, conversation.seed, options), ensure_ascii=False), flush=True)
    return 130 if answer.finish_reason == "interrupted" else 0


@contextlib.contextmanager
def _interruptible(conversation: "Conversation") -> Iterator[None]:
    """Ctrl-C ends the answer in work; a second one does not wait for the token in work."""

    def stop(_signal: int, _frame: object) -> None:
        if conversation.stopping:
            raise KeyboardInterrupt
        conversation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _face(options: ChatOptions) -> _Face:
    bare = os.environ.get("TERM", "dumb") in ("", "dumb")
    if options.plain or options.json or bare or not sys.stdout.isatty():
        return _Plain()
    return _Screen()


class _Plain:
    """Words only: answers to standard output, everything else to standard error."""

    def ask(self) -> str:
        print("You: ", end="", file=sys.stderr, flush=True)
        lines = [self._line()]
        while select.select([sys.stdin], [], [], _PASTE_SECONDS)[0] and lines[-1]:
            lines.append(self._line())
        if not any(lines):
            print(file=sys.stderr)
            raise EOFError
        return "".join(lines).rstrip("\n")

    def _line(self) -> str:
        # Past Python's buffer, in which select would not see the lines that wait.
        return os.read(sys.stdin.fileno(), 65536).decode("utf-8", "replace")

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def show(self, pieces: Iterator[str]) -> None:
        said = False
        try:
            for piece in pieces:
                said = True
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            if said:
                print(flush=True)


class _Screen:
    """A line editor whose history lives in memory only, and answers drawn as Markdown."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.history import InMemoryHistory
        from rich.console import Console

        self._answers = Console(highlight=False)
        self._messages = Console(stderr=True, highlight=False, markup=False, style="dim")
        self._editor: PromptSession[str] = PromptSession(
            FormattedText([("ansicyan bold", "You › ")]),
            history=InMemoryHistory(),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=FormattedText([("ansicyan", "    … ")]),
        )

    def ask(self) -> str:
        text = self._editor.prompt()
        self._answers.print()
        return text

    def say(self, message: str) -> None:
        self._messages.print(message)

    def show(self, pieces: Iterator[str]) -> None:
        """Draw finished paragraphs once and for all, and the one that is growing again and again."""
        from rich.live import Live

        from mlx_dpo.chat.markdown import Block, settled

        growing = ""
        drawn_at = 0.0
        with _unseen_keys(), Live(console=self._answers, auto_refresh=False, transient=True) as live:
            try:
                for piece in pieces:
                    growing += piece
                    if end := settled(growing):
                        self._answers.print(Block(growing[:end], _WIDEST))
                        self._answers.print()
                        growing = growing[end:]
                    if time.monotonic() - drawn_at > _SECONDS_BETWEEN_DRAWINGS:
                        live.update(Block(growing, _WIDEST, growing=True), refresh=True)
                        drawn_at = time.monotonic()
            finally:
                live.update("", refresh=True)
                live.stop()
                if growing.strip():
                    self._answers.print(Block(growing, _WIDEST))
                    self._answers.print()


@contextlib.contextmanager
def _unseen_keys() -> Iterator[None]:
    """What is typed while an answer is drawn waits for the next question instead of tearing the drawing."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
