"""Train the parity runs of CPOTrainer, ORPOTrainer and KTOTrainer and write what TRL logs to trl_others.json.

Run with the reference extra installed: PYTHONPATH=tests python tests/goldens/make_trl_others.py
"""

import os
from pathlib import Path
from typing import Any

import mlx_dpo  # noqa: F401  (loads the BLAS before MLX)

import parity  # isort: skip
import tiny  # isort: skip
from goldens.make_tokenised import tokenised  # isort: skip
from goldens.make_trl import logged, settings_of, write_golden  # isort: skip


def trl_rows(folder: Path, name: str) -> list[dict[str, float]]:
    """What TRL's CPOTrainer, ORPOTrainer or KTOTrainer logs at each step of a parity run."""
    run = parity.RUNS[name]
    return _kto_rows(folder, run) if run.trainer == "KTO" else _without_reference(folder, run)


def _without_reference(folder: Path, run: parity.Run) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, config = (CPOTrainer, CPOConfig) if run.trainer == "CPO" else (ORPOTrainer, ORPOConfig)

    class GivenTokens(trainer):
        """Takes the token ids of DPOTrainer, which are ours: these two trainers add a second EOS of their own."""

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
            return {name: feature[name] for name in feature if name.endswith(("_input_ids", "_mask", "_labels"))}

    pairs = tokenised(tiny.CHATML, [pair | {"prompt": _turn("user", pair["prompt"])} for pair in parity.PAIRS])
    rows = [dict.fromkeys(("prompt", "chosen", "rejected"), "") | _columns(**pair) for pair in pairs]
    settings = settings_of(run, folder, config, max_length=512, remove_unused_columns=False)
    return logged(folder, run, GivenTokens, settings, Dataset.from_list(rows))


def _columns(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    """What the collator of CPOTrainer and ORPOTrainer pads."""
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        columns[f"{name}_input_ids"] = prompt + answer
        columns[f"{name}_attention_mask"] = [1] * len(prompt + answer)
        columns[f"{name}_labels"] = [-100] * len(prompt) + answer
    return columns


def _kto_rows(folder: Path, run: parity.Run) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    turns = [
        {
            "prompt": _turn("user", row["prompt"]),
            "completion": _turn("assistant", row["completion"]),
            "label": row["label"],
        }
        for row in parity.LABELLED
    ]
    settings = settings_of(run, folder, KTOConfig, max_length=None)
    return logged(folder, run, KTOTrainer, settings, Dataset.from_list(turns))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


if __name__ == "__main__":
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    here = Path(__file__).with_name("trl_others.json")
    write_golden(here, trl_rows, [name for name, run in parity.RUNS.items() if run.trainer != "DPO"])
