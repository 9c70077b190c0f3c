"""Answers in a chat against mlx-lm's, early and late in a conversation: `python -m benchmarks.peers.answers ...`."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx_dpo  # noqa: F401  # ahead of MLX

# isort: split
import mlx.core as mx
from mlx_lm.generate import generate
from mlx_lm.utils import load

from benchmarks.peers.job import AROUND, TOKENS, TURNS
from mlx_dpo.chat.engine import Answer, open_conversation
from mlx_dpo.chat.options import Sampling

_QUESTION = "My mother asks the same question again and again. What can I do tonight?"
_LATER = "And what else could I try, say in week {}?"


def main() -> None:
    """Take a model folder, cpu or gpu, and the number of runs."""
    folder, device, runs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    ours, other = whole_answers(folder, runs)
    early, late = first_tokens(folder)
    print(json.dumps({"ours": ours, "other": other, "early": early, "late": late}))


def whole_answers(folder: Path, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of the same greedy answer, ours and mlx_lm.generate's in turn, after one warm-up of each."""
    conversation = open_conversation(folder, None, Sampling(temperature=0.0, max_tokens=TOKENS))
    model, tokenizer = load(str(folder))[:2]
    messages = [{"role": "user", "content": _QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def ask() -> None:
        conversation.clear()
        conversation.answer(_QUESTION)

    ways: list[Callable[[], object]] = [ask, lambda: generate(model, tokenizer, prompt, max_tokens=TOKENS)]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for way, kept in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            if number:
                kept.append(time.perf_counter() - started)
    return times


def first_tokens(folder: Path) -> tuple[float, float]:
    """Median seconds to the first token in the AROUND turns from the second on, and in the last AROUND of TURNS."""
    conversation = open_conversation(folder, None, Sampling(temperature=0.0, max_tokens=8))
    waits = []
    for turn in range(1, TURNS + 1):
        *_, answer = conversation.ask(_LATER.format(turn))
        if isinstance(answer, Answer):
            waits.append(answer.seconds_to_first_token)
    return statistics.median(waits[1 : 1 + AROUND]), statistics.median(waits[-AROUND:])


if __name__ == "__main__":
    main()
