"""Tiny random models in Hugging Face layout, with a real tokenizer and chat template, made in code."""

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_dpo.models.arrays import named_arrays

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "My mother asks the same question again and again, and I am tired. What can I say to her tonight?",
    "You are doing a hard thing, and it is all right to rest. Try one calm sentence, then a cup of tea.",
    "Repetition is a symptom of dementia. Do not correct the patient; redirect the patient to an activity.",
    "system user assistant You are a kind assistant for family caregivers. He fell in the bathroom at 3 am.",
]

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_GEMMA3_TEXT = _COMMON | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "hidden_activation": "gelu_pytorch_tanh",
}
# One entry for every architecture that a recipe names.
FAMILIES = {
    "llama": _COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "llama-untied": _COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
    "mistral": _COMMON
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
    "qwen3": _COMMON
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 16,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": _GEMMA3_TEXT | {"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": _GEMMA3_TEXT | {"vocab_size": 0},
        "vocab_size": 0,
    },
}


def tokenizer() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens with ChatML's special tokens."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(CORPUS, trainer)
    return result


def write_tokenizer(folder: Path, chat_template: str = CHATML) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the number of tokens."""
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made.get_vocab_size()


def write_model(folder: Path, family: str = "llama", seed: int = 0, dtype: mx.Dtype = mx.float32) -> Path:
    """Write a random model of `family` to `folder` and return the folder."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    config = json.loads(json.dumps(FAMILIES[family]))
    config["vocab_size"] = vocabulary
    config["eos_token_id"] = 2
    if "text_config" in config:
        config["text_config"]["vocab_size"] = vocabulary
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    weights = {
        name: (value if value.ndim == 1 else mx.random.normal(value.shape) * 0.15).astype(dtype)
        for name, value in named_arrays(model.parameters()).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder
