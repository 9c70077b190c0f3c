"""Preference data before it is learnt: audited, parted, mended. Each verb reads a file and writes, at most, its own."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.align.record import base_hashes
from mlx_dpo.convert.encoder_wheel import encoder_at_hand
from mlx_dpo.data.asked import read_asked
from mlx_dpo.data.audit.audit import Audited, audited
from mlx_dpo.data.audit.copies import Encode
from mlx_dpo.data.audit.mending import Mended, mended
from mlx_dpo.data.audit.parting import parted
from mlx_dpo.data.audit.repairs import REPAIRS, Openers, Repair
from mlx_dpo.data.examples import Example
from mlx_dpo.data.making.making import Making, Progress, identity, made
from mlx_dpo.data.reading import Splits, read
from mlx_dpo.journal import Journal
from mlx_dpo.models.load import load_to_compute
from mlx_dpo.refusal import Refusal
from mlx_dpo.storage import whole_folder, write_whole, writing


def audit(path: Path, against: Path | None = None, encoder: Path | None = None) -> Audited:
    """Audit the training pairs at `path`, against a test file's questions where one is given.

    `encoder` is a folder; without it the one that was fetched before is taken, or none. Raises Refusal.
    """
    pairs = read(path, kind="pairs").train
    asked = [] if against is None else read_asked(against)
    return audited(pairs, asked, encode_with(encoder))


def split(path: Path, out: Path, valid: float, test: float, seed: int, encoder: Path | None = None) -> Splits:
    """Part all pairs at `path` into train, valid and test files in the new folder `out`; raises Refusal."""
    pairs = [pair for side in read(path, kind="pairs") for pair in side]
    splits = parted(pairs, valid, test, seed, encode_with(encoder))
    if not splits.train:
        raise Refusal(f"{path} holds too few prompts that differ to be parted: give more, or smaller shares.")
    with whole_folder(out) as folder:
        for name, side in splits._asdict().items():
            if side:
                (folder / f"{name}.jsonl").write_bytes(_lines([_row(pair) for pair in side]))
    return splits


def fix(path: Path, out: Path, repairs: Sequence[Repair] = REPAIRS, openers: Openers = "vary") -> list[Mended]:
    """Write the mended pairs to the new file `out`, and beside it what was done to each row; raises Refusal."""
    record = changes_beside(out)
    _refuse_taken(out, record)
    rows = mended(read(path, kind="pairs").train, repairs, openers)
    kept = [row.pair for row in rows if row.pair is not None]
    if not kept:
        raise Refusal(f"No row of {path} would be left: choose fewer --repairs.")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, _lines([row.record() for row in rows]))
        write_whole(out, _lines([_row(pair) for pair in kept]))
    return rows


def make(questions: Path, model: Path, out: Path, making: Making) -> Iterator[Progress | list[dict[str, Any]]]:
    """Write pairs made from questions by a local model to `out`; yields Progress, and last the work's rows.

    The work is kept in `work_beside(out)`, from which the same command goes on. Raises Refusal.
    """
    _refuse_taken(out)
    asked = [row.prompt for row in read_asked(questions)]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(work_beside(out), identity(asked, making, sorted(base_hashes(model).values())))
        if len(journal.rows) < len(asked):
            yield from made(load_to_compute(model), asked, journal, making)
        pairs = [pair for row in journal.rows for pair in row["pairs"]]
        if not pairs:
            raise Refusal(f"No pair could be made: {work_beside(out)} says of each question why; use a larger model.")
        write_whole(out, _lines(pairs))
    yield journal.rows


def _refuse_taken(out: Path, *beside: Path) -> None:
    if out.suffix != ".jsonl":
        raise Refusal(f"{out} is to hold JSON Lines: give --out a name that ends in .jsonl.")
    for file in (out, *beside):
        if file.exists():
            raise Refusal(f"{file} is there already: choose another --out, or remove it first.")


def work_beside(out: Path) -> Path:
    """The file in which `make` keeps its work."""
    return out.with_suffix(".work.jsonl")


def changes_beside(out: Path) -> Path:
    """The file in which `fix` says what it did to each row."""
    return out.with_suffix(".changes.jsonl")


def encode_with(folder: Path | None) -> Encode | None:
    """A function from texts to their vectors, by the encoder in `folder` or the one that was fetched before."""
    folder = folder or encoder_at_hand()
    if folder is None:
        return None
    from mlx_dpo.models.encoder import load_encoder

    return _remembering(load_encoder(folder).encode)


def _remembering(encode: Encode) -> Encode:
    """The same, which works on no text twice: questions and references come again and again."""
    known: dict[str, np.ndarray] = {}

    def vectors(texts: Sequence[str]) -> np.ndarray:
        fresh = list(dict.fromkeys(text for text in texts if text not in known))
        if fresh:
            known.update(zip(fresh, encode(fresh), strict=True))
        return np.stack([known[text] for text in texts])

    return vectors


def _row(pair: Example) -> dict[str, Any]:
    alone = len(pair.prompt) == 1 and pair.prompt[0].keys() == {"role", "content"}
    prompt = pair.prompt[0]["content"] if alone else list(pair.prompt)
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
