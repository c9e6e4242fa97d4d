"""The index: an SQLite database of what speeds work up or tells its history.

Nothing in it is trusted: a predicted digest is checked by sha256, a fingerprint only saves a look. If it is
lost, all but the history is rebuilt by use.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import IndexFailed, InvalidDigest, printable

# This is the reference for every column.
_SCHEMA = """
-- What a large tensor will probably hash to, by the xxh3-128 of its blob header and of samples of its data.
CREATE TABLE IF NOT EXISTS predictions (
    sample BLOB PRIMARY KEY,
    digest TEXT NOT NULL                -- sha256:<hex> of the blob
) WITHOUT ROWID;
-- What `verify --quick` compares a blob with.
CREATE TABLE IF NOT EXISTS fingerprints (
    digest TEXT PRIMARY KEY,            -- sha256:<hex>
    xxh3 BLOB NOT NULL                  -- xxh3-64 of the blob, eight bytes, taken when its sha256 was
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
-- One row a drop that is being removed after its import: should that be interrupted, it goes on.
CREATE TABLE IF NOT EXISTS removals (
    path TEXT NOT NULL,                 -- absolute, of the drop
    name TEXT NOT NULL,                 -- the model's name in full
    manifest TEXT NOT NULL,             -- sha256:<hex>; of another manifest nothing is believed
    begun REAL NOT NULL,                -- seconds since the epoch; what came later is no part of it
    PRIMARY KEY (path, name)
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

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """
        Args:
            read_only: for looking; needs neither space nor the right to write. The database must exist.
        """
        self._path = path
        self._lock = threading.Lock()
        if not read_only:
            self._create()
        uri = f"file:{quote(str(path))}" + ("?mode=ro" if read_only else "")
        with self._using():
            self._db = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False, isolation_level=None)
            try:
                if not read_only:
                    # WAL with NORMAL keeps the database whole through a power cut; lost rows cost a re-read.
                    self._db.execute("PRAGMA synchronous=NORMAL")
                    self._db.executescript(_SCHEMA)  # what an older version lacks
            except sqlite3.Error:
                self._db.close()
                raise

    def _create(self) -> None:
        """Make the database where there is none; who looks finds none or a whole one."""
        if self._path.exists():
            return
        temporary = self._path.with_name(f"{self._path.name}-{durable.unique_suffix()}")
        try:
            with self._using():
                os.close(durable.open_for_all(temporary))  # with our mode, which SQLite gives to the files beside it
                db = sqlite3.connect(temporary, isolation_level=None)
                try:
                    db.execute("PRAGMA journal_mode=WAL")
                    db.executescript(_SCHEMA)
                finally:
                    db.close()
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        with self._using():
            self._db.close()

    def predicted(self, sample: bytes) -> Digest | None:
        """The digest a tensor with this sample had before."""
        with self._using():
            row = self._db.execute("SELECT digest FROM predictions WHERE sample = ?", (sample,)).fetchone()
            return Digest.parse(row[0]) if row else None

    def fingerprints(self) -> dict[Digest, int]:
        """The fingerprints of blobs, where they are known."""
        with self._using():
            rows = self._db.execute("SELECT digest, xxh3 FROM fingerprints").fetchall()
            return {Digest.parse(digest): int.from_bytes(xxh3[:8]) for digest, xxh3 in rows}

    def remember(
        self,
        *,
        predictions: dict[bytes, Digest] | None = None,
        quantizations: dict[QuantizationKey, Quantization] | None = None,
        fingerprints: dict[Digest, int] | None = None,
    ) -> None:
        """Keep what an import found out for the next."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO predictions VALUES (?, ?)",
                [(sample, str(digest)) for sample, digest in (predictions or {}).items()],
            )
            db.executemany(
                "INSERT OR REPLACE INTO fingerprints VALUES (?, ?)",
                [(str(digest), xxh3.to_bytes(8)) for digest, xxh3 in (fingerprints or {}).items()],
            )
            db.executemany(
                "INSERT OR REPLACE INTO quantizations VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (str(key.source), key.qtype, key.kernel, str(done.blob), done.squared_error, done.squared_source)
                    for key, done in (quantizations or {}).items()
                ],
            )

    def quantization(self, key: QuantizationKey) -> Quantization | None:
        """What a tensor was quantized to before. Whether that blob still exists is not known here."""
        with self._using():
            row = self._db.execute(
                "SELECT blob, squared_error, squared_source FROM quantizations"
                " WHERE source = ? AND type = ? AND kernel = ?",
                (str(key.source), key.qtype, key.kernel),
            ).fetchone()
            return Quantization(Digest.parse(row[0]), float(row[1]), float(row[2])) if row else None

    def record_import(
        self, *, name: str, manifest: Digest, source: Path, seconds: float, new_bytes: int, reused_bytes: int
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO imports (name, manifest, source, finished, seconds, new_bytes, reused_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, str(manifest), printable(str(source)), time.time(), seconds, new_bytes, reused_bytes),
            )

    def imported(self) -> dict[str, dict[Digest, float]]:
        """By model name, the manifests that were imported under it, and when each was last, in seconds."""
        imported: dict[str, dict[Digest, float]] = defaultdict(dict)
        with self._using():
            query = "SELECT name, manifest, max(finished) FROM imports GROUP BY name, manifest"
            for name, manifest, finished in self._db.execute(query):
                imported[name][Digest.parse(manifest)] = float(finished)
        return imported

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

    def begin_watch(self) -> None:
        """What the last watcher left: what it imported counts as unchanged, what it was importing settles again."""
        with self._transaction() as db:
            db.execute("UPDATE drops SET state = 'unchanged' WHERE state = 'imported'")
            db.execute(
                "UPDATE drops SET state = 'settling', fingerprint = '', error = 'interrupted, goes on'"
                " WHERE state = 'importing'"
            )

    def removals(self) -> list[Path]:
        """The drops that are being removed."""
        with self._using():
            return [Path(path) for (path,) in self._db.execute("SELECT DISTINCT path FROM removals")]

    def removal(self, path: Path) -> tuple[dict[str, Digest], float]:
        """The manifests, by name, that hold what the drop was, and when its removal was begun; none if it was not."""
        query = "SELECT name, manifest, begun FROM removals WHERE path = ?"
        with self._using():
            rows = self._db.execute(query, (str(path),)).fetchall()
            manifests = {name: Digest.parse(manifest) for name, manifest, _ in rows}
            return manifests, min((float(begun) for _, _, begun in rows), default=0.0)

    def last_import(self, name: str) -> tuple[Digest, str] | None:
        """The manifest that was imported last under this name, and the folder it came from."""
        query = "SELECT manifest, source FROM imports WHERE name = ? ORDER BY id DESC LIMIT 1"
        with self._using():
            row = self._db.execute(query, (name,)).fetchone()
            return (Digest.parse(row[0]), str(row[1])) if row else None

    def begin_removal(self, path: Path, manifests: Mapping[str, Digest]) -> None:
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO removals VALUES (?, ?, ?, ?)",
                [(str(path), name, str(manifest), time.time()) for name, manifest in manifests.items()],
            )

    def end_removal(self, path: Path) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM removals WHERE path = ?", (str(path),))

    def forget_drop(self, path: Path) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM drops WHERE path = ?", (str(path),))
            db.execute("DELETE FROM removals WHERE path = ?", (str(path),))

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
        except (InvalidDigest, TypeError, ValueError) as error:
            raise IndexFailed(self._path, f"is damaged ({printable(str(error))})") from None
