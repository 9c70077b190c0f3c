"""Recipes: every entry known, every architecture tried on a tiny model, memory computed as the text says."""

from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_lm.utils import load_model

from mlx_dpo.models.recipes import FOLDER, HubSource, WheelSource, read_recipe, recipe, recipes
from mlx_dpo.refusal import Refusal

NAMES = [entry.name for entry in recipes()]
# The dimensions that the models' own configurations give, for counting the parameters again.
DIMENSIONS = {
    "smollm2-135m-instruct": dict(hidden=576, inner=1536, layers=30, heads=9, kv=3, size=64, words=49152, tied=True),
    "llama-3.1-8b-instruct": dict(hidden=4096, inner=14336, layers=32, heads=32, kv=8, size=128, words=128256),
    "mistral-7b-instruct-v0.3": dict(hidden=4096, inner=14336, layers=32, heads=32, kv=8, size=128, words=32768),
    "qwen3-4b-instruct": dict(
        hidden=2560, inner=9728, layers=36, heads=32, kv=8, size=128, words=151936, tied=True, norms=2, head_norms=2
    ),
    "gemma-3-4b-it": dict(
        hidden=2560, inner=10240, layers=34, heads=8, kv=4, size=256, words=262208, tied=True, norms=4, head_norms=2
    ),
}
DIMENSIONS["medgemma-4b-it"] = DIMENSIONS["gemma-3-4b-it"]


def counted(
    *, hidden: int, inner: int, layers: int, heads: int, kv: int, size: int, words: int, tied: bool = False,
    norms: int = 2, head_norms: int = 0,
) -> int:  # fmt: skip
    attention = hidden * size * (2 * heads + 2 * kv) + head_norms * size
    block = attention + 3 * hidden * inner + norms * hidden
    return layers * block + hidden + words * hidden * (1 if tied else 2)


def test_the_models_that_are_promised_are_there():
    assert set(DIMENSIONS) <= set(NAMES)
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_tiny_model(name: str):
    assert recipe(name).architecture in tiny.FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_dimensions(name: str):
    assert recipe(name).parameters == counted(**DIMENSIONS[name])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NAMES)
def test_lora_targets_are_layers_of_the_architecture(name: str, tiny_folder):
    model, _ = load_model(tiny_folder(recipe(name).architecture), lazy=True)
    paths = {".".join(path.split(".")[-2:]) for path, _ in model.named_modules()}
    assert set(recipe(name).lora.targets) <= paths


@pytest.mark.parametrize("name", NAMES)
def test_a_source_can_be_checked(name: str):
    source = recipe(name).source
    if isinstance(source, WheelSource):
        assert len(source.sha256) == len(source.member_sha256) == 64
    else:
        assert isinstance(source, HubSource)
        commit = len(source.revision) == 40
        assert commit or source.revision_note, "a revision that can move says so"


def test_memory_of_four_bits_is_what_mlx_packs():
    weight = mx.random.normal((1024, 1024))
    packed = mx.quantize(weight.astype(mx.float16), group_size=64, bits=4)
    numbers = recipe("llama-3.1-8b-instruct")
    per_parameter = numbers.memory(4) * 1e9 / numbers.parameters
    assert per_parameter == pytest.approx(sum(part.nbytes for part in packed) / weight.size)
    assert numbers.memory(16) == pytest.approx(16.06, abs=0.01)


def test_a_recipe_that_is_not_there_is_refused_with_the_names():
    with pytest.raises(Refusal, match="smollm2-135m-instruct"):
        recipe("gpt-9")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('title = "', 'titel = "x"\ntitle = "', "titel"),
        ("beta = ", "betta = ", "defaults.betta"),
        ("gated = false\n", "", "licence.gated"),
        ("rank = 16", 'rank = "eight"', "defaults.rank"),
        ('name = "smollm2', 'name = "other', "names itself"),
        ("[lora]", "[lora", "not valid TOML"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(old: str, new: str, said: str, tmp_path: Path):
    text = (FOLDER / "smollm2-135m-instruct.toml").read_text()
    assert old in text
    path = tmp_path / "smollm2-135m-instruct.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(Refusal, match=said):
        read_recipe(path)
