"""Log-probabilities under a reference, remembered on disk for as long as what they depend on is the same."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.models.rows import Said

_FORMAT = 2  # raised when the same model and tokens come to give other numbers
_CHECK = 8  # bytes of a checksum behind the values
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FULL = 2**29  # bytes; then the oldest quarter goes


def identity(
    origin: Mapping[str, Any], config: Mapping[str, Any], start: Mapping[str, Any] | None, dtype: str, device: str
) -> bytes:
    """The name of a reference: weights and config.json, start adapter and its own, number format, kind of device.

    So are the versions of what computes it; tokens are named apart.
    """
    versions = [metadata.version(name) for name in ("mlx", "mlx-lm")]
    facts = [_FORMAT, versions, origin["model"], config, origin["adapter"], start, dtype, device]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


class Remembered:
    """Log-probabilities of single tokens by reference and text, in a database that several runs may use at once.

    It saves work and nothing else: where it cannot be read or written, it is as if it were empty.
    """

    def __init__(self, folder: Path, reference: bytes):
        """Open the database in `folder`, or a new one where there is none or a damaged one."""
        self.reference = reference
        self.path = folder / "reference.sqlite"
        self._is_damaged = False
        self.database = self._opened() or self._anew()

    def close(self) -> None:
        """Let go of the database; nothing is remembered any longer."""
        if self.database is not None:
            self.database.close()
        self.database = None

    def _opened(self) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            database.execute("CREATE TABLE IF NOT EXISTS logps (text BLOB PRIMARY KEY, tokens BLOB NOT NULL)")
            database.execute("SELECT count(*) FROM logps").fetchone()
        except OSError:
            return None
        except sqlite3.Error as error:
            self._is_damaged = (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED
            return None
        return database

    def _anew(self) -> sqlite3.Connection | None:
        """A new database in the place of a damaged one, and of no other: it may only be busy."""
        if not self._is_damaged:
            return None
        with contextlib.suppress(OSError):
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
            yield self._believed(text, found[0] if found else None)

    def _believed(self, text: Said, stored: Any) -> np.ndarray | None:
        """The values that were stored for a text, where they are what was stored."""
        size = 4 * (text.lead + len(text.answer))
        if not isinstance(stored, bytes) or len(stored) != size + _CHECK or stored != self._sealed(text, stored[:size]):
            return None
        values = np.frombuffer(stored[:size], dtype="<f4")
        return values if np.isfinite(values).all() else None

    def _sealed(self, text: Said, values: bytes) -> bytes:
        return values + hashlib.blake2b(self._name(text) + values, digest_size=_CHECK).digest()

    def remember(self, texts: Iterable[Said], values: Iterable[np.ndarray]) -> None:
        """Keep the log-probabilities of each text's scored tokens, all or none of them."""
        if self.database is None:
            return
        rows = [
            (self._name(text), self._sealed(text, value.astype("<f4").tobytes()))
            for text, value in zip(texts, values, strict=True)
        ]
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
