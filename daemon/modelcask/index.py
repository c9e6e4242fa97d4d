"""The index: an SQLite database of what speeds work up or tells its history.

Nothing in it is trusted: a predicted digest is checked by sha256, a fingerprint only saves a look. If it is
lost, all but the history is rebuilt by use.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelcask.digest import Digest
from modelcask.errors import IndexFailed

# This is the reference for every column.
_SCHEMA = """
-- What a large tensor will probably hash to, by the xxh3-128 of its blob header and of samples of its data.
CREATE TABLE IF NOT EXISTS predictions (
    sample BLOB PRIMARY KEY,
    digest TEXT NOT NULL                -- sha256:<hex> of the blob
) WITHOUT ROWID;
-- What a range of a file hashed to, for as long as the file does not change.
CREATE TABLE IF NOT EXISTS unchanged (
    fingerprint BLOB PRIMARY KEY,       -- xxh3-128 of the file's identity, the offset and the blob header
    digest TEXT NOT NULL                -- sha256:<hex> of the blob
) WITHOUT ROWID;
-- What a tensor was quantized to, so that one that is met again is neither quantized nor written again.
CREATE TABLE IF NOT EXISTS quantizations (
    source TEXT NOT NULL,               -- sha256:<hex> of the tensor's blob as it would be stored unquantized
    type TEXT NOT NULL,                 -- int4, …
    kernel INTEGER NOT NULL,            -- KERNEL_VERSION of the kernels that made it
    blob TEXT NOT NULL,                 -- sha256:<hex>
    squared_error REAL NOT NULL,        -- sum over the tensor of (dequantized - source)²
    squared_source REAL NOT NULL,       -- sum of source²
    PRIMARY KEY (source, type, kernel)
) WITHOUT ROWID;
-- One row a drop: what the watcher last knew of it.
CREATE TABLE IF NOT EXISTS drops (
    path TEXT PRIMARY KEY,              -- absolute
    name TEXT NOT NULL,                 -- the model's name in full
    fingerprint TEXT NOT NULL,          -- of paths, sizes, mtimes, ctimes and inodes; '' before the first look
    state TEXT NOT NULL,                -- settling, importing, imported, failed, unchanged
    done_bytes INTEGER NOT NULL,
    total_bytes INTEGER NOT NULL,
    error TEXT,                         -- one line: why it settles still, or why it failed
    changed REAL NOT NULL               -- seconds since the epoch
) WITHOUT ROWID;
-- One row a manifest that was committed, for people to look back at.
CREATE TABLE IF NOT EXISTS imports (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    manifest TEXT NOT NULL,             -- sha256:<hex>
    source TEXT NOT NULL,               -- the folder
    finished REAL NOT NULL,             -- seconds since the epoch
    seconds REAL NOT NULL,
    new_bytes INTEGER NOT NULL,
    reused_bytes INTEGER NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Drop:
    """A row of `drops`."""

    path: Path
    name: str
    fingerprint: str
    state: str
    done_bytes: int = 0
    total_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class QuantizationKey:
    """What decides a quantized blob: the unquantized one, the type, the kernels' version."""

    source: Digest
    qtype: str
    kernel: int


@dataclass(frozen=True, slots=True)
class Quantization:
    """A row of `quantizations` without its key."""

    blob: Digest
    squared_error: float
    squared_source: float


class Index:
    """The open database. Threads and processes may share it; a writer waits up to 30 s for another.

    Every method raises `IndexFailed` where the database cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._using():
            self._db = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except sqlite3.Error:
                self._db.close()
                raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        # WAL with NORMAL keeps the database whole through a power cut; losing the last rows costs a re-read.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        with self._using():
            self._db.close()

    def predicted(self, sample: bytes) -> Digest | None:
        """The digest a tensor with this sample had before."""
        return self._digest("SELECT digest FROM predictions WHERE sample = ?", sample)

    def unchanged(self, fingerprint: bytes) -> Digest | None:
        """The digest that this range of a file had when it was read, with the file as it is now."""
        return self._digest("SELECT digest FROM unchanged WHERE fingerprint = ?", fingerprint)

    def remember(
        self,
        *,
        predictions: dict[bytes, Digest],
        unchanged: dict[bytes, Digest],
        quantizations: dict[QuantizationKey, Quantization],
    ) -> None:
        """Keep what an import found out for the next."""
        with self._transaction() as db:
            for table, rows in (("predictions", predictions), ("unchanged", unchanged)):
                db.executemany(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?)",
                    [(key, str(digest)) for key, digest in rows.items()],
                )
            db.executemany(
                "INSERT OR REPLACE INTO quantizations VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (str(key.source), key.qtype, key.kernel, str(done.blob), done.squared_error, done.squared_source)
                    for key, done in quantizations.items()
                ],
            )

    def _digest(self, query: str, key: bytes) -> Digest | None:
        with self._using():
            row = self._db.execute(query, (key,)).fetchone()
        return Digest.parse(row[0]) if row else None

    def quantization(self, key: QuantizationKey) -> Quantization | None:
        """What a tensor was quantized to before. Whether that blob still exists is not known here."""
        with self._using():
            row = self._db.execute(
                "SELECT blob, squared_error, squared_source FROM quantizations"
                " WHERE source = ? AND type = ? AND kernel = ?",
                (str(key.source), key.qtype, key.kernel),
            ).fetchone()
        return Quantization(Digest.parse(row[0]), row[1], row[2]) if row else None

    def record_import(
        self, *, name: str, manifest: Digest, source: Path, seconds: float, new_bytes: int, reused_bytes: int
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO imports (name, manifest, source, finished, seconds, new_bytes, reused_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, str(manifest), str(source), time.time(), seconds, new_bytes, reused_bytes),
            )

    def drops(self) -> list[Drop]:
        """All drops, those that changed last first."""
        with self._using():
            rows = self._db.execute(
                "SELECT path, name, fingerprint, state, done_bytes, total_bytes, error FROM drops"
                " ORDER BY changed DESC, path"
            ).fetchall()
        return [Drop(Path(path), *rest) for path, *rest in rows]

    def save_drop(self, drop: Drop) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO drops VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    str(drop.path),
                    drop.name,
                    drop.fingerprint,
                    drop.state,
                    drop.done_bytes,
                    drop.total_bytes,
                    drop.error,
                    time.time(),
                ),
            )

    def forget_drop(self, path: Path) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM drops WHERE path = ?", (str(path),))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise IndexFailed(self._path, str(error)) from None
