"""Small runs, set up the same for TRL and for mlx_dpo: model, start adapter, pairs, settings."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import tiny

from mlx_dpo.models import adapters
from mlx_dpo.models.load import blocks, load

PAIRS = [
    {
        "prompt": "My mother asks the same question again and again. What can I say?",
        "chosen": "Answer in one calm sentence, then offer a cup of tea. You are not doing it wrong.",
        "rejected": "Repetition is a symptom. Redirect the patient.",
    },
    {
        "prompt": "He will not take a bath and I am tired of the fights.",
        "chosen": "Try a warm cloth tonight and leave the bath for tomorrow morning.",
        "rejected": "Bathing must be performed twice a week. Set a fixed schedule and keep to it.",
    },
    {
        "prompt": "Is it all right to cry?",
        "chosen": "Yes. It is.",
        "rejected": "Emotional responses are common in caregivers and should be managed.",
    },
    {
        "prompt": "She wandered out at 3 am.",
        "chosen": "That must have frightened you. A bell on the door can wake you next time. Tell her doctor?",
        "rejected": "Install locks.",
    },
    {
        "prompt": "My brother never calls. I do it all.",
        "chosen": "Write down three things that he could do from far away, and ask for one of them this week.",
        "rejected": "Hold a family meeting, assign duties and document them in writing for all parties.",
    },
    {
        "prompt": "Can I leave him alone for an hour?",
        "chosen": "If he can call you and would not go near the stove, an hour may be fine; ask his nurse first.",
        "rejected": "Supervision needs depend on the stage of the disease.",
    },
    {
        "prompt": "Dad says I stole his watch.",
        "chosen": "It hurts to hear that. Look for it together, and do not argue about who took it.",
        "rejected": "Accusations are a known behavioural symptom. Do not respond to them.",
    },
    {
        "prompt": "How do I ask for help at night?",
        "chosen": "Call a friend you trust and say one plain sentence: I need you for two hours on Friday.",
        "rejected": "Contact your local agency during office hours to request respite services.",
    },
]
BETA, RATE, CLIP = 0.3, 5e-3, 0.7
SHAPE = {"rank": 4, "alpha": 6.0}


class Run(NamedTuple):
    """Which of TRL's trainers runs it, what its config and our options are given, and what both are given."""

    trainer: Literal["DPO", "CPO", "ORPO", "KTO"]
    theirs: dict[str, Any]
    ours: dict[str, Any]
    steps: int = 6
    batch: int = 2
    accumulation: int = 1
    beta: float = BETA
    rate: float = RATE

    @property
    def keys(self) -> tuple[str, ...]:
        """What is compared of a step: all that TRL's trainer and ours both log."""
        if self.ours.get("method") == "sft":
            return ("loss", "logps/chosen", "grad_norm")
        means = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
        more = {"DPO": ("rewards/accuracies", "num_tokens"), "KTO": ("kl", "num_tokens")}
        return ("loss", *means, *more.get(self.trainer, ("rewards/accuracies",)), "grad_norm")


# Options of ours that TRL's DPOConfig has under another name.
_THEIR_NAMES = {"wpo": "use_weighting", "f_divergence": "f_divergence_type", "f_alpha": "f_alpha_divergence_coef"}


def _dpo(loss: str, options: dict[str, Any] | None = None, **both: Any) -> Run:
    """A run of one DPOTrainer loss with the same `options` on both sides."""
    ours = options or {}
    theirs = {_THEIR_NAMES.get(name, name): value for name, value in ours.items()}
    return Run("DPO", {"loss_type": [loss], **theirs}, {"loss": loss, **ours}, **both)


_UNSURE = {"label_smoothing": 0.1}
RUNS = {
    "sigmoid": _dpo("sigmoid"),
    "accumulated": _dpo("sigmoid", steps=4, accumulation=2),
    "sigmoid+sft": Run(
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss": "sigmoid", "sft_weight": 0.5},
        batch=4,
    ),
    "hinge": _dpo("hinge"),
    "ipo": _dpo("ipo", beta=1.0),
    "exo_pair": _dpo("exo_pair", _UNSURE),
    "nca_pair": _dpo("nca_pair"),
    "robust": _dpo("robust", _UNSURE),
    "bco_pair": _dpo("bco_pair"),
    "sppo_hard": _dpo("sppo_hard", beta=1.0, rate=1e-3),
    # Fast enough for margins to overtake one another: otherwise the sorted differences are the unsorted ones.
    "aot": _dpo("aot", _UNSURE, batch=4, rate=1e-2),
    "aot_unpaired": _dpo("aot_unpaired", _UNSURE, batch=4, rate=1e-2),
    "apo_zero": _dpo("apo_zero"),
    "apo_down": _dpo("apo_down"),
    "discopop": _dpo("discopop", {"discopop_tau": 0.2}, rate=1e-3),
    "sigmoid_norm": _dpo("sigmoid_norm", beta=5.0),
    "sft": Run("DPO", {"loss_type": ["sft"]}, {"method": "sft"}),
    "ld_alpha": _dpo("sigmoid", {"ld_alpha": 0.4}),
    "wpo": _dpo("sigmoid", {"wpo": True}),
    "wpo of ipo": _dpo("ipo", {"wpo": True}, beta=1.0),
    "forward_kl": _dpo("sigmoid", {"f_divergence": "forward_kl"}, rate=2e-3),
    "js_divergence": _dpo("sigmoid", {"f_divergence": "js_divergence"}),
    "js_divergence of ipo": _dpo("ipo", {"f_divergence": "js_divergence"}, beta=1.0),
    "alpha_divergence 0.5": _dpo("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha": 0.5}),
    "alpha_divergence 0.3": _dpo("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha": 0.3}),
    "mix": Run(
        "DPO",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss": "0.8*sigmoid+0.2*bco_pair+1.0*sft"},
        batch=4,
    ),
    "accumulated robust": _dpo("robust", _UNSURE, steps=4, accumulation=2),
    "weight_decay": _dpo("sigmoid", {"weight_decay": 0.1}),
    "simpo": Run(
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
        {"loss": "simpo", "simpo_gamma": 0.5},
        beta=2.0,
    ),
    "cpo": Run("CPO", {"loss_type": "sigmoid", "cpo_alpha": 1.0}, {"loss": "cpo", "sft_weight": 1.0}, beta=0.05),
    "cpo with smoothing": Run(
        "CPO",
        {"loss_type": "sigmoid", "cpo_alpha": 1.0, **_UNSURE},
        {"loss": "cpo", "sft_weight": 1.0, **_UNSURE},
        beta=0.05,
    ),
    "orpo": Run("ORPO", {}, {"loss": "orpo"}, beta=1.0),
    "kto": Run("KTO", {"loss_type": "kto"}, {"loss": "kto"}, batch=4),
    "kto with weights": Run(
        "KTO",
        {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.5},
        {"loss": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.5},
        batch=4,
    ),
}
# The pairs as rows of one answer each, up and down in turn.
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
    for pair in PAIRS
    for answer in ("chosen", "rejected")
]


def write(folder: Path, family: str = "llama") -> None:
    """Write model, start adapter (with a B that is not zero), pairs.jsonl and labelled.jsonl."""
    model = tiny.write_model(folder / "model", family, seed=3)
    loaded = load(model)
    keys = adapters.chosen_keys(loaded.model, ())
    shape = adapters.AdapterShape(SHAPE["rank"], SHAPE["alpha"] / SHAPE["rank"], 0.0, keys, len(blocks(loaded.model)))
    adapters.attach(loaded.model, shape, seed=11)
    weights = {
        name: mx.random.normal(value.shape) * 0.02 if name.endswith("lora_b") else value
        for name, value in sorted(adapters.adapter_weights(loaded.model).items())
    }
    (folder / "adapter").mkdir()
    adapters.save_adapter(folder / "adapter", weights, shape, str(model))
    for name, rows in (("pairs", PAIRS), ("labelled", LABELLED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
