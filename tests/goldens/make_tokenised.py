"""Write tokenised.json: token ids that TRL's DPOTrainer makes of a few rows, with tests/tiny's tokenizer.

Run with the reference extra installed: PYTHONPATH=tests python tests/goldens/make_tokenised.py
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny

TEMPLATES = {
    "chatml": tiny.CHATML,
    "bos and no line break after the turn": (
        "{{ '<|endoftext|>' }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' "
        "+ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    "system folded into the user's turn": (
        "{{ '<|endoftext|>' }}{% if messages[0]['role'] == 'system' %}"
        "{% set opening = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set opening = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ (opening if loop.first else '') + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
SYSTEM = {"role": "system", "content": "You are a kind assistant for family caregivers."}
ROWS = [
    {
        "prompt": [{"role": "user", "content": "My mother asks the same question again and again."}],
        "chosen": "It is all right to rest. Try one calm sentence.",
        "rejected": "Repetition is a symptom of dementia.",
    },
    {
        "prompt": [
            SYSTEM,
            {"role": "user", "content": "He fell in the bathroom at 3 am."},
            {"role": "assistant", "content": "Is he hurt?"},
            {"role": "user", "content": "No.\nHe is tired."},
        ],
        "chosen": "Then stay with him.\n\nCall the doctor in the morning. ",
        "rejected": "Do not correct the patient; redirect the patient to an activity.",
    },
    {
        "prompt": [SYSTEM, {"role": "user", "content": "Was sagt man? 何を言えばいい？ 🫖"}],
        "chosen": "»Ich bin da.« – 大丈夫。",
        "rejected": "a\u0301 <|im_end|> é\u200b?",
    },
]


def tokenised(template: str, rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """What TRL's own preparation of a conversational data set gives: prompt_ids, chosen_ids, rejected_ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder), template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    conversational = [
        {"prompt": row["prompt"]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        for row in rows
    ]
    prepared: Any = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),  # type: ignore[arg-type]
        Dataset.from_list(conversational),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),  # type: ignore[arg-type]
        "rows",
    )
    return [{name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for row in prepared.to_list()]


def main() -> None:
    golden = [
        {"name": name, "template": template, "rows": ROWS, "tokens": tokenised(template, ROWS)}
        for name, template in TEMPLATES.items()
    ]
    text = json.dumps({"made with": "trl 1.16.0", "cases": golden}, ensure_ascii=False)
    Path(__file__).with_name("tokenised.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
