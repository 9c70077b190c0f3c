"""TRL's DPOTrainer on a job: `python -m benchmarks.peers.pytorch JOB`."""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.peers.job import ALPHA, BATCH, BETA, RANK, RATE, Job, Result, Watch, given_job

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train with PEFT's adapters, whose reference is the model without them."""
    job = given_job()
    torch.set_num_threads(job.threads)
    result = Result(versions=f"trl {version('trl')}, torch {version('torch')}, peft {version('peft')}")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16 if job.on_gpu else torch.float32)
    steps = Steps(job, result)
    trainer = DPOTrainer(
        model=model,
        args=arguments(job),
        train_dataset=Dataset.from_list([conversational(row) for row in job.rows()]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter(job, model.config.num_hidden_layers),
        callbacks=[steps],
    )
    trainer.train()
    result.epoch_seconds = None if job.cached else sum(result.seconds)
    result.print()


def arguments(job: Job) -> Any:
    """Plain DPO on the pairs in their order, with a report after each step."""
    return DPOConfig(
        output_dir=job.scratch,
        beta=BETA,
        loss_type=["sigmoid"],
        precompute_ref_log_probs=job.cached,
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        gradient_checkpointing=job.grad_checkpoint,
        bf16=job.on_gpu,
        use_cpu=not job.on_gpu,
        dataloader_pin_memory=job.on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapter(job: Job, blocks: int) -> LoraConfig:
    """The adapter that all have."""
    top = None if job.layers is None else list(range(blocks - job.layers, blocks))
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=_LINEAR,
        layers_to_transform=top,
        task_type="CAUSAL_LM",
    )


def conversational(row: dict[str, str]) -> dict[str, Any]:
    """A pair to which TRL applies the chat template."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


class Steps(TrainerCallback):
    """Takes the time of each step and what is logged after it."""

    def __init__(self, job: Job, result: Result):
        """Wait for the training to begin."""
        self.job, self.result = job, result
        self.watch: Watch | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the watch."""
        self.watch = Watch(self.job, self.result, device_peak)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step once the device has finished it."""
        if self.watch is None:
            raise RuntimeError("a step ended before the training began")
        if self.job.on_gpu:
            (torch.cuda if torch.cuda.is_available() else torch.mps).synchronize()
        self.watch.step_ended()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Take a step's numbers."""
        if logs and "logps/chosen" in logs:
            self.result.losses.append(float(logs["loss"]))
            self.result.chosen.append(float(logs["logps/chosen"]))
            self.result.rejected.append(float(logs["logps/rejected"]))


def device_peak() -> int:
    """The most memory of the GPU that was in use; on Metal, which keeps no such number, what the driver holds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory()


if __name__ == "__main__":
    main()
