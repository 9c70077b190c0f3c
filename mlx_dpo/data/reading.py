"""Examples from a file or a folder, whole and checked, before any model is loaded."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_dpo.data.examples import Example, Kind, example, thumbs
from mlx_dpo.data.problems import Problem, refusal
from mlx_dpo.data.rows import SUFFIXES, rows
from mlx_dpo.refusal import Refusal

_FORMATS = ".jsonl, .json, .csv or .parquet"
_MISNAMED = {"validation": "valid", "val": "valid", "dev": "valid", "training": "train", "testing": "test"}


class Splits(NamedTuple):
    """What is learnt, what is watched meanwhile, and what is kept for the end; the last two may be empty."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]


def read(path: Path, *, kind: Kind) -> Splits:
    """Read a .jsonl, .json, .csv or .parquet file as train, or a folder of train.*, valid.* and test.* files.

    A pair that is read for thumbs gives two examples, its rejected answer behind all others. Raises
    Refusal with every bad row of every file in one go, by file, line (or row) and reason.
    """
    files = _files(path)
    made: dict[str, list[Example]] = {"train": [], "valid": [], "test": []}
    problems: list[Problem] = []
    for split, file in files.items():
        made[split], wrong = _examples(file, kind)
        problems += wrong
    if problems:
        raise refusal(problems, path)
    return Splits(**made)


def split_off(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about `fraction` of the examples as (train, valid), a prompt's examples all on one side.

    Which prompts go depends on the seed and the prompts alone; each side keeps the order of the rows. Plain text,
    which has no prompt, is taken for its own. Where all rows share one prompt, valid is empty. Raises Refusal
    unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise Refusal(f"The share to hold out is {fraction}: it must be at least 0 and less than 1.")
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(examples):
        groups[_grouped_by(item)].append(index)
    if fraction == 0 or len(groups) < 2:
        return list(examples), []
    wanted = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    drawn = sorted(groups.values(), key=lambda group: _lot(examples[group[0]], seed))
    held: set[int] = set()
    for group in drawn:
        if len(held) + len(group) <= wanted:
            held.update(group)
    held = held or set(min(drawn, key=len))
    train = [item for index, item in enumerate(examples) if index not in held]
    return train, [item for index, item in enumerate(examples) if index in held]


def fingerprint(examples: Sequence[Example]) -> str:
    """The SHA-256 of the examples' text in their order, in hexadecimal, wherever they were read from."""
    digest = hashlib.sha256()
    for item in examples:
        digest.update(_canonical([item.prompt, item.chosen, item.rejected]).encode() + b"\n")
    return digest.hexdigest()


def _lot(item: Example, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{_grouped_by(item)}".encode()).hexdigest()


def _grouped_by(item: Example) -> str:
    return _canonical(item.prompt or item.chosen)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _examples(file: Path, kind: Kind) -> tuple[list[Example], list[Problem]]:
    found, problems = rows(file, kind=kind)
    good: list[Example] = []
    for where, value in found:
        made = example(value, where, kind=kind)
        if isinstance(made, Example):
            good.append(made)
        else:
            problems.append(Problem(where, "; ".join(made)))
    return thumbs(good) if kind == "thumbs" else good, sorted(problems, key=_place)


def _place(problem: Problem) -> int:
    number = problem.where.rpartition(" ")[2]
    return int(number) if number.isdecimal() else 0


def _files(path: Path) -> dict[str, Path]:
    try:
        if path.is_dir():
            return _split_files(path)
        if path.exists():
            return {"train": path}
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}): allow reading it.") from None
    raise Refusal(f"There is no {path}: give a {_FORMATS} file, or a folder with train.jsonl.")


def _split_files(folder: Path) -> dict[str, Path]:
    data = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    files: dict[str, Path] = {}
    for file in data:
        if file.stem in _MISNAMED:
            raise Refusal(f"{file} would not be read: name it {_MISNAMED[file.stem]}{file.suffix}, or move it away.")
        if file.stem in files:
            raise Refusal(f"{folder} has both {files[file.stem].name} and {file.name}: keep one of them.")
        if file.stem in Splits._fields:
            files[file.stem] = file
    if "train" not in files:
        raise Refusal(f"{folder} has no train file ({_FORMATS}): name the pairs train.jsonl, or give their file.")
    return {split: files[split] for split in Splits._fields if split in files}
