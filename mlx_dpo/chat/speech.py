"""One answer while it is being said: tokens from the model, text from the tokens."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.sample_utils import Sampler
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

from mlx_dpo.chat.cache import TrackedCache
from mlx_dpo.models.attention import by_arithmetic
from mlx_dpo.models.load import one_line
from mlx_dpo.refusal import Refusal

Finish = Literal["stop", "length", "interrupted"]
# Between two chunks of a long prompt an interrupt is heard; larger is hardly faster.
PREFILL = 512


class Voice(NamedTuple):
    """What speaks: a model, its tokenizer, the tokens that end an answer, and how the next token is drawn."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    ends: frozenset[int]
    sampler: Sampler


class Speech:
    """The answer to one prompt: `pieces` gives its text, the attributes say how far it came."""

    def __init__(self, voice: Voice, cache: TrackedCache, stopped: Callable[[], bool]) -> None:
        """Speak with `voice`, reusing `cache`, until the answer ends or `stopped` says so."""
        self._voice = voice
        self._cache = cache
        self._stopped = stopped
        self.text = ""
        self.tokens = 0
        self.finish: Finish = "interrupted"
        self.first_at: float | None = None
        self.last_at: float | None = None

    def pieces(self, ids: list[int], limit: int) -> Iterator[str]:
        """The answer to the prompt `ids`, of at most `limit` tokens.

        Raises Refusal where the model computes no numbers, or cannot compute at all.
        """
        detokenizer = self._voice.tokenizer.detokenizer
        with contextlib.closing(self._drawn(ids, limit)) as drawn:
            for token in drawn:
                if token in self._voice.ends:
                    self.finish = "stop"
                    break
                self._count()
                detokenizer.add_token(token)
                if piece := detokenizer.last_segment:
                    self.text += piece
                    yield piece
                if self.tokens == limit:
                    self.finish = "length"
                    break
        if piece := _rest(detokenizer):
            self.text += piece
            yield piece

    def _count(self) -> None:
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.tokens += 1

    def _drawn(self, ids: list[int], limit: int) -> Generator[int]:
        # generate_step feeds a token to the model before handing it over: what is yielded is in the cache.
        reused = len(self._cache.tokens)

        def listen(done: int, total: int) -> None:
            if done < total:
                self._cache.tokens = list(ids[: reused + done])
                if self._stopped():
                    raise _StoppedError

        try:
            with _wired(self._voice.model), by_arithmetic(self._voice.model):
                steps = generate_step(
                    mx.array(ids[reused:]),
                    self._voice.model,
                    max_tokens=limit,
                    sampler=self._voice.sampler,
                    prompt_cache=self._cache.layers,
                    prefill_step_size=PREFILL,
                    prompt_progress_callback=listen,
                )
                for number, (drawn, logprobs) in enumerate(steps):
                    token = int(drawn)
                    if number == 0:
                        self._cache.tokens = list(ids)
                    self._cache.tokens.append(token)
                    _check(logprobs, token)
                    yield token
                    if self._stopped():
                        return
        except (GeneratorExit, _StoppedError):
            return
        except RuntimeError as error:
            self._cache.drop()
            raise Refusal(f"The model could not compute an answer ({one_line(error)}): ask again.") from error
        except BaseException:
            self._cache.drop()
            raise


class _StoppedError(Exception):
    """Leaves a prefill between two chunks."""


def _check(logprobs: mx.array, token: int) -> None:
    # One NaN or infinity among the logits makes every log-probability NaN. On the model's own stream this
    # question would wait for the next token, which is being computed already.
    with mx.stream(mx.cpu):
        lost = mx.isnan(logprobs[token]).item()
    if lost:
        raise Refusal("The model computes NaN instead of probabilities: convert or train it again.")


def _rest(detokenizer: StreamingDetokenizer) -> str:
    try:
        detokenizer.finalize()
    except KeyError:
        # mlx-lm's byte table lacks some characters of added tokens; no whole word is lost by that.
        return ""
    return detokenizer.last_segment.rstrip("\ufffd")


@contextlib.contextmanager
def _wired(model: nn.Module) -> Iterator[None]:
    streams: list[Any] = [generation_stream]
    with contextlib.ExitStack() as stack:
        # mlx-lm prints a warning about large models, and standard output belongs to the answer.
        with contextlib.redirect_stdout(sys.stderr):
            stack.enter_context(wired_limit(model, streams))
        yield
