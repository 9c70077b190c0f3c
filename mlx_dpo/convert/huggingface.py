"""A model folder in Hugging Face layout: its configuration as mlx-lm needs it, its files."""

import importlib
import inspect
import shutil
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING, load_config
from transformers import AutoConfig, PretrainedConfig

from mlx_dpo.convert.pytorch import pytorch_files, pytorch_tensors
from mlx_dpo.convert.sentence_pieces import Pieces, read_pieces, sentence_pieces
from mlx_dpo.convert.shards import ShardWriter
from mlx_dpo.convert.tokenizer_files import Special, write_tokenizer
from mlx_dpo.models.load import one_line, read_config
from mlx_dpo.models.weights import read_json, weight_files
from mlx_dpo.refusal import Refusal

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*USE_POLICY*")
_STRETCHED = ("llama3", "yarn", "longrope")
_RECOMPUTED = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry, and that no model reads
Config = dict[str, Any]


def model_folder(folder: Path, scratch: Path) -> Path:
    """The folder that holds the weights as safetensors: `folder`, or `scratch` with PyTorch files rewritten there.

    Raises Refusal for a folder without a model, with damaged files, or whose files want to run code.
    """
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise Refusal(f"{folder} is an adapter and no model: give the folder of a base model.")
    if not (folder / "config.json").exists():
        inside = sorted(folder.glob("*.gguf"))
        instead = f"the file {inside[0]}" if inside else "a folder with config.json, weights and tokenizer"
        raise Refusal(f"{folder} holds no config.json, so it is no model folder: give {instead}.")
    read_config(folder)
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise Refusal(f"{settings} asks to run code of its own (auto_map): no code of a model is run.")
    pickles = pytorch_files(folder)
    if any(folder.glob("model*.safetensors")) or not pickles:
        weight_files(folder)
        return folder
    scratch.mkdir()
    writer = ShardWriter(scratch)
    for path in pickles:
        for name, tensor in pytorch_tensors(path):
            if not name.endswith(_RECOMPUTED):
                writer.add(name, tensor)
    writer.finish()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, scratch / name)
    return scratch


def transformers_config(folder: Path) -> PretrainedConfig | None:
    """The configuration as transformers reads it, defaults filled in; None for a model it does not know."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever an unknown or odd configuration makes it raise
        return None


def written_config(folder: Path) -> Config:
    """The configuration for mlx-lm: rope settings at the top, and whatever it needs that the file leaves to defaults.

    transformers leaves out what equals its own defaults, and mlx-lm's defaults are others.
    """
    config = load_config(folder)
    reference = transformers_config(folder)
    config.pop("auto_map", None)
    try:
        nested = config.get("text_config")
        if isinstance(nested, dict):
            inner = getattr(reference, "text_config", None)
            config["text_config"] = _completed(with_rope_at_top(nested), inner)
            if "vocab_size" not in config and "vocab_size" in nested:
                config["vocab_size"] = nested["vocab_size"]
        return _completed(with_rope_at_top(config), reference)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise Refusal(f"{folder / 'config.json'} cannot be understood: {one_line(error)}") from None


def with_rope_at_top(config: Config) -> Config:
    """`config` with what transformers 5 puts under `rope_parameters` also where transformers 4 had it."""
    parameters = config.get("rope_parameters")
    result = dict(config)
    if isinstance(parameters, dict):
        if isinstance(parameters.get("full_attention"), dict):
            result |= _settings(parameters["full_attention"])
            local = parameters.get("sliding_attention") or {}
            if "rope_theta" in local:
                result["rope_local_base_freq"] = local["rope_theta"]
            pattern = _pattern(config.get("layer_types"))
            if pattern:
                result["sliding_window_pattern"] = pattern
        else:
            result |= _settings(parameters)
    return _with_original_length(result)


def _settings(parameters: Config) -> Config:
    """theta, scaling and partial factor from one set of transformers 5's rope parameters."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    apart = ("rope_theta", "partial_rotary_factor")
    result: Config = {key: parameters[key] for key in apart if parameters.get(key) is not None}
    scaling = {key: value for key, value in parameters.items() if key not in apart}
    result["rope_scaling"] = None if kind == "default" else scaling | {"rope_type": kind, "type": kind}
    return result


def _with_original_length(config: Config) -> Config:
    """Name the length before stretching, which transformers takes from the configuration and mlx-lm from a constant."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return config
    kind = scaling.get("rope_type", scaling.get("type"))
    length = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind not in _STRETCHED or "original_max_position_embeddings" in scaling or length is None:
        return config
    return config | {"rope_scaling": scaling | {"original_max_position_embeddings": length}}


def _pattern(layer_types: Any) -> int | None:
    """Every how many layers one sees everything; None where no single number says it."""
    if not isinstance(layer_types, list) or "full_attention" not in layer_types:
        return None
    pattern = layer_types.index("full_attention") + 1
    regular = all((kind == "full_attention") == ((i + 1) % pattern == 0) for i, kind in enumerate(layer_types))
    return pattern if regular else None


def _completed(config: Config, reference: PretrainedConfig | None) -> Config:
    kind = str(config.get("model_type", ""))
    try:
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    except ImportError:
        return config
    if reference is None:
        return config
    defaults = with_rope_at_top(reference.to_dict())
    needed = inspect.signature(module.ModelArgs).parameters
    missing = {key: defaults[key] for key in needed if key not in config and defaults.get(key) is not None}
    return config | missing


def copy_texts(folder: Path, out: Path) -> list[str]:
    """Copy the tokenizer's files and the licence texts, and nothing that could be run; return the names copied."""
    found = {folder / name for name in TOKENIZER_FILES} | {path for text in _TEXTS for path in folder.glob(text)}
    copied = []
    for path in sorted(found):
        if path.is_file() and path.suffix != ".py":
            shutil.copyfile(path, out / path.name)
            copied.append(path.name)
    return copied


def rebuilt_tokenizer(folder: Path, out: Path) -> Pieces | None:
    """Write tokenizer.json for a folder that has only a SentencePiece model, and return that vocabulary.

    None where there is nothing to rebuild. transformers, left alone with such a file, drops the space that
    SentencePiece puts before a text.
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return None
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    read = read_pieces(folder / "tokenizer.model")
    vocabulary = read._replace(space_after_special=bool(settings.get("legacy", True)))
    texts = {piece.text for piece in vocabulary.pieces}

    def named(key: str, usual: str) -> str | None:
        token = settings.get(key, usual)
        token = token.get("content") if isinstance(token, dict) else token
        return token if token in texts else None

    special = Special(
        bos=named("bos_token", "<s>"),
        eos=named("eos_token", "</s>"),
        unk=named("unk_token", "<unk>"),
        pad=named("pad_token", "<pad>"),
        add_bos=bool(settings.get("add_bos_token", True)),
        add_eos=bool(settings.get("add_eos_token", False)),
    )
    template = {"chat_template": settings["chat_template"]} if "chat_template" in settings else {}
    tokenizer = sentence_pieces(vocabulary, str(folder / "tokenizer.model"))
    write_tokenizer(out, tokenizer, special, template)
    return vocabulary
