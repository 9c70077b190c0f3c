"""Log-probabilities under a reference, remembered on disk for as long as what they depend on is the same."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.models.rows import Said

_FORMAT = 1  # raised when the same model and tokens come to give other numbers
_FULL = 2**29  # bytes; then the oldest quarter goes


def identity(origin: Mapping[str, Any], config: Mapping[str, Any], dtype: str, device: str) -> bytes:
    """The name of a reference: weights, what config.json makes of them, start adapter, number format, kind of device.

    Tokens are named apart.
    """
    facts = [_FORMAT, origin["model"], config, origin["adapter"], dtype, device]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


class Remembered:
    """Log-probabilities of single tokens by reference and text, in a database that several runs may use at once.

    It saves work and nothing else: where it cannot be read or written, it is as if it were empty.
    """

    def __init__(self, folder: Path, reference: bytes):
        """Open the database in `folder`, or a new one where there is none or a damaged one."""
        self.reference = reference
        self.path = folder / "reference.sqlite"
        self.database = self._opened() or self._anew()

    def close(self) -> None:
        """Let go of the database; nothing is remembered any longer."""
        if self.database is not None:
            self.database.close()
        self.database = None

    def _opened(self) -> sqlite3.Connection | None:
        with contextlib.suppress(sqlite3.Error, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            database.execute("CREATE TABLE IF NOT EXISTS logps (text BLOB PRIMARY KEY, tokens BLOB NOT NULL)")
            database.execute("SELECT count(*) FROM logps").fetchone()
            return database
        return None

    def _anew(self) -> sqlite3.Connection | None:
        with contextlib.suppress(OSError):
            if self.path.is_file():
                self.path.unlink()
                return self._opened()
        return None

    def recalled(self, texts: Iterable[Said]) -> Iterator[np.ndarray | None]:
        """The log-probabilities of each text's scored tokens, (scored,) float32 in nats, or None."""
        for text in texts:
            found = None
            if self.database is not None:
                with contextlib.suppress(sqlite3.Error):
                    query = "SELECT tokens FROM logps WHERE text = ?"
                    found = self.database.execute(query, (self._name(text),)).fetchone()
            values = np.frombuffer(found[0], dtype="<f4") if found and len(found[0]) % 4 == 0 else None
            whole = values is not None and len(values) == text.lead + len(text.answer) and np.isfinite(values).all()
            yield values if whole else None

    def remember(self, texts: Iterable[Said], values: Iterable[np.ndarray]) -> None:
        """Keep the log-probabilities of each text's scored tokens, all or none of them."""
        rows = [(self._name(text), value.astype("<f4").tobytes()) for text, value in zip(texts, values, strict=True)]
        if self.database is None:
            return
        with contextlib.suppress(sqlite3.Error):
            self.database.execute("BEGIN IMMEDIATE")
            try:
                self.database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", rows)
                self._make_room()
                self.database.execute("COMMIT")
            except sqlite3.Error:
                self.database.execute("ROLLBACK")

    def _make_room(self) -> None:
        (pages,), (size,) = (self._ask(f"PRAGMA {name}") for name in ("page_count", "page_size"))
        (free,) = self._ask("PRAGMA freelist_count")
        if (pages - free) * size > _FULL:
            oldest = "SELECT rowid FROM logps ORDER BY rowid LIMIT (SELECT count(*) / 4 FROM logps)"
            self._ask(f"DELETE FROM logps WHERE rowid IN ({oldest})")

    def _ask(self, query: str) -> Any:
        return self.database.execute(query).fetchone() if self.database else None

    def _name(self, text: Said) -> bytes:
        name = hashlib.sha256(self.reference)
        for part in ([text.lead], text.prompt, text.answer):
            name.update(len(part).to_bytes(8, "little") + np.array(part, dtype="<i4").tobytes())
        return name.digest()
