"""An adapter merged into its base for good, and the proof that the merged model still says what it said."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import save_config, save_model

from mlx_dpo.align import record
from mlx_dpo.convert import fidelity, merge
from mlx_dpo.convert.fidelity import Fidelity, Held
from mlx_dpo.convert.fuse_options import FuseOptions
from mlx_dpo.convert.merge import FLOATING, Format
from mlx_dpo.data.examples import Example
from mlx_dpo.data.reading import Splits, read, split_off
from mlx_dpo.data.tokenised import tokenise
from mlx_dpo.models.adapters import WEIGHTS, load_adapter, read_folder
from mlx_dpo.models.load import Loaded, compute_dtype, load, load_to_compute, on_cpu
from mlx_dpo.models.weights import read_json
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sha256_of, whole_folder

_ROUNDING = 1e-3  # of logits, between two ways of arriving at the same weights
ENOUGH = 0.9  # of the adapter's effect has to survive
_COPIED = (
    "*token*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
    "special_tokens_map.json",
    "*.model",
)


class Phase(NamedTuple):
    """A part of the work begins."""

    text: str


class Measured(NamedTuple):
    """How faithful the merged model is in a format."""

    format: str
    fidelity: Fidelity


class Fused(NamedTuple):
    """The merged model is in `out` and opens in plain mlx-lm."""

    out: Path
    format: str
    fidelity: Fidelity


Event = Phase | Measured | Fused


def run(options: FuseOptions, fallback: Path) -> Iterator[Event]:
    """Merge, measure, raise the precision where too little survives, write, and read the result back.

    `fallback` holds pairs to measure on where neither the options nor the adapter name any. Raises Refusal for an
    adapter of other weights, and where even floating-point layers would lose more than a tenth of its effect.
    """
    if options.pairs < 1:
        raise Refusal(f"--pairs {options.pairs} makes no sense: give at least 1.")
    read_folder(options.adapter)
    record.refuse_other_base(options.adapter, options.model)
    with whole_folder(options.out) as staging:
        yield Phase("Loading the model and its adapter")
        storage = load(options.model)
        load_adapter(storage.model, options.adapter)
        computing = load_to_compute(options.model)
        load_adapter(computing.model, options.adapter)
        pairs, source = _pairs(options, storage, fallback)
        yield Phase(f"Merging, and measuring on {len(pairs)} pairs of {source}")
        yardstick = fidelity.Yardstick(computing.model, pairs)
        layers, formats, found = merge.Layers({}, {}, False), {}, None
        for name, formats in _attempts(storage.model, options.quantize):
            layers = merge.layers(storage.model, formats)
            found = Measured(name, yardstick.measured(_computing(layers, computing.model)))
            if not math.isfinite(found.fidelity.kl):
                raise Refusal(f"{options.model} or its adapter gives numbers that are not finite: convert it again.")
            yield found
            if found.fidelity.survived >= ENOUGH:
                break
        if found is None or found.fidelity.survived < ENOUGH:
            raise Refusal(_nothing_helps(found, options.quantize))
        yield Phase("Writing, and reading back")
        with fidelity.replaced(computing.model, _computing(layers, computing.model).merged):
            said = _said(computing, pairs[0])
        storage.model.update_modules(tree_unflatten(list(layers.merged.items())))
        _write(staging, options, storage, formats, found)
        if not mx.allclose(_said(load_to_compute(staging), pairs[0]), said, rtol=_ROUNDING, atol=_ROUNDING):
            raise Refusal("The merged model reads back differently from what was written: nothing was kept.")
    yield Fused(options.out, found.format, found.fidelity)


def _nothing_helps(found: Measured | None, quantize: str) -> str:
    if found is None:
        return "The adapter changes no layer of this model: there is nothing to merge."
    lost = f"Only {found.fidelity.survived:.0%} of the adapter's effect would survive, even as {found.format}"
    if quantize in ("4", "6"):
        return f"{lost}: ask for --quantize 8 or none."
    return f"{lost}: keep base and adapter apart, and use them with --adapter."


def _pairs(options: FuseOptions, loaded: Loaded, fallback: Path) -> tuple[list[Held], str]:
    """Held-out pairs as token ids, and what they are, in words."""
    path = options.data
    examples = _held_out_of(read(path, kind="pairs")) if path else []
    if path is None and (run := _preference_run(options.adapter)) is not None:
        path = Path(run["data"])
        splits = read(path, kind="pairs")
        examples = _held_out_of(splits)
        if run["holdout"] and not splits.valid:
            examples = split_off(splits.train, run["holdout"], run["seed"])[1]
    if not examples:
        path = fallback
        examples = read(fallback, kind="pairs").train
    items = tokenise(examples[: options.pairs], loaded.tokenizer, None).items
    return [Held(item.prompt, item.chosen, item.rejected) for item in items], str(path)


def _held_out_of(splits: Splits) -> list[Example]:
    return splits.valid or splits.test or splits.train


def _preference_run(adapter: Path) -> dict[str, Any] | None:
    """The options of the adapter's run, where it learnt from pairs that are still there."""
    if not (adapter / record.RUN).exists():
        return None
    options = record.read_options(adapter)
    options |= options.get("stage", [{}])[-1]
    pairs = options.get("method") == "dpo" and "kto" not in options.get("loss", "")
    usable = pairs and {"data", "holdout", "seed"} <= options.keys()
    return options if usable and Path(options["data"]).exists() else None


def _attempts(model: nn.Module, quantize: str) -> Iterator[tuple[str, dict[str, Format]]]:
    """Formats by layer, from the one that was asked for to ever finer ones for the adapted layers."""
    lora = merge.adapted(model)
    if not lora:
        return
    formats = _asked_formats(model, lora, quantize)
    asked = _in_words(formats)
    yield asked, formats
    coarse = [name for name in lora if (formats[name].bits or 16) < 8]
    worst = sorted(coarse, key=lambda name: -_loss(lora[name], formats[name]))
    for count in sorted({math.ceil(len(worst) / 2), len(worst)} - {0}):
        taken = worst[:count]
        formats |= {name: merge.fitting(8, merge.plain_weight(lora[name].linear).shape[1]) for name in taken}
        yield f"{asked}, with {count} of {len(lora)} adapted layers raised to 8 bit", formats
    if any(formats[name].bits for name in lora):
        formats |= dict.fromkeys(lora, FLOATING)
        yield f"{asked}, with the adapted layers in floating point", formats


def _asked_formats(model: nn.Module, lora: Mapping[str, Any], quantize: str) -> dict[str, Format]:
    if quantize == "keep":
        return {name: merge.format_of(layer.linear) for name, layer in lora.items()}
    every = {name: lora[name].linear if name in lora else module for name, module in _packable(model, lora)}
    if quantize == "none":
        return dict.fromkeys(every, FLOATING)
    return {name: merge.fitting(int(quantize), merge.plain_weight(m).shape[1]) for name, m in every.items()}


def _packable(model: nn.Module, lora: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    inside = {f"{name}.linear" for name in lora}
    for name, module in model.named_modules():
        if name in lora or (isinstance(module, kinds) and name not in inside):
            yield name, module


def _loss(layer: Any, into: Format) -> float:
    """How large the rounding of a merged layer is against what its adapter adds."""
    weight = merge.merged_weight(layer)
    delta = weight - merge.plain_weight(layer.linear)
    rounded = merge.plain_weight(merge.stored(weight, layer.linear, into, mx.float32))
    return float(mx.linalg.norm(rounded - weight) / mx.maximum(mx.linalg.norm(delta), 1e-12))


def _in_words(formats: Mapping[str, Format]) -> str:
    counts: dict[str, int] = {}
    for form in formats.values():
        name = f"{form.bits} bit" if form.bits else "floating point"
        counts[name] = counts.get(name, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} layers in {name}" for name, count in counts.items())


def _computing(layers: merge.Layers, model: nn.Module) -> merge.Layers:
    """The layers in the form that `model` computes in: their own, or float32 and unpacked on the CPU."""
    if not on_cpu():
        return layers
    dtype = compute_dtype(model)
    merged, plain = (
        {name: merge.stored(merge.plain_weight(layer), layer, FLOATING, dtype) for name, layer in part.items()}
        for part in (layers.merged, layers.plain)
    )
    return merge.Layers(merged, plain, layers.rounded)


def _write(folder: Path, options: FuseOptions, merged: Loaded, formats: Mapping[str, Format], found: Measured) -> None:
    config = dict(read_json(options.model / "config.json"))
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    quantization = _quantization(merged.model)
    if quantization:
        config["quantization"] = quantization
    save_model(folder, merged.model)
    save_config(config, folder / "config.json")
    for pattern in _COPIED:
        for file in options.model.glob(pattern):
            shutil.copy(file, folder)
    base = record.base_facts(options.model)
    facts = {
        "kind": "merged model",
        "base": base,
        "adapter": {"path": str(options.adapter), "sha256": sha256_of(options.adapter / WEIGHTS)},
        "licence": base["licence"],
        "format": found.format,
        "fidelity": found.fidelity._asdict(),
        "versions": record.versions(),
    }
    (folder / record.MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """The quantization map of config.json, from what the layers are now."""
    layers = {name: merge.format_of(module) for name, module in model.named_modules() if _has_weight(module)}
    packed = [form for form in layers.values() if form.bits]
    if not packed:
        return None
    usual = max(set(packed), key=packed.count)
    top = {"bits": usual.bits, "group_size": usual.group_size, "mode": usual.mode}
    return top | {name: form.as_config() for name, form in layers.items() if form != usual}


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding))


def _said(loaded: Loaded, pair: Held) -> mx.array:
    """Logits at the pair's chosen answer."""
    return loaded.model(mx.array([[*pair.prompt, *pair.chosen]]))[0, len(pair.prompt) - 1 :]
