"""What a person sees of a run: a progress bar on standard error, results on standard output."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mlx_dpo.align import events
from mlx_dpo.align.plan import Plan

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class StopRequest:
    """Set by the first Ctrl-C; the second one interrupts at once."""

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.asked = False

    def __call__(self) -> bool:
        """Whether to stop after the current step."""
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        err.print("Stopping after this step; Ctrl-C again stops at once.")

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Turn Ctrl-C and a polite kill into a request for as long as the block lasts."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def show_training(happenings: Iterable[events.Event]) -> events.Finished | events.Interrupted | None:
    """Show a run as it happens and return how it ended; None after a dry run."""
    last: events.Finished | events.Interrupted | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        view = _TrainingView(bar)
        for event in happenings:
            view.show(event)
            if isinstance(event, (events.Finished, events.Interrupted)):
                last = event
    return last


class _TrainingView:
    def __init__(self, bar: Progress):
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}
        self.printed = 0

    def show(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            out.print(plan_in_words(event.plan))
        elif isinstance(event, events.Phase):
            self._advance(event.name, event.done, event.total, "")
            if not err.is_terminal and event.done == 0:
                err.print(f"{event.name} …")
        elif isinstance(event, events.Note):
            err.print(event.text)
        elif isinstance(event, events.Stepped):
            self._step(event)
        elif isinstance(event, events.Evaluated):
            err.print(evaluation_in_words(event.numbers))

    def _step(self, event: events.Stepped) -> None:
        numbers = event.numbers
        words = step_in_words(numbers)
        self._advance("Training", int(numbers["step"]), event.steps, words)
        tenths = int(10 * numbers["step"] / event.steps)
        if not err.is_terminal and tenths > self.printed:
            self.printed = tenths
            err.print(f"step {int(numbers['step'])}/{event.steps}: {words}")

    def _advance(self, name: str, done: int, total: int, numbers: str) -> None:
        if name not in self.tasks:
            for task in self.tasks.values():
                self.bar.update(task, visible=False)
            self.tasks[name] = self.bar.add_task(name, total=total, numbers="")
        self.bar.update(self.tasks[name], completed=done, total=total, numbers=numbers, visible=True)


def plan_in_words(plan: Plan) -> str:
    """The plan as a few lines."""
    held_out = f", {plan.held_out} held out" if plan.held_out else ", none held out"
    return (
        f"{plan.pairs} pairs{held_out}; {plan.tokens:,} tokens an epoch, the longest text {plan.longest}\n"
        f"{plan.steps} steps ({plan.steps_an_epoch} an epoch), about {plan.memory_gb:.1f} GB at the peak"
    )


def step_in_words(numbers: dict[str, float]) -> str:
    """A step's numbers in a line."""
    words = [f"loss {numbers['loss']:.4f}"]
    if "rewards/margins" in numbers:
        words += [
            f"accuracy {numbers['rewards/accuracies']:.0%}",
            f"margin {numbers['rewards/margins']:+.3f}",
        ]
    words += [f"{numbers['tokens_per_second']:.0f} tokens/s", f"{numbers['peak_memory_gb']:.1f} GB"]
    return ", ".join(words)


def evaluation_in_words(numbers: dict[str, Any]) -> str:
    """Held-out numbers in a line."""
    if "eval_rewards/accuracies" not in numbers:
        return f"held out: loss {numbers['eval_loss']:.4f}"
    return (
        f"held out: loss {numbers['eval_loss']:.4f}, accuracy {numbers['eval_rewards/accuracies']:.0%} "
        f"(95% interval {numbers['eval_rewards/accuracies_low']:.0%} to "
        f"{numbers['eval_rewards/accuracies_high']:.0%}), log p of chosen "
        f"{numbers['eval_logps/chosen'] - numbers['eval_logps/chosen_reference']:+.1f} nats"
    )


def fail(sentence: str) -> None:
    """Print what went wrong on standard error."""
    print(f"mlx_dpo: {sentence}", file=sys.stderr)
