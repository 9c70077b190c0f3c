"""Adapters: from a seed alone, the same after a round trip, off when switched off, refused when they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import runs

from mlx_dpo.align.adapting import attached, with_adapter_shape
from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TOKENS = mx.array([[5, 6, 7, 8, 9]])


@pytest.fixture
def saved(tiny_folder: Folder, tmp_path: Path) -> Path:
    """An adapter folder with a random adapter of the tiny Llama, and dropout."""
    loaded = load(tiny_folder("llama"))
    shape = adapters.AdapterShape(4, 1.5, 0.5, adapters.chosen_keys(loaded.model, ("q_proj", "mlp.up_proj")), 1)
    runs.attach(loaded, shape, seed=3)
    adapters.save_adapter(tmp_path, adapters.adapter_weights(loaded.model), shape, "somewhere")
    return tmp_path


def logits(loaded: Loaded) -> np.ndarray:
    return np.array(loaded.model(TOKENS))


def rewritten(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Path:
    """The adapter folder with other tensors in it."""
    arrays, _ = read_arrays(folder / adapters.WEIGHTS)
    mx.save_safetensors(str(folder / adapters.WEIGHTS), change(arrays))
    return folder


def test_a_fresh_adapter_comes_from_its_seed_alone(tiny_folder: Folder):
    def first(seed: int) -> dict[str, np.ndarray]:
        loaded = load(tiny_folder("llama"))
        mx.random.uniform(shape=(seed + 1,))
        shape = adapters.AdapterShape(4, 2.0, 0.0, adapters.chosen_keys(loaded.model, ()), 2)
        adapters.attach(loaded.model, shape, seed)
        return runs.weights(loaded)

    one, same, other = first(1), first(1), first(2)
    assert all(np.array_equal(value, same[name]) for name, value in one.items())
    assert not any(np.array_equal(value, other[name]) for name, value in one.items() if name.endswith("lora_a"))
    for name, value in one.items():
        if name.endswith("lora_b"):
            assert not value.any(), name
        else:
            assert 0.8 < np.abs(value).max() * value.shape[0] ** 0.5 <= 1, name


def test_only_the_adapter_learns_and_only_where_it_was_asked_for(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"), targets=("q_proj", "mlp.down_proj"), layers=1)
    learning = {name for name, _ in runs.named(loaded.model.trainable_parameters())}
    assert learning == {
        f"model.layers.1.{module}.lora_{side}" for module in ("self_attn.q_proj", "mlp.down_proj") for side in "ab"
    }


def test_targets_are_names_or_paths_and_all_by_default(tiny_folder: Folder):
    model = load(tiny_folder("llama")).model
    assert set(adapters.chosen_keys(model, ("up_proj", "self_attn.k_proj"))) == {"self_attn.k_proj", "mlp.up_proj"}
    assert len(adapters.chosen_keys(model, ())) == 7
    with pytest.raises(Refusal, match="--targets proj names no linear module; this model has .*self_attn.q_proj"):
        adapters.chosen_keys(model, ("proj",))


def test_an_adapter_is_the_same_after_a_round_trip_and_its_dropout_is_off(tiny_folder: Folder, saved: Path):
    loaded = load(tiny_folder("llama"))
    plain = logits(loaded)
    adapters.load_adapter(loaded.model, saved)
    given, _ = read_arrays(saved / adapters.WEIGHTS)
    weights = runs.weights(loaded)
    assert weights.keys() == given.keys()
    assert all(np.array_equal(value, np.array(given[name])) for name, value in weights.items())
    assert adapters.read_shape(saved) == adapters.AdapterShape(4, 1.5, 0.5, ("mlp.up_proj", "self_attn.q_proj"), 1)
    assert np.array_equal(logits(loaded), logits(loaded))
    loaded.model.train()
    assert not np.array_equal(logits(loaded), logits(loaded))
    loaded.model.eval()
    with adapters.switched_off(loaded.model):
        assert np.array_equal(logits(loaded), plain)
    assert np.abs(logits(loaded) - plain).max() > 0.01


def test_what_was_switched_off_is_on_again_after_an_error(tiny_folder: Folder):
    loaded = runs.adapted(tiny_folder("llama"), seed=1)
    before = logits(loaded)
    with pytest.raises(KeyError), adapters.switched_off(loaded.model):
        raise KeyError
    assert np.array_equal(logits(loaded), before)


def test_a_start_adapter_in_16_bit_learns_in_float32(tiny_folder: Folder, saved: Path, tmp_path: Path):
    rewritten(saved, lambda arrays: {name: value.astype(mx.bfloat16) for name, value in arrays.items()})
    loaded = load(tiny_folder("llama"))
    options = runs.options(tiny_folder("llama"), tmp_path, tmp_path, adapter=saved, rank=None)
    shape = attached(loaded, with_adapter_shape(options))
    assert shape == adapters.read_shape(saved)
    assert {value.dtype for value in adapters.adapter_weights(loaded.model).values()} == {mx.float32}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 8}, "--rank is 8, but the adapter .* has 4"),
        ({"alpha": 16.0}, "--alpha is 16, but the adapter .* has 6"),
        ({"targets": ("q_proj",)}, "--targets are not those of the adapter"),
        ({"layers": 2}, "--layers is 2, but the adapter .* has 1"),
    ],
)
def test_a_start_adapter_is_not_to_be_contradicted(saved: Path, options: dict, reason: str):
    given = runs.options(saved, saved, saved, adapter=saved, **({"rank": None} | options))
    with pytest.raises(Refusal, match=reason):
        with_adapter_shape(given)


def test_a_start_adapters_own_shape_may_be_repeated(saved: Path):
    shape = adapters.read_shape(saved)
    names = tuple(key.rsplit(".", 1)[-1] for key in shape.keys)
    given = runs.options(saved, saved, saved, adapter=saved, rank=4, alpha=6.0, layers=1, targets=names)
    assert with_adapter_shape(given).rank == 4


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _config(**changes: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        config = json.loads((folder / adapters.CONFIG).read_text())
        config["lora_parameters"] |= changes.pop("lora_parameters", {})  # type: ignore[arg-type]
        (folder / adapters.CONFIG).write_text(json.dumps(config | changes))

    return write


def _arrays(change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> Callable[[Path], object]:
    return lambda folder: rewritten(folder, change)


Q = "model.layers.1.self_attn.q_proj.lora_b"
BROKEN = {
    "no weights": (_without(adapters.WEIGHTS), "holds no adapters.safetensors, so it is no finished adapter"),
    "no configuration": (_without(adapters.CONFIG), "holds no adapter_config.json"),
    "no folder": (shutil.rmtree, "There is no adapter folder"),
    "cut off": (
        lambda folder: (folder / adapters.WEIGHTS).write_bytes((folder / adapters.WEIGHTS).read_bytes()[:-40]),
        "adapters.safetensors holds .* bytes of data, its header says",
    ),
    "a tensor of another size": (
        _arrays(lambda arrays: arrays | {Q: mx.zeros((4, 65))}),
        "does not fit this model: model.layers.1.self_attn.q_proj.lora_b: adapter shape .4, 65.",
    ),
    "a tensor too few": (
        _arrays(lambda arrays: {name: value for name, value in arrays.items() if name != Q}),
        f"does not fit this model: it lacks {Q}",
    ),
    "a tensor too many": (
        _arrays(lambda arrays: arrays | {"model.layers.7.self_attn.q_proj.lora_b": mx.zeros((4, 64))}),
        "does not fit this model: model.layers.7.self_attn.q_proj.lora_b",
    ),
    "not a number": (
        _arrays(lambda arrays: arrays | {Q: arrays[Q] * mx.array(float("nan"))}),
        f"{Q} holds numbers that are not finite",
    ),
    "another rank": (_config(lora_parameters={"rank": 8}), "does not fit this model: .*shape"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_refused_in_one_line(tiny_folder: Folder, saved: Path, kind: str):
    damage, reason = BROKEN[kind]
    damage(saved)
    with pytest.raises(Refusal, match=reason) as refusal:
        adapters.load_adapter(load(tiny_folder("llama")).model, saved)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fine_tune_type": "dora"}, "of the kind dora; only lora can be trained on"),
        ({"lora_parameters": {"rank": "many"}}, "lacks a usable number"),
        ({"lora_parameters": {"scale": float("nan")}}, "impossible rank, scale or dropout"),
        ({"lora_parameters": {"dropout": 1.0}}, "impossible rank, scale or dropout"),
        ({"num_layers": "all"}, "lacks a usable number"),
    ],
)
def test_impossible_shapes_are_refused(saved: Path, change: dict, reason: str):
    _config(**change)(saved)
    with pytest.raises(Refusal, match=reason):
        adapters.read_shape(saved)


def test_an_adapter_of_another_architecture_is_refused(tiny_folder: Folder, saved: Path):
    with pytest.raises(Refusal, match="does not fit this model: model.layers.1"):
        adapters.load_adapter(load(tiny_folder("gemma3")).model, saved)
