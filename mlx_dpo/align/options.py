"""What a training run can be told, declared once: flags, TOML keys and Python fields are these."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from mlx_dpo.align import mixture
from mlx_dpo.align.objectives import TERMS
from mlx_dpo.align.quantities import Divergence
from mlx_dpo.align.tracking import Tracker
from mlx_dpo.refusal import Refusal
from mlx_dpo.whole import Whole


def _known_loss(kind: type, value: str) -> None:
    try:
        mixture.mixture(value)
    except Refusal as fault:
        raise ValueError(str(fault)) from None


_LOSSES = f"The objective: one of {', '.join(TERMS)}, or a sum such as 0.8*sigmoid+0.5*sft."
LossName = Annotated[str, Parameter(validator=_known_loss, help=_LOSSES)]
Measure = Literal["loss", "accuracy", "margin", "chosen"]


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
    """Learn from preferences (dpo), or from the chosen answers or plain text alone (sft)."""
    loss: LossName = "sigmoid+sft"
    """The objective: a name in `objectives.TERMS`, or a sum of several with weights."""
    adapter: Path | None = None
    """Adapter folder to start from; it is the reference too."""
    resume: bool = False
    """Go on with the interrupted run in --out."""
    dry_run: bool = False
    """Print the plan (pairs, tokens, steps, memory) and stop."""
    holdout: float | None = None
    """Share of the training prompts to hold out where there is no valid file. [default: 0.1 of 100 rows or more]"""
    beta: float | None = None
    """Strength of the pull towards the reference. [default: 0.1; 5 for sigmoid_norm, 2 for simpo]"""
    label_smoothing: float | None = None
    """Share of pairs whose labels are taken as wrong. [default: 0; 0.001 for exo_pair]"""
    sft_weight: float | None = None
    """Weight of the chosen answers' mean negative log-likelihood beside the preference loss; 0 leaves it out."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the shorter answer of a pair (LD-DPO), 0 to 1."""
    wpo: bool = False
    """Weigh pairs by how likely the policy is to say them (WPO)."""
    f_divergence: Divergence = "reverse_kl"
    """The divergence from the reference that is held small (f-DPO)."""
    f_alpha: float | None = None
    """The α of the α-divergence. [default: 0.5]"""
    discopop_tau: float | None = None
    """Temperature of DiscoPOP's blend. [default: 0.05]"""
    simpo_gamma: float | None = None
    """SimPO's target margin γ. [default: 0.5]"""
    dpop_lambda: float | None = None
    """What DPO-positive charges for a nat that the chosen answer loses. [default: 50]"""
    desirable_weight: float | None = None
    """KTO's weight of thumbs up. [default: 1]"""
    undesirable_weight: float | None = None
    """KTO's weight of thumbs down. [default: 1]"""
    learning_rate: float | None = None
    """Peak learning rate. [default: 1e-3 for models up to 576 wide, in inverse proportion for wider ones]"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes down after warm-up."""
    warmup: float = 0.0
    """Warm-up: below 1 a share of all steps, otherwise a number of steps."""
    optimizer: Literal["adamw", "adafactor", "muon", "lion"] = "adamw"
    """The optimiser; AdamW is PyTorch's, the others are MLX's."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: Whole | None = None
    """Number of steps, instead of --epochs."""
    batch_size: Whole = 4
    """Pairs a batch, which is the most that is computed at once."""
    grad_accumulation: Whole = 1
    """Batches a step; the loss is that of all their pairs together."""
    max_length: Whole | None = None
    """Longest prompt with answer, in tokens; longer prompts are cut from the left, and counted."""
    rank: Whole | None = None
    """LoRA rank. [default: 8, or the start adapter's]"""
    alpha: float | None = None
    """LoRA alpha as PEFT has it: the scale is alpha/rank. [default: 16, or the start adapter's]"""
    rslora: bool = False
    """Rank-stabilised LoRA: the scale is alpha/√rank."""
    dora: bool = False
    """DoRA: learn the magnitude of each weight row beside the direction."""
    lora_plus: float = 1.0
    """LoRA+: how many times the learning rate B gets."""
    dropout: float | None = None
    """LoRA dropout. [default: 0, or the start adapter's]"""
    layers: Whole | None = None
    """Adapt only so many blocks, counted from the top. [default: all]"""
    targets: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """Linear modules to adapt, by name, path or pattern, e.g. q_proj, mlp.*, model.layers.2?.mlp.*. [default: all]"""
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
    keep_checkpoints: Whole = 2
    """How many checkpoints to keep, beside those that a rescue or --keep best needs."""
    on_displacement: Literal["warn", "stop", "rescue"] = "warn"
    """What to do where the chosen answers get less likely: say so, stop, or go back and on with a gentler loss."""
    kl_budget: float = 0.5
    """Warn where the model's own answers diverge further than this from the base, in nats a token."""
    keep: Literal["last", "best"] = "last"
    """The adapter to keep: of the last step, or of the best evaluation."""
    best_by: Measure = "loss"
    """The held-out number that says which evaluation is best; chosen is the chosen answers' log-probability."""
    patience: Whole | None = None
    """Stop after so many evaluations without a better one."""
    memory_limit: float | None = None
    """Most gigabytes of memory; less is computed at once to keep it. [default: 75% of what the machine recommends]"""
    disk_limit: float | None = None
    """Most gigabytes kept on disk to compute less; 0 keeps nothing. [default: a tenth of what is free]"""
    grad_checkpoint: bool = False
    """Keep less and compute more, about a third slower, also where the memory would do without."""
    samples: Whole = 3
    """Questions answered before, at each evaluation and after, for the report."""
    questions: Path | None = None
    """JSONL file with a prompt a row to take those questions from. [default: the held-out prompts]"""
    sample_tokens: Whole = 160
    """Longest sample answer, in tokens."""
    track: Annotated[tuple[Tracker, ...], Parameter(show_default=False)] = ()
    """Send the numbers to these trackers too, all of them offline (their packages are extras)."""


def defaults() -> dict[str, Any]:
    """The defaults of the options that have one."""
    return {field.name: field.default for field in fields(TrainOptions)}


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
