"""The files of a run: its options, its numbers step by step, its manifest."""

import json
import os
import shlex
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from mlx_dpo.align.options import TrainOptions, as_toml, defaults, flag
from mlx_dpo.models.adapters import WEIGHTS
from mlx_dpo.models.weights import read_json, weight_files
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import sha256_of, write_whole

RUN = "run.toml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
_FREE_TO_CHANGE = {
    "eval-every", "save-every", "keep-checkpoints", "memory-limit", "disk-limit", "grad-checkpoint",
    "on-displacement", "kl-budget", "track", "model", "data", "out", "adapter",
}  # fmt: skip


_STARTING = {"resume", "dry-run"}  # say how to start, and are not recorded


def write_options(out: Path, options: dict[str, Any]) -> None:
    """Write run.toml, from which the run can be repeated."""
    out.mkdir(parents=True, exist_ok=True)
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
    now = tomllib.loads(tomli_w.dumps({k: v for k, v in options.items() if v is not None}))
    refuse_changes(read_options(out), now, out / RUN)


def refuse_changes(before: dict[str, Any], now: dict[str, Any], record: Path, of: str = "") -> None:
    """Raise Refusal where an option is not the one in `record`, unless it may change; `of` says whose it is."""
    # An option that an older version did not know was at its default.
    usual = {flag(name).removeprefix("--"): value for name, value in defaults().items()}
    before = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()} | before
    for name in sorted((before.keys() | now.keys()) - _FREE_TO_CHANGE - _STARTING):
        if before.get(name) != now.get(name):
            raise Refusal(
                f"--{name}{of} is {now.get(name)} here and {before.get(name)} in {record}: resume with the run's own "
                "options, or start anew in another --out."
            )


class Rows:
    """A file of JSON objects, one a line and each with its step, appended as the run goes."""

    def __init__(self, path: Path, steps_done: int, rescues: int = 0):
        """Continue the file after `steps_done` steps and `rescues` rescues; rows that will be written again go."""
        self.path = path
        self.rows: list[dict[str, Any]] = [
            row for row in read_rows(path) if row["step"] <= steps_done and row.get("rescue", 0) <= rescues
        ]
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        write_rows(self.path, self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, and tell the listeners."""
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(_lines([row]))
        for listener in self.listeners:
            listener(row)

    def put(self, row: dict[str, Any]) -> None:
        """Append a row of an evaluation, in the place of one of the same step that a kill left behind."""
        kept = [old for old in self.rows if old["step"] != row["step"] or "loss" in old or "rescue" in old]
        if len(kept) < len(self.rows):
            self.rows = kept
            write_rows(self.path, kept)
        self.add(row)

    def sync(self) -> None:
        """Let what was written outlast a power cut."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def take_back(self, step: int, rescue: dict[str, Any]) -> None:
        """Move the rows after `step` into a row that says of the rescue why."""
        abandoned = [row for row in self.rows if row["step"] > step]
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.rows.append({"step": step, **rescue, "abandoned": abandoned})
        write_rows(self.path, self.rows)


def refuse_lost_rows(out: Path, steps_done: int) -> None:
    """Raise Refusal where metrics.jsonl lacks steps that a checkpoint has gone beyond."""
    there = {row["step"] for row in read_metrics(out) if "loss" in row}
    if steps_done and not there >= set(range(1, steps_done + 1)):
        raise Refusal(
            f"{out / METRICS} lacks rows of the {steps_done} steps that were taken, and without them the run would "
            "not be watched as it was: restore the file, or start anew in another --out."
        )


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl."""
    return read_rows(out / METRICS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file that may not be there; a last line that was cut off by a crash does not count."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as one file, whole."""
    write_whole(path, _lines(rows))


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


def start_facts(adapter: Path | None) -> dict[str, str] | None:
    """What a manifest says of the adapter that a run starts from, which is its reference."""
    return None if adapter is None else {"adapter": str(adapter), "sha256": sha256_of(adapter / WEIGHTS)}


def origin(model: Path, adapter: Path | None, data: list[str], questions: str) -> dict[str, Any]:
    """What a run begins with, by hash: the model's weights, the start adapter's if any, the data's, the questions'."""
    start = sha256_of(adapter / WEIGHTS) if adapter else None
    model_hashes = sorted(base_hashes(model).values())
    return {"model": model_hashes, "adapter": start, "data": data, "questions": questions}


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


def facts(options: TrainOptions, data: str, rows: list[dict[str, Any]], kept: int) -> dict[str, Any]:
    """What a manifest says of an adapter: what it was made of and how, and the evaluation of the step that was kept.

    `data` is the data's hash, `rows` are the run's metrics.
    """
    evaluation = next((row for row in rows if row["step"] == kept and "eval_loss" in row), {})
    return {
        "kind": "adapter",
        "base": base_facts(options.model),
        "start": start_facts(options.adapter),
        "data": {"path": str(options.data), "sha256": data},
        "options": as_toml(options),
        "step": kept,
        "scores": {n: v for n, v in evaluation.items() if n.startswith("eval_") and isinstance(v, int | float)},
    }


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {name: metadata.version(name) for name in ("mlx-dpo", "mlx", "mlx-lm", "transformers", "tokenizers")}


def write_manifest(out: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json next to a finished adapter, whose hash it adds."""
    whole = facts | {"adapter": {"sha256": sha256_of(out / WEIGHTS)}, "versions": versions()}
    write_whole(out / MANIFEST, (json.dumps(whole, indent=2) + "\n").encode())
