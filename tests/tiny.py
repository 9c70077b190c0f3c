"""Tiny random models in Hugging Face layout, with a real tokenizer and chat template, made in code."""

import json
from pathlib import Path
from typing import Any

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

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# Further ways to attend, to scale and to mix; their windows are short, so that small texts reach past them.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama-sliding": FAMILIES["llama"]
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "attention_bias": True},
    "ministral3": _COMMON
    | {
        "model_type": "ministral3",
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": {
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        },
        "tie_word_embeddings": False,
    },
    "gemma2": _COMMON
    | {
        "model_type": "gemma2",
        "head_dim": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": _COMMON
        | {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
            "vocab_size": 0,
        },
        "vocab_size": 0,
    },
    "gemma4_text": _COMMON
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 512,
    },
    "cohere2": _COMMON
    | {
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "logit_scale": 0.5,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "phi3": _COMMON
    | {
        "model_type": "phi3",
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 4.0],
        },
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 8,
    },
    "qwen2": _COMMON | {"model_type": "qwen2", "rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "olmo3": _COMMON
    | {
        "model_type": "olmo3",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_theta": 500_000.0,
    },
    "gpt_oss": _COMMON
    | {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_ctx": 512,
        "n_positions": 512,
        "num_key_value_heads": 4,
        "layer_norm_epsilon": 1e-5,
    },
    "qwen3_moe": _COMMON
    | _EXPERTS
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
    "mixtral": _COMMON | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _COMMON
    | {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
    "llama4": {
        "model_type": "llama4",
        "text_config": _COMMON
        | {
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 8,
            "head_dim": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "rope_scaling": None,
            "rope_theta": 10_000.0,
            "use_qk_norm": True,
            "vocab_size": 0,
        },
        "vocab_size": 0,
    },
    "internlm3": _COMMON
    | {
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "head_dim": 16,
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "lfm2": _COMMON
    | {
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "rope_theta": 1_000_000.0,
    },
    "mamba": {
        "model_type": "mamba",
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
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
    config = json.loads(json.dumps((FAMILIES | MORE_FAMILIES)[family]))
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
