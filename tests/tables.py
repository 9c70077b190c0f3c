"""Rows as the bytes of a file, in every format that is read."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Rows = list[dict[str, Any]]


def as_jsonl(rows: Rows) -> bytes:
    """One object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: Rows) -> bytes:
    """One list of objects."""
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_csv(rows: Rows) -> bytes:
    """A table with the columns of all rows; a row that lacks one has an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    """A table with the columns of all rows; a row that lacks one has null."""
    sink = pyarrow.BufferOutputStream()
    columns = dict.fromkeys(name for row in rows for name in row)
    whole = [dict.fromkeys(columns) | row for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), sink)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def stored(path: Path, data: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(data)
    return path
