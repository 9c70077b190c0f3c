"""What an evaluation can be told."""

from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.refusal import Refusal
from mlx_dpo.whole import Whole

BASE, PROMPTED = "base", "prompted base"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Which systems answer which questions, and what their answers are weighed against.

    Raises Refusal for what makes no sense.
    """

    model: Path
    """Folder of the base model, which answers as it is and with an empathetic system prompt as well."""
    data: Path
    """Test questions with reference answers: .jsonl, .json, .csv or .parquet."""
    out: Path
    """Folder for answers and report; the same command goes on where an earlier one was stopped."""
    adapter: tuple[str, ...] = ()
    """NAME=DIR of an adapter of the base; may be given several times."""
    also: tuple[str, ...] = ()
    """NAME=DIR of another model; may be given several times."""
    answers: tuple[str, ...] = ()
    """NAME=FILE of another system's answers (columns question and answer); may be given several times."""
    endpoint: tuple[str, ...] = ()
    """NAME=URL of an OpenAI-compatible endpoint, which gets the questions; may be given several times."""
    endpoint_model: str = "default"
    """What the endpoints are asked for as model."""
    train: Path | None = None
    """The pairs that were learnt: their nearest answers are a floor, and questions near them are counted apart."""
    limit: Whole | None = None
    """Ask only so many questions, the first ones."""
    system_prompt: Path | None = None
    """Text file with the prompted base's system prompt. [default: one that comes with mlx_dpo]"""
    max_tokens: Whole = 256
    """Longest answer."""
    batch_size: Whole = 16
    """Questions answered at once."""
    encoder: Path | None = None
    """Folder of a sentence encoder. [default: that of mlx_dpo data encoder]"""
    judge: Path | None = None
    """Folder of a model that judges; its numbers are withheld unless it passes controls made from the references."""
    seed: int = 0
    """Draws the resamples of intervals and tests."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        names = [BASE, PROMPTED, *(name for name, _ in named("adapter", self.adapter))]
        names += [name for kind in ("also", "answers", "endpoint") for name, _ in parted(kind, getattr(self, kind))]
        for name, url in parted("endpoint", self.endpoint):
            if not url.startswith(("http://", "https://")):
                raise Refusal(f"--endpoint {name}={url} is no URL: write it with http:// or https://.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise Refusal(f"Two systems are named {twice[0]}: give each a name of its own.")


def named(option: str, entries: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The NAME=PATH entries of an option; Refusal where one is not of that form."""
    return [(name, Path(path)) for name, path in parted(option, entries)]


def parted(option: str, entries: tuple[str, ...]) -> list[tuple[str, str]]:
    """The entries of an option as (name, what stands behind the sign); Refusal where one has no such form."""
    found = []
    for entry in entries:
        name, sign, rest = entry.partition("=")
        if not sign or not name.strip() or not rest:
            raise Refusal(f"--{option} {entry} is not of the form NAME=…: write for instance --{option} mine={entry}.")
        if not all(letter.isalnum() or letter in " -_.+" for letter in name) or name.startswith("."):
            raise Refusal(f"--{option} {entry}: a name has letters, figures, spaces and - _ . + only.")
        found.append((name.strip(), rest))
    return found
