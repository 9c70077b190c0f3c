"""What a person sees of a run: a progress bar on standard error, results on standard output."""

import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlx_dpo import fuse, machine
from mlx_dpo.align import events
from mlx_dpo.align.plan import Plan
from mlx_dpo.align.record import versions
from mlx_dpo.convert import events as conversion
from mlx_dpo.convert.fidelity import Fidelity
from mlx_dpo.machine import Machine
from mlx_dpo.models.recipes import Recipe

# No markup: a path may hold brackets.
out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


_speaker = "mlx_dpo"


class StopRequest:
    """Set by the first Ctrl-C once there are steps; before them, and the second time, it interrupts at once."""

    def __init__(self) -> None:
        """Nothing has been asked yet, and no step taken."""
        self.asked = False
        self.begun = False

    def __call__(self) -> bool:
        """Whether to stop after the step that was taken."""
        self.begun = True
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.begun:
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


def show_training(
    happenings: Iterable[events.Event], plan_on: Console = err
) -> events.Finished | events.Interrupted | None:
    """Show a run as it happens, its plan on `plan_on`, and return how it ended; None after a dry run."""
    last: events.Finished | events.Interrupted | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        view = _TrainingView(bar, plan_on)
        for event in happenings:
            view.show(event)
            if isinstance(event, (events.Finished, events.Interrupted)):
                last = event
    return last


class _TrainingView:
    def __init__(self, bar: Progress, plan_on: Console):
        self.bar, self.plan_on = bar, plan_on
        self.tasks: dict[str, TaskID] = {}
        self.step = self.printed = 0

    def show(self, event: events.Event) -> None:
        if isinstance(event, events.Planned):
            self.plan_on.print(plan_in_words(event.plan))
        elif isinstance(event, events.Phase):
            self._advance(event.name, event.done, event.total, "")
            if not err.is_terminal and event.done == 0:
                err.print(f"{event.name} …")
        elif isinstance(event, events.Note):
            err.print(event.text)
        elif isinstance(event, events.Stepped):
            self._step(event)
        elif isinstance(event, events.Warned):
            err.print(f"Warning, step {event.step}: {event.finding.text}", style="yellow")
        elif isinstance(event, events.Stage):
            self.step = self.printed = 0
            err.print(f"Stage {event.number} of {event.stages}: {event.method}", style="bold")
        elif isinstance(event, events.Evaluated):
            err.print(evaluation_in_words(event.numbers))

    def _step(self, event: events.Stepped) -> None:
        numbers = event.numbers
        words = step_in_words(numbers)
        step = int(numbers["step"])
        self._advance("Training", step, event.steps, words)
        if step <= self.step:  # a rescue went back
            self.printed = 10 * (step - 1) // event.steps
        self.step, tenths = step, 10 * step // event.steps
        if not err.is_terminal and tenths > self.printed:
            self.printed = tenths
            err.print(f"step {step}/{event.steps}: {words}")

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
        f"{_counted(plan.pairs, 'pair')}{held_out}; {plan.tokens:,} tokens an epoch, the longest text {plan.longest}\n"
        f"{_counted(plan.steps, 'step')} ({plan.steps_an_epoch} an epoch), about {plan.memory_gb:.1f} GB at the peak, "
        f"{plan.at_once} at once{', each block computed again for its gradient' if plan.batching.recompute else ''}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def step_in_words(numbers: dict[str, Any]) -> str:
    """A step's numbers in a line."""
    words = [f"loss {numbers['loss']:.4f}"]
    if "rewards/accuracies" in numbers:
        words.append(f"accuracy {numbers['rewards/accuracies']:.0%}")
    if "rewards/margins" in numbers:
        words.append(f"margin {numbers['rewards/margins']:+.3f}")
    if "logps/chosen_shift" in numbers:
        words.append(f"chosen {numbers['logps/chosen_shift']:+.1f} nats")
    words += [f"{numbers['tokens_per_second']:.0f} tokens/s", f"{numbers['peak_memory_gb']:.1f} GB"]
    return ", ".join(words)


def evaluation_in_words(numbers: dict[str, Any]) -> str:
    """Held-out numbers in a line."""
    words = [f"held out: loss {numbers['eval_loss']:.4f}"]
    if "eval_rewards/accuracies" in numbers:
        low, high = numbers["eval_rewards/accuracies_low"], numbers["eval_rewards/accuracies_high"]
        words.append(f"accuracy {numbers['eval_rewards/accuracies']:.0%} (95% interval {low:.0%} to {high:.0%})")
    if "eval_logps/chosen_shift" in numbers:
        words.append(f"log p of chosen {numbers['eval_logps/chosen_shift']:+.1f} nats")
    return ", ".join(words)


def fail(sentence: str) -> None:
    """Print what went wrong on standard error: a sentence, and a list below it where there is one.

    What a file put into the sentence can neither move the cursor nor begin a line of its own.
    """
    text = re.sub(r"\n(?!  )", " ", sentence)
    shown = "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)
    print(f"{_speaker}: {shown}", file=sys.stderr)


def leave_to_the_first(rank: int) -> None:
    """Say nothing from here on but what goes wrong, as the first of several processes speaks for all."""
    global _speaker
    if rank:
        out.quiet = err.quiet = True
        _speaker = f"mlx_dpo, rank {rank}"


def show_conversion(happenings: Iterable[conversion.Event]) -> conversion.Converted | None:
    """Show a conversion as it happens and return its end."""
    end = None
    with Progress(TextColumn("{task.description}"), BarColumn(), console=err, transient=True) as bar:
        task = bar.add_task("", total=None)
        for event in happenings:
            if isinstance(event, conversion.Phase):
                err.print(event.text)
                bar.update(task, description="", total=None, completed=0)
            elif isinstance(event, conversion.Progress):
                bar.update(task, total=event.total, completed=event.done, description=event.unit)
            else:
                end = event
    return end


def conversion_in_words(end: conversion.Converted) -> str:
    """What a conversion gave, and what its own check found."""
    checks = end.checks
    layers = f"all {checks.layers}" if checks.layers == checks.all_layers else f"{checks.layers} of {checks.all_layers}"
    return (
        f"Model: {end.folder} ({end.quantisation}; licence {end.licence or 'not known'})\n"
        f"Check: {checks.texts} awkward texts give the same tokens as {checks.tokenizer_peer}; against "
        f"{checks.logits_peer}, over {layers} layers, the logits differ by at most {checks.max_logit_difference:.2g} "
        f"(mean KL {checks.mean_kl:.2g} nats, same likeliest token {checks.top_token_agreement:.0%})"
    )


def show_fusing(happenings: Iterable[fuse.Event]) -> fuse.Fused | None:
    """Show a merge as it happens and return its end."""
    end = None
    for event in happenings:
        if isinstance(event, fuse.Phase):
            err.print(f"{event.text} …")
        elif isinstance(event, fuse.Measured):
            out.print(f"{event.format}: {fidelity_in_words(event.fidelity)}")
        else:
            end = event
    return end


def fusing_in_words(end: fuse.Fused) -> str:
    """What a merge gave."""
    return f"Merged model: {end.out} ({end.format}); it reads back with the same logits."


def fidelity_in_words(found: Fidelity) -> str:
    """How much of an adapter is left, in a line."""
    return (
        f"{found.survived:.0%} of the adapter's effect survives, KL {found.kl:.2g} nats a token, the likeliest token "
        f"is the same in {found.agreement:.1%} of {found.tokens} tokens"
    )


def recipes_table(recipes: Iterable[Recipe], about: Machine) -> Table:
    """The recipes with what each needs; a model fits where its weights take at most half of what may be used."""
    table = Table(box=None, pad_edge=False)
    table.add_column("Recipe", no_wrap=True)
    for name in ("GB at 16/8/4 bit", "Fits here", "Licence", "Tried"):
        table.add_column(name, overflow="fold")
    for recipe in recipes:
        sizes = {bits: recipe.memory(bits) for bits in (16, 8, 4)}
        fitting = [bits for bits, size in sizes.items() if size * 2e9 <= about.memory_limit]
        gated = " (gated)" if recipe.licence.gated else ""
        table.add_row(
            recipe.name,
            " / ".join(f"{size:.1f}" for size in sizes.values()),
            f"at {fitting[0]} bit" if fitting else "no",
            recipe.licence.name + gated,
            "yes" if recipe.defaults.tried else "no",
        )
    return table


def recipe_in_words(recipe: Recipe) -> str:
    """All that a recipe says."""
    licence, defaults = recipe.licence, recipe.defaults
    sizes = ", ".join(f"{recipe.memory(bits):.1f} GB at {bits} bit" for bits in (16, 8, 4))
    settings = {k: v for k, v in asdict(defaults).items() if k not in ("tried", "tried_by")}
    lines = [
        f"{recipe.name}: {recipe.title}, {recipe.architecture}, {recipe.parameters / 1e6:,.0f} million parameters",
        f"licence: {licence.name}{' (gated)' if licence.gated else ''}, {licence.text}. {licence.asks}",
        f"source: {', '.join(str(value) for value in asdict(recipe.source).values() if value)}",
        f"weights: {sizes} (computed; training takes more, which `mlx_dpo train --dry-run` estimates)",
        f"LoRA targets: {', '.join(recipe.lora.targets)}",
        f"training settings ({'tried' if defaults.tried else 'not tried'}; {defaults.tried_by}): "
        + ", ".join(f"{key} {value}" for key, value in settings.items()),
        f"not tried here: {recipe.not_tried}",
    ]
    return "\n".join(lines)


def show_machine(*, as_json: bool) -> None:
    """Print what this machine is."""
    about = machine.describe()._asdict() | {"libraries": versions()}
    if as_json:
        print(json.dumps(about))
        return
    for name, value in about.items():
        if isinstance(value, int) and name.startswith("memory"):
            value = f"{value / 1e9:.1f} GB"
        elif isinstance(value, dict):
            value = ", ".join(f"{library} {version}" for library, version in value.items())
        out.print(f"{name.replace('_', ' ')}: {value}")
