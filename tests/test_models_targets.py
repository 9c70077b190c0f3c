"""Targets: names, parts and patterns, in every block or one by one, and what is said of those that fit nothing."""

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import pytest
import runs

from mlx_dpo.models import adapters
from mlx_dpo.models.load import load
from mlx_dpo.models.targets import adaptable_keys, are_named, chosen_keys
from mlx_dpo.refusal import Refusal

Folder = Callable[[str], Path]
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture
def model(tiny_folder: Folder) -> nn.Module:
    """Two blocks and a head of its own."""
    return load(tiny_folder("llama-untied")).model


def below(block: int, keys: set[str]) -> set[str]:
    return {f"model.layers.{block}.{key}" for key in keys}


CHOICES = [
    ((), ATTENTION | MLP),
    (("up_proj", "self_attn.k_proj"), {"mlp.up_proj", "self_attn.k_proj"}),
    (("*",), ATTENTION | MLP),
    (("*_proj",), ATTENTION | MLP),
    (("mlp.*",), MLP),
    (("[qv]_proj",), {"self_attn.q_proj", "self_attn.v_proj"}),
    (("self_*.?_proj",), ATTENTION),
    (("lm_head",), {"lm_head"}),
    (("*head", "q_proj"), {"lm_head", "self_attn.q_proj"}),
    (("model.layers.1.*",), below(1, ATTENTION | MLP)),
    (("model.layers.[01].self_attn.q_proj",), below(0, {"self_attn.q_proj"}) | below(1, {"self_attn.q_proj"})),
    (("model.*.mlp.up_proj",), below(0, {"mlp.up_proj"}) | below(1, {"mlp.up_proj"})),
]


@pytest.mark.parametrize(("targets", "keys"), CHOICES)
def test_patterns_choose(model: nn.Module, targets: tuple[str, ...], keys: set[str]):
    assert set(chosen_keys(model, targets)) == keys
    assert len(chosen_keys(model, targets)) == len(keys)


@pytest.mark.parametrize("targets", [targets for targets, _ in CHOICES if targets])
def test_keys_are_named_by_the_targets_that_chose_them(model: nn.Module, targets: tuple[str, ...]):
    keys = chosen_keys(model, targets)
    assert are_named(targets, keys)
    assert not are_named((*targets, "another"), keys)


@pytest.mark.parametrize(
    ("targets", "keys", "named"),
    [
        (("q_proj",), ("self_attn.q_proj",), True),
        (("q_proj",), ("self_attn.q_proj", "self_attn.k_proj"), False),
        (("q_proj", "k_proj"), ("self_attn.q_proj",), False),
        (("q_proj",), ("model.layers.1.self_attn.q_proj",), False),
        (("*_proj",), ("model.layers.1.self_attn.q_proj",), False),
        (("model.layers.1.*",), ("model.layers.1.self_attn.q_proj",), True),
        (("language_model.model.layers.?.mlp.*",), ("language_model.model.layers.1.mlp.up_proj",), True),
        (("transformer.h.1.attn.*",), ("transformer.h.1.attn.c_attn",), True),
        (("c_attn",), ("transformer.h.1.attn.c_attn",), False),
    ],
)
def test_a_name_means_every_block_and_a_whole_path_one(targets: tuple[str, ...], keys: tuple[str, ...], named: bool):
    assert are_named(targets, keys) is named


def test_case_counts(model: nn.Module):
    with pytest.raises(Refusal, match="--targets Q_proj names no linear module"):
        chosen_keys(model, ("Q_proj",))


def adapted(model: nn.Module, keys: tuple[str, ...], layers: int) -> set[str]:
    adapters.attach(model, adapters.AdapterShape(4, 2.0, 0.0, keys, layers), seed=0)
    return {name.removesuffix(".lora_a") for name, _ in runs.named(model.parameters()) if name.endswith("lora_a")}


def test_layers_restrict_names_but_not_whole_paths(model: nn.Module):
    keys = chosen_keys(model, ("v_proj", "lm_head", "model.layers.0.mlp.*"))
    expected = {"model.layers.1.self_attn.v_proj", "lm_head"} | below(0, MLP)
    assert adapted(model, keys, layers=1) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_named_twice_is_adapted_once(model: nn.Module, layers: int):
    keys = chosen_keys(model, ("q_proj", "model.layers.*.self_attn.q_proj", "model.layers.0.*"), layers)
    assert adapted(model, keys, layers) == below(0, ATTENTION | MLP) | below(1, {"self_attn.q_proj"})


@pytest.mark.parametrize("target", ["proj", "model.layers.2.*", "model.norm", "embed_tokens"])
def test_what_fits_nothing_is_refused_with_what_there_is(model: nn.Module, target: str):
    with pytest.raises(Refusal) as refusal:
        chosen_keys(model, ("q_proj", target))
    text = str(refusal.value)
    assert text.startswith(f"--targets {target} names no linear module; this model has ")
    assert all(key in text for key in adaptable_keys(model))
    assert text.endswith(" in its blocks, which are model.layers.0 to model.layers.1, and lm_head.")


@pytest.mark.parametrize("target", ["lm_head", "*head"])
def test_a_tied_head_is_no_target_and_the_refusal_says_why(tiny_folder: Folder, target: str):
    model = load(tiny_folder("llama")).model
    with pytest.raises(Refusal, match="no lm_head: its head is tied to its token embedding, which cannot be a target"):
        chosen_keys(model, (target,))
    with pytest.raises(Refusal, match=r"in its blocks, which are model.layers.0 to model.layers.1\.$"):
        chosen_keys(model, ("proj",))
