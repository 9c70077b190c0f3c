"""Train the parity runs with TRL and write what it logs to trl.json: `python tests/goldens/make_trl.py`."""

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx_dpo  # noqa: F401, I001
import mlx.core as mx
import parity


def trl_rows(folder: Path, run: str) -> list[dict[str, float]]:
    """What TRL's DPOTrainer logs at each step of a parity run whose files are in `folder`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    steps, batch, accumulation, (losses, weights), _ = parity.RUNS[run]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    shape = LoraConfig(
        r=parity.SHAPE["rank"], lora_alpha=parity.SHAPE["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, shape)
    _take_adapter(model, folder / "adapter" / "adapters.safetensors")
    rows = [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
        }
        for pair in parity.PAIRS
    ]
    settings = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, beta=parity.BETA, learning_rate=parity.RATE,
        lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=parity.CLIP, weight_decay=0.0, logging_steps=1,
        loss_type=losses, loss_weights=weights, max_length=None, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = InOrder(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [{key: row[key] for key in parity.KEYS} for row in trainer.state.log_history if "loss" in row]


def _take_adapter(model: Any, path: Path) -> None:
    import numpy as np
    import torch

    given = {name: torch.from_numpy(np.array(value).T.copy()) for name, value in mx.load(str(path)).items()}
    taken = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            ours = name.removeprefix("base_model.model.")
            ours = ours.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")
            parameter.data.copy_(given[ours])
            taken += 1
    assert taken == len(given)


if __name__ == "__main__":
    golden: dict[str, Any] = {"made_with": {n: metadata.version(n) for n in ("trl", "torch", "peft", "transformers")}}
    for name in parity.RUNS:
        with tempfile.TemporaryDirectory() as folder:
            parity.write(Path(folder))
            golden[name] = trl_rows(Path(folder), name)
    Path(__file__).with_name("trl.json").write_text(json.dumps(golden, indent=1) + "\n")
