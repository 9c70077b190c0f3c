"""What options have to satisfy before anything is loaded, and what those that were left open come to."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_dpo.align import objectives
from mlx_dpo.align.mixture import Mixture, Term, mixture, option_names
from mlx_dpo.align.options import TrainOptions, defaults, flag
from mlx_dpo.refusal import Refusal

_RANGES: dict[str, tuple[float, float, bool, bool]] = {  # low, high, low allowed, high allowed
    "holdout": (0, 1, True, False),
    "beta": (0, 1e3, False, True),
    "label_smoothing": (0, 0.5, True, False),
    "sft_weight": (0, 1e3, True, True),
    "ld_alpha": (0, 1, True, True),
    "f_alpha": (-10, 10, True, True),
    "discopop_tau": (0, 1e3, False, True),
    "simpo_gamma": (0, 1e3, True, True),
    "dpop_lambda": (0, 1e6, True, True),
    "desirable_weight": (0, 1e3, True, True),
    "undesirable_weight": (0, 1e3, True, True),
    "learning_rate": (0, 1, False, True),
    "warmup": (0, 1e9, True, True),
    "weight_decay": (0, 10, True, True),
    "epochs": (0, 1e4, False, True),
    "steps": (1, 1e9, True, True),
    "batch_size": (1, 4096, True, True),
    "grad_accumulation": (1, 65536, True, True),
    "max_length": (8, 1e7, True, True),
    "rank": (1, 4096, True, True),
    "alpha": (0, 1e5, False, True),
    "lora_plus": (0, 1e4, False, True),
    "dropout": (0, 1, True, False),
    "layers": (1, 1e4, True, True),
    "max_grad_norm": (0, 1e6, True, True),
    "seed": (0, 2**32 - 1, True, True),
    "eval_every": (0, 1e9, True, True),
    "save_every": (0, 1e9, True, True),
    "keep_checkpoints": (1, 1e6, True, True),
    "kl_budget": (0, 1e3, False, True),
    "patience": (1, 1e6, True, True),
    "memory_limit": (0, 1e5, False, True),
    "disk_limit": (0, 1e6, True, True),
    "samples": (0, 100, True, True),
    "sample_tokens": (1, 4096, True, True),
}
_SFT = Mixture((Term(1.0, objectives.likelihood),))
_OF_PREFERENCE = ("loss", "sft_weight", "ld_alpha", "wpo", "f_divergence", "f_alpha", "on_displacement")


def refuse_absurd(options: TrainOptions) -> None:
    """Raise Refusal, naming the option and its range, where a number cannot be meant."""
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
    if not options.samples and options.kl_budget != defaults()["kl_budget"]:
        raise Refusal("--kl-budget has no meaning with --samples 0, as nothing is answered: leave one of them away.")
    if not options.eval_every and (options.keep == "best" or options.patience):
        name = "--keep best" if options.keep == "best" else "--patience"
        raise Refusal(f"{name} needs evaluations to choose from: add --eval-every, and hold pairs out.")
    if options.keep == "last" and not options.patience and options.best_by != defaults()["best_by"]:
        raise Refusal("--best-by has no meaning without --keep best or --patience: leave it away.")
    single = options.method == "sft" or loss_of(options).is_unpaired
    if options.best_by in ("accuracy", "margin") and single:
        raise Refusal(f"--best-by {options.best_by} needs pairs, which are not learnt here: give loss or chosen.")


def _out_of_range(name: str, value: float) -> str:
    low, high, with_low, with_high = _RANGES[name]
    below = "at least" if with_low else "more than"
    above = "at most" if with_high else "less than"
    low, high = (int(limit) if limit == int(limit) else limit for limit in (low, high))
    return f"{flag(name)} {value} makes no sense: give a number of {below} {low} and {above} {high}."


def loss_of(options: TrainOptions) -> Mixture:
    """The terms that a run minimises."""
    return _SFT if options.method == "sft" else mixture(options.loss, options.sft_weight)


def resolved(options: TrainOptions) -> TrainOptions:
    """Fill in what the loss's own options come to where they were left open.

    Raises Refusal for an option that the loss does not use, or cannot be used with.
    """
    if options.method == "sft":
        _refuse_given(options, (*_OF_PREFERENCE, *sorted(option_names())), "with --method sft")
        return options
    terms = loss_of(options)
    if not terms.preference:
        raise Refusal(f"--loss {options.loss} compares nothing: give --method sft to learn from answers alone.")
    used = terms.options
    _refuse_given(options, sorted(option_names() - used.keys()), f"with --loss {options.loss}")
    _refuse_unfit(options, terms)
    chosen: dict[str, Any] = {n: v if getattr(options, n) is None else getattr(options, n) for n, v in used.items()}
    if options.f_divergence == "alpha_divergence" and options.f_alpha is None:
        chosen["f_alpha"] = 0.5
    if objectives.exo_pair in [term.objective for term in terms.terms] and chosen["label_smoothing"] == 0:
        raise Refusal("--label-smoothing 0 makes exo_pair's loss infinite: give a small share such as 0.001.")
    return replace(options, **chosen)


def _refuse_given(options: TrainOptions, names: tuple[str, ...] | list[str], where: str) -> None:
    for name in names:
        if getattr(options, name) != defaults()[name]:
            raise Refusal(f"{flag(name)} has no meaning {where}: leave it away.")


# What goes with which losses: the option, whether it is used, whether the loss takes it, and what to do.
_Check = tuple[str, Callable[[TrainOptions], bool], Callable[[Mixture], bool], str]
_UNFIT: tuple[_Check, ...] = (
    (
        "--f-divergence",
        lambda options: options.f_divergence != "reverse_kl",
        lambda terms: terms.takes_divergences and terms.needs_reference,
        "its pull towards the reference does not cancel between chosen and rejected",
    ),
    (
        "--ld-alpha",
        lambda options: options.ld_alpha is not None,
        lambda terms: terms.needs_reference and not terms.is_unpaired,
        "it needs pairs and a reference",
    ),
    (
        "--wpo",
        lambda options: options.wpo,
        lambda terms: not terms.is_coupled and not terms.is_unpaired,
        "its losses do not belong to single pairs",
    ),
    (
        "--on-displacement",
        lambda options: options.on_displacement != "warn",
        lambda terms: terms.needs_reference,
        "without a reference there is nothing to measure a fall from",
    ),
)


def _refuse_unfit(options: TrainOptions, terms: Mixture) -> None:
    for name, is_used, fits, why in _UNFIT:
        if is_used(options) and not fits(terms):
            raise Refusal(f"{name} cannot be used with --loss {options.loss} ({why}): leave it away.")
    if options.f_alpha is not None and options.f_divergence != "alpha_divergence":
        raise Refusal("--f-alpha has no meaning without --f-divergence alpha_divergence: leave it away.")
    if terms.is_unpaired and options.batch_size * options.grad_accumulation < 2:
        raise Refusal("--loss kto measures rewards against other answers of a step: give a --batch-size of at least 2.")
