"""Merging: what was said with the adapter is said without it, in whatever number format, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import parity
import pytest
import runs
import tiny
from commands import state
from test_models_adapters import KINDS
from test_models_lora import around

from mlx_dpo import fuse
from mlx_dpo.convert import merge
from mlx_dpo.convert.conversion import convert
from mlx_dpo.convert.fuse_options import FuseOptions
from mlx_dpo.models import adapters
from mlx_dpo.models.load import blocks, load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TOKENS = mx.array([[1, 17, 30, 8, 9, 12, 40, 2, 99, 100]])


def adapter(model: Path, folder: Path, size: float = 0.05, dropout: float = 0.0, **parts: Any) -> Path:
    """An adapter of rank 4 on all linear modules of `model`, whose B, and share of change in m, is of this size."""
    loaded = load(model)
    keys = adapters.chosen_keys(loaded.model, parts.get("targets", ()))
    layers, kind = parts.get("layers", len(blocks(loaded.model))), parts.get("kind", "lora")
    shape = adapters.AdapterShape(4, 2.0, dropout, keys, layers, kind)
    runs.attach(loaded, shape, seed=5)
    weights = {
        name: value * (size / 0.05) if name.endswith("lora_b") else value
        for name, value in adapters.adapter_weights(loaded.model).items()
    }
    for number, name in enumerate(sorted(name for name in weights if name.endswith(".m"))):
        weights[name] *= 1 + size * mx.random.normal(weights[name].shape, key=mx.random.key(number))
    folder.mkdir()
    adapters.save_adapter(folder, weights, shape, str(model))
    return folder


def fused(model: Path, with_adapter: Path, out: Path, **more: Any) -> list[fuse.Event]:
    more.setdefault("pairs", 4)
    options = FuseOptions(model=model, adapter=with_adapter, out=out, **more)
    return list(fuse.run(options, runs.write_pairs(out.parent / "fallback.jsonl")))


def logits(model: Path, with_adapter: Path | None = None) -> np.ndarray:
    """What plain mlx-lm computes."""
    loaded, *_ = mlx_lm.load(str(model), adapter_path=str(with_adapter) if with_adapter else None)
    return np.array(loaded(TOKENS).astype(mx.float32))


def measured(events: list[fuse.Event]) -> list[fuse.Measured]:
    return [event for event in events if isinstance(event, fuse.Measured)]


@pytest.fixture(scope="module")
def packed(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 4 bit."""
    out = tmp_path_factory.mktemp("packed") / "model"
    list(convert(str(tiny_folder("llama-untied")), out, quantize="4", dtype="keep"))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [(), ("lm_head", "model.layers.0.mlp.*")])
def test_a_float_base_says_what_it_said_with_the_adapter(
    tiny_folder: Folder, tmp_path: Path, kind: adapters.Kind, targets: tuple[str, ...]
):
    base = tiny_folder("llama-untied")
    given = adapter(base, tmp_path / "adapter", dropout=0.5, kind=kind, targets=targets)
    *_, end = fused(base, given, tmp_path / "out")
    assert isinstance(end, fuse.Fused)
    assert logits(tmp_path / "out") == pytest.approx(logits(base, given), abs=1e-4)
    assert np.abs(logits(base) - logits(base, given)).max() > 0.5
    assert end.fidelity.kl == pytest.approx(0, abs=1e-6)
    assert end.fidelity.survived == pytest.approx(1, abs=1e-4)
    assert end.format == "floating point"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 8])
def test_a_merged_weight_computes_what_the_layer_computes(bits: int | None, kind: adapters.Kind):
    linear = nn.Linear(64, 32)
    linear.bias = mx.random.normal((32,), key=mx.random.key(0))
    layer = around(linear if bits is None else linear.to_quantized(32, bits), kind, rank=4, scale=2.0)
    layer.lora_b = mx.random.normal((4, 32), key=mx.random.key(1)) * 0.3
    if kind == "dora":
        layer.m *= mx.random.uniform(0.5, 2.0, (32,), key=mx.random.key(2))
    x = mx.random.normal((5, 64), key=mx.random.key(3))
    merged = merge.merged_weight(layer)
    assert np.array(x @ merged.T + linear.bias) == pytest.approx(np.array(layer(x)), rel=1e-5, abs=1e-5)
    if kind == "dora":
        assert np.linalg.norm(np.array(merged), axis=1) == pytest.approx(np.array(layer.m), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: adapters.Kind):
    monkeypatch.setitem(tiny.FAMILIES, "biased", tiny.FAMILIES["llama"] | {"attention_bias": True, "mlp_bias": True})
    base = tiny.write_model(tmp_path / "model", "biased")
    given = adapter(base, tmp_path / "adapter", kind=kind)
    fused(base, given, tmp_path / "out")
    assert logits(tmp_path / "out") == pytest.approx(logits(base, given), abs=1e-4)
    fused(base, given, tmp_path / "packed", quantize="8")
    assert np.abs(logits(tmp_path / "packed") - logits(base, given)).max() < 0.2


def test_layers_that_were_not_adapted_stay_to_the_bit(packed: Path, tmp_path: Path):
    given = adapter(packed, tmp_path / "adapter", size=0.3, targets=("q_proj",), layers=1)
    fused(packed, given, tmp_path / "out")
    before, after = (dict(runs.named(load(folder).model.parameters())) for folder in (packed, tmp_path / "out"))
    changed = {name for name, value in after.items() if name not in before or not mx.array_equal(value, before[name])}
    assert {name.rsplit(".", 1)[0] for name in changed} == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_adapter_survives_in_the_base_s_own_4_bit(packed: Path, tmp_path: Path, kind: adapters.Kind):
    given = adapter(packed, tmp_path / "adapter", size=0.5, targets=("v_proj",), layers=1, kind=kind)
    events = fused(packed, given, tmp_path / "out", pairs=8)
    assert [found.format for found in measured(events)] == ["4 bit"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]


def test_layers_are_raised_until_a_small_adapter_survives(packed: Path, tmp_path: Path):
    given = adapter(packed, tmp_path / "adapter", size=0.01)
    events = fused(packed, given, tmp_path / "out")
    *lost, last = [found.fidelity.survived for found in measured(events)]
    assert lost
    assert all(survived < fuse.ENOUGH for survived in lost)
    assert last >= fuse.ENOUGH
    end = events[-1]
    assert isinstance(end, fuse.Fused)
    assert "raised to 8 bit" in end.format
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    modules = dict(mlx_lm.load(str(tmp_path / "out"))[0].named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, nn.QuantizedLinear)}
    raised = {name for name, module in layers.items() if module.bits == 8}
    assert 0 < len(raised) <= 14
    for name, module in layers.items():
        stated = config.get(name, config)
        assert (stated["bits"], stated["group_size"]) == (module.bits, module.group_size), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_becomes_floating_on_request(packed: Path, tmp_path: Path, kind: adapters.Kind):
    given = adapter(packed, tmp_path / "adapter", kind=kind)
    *_, end = fused(packed, given, tmp_path / "out", quantize="none")
    assert isinstance(end, fuse.Fused)
    assert end.fidelity.survived == pytest.approx(1, abs=1e-3)
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert logits(tmp_path / "out") == pytest.approx(logits(packed, given), abs=1e-3)


def test_dora_on_6_bit_is_merged_though_plain_mlx_lm_cannot_open_it(tiny_folder: Folder, tmp_path: Path):
    base = tmp_path / "model"
    list(convert(str(tiny_folder("llama")), base, quantize="6", dtype="keep"))
    given = adapter(base, tmp_path / "adapter", kind="dora")
    with pytest.raises(ValueError, match="does not match"):
        logits(base, given)
    fused(base, given, tmp_path / "out", quantize="none")
    own = load(base)
    adapters.load_adapter(own.model, given)
    assert logits(tmp_path / "out") == pytest.approx(np.array(own.model(TOKENS)), abs=1e-3)


def test_an_adapter_of_an_embedding_is_refused(tiny_folder: Folder, tmp_path: Path):
    loaded = load(tiny_folder("llama"))
    shape = adapters.AdapterShape(4, 2.0, 0.0, ("model.embed_tokens",), 2)
    runs.attach(loaded, shape, seed=5)
    adapters.save_adapter(tmp_path, adapters.adapter_weights(loaded.model), shape, "somewhere")
    with pytest.raises(Refusal, match="changes model.embed_tokens by a LoRAEmbedding, which cannot be merged here"):
        fused(tiny_folder("llama"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_float_base_is_packed_on_request(tiny_folder: Folder, tmp_path: Path, bits: int):
    base = tiny_folder("llama")
    given = adapter(base, tmp_path / "adapter", size=0.5, targets=("v_proj",), layers=1)
    events = fused(base, given, tmp_path / "out", quantize=str(bits), pairs=8)
    assert measured(events)[0].format == f"{bits} bit"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    packed = [module for module in load(tmp_path / "out").model.modules() if isinstance(module, kinds)]
    assert {module.bits for module in packed} == {bits}
    assert len(packed) == 15


def test_where_the_rest_of_the_model_suffers_it_says_what_else_to_ask_for(tiny_folder: Folder, tmp_path: Path):
    base = tiny_folder("llama-untied")
    given = adapter(base, tmp_path / "adapter", size=0.1, targets=("v_proj",), layers=1)
    with pytest.raises(Refusal, match="--quantize 8 or none") as refusal:
        fused(base, given, tmp_path / "out", quantize="4", pairs=8)
    assert "adapted layers in floating point" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_no_format_is_tried_twice(packed: Path, tmp_path: Path):
    given = adapter(packed, tmp_path / "adapter", size=0.001, targets=("v_proj",), layers=1)
    formats = [found.format for found in measured(fused(packed, given, tmp_path / "out"))]
    assert len(set(formats)) == len(formats)


def test_the_manifest_says_what_was_merged_and_what_was_measured(
    finished_run: Path, tiny_folder: Folder, tmp_path: Path
):
    *_, end = fused(tiny_folder("llama"), finished_run, tmp_path / "out")
    assert isinstance(end, fuse.Fused)
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    trained = json.loads((finished_run / "manifest.json").read_text())
    assert facts["base"]["sha256"] == trained["base"]["sha256"]
    assert facts["adapter"]["sha256"] == trained["adapter"]["sha256"]
    assert facts["fidelity"] == end.fidelity._asdict()


def test_it_is_measured_on_the_run_s_own_held_out_pairs(tiny_folder: Folder, tmp_path: Path):
    data = runs.write_pairs(tmp_path / "data.jsonl")
    runs.run(runs.options(tiny_folder("llama"), data, tmp_path / "run", holdout=0.3, steps=2))
    found = measured(fused(tiny_folder("llama"), tmp_path / "run", tmp_path / "out", pairs=8))[0].fidelity
    assert found.pairs == 2
    wanted = runs.write_pairs(tmp_path / "wanted.jsonl", parity.PAIRS[:5])
    events = fused(tiny_folder("llama"), tmp_path / "run", tmp_path / "out2", pairs=8, data=wanted)
    assert measured(events)[0].fidelity.pairs == 5
    assert any(isinstance(event, fuse.Phase) and str(wanted) in event.text for event in events)


def test_an_adapter_of_other_weights_is_refused(finished_run: Path, tmp_path: Path):
    other = tiny.write_model(tmp_path / "other", seed=9)
    before = state(tmp_path)
    options = FuseOptions(model=other, adapter=finished_run, out=tmp_path / "out")
    with pytest.raises(Refusal, match="was trained on other weights than .* holds"):
        list(fuse.run(options, tmp_path / "nothing.jsonl"))
    assert state(tmp_path) == before


def test_an_adapter_too_small_for_16_bit_is_refused_and_nothing_is_left(tmp_path: Path):
    base = tiny.write_model(tmp_path / "model", "llama", dtype=mx.bfloat16)
    given = adapter(base, tmp_path / "adapter", size=1e-5)
    runs.write_pairs(tmp_path / "fallback.jsonl")
    before = state(tmp_path)
    with pytest.raises(Refusal, match=r"Only -?\d+% of the adapter's effect would survive, even as floating point"):
        fused(base, given, tmp_path / "out")
    assert state(tmp_path) == before


def test_an_occupied_folder_stays_as_it_is(tiny_folder: Folder, finished_run: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(Refusal, match="already holds files"):
        fused(tiny_folder("llama"), finished_run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]
