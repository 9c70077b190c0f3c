"""mlx-lm-lora on a job, through its `train_dpo`: `python -m benchmarks.peers.mlx_lm_lora JOB`."""
# pyright: reportMissingImports=false

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers import fast_blas  # noqa: F401  # ahead of MLX

# isort: split
import mlx.core as mx
import mlx.optimizers as optimizers
from mlx_lm.utils import load
from mlx_lm_lora.trainer import dpo_trainer
from mlx_lm_lora.trainer.datasets import DPODataset
from mlx_lm_lora.utils import from_pretrained

from benchmarks.peers.job import ALPHA, BATCH, BETA, RANK, RATE, Job, Result, Watch, given_job


def main() -> None:
    """Train as its command does: the reference is a second copy of the model, scored in every step."""
    job = given_job()
    mx.set_default_device(mx.gpu if job.on_gpu else mx.cpu)
    give_working_set_size()
    take_batches_in_order()
    scratch = Path(job.scratch)
    adapter = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "num_layers": job.layers or -1}
    model, tokenizer, file = from_pretrained(job.model, new_adapter_path=str(scratch), lora_config=adapter)
    reference = load(job.model)[0].freeze()
    result = Result(versions=f"mlx-lm-lora {version('mlx-lm-lora')}, mlx-lm {version('mlx-lm')}, mlx {version('mlx')}")
    dpo_trainer.train_dpo(
        model=model,
        ref_model=reference,
        optimizer=optimizers.AdamW(learning_rate=RATE, weight_decay=0.0, bias_correction=True),
        train_dataset=DPODataset(job.rows(), tokenizer),
        args=arguments(job, str(file)),
        training_callback=Reports(job, result),
    )
    result.print()


def arguments(job: Job, adapter_file: str) -> Any:
    """Plain DPO with a report after each step."""
    steps = job.warmup + job.steps
    return dpo_trainer.DPOTrainingArgs(
        batch_size=BATCH,
        iters=steps,
        steps_per_report=1,
        steps_per_eval=steps + 1,
        steps_per_save=steps + 1,
        max_seq_length=8192,
        adapter_file=adapter_file,
        grad_checkpoint=job.grad_checkpoint,
        beta=BETA,
        loss_type="sigmoid",
    )


def give_working_set_size() -> None:
    """Tell the memory that its trainer asks of `mx.device_info` and that MLX has only on Metal."""
    ask = mx.device_info
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def told(*which: Any) -> dict[str, Any]:
        return {"max_recommended_working_set_size": memory} | ask(*which)

    mx.device_info = told


def take_batches_in_order() -> None:
    """Give its trainer the pairs batch by batch as they stand, where it would draw batches at random."""
    make, taken = dpo_trainer.iterate_dpo_batches, iter(range(10**9))

    def in_order(dataset: Any, batch_size: int, max_seq_length: int, train: bool = False) -> Iterator[Any]:
        start = next(taken) * batch_size
        rows = [dataset[i] for i in range(start, start + batch_size)]
        yield from make(rows, batch_size, max_seq_length, train=False)

    dpo_trainer.iterate_dpo_batches = in_order


class Reports:
    """Takes what its trainer reports after each step."""

    def __init__(self, job: Job, result: Result):
        """Start the watch."""
        self.watch, self.result = Watch(job, result, mx.get_peak_memory), result

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """Note a step; what is called logits there are the answers' log-probabilities."""
        self.watch.step_ended()
        self.result.losses.append(float(info["train_loss"]))
        self.result.chosen.append(float(info["train_chosen_logits_mean"]))
        self.result.rejected.append(float(info["train_rejected_logits_mean"]))
        self.result.epoch_seconds = sum(self.result.seconds)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """Nothing is held out."""


if __name__ == "__main__":
    main()
