"""What a training run can be told, declared once: flags, TOML keys and Python fields are these."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from mlx_dpo.refusal import Refusal
from mlx_dpo.whole import Whole


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of one training run; a field is the flag of the same name."""

    model: Path
    """Folder of the model to align, as `mlx_dpo convert` writes it."""
    data: Path
    """Pairs: a JSONL, JSON, CSV or Parquet file, or a folder with train, valid and test files."""
    out: Path
    """Folder for the adapter and the run's records."""
    method: Literal["dpo", "sft"] = "dpo"
    """Learn from preference pairs (dpo), or from the chosen answers alone (sft)."""
    loss: Literal["sigmoid"] = "sigmoid"
    """The preference objective."""
    adapter: Path | None = None
    """Adapter folder to start from; it is the reference too."""
    resume: bool = False
    """Go on with the interrupted run in --out."""
    dry_run: bool = False
    """Print the plan (pairs, tokens, steps, memory) and stop."""
    holdout: float = 0.0
    """Share of the training prompts to hold out for evaluation, where the data has no valid file."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken as wrong (cDPO)."""
    sft_weight: float = 0.0
    """Weight of the chosen answers' mean negative log-likelihood, added to the preference loss."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes down after warm-up."""
    warmup: float = 0.0
    """Warm-up: below 1 a share of all steps, otherwise a number of steps."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: Whole | None = None
    """Number of steps, instead of --epochs."""
    batch_size: Whole = 4
    """Pairs computed at once."""
    grad_accumulation: Whole = 1
    """Batches a step; the loss is the mean over all their pairs."""
    max_length: Whole | None = None
    """Longest prompt with answer, in tokens; longer prompts are cut from the left, and counted."""
    rank: Whole | None = None
    """LoRA rank. [default: 8, or the start adapter's]"""
    alpha: float | None = None
    """LoRA alpha as PEFT has it: the scale is alpha/rank. [default: 16, or the start adapter's]"""
    dropout: float | None = None
    """LoRA dropout. [default: 0, or the start adapter's]"""
    layers: Whole | None = None
    """Adapt only so many blocks, counted from the top. [default: all]"""
    targets: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """Linear modules to adapt, by name or path, e.g. q_proj. [default: all]"""
    max_grad_norm: float = 1.0
    """Clip the gradient's global norm to this; 0 does not clip."""
    seed: Whole = 0
    """Decides order, initialisation and dropout."""
    shuffle: Annotated[bool, Parameter(negative="--no-shuffle")] = True
    """Shuffle the pairs anew in each epoch."""
    eval_every: Whole = 0
    """Evaluate on held-out pairs every so many steps; the end is always evaluated."""
    save_every: Whole = 50
    """Write a checkpoint every so many steps; 0 writes none before the end."""
    memory_limit: float | None = None
    """Refuse a run that would take more gigabytes than this. [default: 75% of what the machine recommends]"""
    grad_checkpoint: bool = False
    """Keep less and compute more: about a third slower, for long texts in little memory."""
    samples: Whole = 3
    """Questions answered before and after, for the report."""
    questions: Path | None = None
    """JSONL file with a prompt a row to take those questions from. [default: the held-out prompts]"""
    sample_tokens: Whole = 160
    """Longest sample answer, in tokens."""


_RANGES: dict[str, tuple[float, float, bool, bool]] = {  # low, high, low allowed, high allowed
    "holdout": (0, 1, True, False),
    "beta": (0, 1e3, False, True),
    "label_smoothing": (0, 0.5, True, False),
    "sft_weight": (0, 1e3, True, True),
    "learning_rate": (0, 1, False, True),
    "warmup": (0, 1e9, True, True),
    "epochs": (0, 1e4, False, True),
    "steps": (1, 1e9, True, True),
    "batch_size": (1, 4096, True, True),
    "grad_accumulation": (1, 65536, True, True),
    "max_length": (8, 1e7, True, True),
    "rank": (1, 4096, True, True),
    "alpha": (0, 1e5, False, True),
    "dropout": (0, 1, True, False),
    "layers": (1, 1e4, True, True),
    "max_grad_norm": (0, 1e6, True, True),
    "seed": (0, 2**32 - 1, True, True),
    "eval_every": (0, 1e9, True, True),
    "save_every": (0, 1e9, True, True),
    "memory_limit": (0, 1e5, False, True),
    "samples": (0, 100, True, True),
    "sample_tokens": (1, 4096, True, True),
}


def refuse_absurd(options: TrainOptions) -> None:
    """Raise Refusal, naming the option and its range, where a number cannot be meant, or is not used."""
    for name, (low, high, with_low, with_high) in _RANGES.items():
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < low or value > high or (value, with_low) == (low, False):
            raise Refusal(_out_of_range(name, value))
        if (value, with_high) == (high, False):
            raise Refusal(_out_of_range(name, value))
    if options.warmup >= 1 and options.warmup != int(options.warmup):
        raise Refusal(f"--warmup {options.warmup} is neither a share below 1 nor a whole number of steps: give one.")
    if options.method == "sft":
        _refuse_preference_options(options)


def _out_of_range(name: str, value: float) -> str:
    low, high, with_low, with_high = _RANGES[name]
    below = "at least" if with_low else "more than"
    above = "at most" if with_high else "less than"
    low, high = (int(limit) if limit == int(limit) else limit for limit in (low, high))
    return f"{flag(name)} {value} makes no sense: give a number of {below} {low} and {above} {high}."


def _refuse_preference_options(options: TrainOptions) -> None:
    unused = ("loss", "beta", "label_smoothing", "sft_weight")
    defaults = {field.name: field.default for field in fields(TrainOptions)}
    for name in unused:
        if getattr(options, name) != defaults[name]:
            raise Refusal(f"{flag(name)} has no meaning with --method sft: leave it away.")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def as_toml(options: TrainOptions) -> dict[str, Any]:
    """The options under their TOML keys, paths absolute, without those that only say how to start."""
    result: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("resume", "dry_run"):
            continue
        if isinstance(value, Path):
            value = str(value.absolute())
        result[flag(field.name).removeprefix("--")] = list(value) if isinstance(value, tuple) else value
    return result
