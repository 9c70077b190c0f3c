"""Adapters: from a seed alone, the same after a round trip, off when switched off, refused when they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import runs
from mlx.utils import tree_unflatten

from mlx_dpo.align.adapting import attached, with_adapter_shape
from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import read_arrays
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
TOKENS = mx.array([[5, 6, 7, 8, 9]])
TARGETS = ("q_proj", "mlp.up_proj")
KINDS: tuple[adapters.Kind, ...] = ("lora", "dora")


def moved(loaded: Loaded, seed: int) -> Loaded:
    """The model with B and, for DoRA, magnitudes as training might leave them."""
    keys = iter(mx.random.split(mx.random.key(seed), 100))
    changed = []
    for name, value in sorted(adapters.adapter_weights(loaded.model).items()):
        noise = mx.random.normal(value.shape, key=next(keys))
        if name.endswith("lora_b"):
            changed.append((name, noise * 0.05))
        elif name.endswith(".m"):
            changed.append((name, value * (1 + 0.2 * noise)))
    loaded.model.update(tree_unflatten(changed))
    return loaded


def written(model: Path, folder: Path, kind: adapters.Kind = "lora", targets: tuple[str, ...] = TARGETS) -> Path:
    """An adapter folder with a random adapter of the top block, and dropout."""
    loaded = load(model)
    shape = adapters.AdapterShape(4, 1.5, 0.5, adapters.chosen_keys(loaded.model, targets), 1, kind)
    adapters.attach(loaded.model, shape, seed=7)
    folder.mkdir(exist_ok=True)
    adapters.save_adapter(folder, adapters.adapter_weights(moved(loaded, 3).model), shape, "somewhere")
    return folder


@pytest.fixture
def saved(tiny_folder: Folder, tmp_path: Path) -> Path:
    """An adapter folder with a random LoRA adapter of the tiny Llama, and dropout."""
    return written(tiny_folder("llama"), tmp_path)


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


@pytest.mark.parametrize(("kind", "leaves"), [("lora", ("lora_a", "lora_b")), ("dora", ("lora_a", "lora_b", "m"))])
def test_only_the_adapter_learns_and_only_where_it_was_asked_for(
    tiny_folder: Folder, kind: adapters.Kind, leaves: tuple[str, ...]
):
    model = load(tiny_folder("llama")).model
    keys = adapters.chosen_keys(model, ("q_proj", "mlp.down_proj"))
    adapters.attach(model, adapters.AdapterShape(4, 2.0, 0.0, keys, 1, kind), seed=0)
    learning = {name for name, _ in runs.named(model.trainable_parameters())}
    assert learning == {
        f"model.layers.1.{module}.{leaf}" for module in ("self_attn.q_proj", "mlp.down_proj") for leaf in leaves
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_same_after_a_round_trip_and_its_dropout_is_off(
    tiny_folder: Folder, tmp_path: Path, kind: adapters.Kind
):
    folder = written(tiny_folder("llama"), tmp_path, kind)
    loaded = load(tiny_folder("llama"))
    adapters.load_adapter(loaded.model, folder)
    given, _ = read_arrays(folder / adapters.WEIGHTS)
    weights = runs.weights(loaded)
    assert weights.keys() == given.keys()
    assert all(np.array_equal(value, np.array(given[name])) for name, value in weights.items())
    keys = ("mlp.up_proj", "self_attn.q_proj")
    assert adapters.read_shape(folder) == adapters.AdapterShape(4, 1.5, 0.5, keys, 1, kind)
    assert np.array_equal(logits(loaded), logits(loaded))
    loaded.model.train()
    assert not np.array_equal(logits(loaded), logits(loaded))
    adapters.set_dropout(loaded.model, 0.0)
    assert np.array_equal(logits(loaded), logits(loaded))


WHOLE = ("lm_head", "model.layers.0.self_attn.[qk]_proj", "model.layers.1.mlp.*")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [TARGETS, WHOLE, ("v_proj", "lm_head")])
def test_plain_mlx_lm_reads_what_was_written(
    tiny_folder: Folder, tmp_path: Path, kind: adapters.Kind, targets: tuple[str, ...]
):
    folder = written(tiny_folder("llama-untied"), tmp_path, kind, targets)
    ours = load(tiny_folder("llama-untied"))
    plain = logits(ours)
    adapters.load_adapter(ours.model, folder)
    theirs, *_ = mlx_lm.load(str(tiny_folder("llama-untied")), adapter_path=str(folder))
    assert np.array_equal(logits(ours), np.array(theirs(TOKENS)))
    assert np.abs(logits(ours) - plain).max() > 0.01
    assert json.loads((folder / adapters.CONFIG).read_text())["fine_tune_type"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_mlx_lm_s_that_names_no_keys_keeps_meaning_all(
    tiny_folder: Folder, tmp_path: Path, kind: adapters.Kind
):
    folder = written(tiny_folder("llama"), tmp_path / "theirs", kind, targets=())
    config = json.loads((folder / adapters.CONFIG).read_text())
    del config["lora_parameters"]["keys"]
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    loaded = load(tiny_folder("llama"))
    adapters.load_adapter(loaded.model, folder)
    weights = adapters.adapter_weights(loaded.model)
    assert len({name.rsplit(".", 1)[0] for name in weights}) == 7
    again = tmp_path / "again"
    again.mkdir()
    adapters.save_adapter(again, weights, adapters.read_shape(folder), "somewhere")
    theirs, *_ = mlx_lm.load(str(tiny_folder("llama")), adapter_path=str(again))
    assert np.array_equal(logits(loaded), np.array(theirs(TOKENS)))


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
        f"does not fit this model: {Q} has the shape .4, 65., which should be .4, 64.",
    ),
    "a tensor too few": (
        _arrays(lambda arrays: {name: value for name, value in arrays.items() if name != Q}),
        f"does not fit this model: the adapter lacks {Q}",
    ),
    "a tensor too many": (
        _arrays(lambda arrays: arrays | {"model.layers.7.self_attn.q_proj.lora_b": mx.zeros((4, 64))}),
        "does not fit this model: it has no place for model.layers.7.self_attn.q_proj.lora_b",
    ),
    "not a number": (
        _arrays(lambda arrays: arrays | {Q: arrays[Q] * mx.array(float("nan"))}),
        f"{Q} holds numbers that are not finite",
    ),
    "another kind": (_config(fine_tune_type="dora"), "does not fit this model: the adapter lacks .*.m;"),
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
        ({"fine_tune_type": "full"}, "of the kind full; only lora and dora can be trained on"),
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
    with pytest.raises(Refusal, match="does not fit this model: it has no place for model.layers.1"):
        adapters.load_adapter(load(tiny_folder("gemma3")).model, saved)
