"""The whole loop on a small real model: convert, train, compare, fuse, one turn of chat."""

import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from rich.table import Table

from mlx_dpo import console, fuse, machine, train
from mlx_dpo.align.events import Finished, Interrupted
from mlx_dpo.align.options import TrainOptions
from mlx_dpo.chat.engine import open_conversation
from mlx_dpo.chat.options import Sampling
from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.events import Converted
from mlx_dpo.convert.fuse_options import FuseOptions
from mlx_dpo.data.questions import read_questions
from mlx_dpo.demo import PAIRS, DemoOptions
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import refuse_occupied

_RECIPE = "smollm2-135m-instruct"
_FLOP = 28e12  # of matrix products in the whole run: forward, backward and in generation
_EXPONENTIALS = 6e9  # what the rest amounts to, fitted to a whole run; on CPUs softmax and SwiGLU take as long
_OVERHEAD = 60.0  # seconds that depend on neither: fetching, loading, hashing, writing
_SLOW = 15 * 60.0  # seconds; beyond that the demo trains less


def run(options: DemoOptions) -> int:
    """Run the demo, printing as it goes, and return the exit status."""
    started = time.perf_counter()
    out = options.out or _free_folder(Path("runs"))
    refuse_occupied(out)
    size = _announced(options)
    _heading("1. Convert")
    _converted(out / "model")
    data = _data(out, size)
    _heading("2. Train, and compare")
    end = _trained(out, data, size)
    if not isinstance(end, Finished):
        return 130
    _compared(end)
    _heading("3. Fuse, and prove it")
    _fused(out, size)
    _heading("4. Ask the fused model")
    _asked(out / "fused")
    minutes = (time.perf_counter() - started) / 60
    console.out.print(f"\nDone in {minutes:.1f} minutes. To go on talking with it:")
    console.out.print(f"  mlx_dpo chat --model {shlex.quote(str(out / 'fused'))}")
    console.out.print(f"Report: {end.report.absolute()}")
    return 0


def _free_folder(parent: Path) -> Path:
    names = (parent / ("demo" if number == 1 else f"demo-{number}") for number in range(1, 10_000))
    return next(folder for folder in names if not folder.exists())


class _Size(NamedTuple):
    """How much is done: None for all of the pairs, and what follows from it."""

    train: int | None = None
    valid: int | None = None
    steps: int | None = None
    batch: int = 4
    samples: int = 6
    sample_tokens: int = 96
    fuse_pairs: int = 6


_ALL = _Size()
_QUICK = _Size(train=8, valid=4, steps=4, batch=2, samples=2, sample_tokens=24, fuse_pairs=2)


def _announced(options: DemoOptions) -> _Size:
    """Say what will happen and about how long it takes; return how much that is."""
    about = machine.describe()
    products, exponentials = _speeds()
    seconds = _OVERHEAD + _FLOP / products + _EXPONENTIALS / exponentials
    short = options.quick or seconds > _SLOW
    console.out.print(
        "This runs the whole loop on SmolLM2-135M-Instruct: convert, train, compare, fuse, chat.\n"
        f"Machine: {about.name}, {about.cores} cores, {about.memory / 1e9:.0f} GB; {about.device}, {about.blas}; "
        f"{products / 1e9:.0f} GFLOP/s."
    )
    if options.quick:
        console.out.print("Quick: four steps on eight pairs.")
    elif short:
        console.out.print(
            f"All of it would take about {seconds / 60:.0f} minutes here, so it takes four steps on eight pairs only."
        )
    else:
        console.out.print(f"It takes about {max(1, round(seconds / 60))} minutes here.")
    return _QUICK if short else _ALL


def _speeds() -> tuple[float, float]:
    """Operations of a float32 matrix product, and exponentials, a second on MLX's device."""
    square = mx.random.normal((1024, 1024), key=mx.random.key(0))
    product, exponential = _seconds(lambda: square @ square), _seconds(lambda: mx.exp(square))
    return 2 * 1024**3 / product, square.size / exponential


def _seconds(work: Callable[[], mx.array]) -> float:
    """The median time of a few runs, after one to warm up."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _heading(text: str) -> None:
    console.out.print(f"\n{text}", style="bold")


def _converted(folder: Path) -> None:
    end = console.show_conversion(convert(_RECIPE, folder))
    if isinstance(end, Converted):
        console.out.print(console.conversion_in_words(end))


def _data(out: Path, size: _Size) -> Path:
    """The folder with the pairs: the demo's own, or the first few of them in the results."""
    if size.train is None:
        return PAIRS
    data = out / "data"
    data.mkdir()
    for name, count in (("train.jsonl", size.train), ("valid.jsonl", size.valid)):
        lines = (PAIRS / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (data / name).write_text("".join(lines[:count]), encoding="utf-8")
    return data


def _trained(out: Path, data: Path, size: _Size) -> Finished | Interrupted | None:
    options = TrainOptions(
        model=out / "model",
        data=data,
        out=out / "adapter",
        epochs=2,
        steps=size.steps,
        learning_rate=1.5e-3,
        rank=16,
        alpha=32.0,
        layers=15,
        warmup=0.1,
        schedule="cosine",
        batch_size=size.batch,
        samples=size.samples,
        questions=PAIRS / "questions.jsonl",
        sample_tokens=size.sample_tokens,
    )
    with console.StopRequest().listening() as stop:
        end = console.show_training(train.run(options, stop))
    if isinstance(end, Interrupted):
        console.out.print(f"Stopped after step {end.steps_done}. To go on with the training: {end.command}")
    return end


def _compared(end: Finished) -> None:
    table = Table(show_lines=True, expand=True)
    for name in ("Question (not trained on)", "Before", "After"):
        table.add_column(name, ratio=1, overflow="fold")
    for sample in end.samples:
        table.add_row(sample.question, sample.before, sample.after)
    console.out.print(table)
    scores = end.scores
    moved = scores["eval_logps/chosen"] - scores["eval_logps/chosen_reference"]
    console.out.print(
        f"Held-out reward accuracy: {scores['eval_rewards/accuracies']:.0%} of {scores['eval_pairs']} pairs "
        f"(95% interval {scores['eval_rewards/accuracies_low']:.0%} to {scores['eval_rewards/accuracies_high']:.0%}).\n"
        f"Log-probability of the held-out chosen answers: {moved:+.1f} nats on average "
        f"({'up' if moved >= 0 else 'down'}; a fall would mean that the model forgets how to give them)."
    )


def _fused(out: Path, size: _Size) -> None:
    pairs = size.fuse_pairs
    options = FuseOptions(model=out / "model", adapter=out / "adapter", out=out / "fused", pairs=pairs)
    end = console.show_fusing(fuse.run(options, PAIRS / "valid.jsonl"))
    if end is not None:
        console.out.print(console.fusing_in_words(end))


def _asked(model: Path) -> None:
    questions: Iterator = iter(read_questions(PAIRS / "questions.jsonl"))
    question = next(questions)[-1]["content"]
    conversation = open_conversation(model, None, Sampling(temperature=0.0, max_tokens=96))
    console.out.print(f"> {question}")
    answer = conversation.answer(question)
    if not answer.text.strip():
        raise Refusal(f"The fused model in {model} says nothing: look at the report, and train again.")
    console.out.print(answer.text.strip())
    console.out.print("(A model this small has a tone, not knowledge: do not rely on what it says.)")
