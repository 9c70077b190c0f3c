"""Train DPOTrainer's parity runs and write what TRL logs to trl.json.

Run with the reference extra installed: PYTHONPATH=tests python tests/goldens/make_trl.py
"""

import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx_dpo  # noqa: F401  (loads the BLAS before MLX)

import mlx.core as mx  # isort: skip
import parity  # isort: skip


def trl_rows(folder: Path, name: str) -> list[dict[str, float]]:
    """What TRL's DPOTrainer logs at each step of a parity run whose files are in `folder`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    run = parity.RUNS[name]
    turns = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        | {answer: [{"role": "assistant", "content": pair[answer]}] for answer in ("chosen", "rejected")}
        for pair in parity.PAIRS
    ]
    settings = settings_of(run, folder, DPOConfig, max_length=None)
    return logged(folder, run, DPOTrainer, settings, Dataset.from_list(turns))


def settings_of(run: parity.Run, folder: Path, config: Any, **more: Any) -> Any:
    """The config of one of TRL's trainers for a parity run: in order, in float32, on the CPU, without a sound."""
    common = {
        "max_steps": run.steps, "per_device_train_batch_size": run.batch, "beta": run.beta,
        "gradient_accumulation_steps": run.accumulation, "learning_rate": run.rate, "lr_scheduler_type": "linear",
        "warmup_steps": 0, "max_grad_norm": parity.CLIP, "weight_decay": 0.0, "seed": 0,
    }  # fmt: skip
    silent = {
        "output_dir": str(folder / "trl"), "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return config(**(common | silent | more | run.theirs))


def logged(folder: Path, run: parity.Run, trainer: Any, settings: Any, rows: Any) -> list[dict[str, float]]:
    """What one of TRL's trainers logs at each step, from the start adapter in `folder`."""
    import datasets
    import torch
    from transformers import AutoTokenizer, PrinterCallback

    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # at this size a second one only waits, for long where the machine has other work
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    running = trainer(model=_policy(folder), args=settings, train_dataset=rows, processing_class=tokenizer)
    running.remove_callback(PrinterCallback)
    running.train()
    return [{key: row[key] for key in run.keys} for row in running.state.log_history if "loss" in row]


def write_golden(path: Path, rows: Any, names: list[str]) -> None:
    """Write what `rows(folder, name)` gives for each run, one line a step, to nine significant digits."""
    made_with = {package: metadata.version(package) for package in ("trl", "torch", "peft", "transformers")}
    parts = [f' "made_with": {json.dumps(made_with)}']
    with tempfile.TemporaryDirectory() as folder:
        parity.write(Path(folder))
        for name in names:
            steps = [{key: float(f"{value:.9g}") for key, value in row.items()} for row in rows(Path(folder), name)]
            parts.append(f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(step)}" for step in steps) + "\n ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _policy(folder: Path) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rank, alpha = parity.SHAPE["rank"], parity.SHAPE["alpha"]
    shape = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, shape)
    _take_adapter(model, folder / "adapter" / "adapters.safetensors")
    return model


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
    here = Path(__file__).with_name("trl.json")
    write_golden(here, trl_rows, [name for name, run in parity.RUNS.items() if run.trainer == "DPO"])
