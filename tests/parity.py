"""One small DPO run, set up the same for TRL and for mlx_dpo: model, start adapter, pairs, settings."""

import json
from pathlib import Path

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
# name: (steps, batch size, accumulation, TRL's losses and weights, our options)
RUNS = {
    "sigmoid": (6, 2, 1, (["sigmoid"], None), {}),
    "accumulated": (4, 2, 2, (["sigmoid"], None), {}),
    "sigmoid+sft": (6, 4, 1, (["sigmoid", "sft"], [1.0, 0.5]), {"sft_weight": 0.5}),
}
BETA, RATE, CLIP = 0.3, 5e-3, 0.7
SHAPE = {"rank": 4, "alpha": 6.0}
KEYS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "grad_norm", "num_tokens")  # fmt: skip


def write(folder: Path, family: str = "llama") -> tuple[Path, Path, Path]:
    """Write model, start adapter (with a B that is not zero) and pairs; return their paths."""
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
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return model, folder / "adapter", folder / "pairs.jsonl"
