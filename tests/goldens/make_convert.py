"""Small models written by transformers, and the logits that transformers' own PyTorch code gives for them.

Needs torch (the extra `reference`). Run `python tests/goldens/make_convert.py` to write tests/goldens/convert anew.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "convert"
IDS = [5, 80, 300, 7, 7, 200, 31, 99, 250, 11, 64, 399, 120, 8, 8, 8, 77, 310, 42, 13, 2, 190, 66, 101]
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 400,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# The settings that move between transformers 4 and 5, each with a value that differs from mlx-lm's default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3, "tie_word_embeddings": False}),
    "mistral": (
        "MistralForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
}


def written(folder: Path, family: str, seed: int, pickled: bool = False) -> np.ndarray:
    """Write a random model of `family` without tokenizer, and return PyTorch's logits for IDS.

    The weights are bfloat16 numbers, as safetensors, or as torch.save writes them where `pickled`.
    """
    import torch
    import transformers

    class_name, settings = MODELS[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    config = model_class.config_class(**(_SIZES | settings))
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * 0.2)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    # a model that was ever in bfloat16 has rounded rotations; one made anew has not
    fresh = model_class(config)
    fresh.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.no_grad():
        return fresh.eval()(torch.tensor([IDS])).logits[0].numpy()


def main() -> None:
    import torch
    import transformers

    for seed, family in enumerate(MODELS):
        folder = FOLDER / family
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "logits.npy", written(folder, family, seed, pickled=family == "llama"))
        (folder / "generation_config.json").unlink(missing_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    sys.stdout.write(f"wrote {FOLDER}\n")


if __name__ == "__main__":
    main()
