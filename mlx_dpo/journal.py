"""Work that is kept as it is done: a file of rows that a kill cuts off at the end at most."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dpo.refusal import Refusal


class Journal:
    """Rows of one piece of work, JSON objects a line, behind a first line that says what work it is."""

    def __init__(self, file: Path, identity: dict[str, Any]):
        """Take up a file, or begin one; Refusal, naming what differs, where it belongs to other work.

        A last line that was cut off is passed over, and goes with the next `add`.
        """
        self.file, self.identity = file, identity
        data = file.read_bytes() if file.exists() else b""
        self._end = data.rfind(b"\n") + 1  # of what is whole
        lines = data[: self._end].split(b"\n")[:-1]
        try:
            first, *rows = [json.loads(line) for line in lines] or [None]
        except json.JSONDecodeError:
            raise Refusal(f"{file} is damaged: remove it, and what it held is made again.") from None
        if first is not None and first != identity:
            changed = next((name for name in identity if first.get(name) != identity[name]), "beginning")
            raise Refusal(f"{file} was made with another {changed}: choose another --out, or remove the file.")
        self.rows: list[dict[str, Any]] = rows
        if first is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append([identity])

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep further rows; they are on the disk when this returns."""
        self._append(rows)
        self.rows += rows

    def cut_to(self, count: int) -> None:
        """Let go of all rows but the first `count`, as of a batch that was kept in part."""
        if count < len(self.rows):
            self.rows = self.rows[:count]
            self._end = 0
            self._append([self.identity, *self.rows])

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
