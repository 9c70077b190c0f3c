"""Time a training step and a chat answer against the plain way, in one run, and write RESULTS.md: `make bench`.

Each figure is the median of several alternating runs; the ratio is taken pair by pair, so that a machine whose speed
drifts does not decide.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx_dpo  # noqa: F401, I001
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate

from mlx_dpo import machine
from mlx_dpo.align.scores import pair_rows
from mlx_dpo.chat.engine import open_conversation
from mlx_dpo.chat.options import Sampling
from mlx_dpo.convert.conversion import convert
from mlx_dpo.data.reading import read
from mlx_dpo.data.tokenised import tokenise
from mlx_dpo.demo import PAIRS
from mlx_dpo.models import adapters, memory
from mlx_dpo.models.load import Loaded, blocks, load_to_compute, read_config
from mlx_dpo.models.scoring import Rows, parts, token_logps

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")
_QUESTION = "My mother asks the same question again and again. What can I do tonight?"


class Comparison(NamedTuple):
    """Medians in seconds of two ways of doing the same, and the median of their ratios."""

    name: str
    ours: float
    other: float
    ratio: float


def compared(name: str, ours: Callable[[], object], other: Callable[[], object], runs: int) -> Comparison:
    """Time the two in turn, `runs` times each after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for way, kept in zip((ours, other), times, strict=True):
            started = time.perf_counter()
            way()
            if number:
                kept.append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Comparison(name, statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios))


def gradient(loaded: Loaded, rows: Rows, *, whole_logits: bool) -> Callable[[], object]:
    """One forward and backward pass; with `whole_logits` the head runs at every position, as in the plain way."""
    cut = None if whole_logits else parts(loaded.model)

    def run() -> float:
        loss, grads = nn.value_and_grad(loaded.model, lambda: token_logps(loaded.model, rows, cut).sum())()
        mx.eval(loss, grads)
        mx.clear_cache()
        return float(loss)

    return run


def peak(run: Callable[[], object]) -> float:
    """Peak memory of a run in GB."""
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() / 1e9


def results(folder: Path, runs: int) -> str:
    """The section of RESULTS.md for this machine."""
    loaded = load_to_compute(folder)
    pairs = tokenise(read(PAIRS, kind="pairs").train[:4], loaded.tokenizer, None).items
    conversation = open_conversation(folder, None, Sampling(temperature=0.0, max_tokens=48))
    plain = [{"role": "user", "content": _QUESTION}]
    prompt = loaded.tokenizer.apply_chat_template(plain, add_generation_prompt=True, enable_thinking=False)

    def ask() -> None:
        conversation.clear()
        conversation.answer(_QUESTION)

    answer = compared(
        "greedy answer of 48 tokens (other: mlx_lm.generate)",
        ask,
        lambda: generate(loaded.model, loaded.tokenizer, prompt, max_tokens=48),
        runs,
    )
    keys = adapters.chosen_keys(loaded.model, ())
    adapters.attach(loaded.model, adapters.AdapterShape(8, 2.0, 0.0, keys, len(blocks(loaded.model))), seed=0)
    rows = pair_rows(pairs)
    ours, other = gradient(loaded, rows, whole_logits=False), gradient(loaded, rows, whole_logits=True)
    step = compared("forward and backward of 4 pairs (other: head at every position)", ours, other, runs)
    measured = peak(ours)
    load = memory.Load(rows.tokens.shape[0], rows.tokens.shape[1], rows.targets.size, 8, False)
    config = read_config(folder)
    weights = memory.weight_bytes(loaded.model)
    expected = memory.peak_bytes(config, weights, load, on_cpu=mx.default_device().type == mx.DeviceType.cpu) / 1e9
    return _section([step, answer], rows, measured, expected, runs)


def _section(timed: list[Comparison], rows: Rows, measured: float, expected: float, runs: int) -> str:
    about = machine.describe()
    lines = [
        f"## {about.name}, {about.cores} cores, {about.device}, {about.blas}",
        "",
        f"{date.today()}, {about.system}, SmolLM2-135M-Instruct, rank 8 on all linear layers, the demo's first 4 pairs",
        f"({rows.tokens.shape[0]} rows of {rows.tokens.shape[1]} tokens), medians of {runs} alternating runs.",
        "",
        "| what | ours, s | other, s | other / ours |",
        "|---|---|---|---|",
        *(f"| {c.name} | {c.ours:.2f} | {c.other:.2f} | {c.ratio:.2f} |" for c in timed),
        "",
        f"Peak memory of the step: {measured:.2f} GB, predicted {expected:.2f} GB.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Convert the small model where it is not there yet, measure, and add this machine's section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "bench-model")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if not options.model.exists():
        for _ in convert("smollm2-135m-instruct", options.model):
            pass
    section = results(options.model, options.runs)
    heading = section.splitlines()[0]
    before = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nMade by `make bench`; a section a machine.\n"
    kept = [part for part in before.split("\n## ") if not f"## {part}".startswith(heading)]
    RESULTS.write_text("\n## ".join(kept).rstrip() + "\n\n" + section)
    print(section)


if __name__ == "__main__":
    main()
