"""Switched off, a model is its base to the last bit, whatever its adapter has learnt; and a cut of it stays whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model
from test_models_adapters import KINDS, moved

from mlx_dpo.models import adapters
from mlx_dpo.models.arrays import named_arrays
from mlx_dpo.models.forward import Forward
from mlx_dpo.models.load import Loaded, load
from mlx_dpo.models.rows import rows_of

Folder = Callable[[str], Path]
TOKENS = mx.array([[5, 6, 7, 8, 9, 10], [3, 11, 40, 2, 7, 7]])
ROWS = rows_of([([5, 6, 7], [8, 9, 10, 11]), ([20], [21, 22])])
BASES: dict[str, Callable[[Loaded], object]] = {
    "float32": lambda loaded: loaded.model.set_dtype(mx.float32),
    "float16": lambda loaded: loaded.model.set_dtype(mx.float16),
    "4 bit": lambda loaded: quantize_model(loaded.model, loaded.config, 32, 4),
}


def learnt(loaded: Loaded, kind: adapters.Kind, keys: tuple[str, ...] = ()) -> Loaded:
    """The model with an adapter that was trained on."""
    shape = adapters.AdapterShape(4, 2.0, 0.0, keys or adapters.chosen_keys(loaded.model, ()), 2, kind)
    adapters.attach(loaded.model, shape, seed=7)
    return moved(loaded, 1)


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Callable[[Path], Loaded]:
    """A function that loads a folder in one of the number formats."""

    def loading(folder: Path) -> Loaded:
        loaded = load(folder)
        BASES[request.param](loaded)
        mx.eval(loaded.model.parameters())
        return loaded

    return loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3"])
def test_it_is_the_base_to_the_bit_and_then_itself_again(
    tiny_folder: Folder, base: Callable[[Path], Loaded], family: str, kind: adapters.Kind
):
    plain = base(tiny_folder(family)).model
    model = learnt(base(tiny_folder(family)), kind).model
    before = model(TOKENS)
    assert mx.abs(before - plain(TOKENS)).max() > 0.1
    with adapters.switched_off(model):
        assert mx.array_equal(model(TOKENS), plain(TOKENS))
        ours, theirs = (named_arrays(each.parameters()) for each in (model, plain))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(value, theirs[name]) for name, value in ours.items())
    assert mx.array_equal(model(TOKENS), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "key"), [("llama-untied", "lm_head"), ("llama", "model.embed_tokens")])
def test_heads_too(tiny_folder: Folder, kind: adapters.Kind, family: str, key: str):
    plain = load(tiny_folder(family)).model
    model = learnt(load(tiny_folder(family)), kind, (key,)).model
    with adapters.switched_off(model):
        assert mx.array_equal(model(TOKENS), plain(TOKENS))
    assert mx.abs(model(TOKENS) - plain(TOKENS)).max() > 0.1


class Experts(nn.Module):
    """A block of experts alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = SwitchLinear(8, 8, 2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.experts(x[:, None], mx.array([[0], [1]]))[:, 0]


class Mixture(nn.Module):
    """As much of a mixture of experts as adapters go by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [Experts()]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[0](x)


def test_experts_too():
    model = Mixture()
    x = mx.random.normal((2, 8), key=mx.random.key(0))
    plain = model(x)
    adapters.attach(model, adapters.AdapterShape(2, 2.0, 0.0, ("experts",), 1), seed=1)
    layer = model.layers[0].experts
    layer.lora_b = mx.ones_like(layer["lora_b"])
    assert mx.abs(model(x) - plain).max() > 0.1
    with adapters.switched_off(model):
        assert mx.array_equal(model(x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_on_again_after_an_error(tiny_folder: Folder, kind: adapters.Kind):
    model = learnt(load(tiny_folder("llama")), kind).model
    before = model(TOKENS)
    with pytest.raises(KeyError), adapters.switched_off(model):
        raise KeyError
    assert mx.array_equal(model(TOKENS), before)


def test_twice_off_is_off_until_the_outer_block_ends(tiny_folder: Folder):
    model = learnt(load(tiny_folder("llama")), "dora").model
    before = model(TOKENS)
    with adapters.switched_off(model):
        plain = model(TOKENS)
        with adapters.switched_off(model):
            assert mx.array_equal(model(TOKENS), plain)
        assert mx.array_equal(model(TOKENS), plain)
    assert mx.array_equal(model(TOKENS), before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_begun_or_ended_meanwhile_holds_for_the_adapter_too(tiny_folder: Folder, kind: adapters.Kind):
    model = learnt(load(tiny_folder("llama")), kind).model
    adapters.set_dropout(model, 0.5)
    before = model(TOKENS)
    with adapters.switched_off(model):
        model.train()
    assert not mx.array_equal(model(TOKENS), before)
    with adapters.switched_off(model):
        model.eval()
    assert mx.array_equal(model(TOKENS), before)


CUTS = [("llama", ()), ("llama-untied", ()), ("llama-untied", ("lm_head",)), ("llama", ("model.embed_tokens",))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "keys"), CUTS)
@pytest.mark.parametrize("cut_while_off", [False, True])
def test_a_cut_made_on_one_side_holds_on_the_other(
    tiny_folder: Folder,
    family: str,
    keys: tuple[str, ...],
    kind: adapters.Kind,
    cut_while_off: bool,
):
    plain = load(tiny_folder(family)).model
    loaded = learnt(load(tiny_folder(family)), kind, keys)
    model = loaded.model
    if cut_while_off:
        with adapters.switched_off(model):
            forward = Forward.of(model)
    else:
        forward = Forward.of(model)
    forward = replace(forward, logit_bytes=4 * loaded.config["vocab_size"] * 2)  # three chunks of the head
    with adapters.switched_off(model):
        off = np.array(forward.token_logps(ROWS))
    assert off == pytest.approx(np.array(Forward.plain(plain).token_logps(ROWS)), rel=1e-5)

    def gradients(forward: Forward) -> tuple[float, dict[str, mx.array]]:
        value, found = nn.value_and_grad(model, lambda: forward.token_logps(ROWS, learning=True).sum())()
        return float(value), named_arrays(found)

    value, found = gradients(forward)
    expected, wanted = gradients(Forward.plain(model))
    assert value == pytest.approx(expected, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert np.array(gradient) == pytest.approx(np.array(wanted[name]), rel=1e-3, abs=1e-4), name
        assert mx.abs(gradient).max() > 0.001, name
