"""The files of a run: its options, its numbers step by step, its manifest."""

import json
import shlex
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from mlx_dpo.models.adapters import WEIGHTS
from mlx_dpo.models.weights import read_json, weight_files
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sha256_of, write_whole

RUN = "run.toml"
METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
_FREE_TO_CHANGE = {"eval-every", "save-every", "memory-limit", "grad-checkpoint", "model", "data", "out", "adapter"}


def write_options(out: Path, options: dict[str, Any]) -> None:
    """Write run.toml, from which the run can be repeated."""
    write_whole(out / RUN, tomli_w.dumps({k: v for k, v in options.items() if v is not None}).encode())


def read_options(out: Path) -> dict[str, Any]:
    """The options in run.toml; Refusal where it is missing or not TOML."""
    path = out / RUN
    if not path.is_file():
        raise Refusal(f"{out} holds no {RUN}, so there is no run to resume: leave --resume away.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise Refusal(f"{path} is not UTF-8: restore it, or start anew in another --out.") from None
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{path} is not valid TOML ({error}): restore it, or start anew in another --out.") from None


def resume_command(out: Path) -> str:
    """What to type to go on with the run in `out`."""
    return f"mlx_dpo train --resume --config {shlex.quote(str(out / RUN))}"


def refuse_other_options(out: Path, options: dict[str, Any]) -> None:
    """Raise Refusal where a resumed run would compute something else than the one that was begun."""
    before = read_options(out)
    now = tomllib.loads(tomli_w.dumps({k: v for k, v in options.items() if v is not None}))
    for name in sorted((before.keys() | now.keys()) - _FREE_TO_CHANGE):
        if before.get(name) != now.get(name):
            raise Refusal(
                f"--{name} is {now.get(name)} here and {before.get(name)} in {out / RUN}: resume with the run's own "
                "options, or start anew in another --out."
            )


class Metrics:
    """metrics.jsonl: one JSON object a line, appended as the run goes."""

    def __init__(self, out: Path, steps_done: int, steps: int):
        """Continue the file after `steps_done` of `steps` steps; rows that are going to be written again go."""
        self.path = out / METRICS
        kept = [row for row in read_metrics(out) if row["step"] <= steps_done]
        kept = [row for row in kept if row["step"] < steps or "loss" in row]  # the end is evaluated again
        write_whole(self.path, _lines(kept))
        self.rows: list[dict[str, Any]] = kept

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(_lines([row]))


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl; a last line that was cut off by a crash does not count."""
    path = out / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def base_hashes(model: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder."""
    return {file.name: sha256_of(file) for file in weight_files(model)}


def refuse_other_base(adapter: Path, model: Path) -> None:
    """Raise Refusal where the adapter's manifest names other weights than `model` holds; no manifest, no word."""
    path = adapter / MANIFEST
    trained_on = read_json(path).get("base", {}).get("sha256") if path.exists() else None
    if trained_on and sorted(trained_on.values()) != sorted(base_hashes(model).values()):
        raise Refusal(
            f"The adapter {adapter} was trained on other weights than {model} holds: give the model folder it was "
            "trained on."
        )


def origin(model: Path, adapter: Path | None, data: str) -> dict[str, Any]:
    """What a run begins with, by hash: the model's weights, the start adapter's if any, and the data's."""
    start = sha256_of(adapter / WEIGHTS) if adapter else None
    return {"model": sorted(base_hashes(model).values()), "adapter": start, "data": data}


def refuse_other_origin(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise Refusal, naming the option, where a resumed run's files are not those that it was begun with."""
    for name, value in now.items():
        if before.get(name) != value:
            raise Refusal(
                f"--{name} does not hold what this run was begun with: restore it, or start anew in another --out."
            )


def base_facts(model: Path) -> dict[str, Any]:
    """What a manifest says of the base: path, hashes, and its source and licence where convert wrote them."""
    path = model / MANIFEST
    converted = read_json(path) if path.exists() else {}
    return {
        "model": str(model),
        "sha256": base_hashes(model),
        "source": converted.get("source"),
        "licence": converted.get("licence"),
    }


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {name: metadata.version(name) for name in ("mlx-dpo", "mlx", "mlx-lm", "transformers", "tokenizers")}


def write_manifest(out: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json next to a finished adapter, whose hash it adds."""
    whole = facts | {"adapter": {"sha256": sha256_of(out / WEIGHTS)}, "versions": versions()}
    write_whole(out / MANIFEST, (json.dumps(whole, indent=2) + "\n").encode())
