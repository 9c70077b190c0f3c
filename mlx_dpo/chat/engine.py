"""A conversation: its messages are the truth, its cache only saves time."""

import secrets
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from mlx_dpo.chat.cache import TrackedCache
from mlx_dpo.chat.markers import control_tokens, disarmed
from mlx_dpo.chat.options import Sampling
from mlx_dpo.chat.speech import Finish, Speech, Voice
from mlx_dpo.data.templates import Message, prompt_ids
from mlx_dpo.models.load import Loaded, load_to_compute
from mlx_dpo.refusal import Refusal

_SEEDS = 2**63


class Turn(NamedTuple):
    """A question and what was said to it."""

    question: str
    answer: str


class Answer(NamedTuple):
    """What was said, and how.

    `tokens` counts those of the text, `reused_tokens` those of the prompt that the cache already held;
    `seconds_to_first_token` is counted from the question and is 0 where no token came;
    `tokens_per_second` is the pace after the first token, 0 where there was no second.
    `dropped_turns` is how many of the oldest turns no longer fit into the model's context;
    `restarted` tells that a known beginning had to be computed again, because the cache cannot be cut back.
    """

    text: str
    finish_reason: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    dropped_turns: int
    restarted: bool


class _Prompt(NamedTuple):
    ids: list[int]
    dropped: int


class Conversation:
    """Turns with one model; every turn renders all of them and computes only what the cache does not hold."""

    def __init__(self, loaded: Loaded, sampling: Sampling, system: str | None = None) -> None:
        """Begin with no turns; raises Refusal where the chat template has no place for `system`."""
        loaded.model.eval()
        # What is too long is settled below; transformers would only warn of it.
        loaded.tokenizer.model_max_length = sys.maxsize
        self.sampling = sampling
        self.seed = secrets.randbelow(2**32) if sampling.seed is None else sampling.seed
        self.context = context_length(loaded.config)
        self.turns: list[Turn] = []
        self.cache = TrackedCache(loaded.model)
        self.last: Answer | None = None
        self.system: str | None = None
        self._tokenizer: Any = loaded.tokenizer
        self._disarmed = disarmed(loaded.tokenizer)
        self._voice = Voice(
            loaded.model,
            loaded.tokenizer,
            # A turn marker ends an answer too: what follows it would be the other side's words.
            frozenset(loaded.tokenizer.eos_token_ids) | frozenset(control_tokens(loaded.tokenizer)),
            make_sampler(temp=sampling.temperature, top_p=sampling.top_p),
        )
        self._answers = 0
        self._dropped = 0
        self._stopping = False
        if system is not None:
            self.instruct(system)

    def ask(self, question: str) -> Generator[str | Answer]:
        """The answer's text as it comes, piece by piece, and at last the Answer.

        The turn is kept once there is any text, an interrupted one and one that nobody listened to the end of
        too. Raises Refusal, and keeps nothing, for a question that cannot be asked and for an empty answer.
        """
        yield from self._spoken(self.turns, question)

    def answer(self, question: str) -> Answer:
        """The whole answer at once; raises as `ask` does."""
        return _last(self.ask(question))

    def regenerate(self) -> Generator[str | Answer]:
        """As `ask`, for the last question again; the former answer goes when the new one has begun."""
        if not self.turns:
            raise Refusal("There is no answer yet to give anew: ask something first.")
        return self._spoken(self.turns[:-1], self.turns[-1].question)

    def undo(self) -> Turn:
        """Take the last turn back and return it."""
        if not self.turns:
            raise Refusal("There is nothing to take back: the conversation is empty.")
        *self.turns, turn = self.turns
        self._dropped = 0
        return turn

    def clear(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.turns = []
        self._dropped = 0

    def instruct(self, system: str | None) -> None:
        """Set the system prompt for all turns to come, or None for none.

        Raises Refusal, and changes nothing, where the chat template fails on it or leaves it out.
        """
        if system is not None:
            system = _sayable(system, "The system prompt")
            probe = Turn("?", "")
            if self._ids(system, [probe]) == self._ids(None, [probe]):
                raise Refusal("The model's chat template leaves system prompts out: say it in the question.")
        self.system = system
        self._dropped = 0

    def stop(self) -> None:
        """End the answer that is being given after the token in work; may be called from a signal handler."""
        self._stopping = True

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called since the last question."""
        return self._stopping

    def prompt(self, question: str) -> list[int]:
        """The token ids that the model would be given for `question` now."""
        return self._prompt(self.turns, question).ids

    def _spoken(self, before: Sequence[Turn], question: str) -> Generator[str | Answer]:
        started = time.perf_counter()
        self._stopping = False
        question = _sayable(question, "The question")
        prompt = self._prompt(before, question)
        reuse = self.cache.reuse(prompt.ids)
        speech = Speech(self._voice, self.cache, lambda: self._stopping)
        # Each answer has a seed of its own, so that an interrupt changes none of those after it.
        mx.random.seed((self.seed + self._answers) % _SEEDS)
        self._answers += 1
        try:
            yield from speech.pieces(prompt.ids, self._room(len(prompt.ids)))
        except Refusal:
            speech.text = ""
            raise
        finally:
            if speech.text.strip():
                self.turns = [*before, Turn(question, speech.text)]
                self._dropped = prompt.dropped
        if not speech.text.strip() and speech.finish != "interrupted":
            raise Refusal("The model gave an empty answer: ask again, or in other words.")
        self.last = Answer(
            text=speech.text,
            finish_reason=speech.finish,
            tokens=speech.tokens,
            prompt_tokens=len(prompt.ids),
            reused_tokens=reuse.tokens,
            seconds_to_first_token=speech.first_at - started if speech.first_at else 0.0,
            tokens_per_second=_pace(speech),
            dropped_turns=prompt.dropped,
            restarted=reuse.restarted,
        )
        yield self.last

    def _prompt(self, before: Sequence[Turn], question: str) -> _Prompt:
        asked = [*before, Turn(question, "")]
        dropped = min(self._dropped, len(before))
        ids = self._ids(self.system, asked[dropped:])
        if self.context is None or len(ids) + self._reserve() <= self.context:
            return _Prompt(ids, dropped)
        # Down to three quarters, so that not every turn from now on has to compute its whole prompt anew.
        while len(ids) + self._reserve() > self.context * 3 // 4 and dropped < len(before):
            dropped += 1
            ids = self._ids(self.system, asked[dropped:])
        if len(ids) + self._reserve() > self.context:
            raise Refusal(
                f"The question and the system prompt have {len(ids)} tokens, and with room for an answer the "
                f"model takes {self.context - self._reserve()}: shorten them."
            )
        return _Prompt(ids, dropped)

    def _ids(self, system: str | None, turns: Sequence[Turn]) -> list[int]:
        ids = prompt_ids(self._tokenizer, _messages(system, turns, self._disarmed))
        if not ids:
            raise Refusal("The model's chat template makes nothing of this conversation: use another model.")
        return ids

    def _reserve(self) -> int:
        return min(self.sampling.max_tokens, (self.context or self.sampling.max_tokens) // 4)

    def _room(self, taken: int) -> int:
        return min(self.sampling.max_tokens, (self.context or self.sampling.max_tokens + taken) - taken)


def open_conversation(model: Path, adapter: Path | None, sampling: Sampling, system: str | None = None) -> Conversation:
    """Load a model folder, with an adapter on it or not, and begin a conversation; raises Refusal."""
    loaded = load_to_compute(model)
    if adapter is not None:
        from mlx_dpo.models.adapters import load_adapter

        load_adapter(loaded.model, adapter)
    return Conversation(loaded, sampling, system)


def context_length(config: dict[str, Any]) -> int | None:
    """How many tokens a model was made for, after its configuration; None where that does not tell."""
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(length := settings.get(key), int) and length > 0:
                return length
    return None


def _messages(system: str | None, turns: Sequence[Turn], plain: Any) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": plain(system)}]
    for turn in turns:
        messages.append({"role": "user", "content": plain(turn.question)})
        messages.append({"role": "assistant", "content": plain(turn.answer)})
    return messages[:-1]


def _sayable(text: str, name: str) -> str:
    if not text.strip():
        raise Refusal(f"{name} is empty: write some words.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(f"{name} is not valid UTF-8: save or type it again in that encoding.") from None
    return text


def _pace(speech: Speech) -> float:
    if speech.first_at is None or speech.last_at is None or speech.tokens < 2:
        return 0.0
    return (speech.tokens - 1) / max(speech.last_at - speech.first_at, 1e-9)


def _last(events: Iterator[str | Answer]) -> Answer:
    *_, answer = events
    if not isinstance(answer, Answer):
        raise TypeError("a conversation ends with an Answer")
    return answer
