"""The catalog: the one truth for names, and for which file belongs to what.

What must hold: every change of more than one row is one transaction; no row names a file before the transaction that
makes both known to each other; an id or a lock byte is never used twice. SQLite does the crash safety (WAL, a full sync
at each commit); it is never on the read or write path of a volume.
"""

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from errno import EACCES, EIO, EISDIR, ENOSPC, EROFS
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from onionskin import forks
from onionskin.barriers import sync_file
from onionskin.errors import FormatError, StateError, VolumeNotFoundError

APPLICATION_ID = 0x4F6E696F  # "Onio"
SCHEMA_VERSION = 2
SIZE_BYTES_MAX = 1 << 46
_BLOCK_SIZES = tuple(1 << shift for shift in range(12, 22))
_RESTORE = "restore it from a copy of the store"
_VALUES_MAX = 500  # in one statement; SQLite allows 999 and more

_SCHEMA = """
CREATE TABLE store (uuid BLOB NOT NULL, next_lock_byte INTEGER NOT NULL, stamp BLOB NOT NULL);
CREATE TABLE bases (
    id BLOB PRIMARY KEY, path TEXT NOT NULL, inode INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, digest BLOB) WITHOUT ROWID;
CREATE TABLE layers (
    id BLOB PRIMARY KEY, parent BLOB REFERENCES layers, base BLOB REFERENCES bases, block_size INTEGER NOT NULL,
    wipe TEXT NOT NULL, size_bytes INTEGER NOT NULL, sealed INTEGER NOT NULL, map_id BLOB NOT NULL UNIQUE,
    map_lock_byte INTEGER NOT NULL UNIQUE, map_length INTEGER NOT NULL, map_frames INTEGER NOT NULL,
    map_crc INTEGER NOT NULL, created_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX layers_parent ON layers (parent);
CREATE TABLE segments (
    id BLOB PRIMARY KEY, layer BLOB NOT NULL REFERENCES layers, role TEXT NOT NULL, slots INTEGER NOT NULL,
    lock_byte INTEGER NOT NULL UNIQUE) WITHOUT ROWID;
CREATE INDEX segments_layer ON segments (layer);
CREATE TABLE volumes (
    id BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, head BLOB NOT NULL UNIQUE REFERENCES layers,
    created_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE snapshots (
    volume BLOB NOT NULL REFERENCES volumes, name TEXT NOT NULL, layer BLOB NOT NULL UNIQUE REFERENCES layers,
    guid BLOB NOT NULL, created_ns INTEGER NOT NULL, note TEXT NOT NULL,
    PRIMARY KEY (volume, name)) WITHOUT ROWID;
CREATE TABLE pending (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, target BLOB NOT NULL, lock_byte INTEGER NOT NULL,
    wipe TEXT NOT NULL, done_bytes INTEGER NOT NULL DEFAULT 0);
"""
# What each older version lacks.
_UPGRADES = {1: "ALTER TABLE pending ADD COLUMN done_bytes INTEGER NOT NULL DEFAULT 0"}


def _is_id(column: str) -> str:
    return f"(typeof({column}) = 'blob' AND length({column}) = 16)"


def _is_number(column: str, least: int, most: int = (1 << 62) - 1) -> str:
    return f"(typeof({column}) = 'integer' AND {column} BETWEEN {least} AND {most})"


def _is_text(column: str) -> str:
    return f"(typeof({column}) = 'text' AND instr({column}, char(0)) = 0)"


def _all(*conditions: str) -> str:
    return f"({' AND '.join(conditions)})"


# What each row of a table fulfils. SQLite keeps whatever it was given, and a damaged page or a hostile file anything.
_SOUND_ROWS = {
    "store": _all(_is_id("uuid"), _is_number("next_lock_byte", 0), "typeof(stamp) = 'blob'"),
    "bases": _all(
        _is_id("id"), _is_text("path"), "length(path) > 0", "typeof(inode) = 'integer'", "typeof(mtime_ns) = 'integer'",
        _is_number("size_bytes", 0), "(digest IS NULL OR typeof(digest) = 'blob')",
    ),
    "layers": _all(
        _is_id("id"), _is_id("map_id"), "(parent IS NULL OR base IS NULL)",
        f"block_size IN ({', '.join(map(str, _BLOCK_SIZES))})", "wipe IN ('release', 'zero')",
        _is_number("size_bytes", 1, SIZE_BYTES_MAX), _is_number("sealed", 0, 1), _is_number("map_lock_byte", 1),
        _is_number("map_length", 0), _is_number("map_frames", 0), _is_number("map_crc", 0, 0xFFFFFFFF),
        "typeof(created_ns) = 'integer'",
    ),
    "segments": _all(
        _is_id("id"), _is_id("layer"), "role IN ('own', 'spare', 'sealed')", _is_number("slots", 0, 1 << 32),
        _is_number("lock_byte", 1),
    ),
    "volumes": _all(_is_id("id"), _is_text("name"), _is_id("head"), "typeof(created_ns) = 'integer'"),
    "snapshots": _all(
        _is_id("volume"), _is_text("name"), _is_id("layer"), _is_id("guid"), "typeof(created_ns) = 'integer'",
        _is_text("note"),
    ),
    "pending": _all(
        "kind IN ('map', 'segment', 'scrub', 'base-merge')", _is_id("target"), _is_number("lock_byte", 0),
        _is_number("done_bytes", 0), "wipe IN ('release', 'zero')",
    ),
}  # fmt: skip

# What the rows together must not be: a query that finds one that is.
_UNSOUND_WHOLES = {
    "it has not one row that says which store it is": "SELECT 1 WHERE 1 != (SELECT count(*) FROM store)",
    "a head names segments that are not there": (
        "SELECT head FROM volumes WHERE 1 != (SELECT count(*) FROM segments WHERE layer = head AND role = 'spare') "
        "OR NOT EXISTS (SELECT 1 FROM segments WHERE layer = head AND role = 'own')"
    ),
    "a head is sealed": "SELECT 1 FROM volumes JOIN layers ON layers.id = head WHERE sealed",
    "a snapshot names a layer that is not sealed": (
        "SELECT 1 FROM snapshots JOIN layers ON layers.id = layer WHERE NOT sealed"
    ),
    "layers stand on each other in a circle": (
        "WITH RECURSIVE up(id) AS (SELECT id FROM layers WHERE parent IS NULL "
        "UNION ALL SELECT layers.id FROM up JOIN layers ON layers.parent = up.id) "
        "SELECT 1 WHERE (SELECT count(*) FROM up) != (SELECT count(*) FROM layers)"
    ),
    "a layer has blocks of another size than what it stands on": (
        "SELECT 1 FROM layers JOIN layers AS below ON below.id = layers.parent WHERE below.block_size != layers.block_size"
    ),
}


@dataclass(frozen=True, slots=True)
class BaseRow:
    """A raw image file that volumes stand on, and how it looked when they were made."""

    id: bytes
    path: str
    inode: int
    size_bytes: int
    mtime_ns: int
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer. map_length, map_frames and map_crc count once it is sealed; length 0 means it has no map file."""

    id: bytes
    parent: bytes | None
    base: bytes | None
    block_size: int
    wipe: str
    size_bytes: int
    sealed: int
    map_id: bytes
    map_lock_byte: int
    map_length: int
    map_frames: int
    map_crc: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment. role: `own` (the head writes it), `spare` (kept for the next head), `sealed` (read only)."""

    id: bytes
    layer: bytes
    role: str
    slots: int
    lock_byte: int


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """One volume."""

    id: bytes
    name: str
    head: bytes
    created_ns: int


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A name for a sealed layer."""

    volume: bytes
    name: str
    layer: bytes
    guid: bytes
    created_ns: int
    note: str


@dataclass(frozen=True, slots=True)
class PendingRow:
    """Work that has to be done before it is forgotten.

    kind `map` or `segment`: wipe (policy `zero`) and unlink that file. `scrub`: free the slots of that segment which its
    owner's map does not name. `base-merge`: fold the layers up to that one into their base, which durably holds already
    what they have in the first `done_bytes` of the disk.
    """

    id: int
    kind: str
    target: bytes
    lock_byte: int
    wipe: str
    done_bytes: int = 0


Row = TypeVar("Row", BaseRow, LayerRow, SegmentRow, VolumeRow, SnapshotRow, PendingRow)
_TABLES: dict[type, str] = {
    BaseRow: "bases",
    LayerRow: "layers",
    SegmentRow: "segments",
    VolumeRow: "volumes",
    SnapshotRow: "snapshots",
    PendingRow: "pending",
}
_COLUMNS = {kind: tuple(field.name for field in fields(kind)) for kind in _TABLES}


def new_id() -> bytes:
    """Draw a random 128-bit id."""
    return uuid.uuid4().bytes


class CommitUnknownError(StateError):
    """COMMIT failed in a way that does not tell whether it took effect: the catalog must be read again."""


class Catalog:
    """One connection to a store's catalog. All methods may be called by any thread."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self._guard = threading.RLock()
        self._forked = False
        self._depth = 0
        if not path.exists():
            if not create:
                raise VolumeNotFoundError(f"{path.parent} is not a store; make one with 'onionskin create'")
            _make(path)
        self._connection = _connect(path)
        forks.register(self)
        try:
            with self._errors():
                self._check_version()
                self._check_references()
        except BaseException:
            self.close()
            raise

    def _check_version(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise FormatError(f"{self.path} is a SQLite file, but not the catalog of a store")
        if version in _UPGRADES:
            self._upgrade()
        elif version != SCHEMA_VERSION:
            raise FormatError(
                f"{self.path} has version {version}, and this onionskin knows only {SCHEMA_VERSION}; use a newer onionskin"
            )

    def _upgrade(self) -> None:
        """Bring an older catalog up to this version, or find that another process just did."""
        with self.transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            for older in range(version, SCHEMA_VERSION):
                self._connection.execute(_UPGRADES[older])
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_references(self) -> None:
        """Refuse a catalog in which rows name others that are not there: all else here trusts that they are."""
        dangling = self._connection.execute("PRAGMA foreign_key_check").fetchone()
        if dangling:
            self._refuse(f"a row of {dangling[0]} names a row of {dangling[2]} that is not there")
        for table, sound in _SOUND_ROWS.items():
            if self._connection.execute(f"SELECT 1 FROM {table} WHERE NOT coalesce({sound}, 0)").fetchone():
                self._refuse(f"a row of {table} has a value that none can have")
        for what, query in _UNSOUND_WHOLES.items():
            if self._connection.execute(query).fetchone():
                self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        raise FormatError(f"{self.path} is damaged: {what}; {_RESTORE}")

    def sync_found(self) -> None:
        """Make durable what is read: after a crash a commit may be visible that the next power loss would undo.

        The names are durable: SQLite syncs the log's header, and the directory with it, before the first frame.
        """
        with self._guard:
            with self.reading():
                self._connection.execute("SELECT stamp FROM store").fetchone()
            for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
                for descriptor in _descriptors_of(path):
                    sync_file(descriptor)  # BARRIER: opened catalog

    # ---- transactions ----

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the body as one transaction that either is durable on return or did not happen.

        Raises
        ------
        OSError
            ENOSPC where the disk is full: nothing happened.
        CommitUnknownError
            It is not known whether it happened.

        Notes
        -----
        An interrupt that comes while COMMIT runs is raised behind it: the transaction did happen then. So whoever
        takes back what belongs to a transaction asks the catalog first how that ended.
        """
        with self._guard, self._errors():
            stamp = os.urandom(16)
            self._roll_back()  # what a second interrupt left open
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("UPDATE store SET stamp = ?", (stamp,))
            except BaseException:
                self._roll_back()
                raise
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back()
                if not self._committed(stamp):
                    raise

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _committed(self, stamp: bytes) -> bool:
        """Whether a transaction whose COMMIT failed took effect after all: asked on a fresh connection."""
        try:
            fresh = _connect(self.path)
            try:
                (found,) = fresh.execute("SELECT stamp FROM store").fetchone()
                return bool(found == stamp)
            finally:
                fresh.close()
        except sqlite3.Error as error:
            raise CommitUnknownError(
                f"{self.path}: a commit failed and the catalog cannot be read: {error}; close the store, mend the disk, "
                "and open it again"
            ) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Run the body on one state of the catalog."""
        with self._guard, self._errors():
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN")
                yield
            finally:
                self._roll_back()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        if self._forked:
            raise forks.forked_error(f"the store {self.path.parent}")
        try:
            yield
        except sqlite3.Error as error:
            raise _translated(error, self.path) from error
        except UnicodeDecodeError as error:  # SQLite quotes damaged text in its messages
            raise FormatError(f"{self.path} is damaged ({error}); restore it from a copy of the store") from error

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if not self._forked:
            self._connection.close()

    def after_fork(self) -> None:
        """In the child: leave the connection alone, and the lock that another thread of the parent may have held."""
        self._forked = True
        self._guard = threading.RLock()

    # ---- rows ----

    def rows(self, kind: type[Row], condition: str = "1", *values: Any) -> list[Row]:
        """Return the rows of a table that fulfil an SQL condition."""
        text = f"SELECT {', '.join(_COLUMNS[kind])} FROM {_TABLES[kind]} WHERE {condition}"
        with self._guard, self._errors():
            return [kind(*row) for row in self._connection.execute(text, values)]

    def row(self, kind: type[Row], condition: str, *values: Any) -> Row | None:
        """Return the one row that fulfils a condition, or None."""
        found = self.rows(kind, condition, *values)
        return found[0] if found else None

    def insert(self, row: BaseRow | LayerRow | SegmentRow | VolumeRow | SnapshotRow) -> None:
        """Add a row. Inside a transaction."""
        columns = _COLUMNS[type(row)]
        marks = ", ".join("?" * len(columns))
        self._execute(
            f"INSERT INTO {_TABLES[type(row)]} ({', '.join(columns)}) VALUES ({marks})",
            *(getattr(row, column) for column in columns),
        )

    def update(self, kind: type, id: bytes | int, **values: Any) -> None:
        """Change columns of the row with this id. Inside a transaction."""
        assignments = ", ".join(f"{column} = ?" for column in values)
        self._execute(f"UPDATE {_TABLES[kind]} SET {assignments} WHERE id = ?", *values.values(), id)

    def delete(self, kind: type, condition: str, *values: Any) -> None:
        """Remove rows. Inside a transaction."""
        self._execute(f"DELETE FROM {_TABLES[kind]} WHERE {condition}", *values)

    def add_pending(self, kind: str, target: bytes, lock_byte: int, wipe: str) -> None:
        """Note work that has to be done. Inside a transaction."""
        self._execute(
            "INSERT INTO pending (kind, target, lock_byte, wipe) VALUES (?, ?, ?, ?)",
            kind,
            target,
            lock_byte,
            wipe,
        )

    def take_lock_byte(self) -> int:
        """Hand out a byte of the lock file that was never used. Inside a transaction."""
        return self.take_lock_bytes(1)[0]

    def take_lock_bytes(self, count: int) -> range:
        """Hand out so many of them."""
        self._execute("UPDATE store SET next_lock_byte = next_lock_byte + ?", count)
        with self._errors():
            (last,) = self._connection.execute("SELECT next_lock_byte FROM store").fetchone()
        return range(int(last) - count + 1, int(last) + 1)

    def head_of(self, volume: VolumeRow) -> bytes | None:
        """Return the layer that is a volume's head now."""
        found = self.row(VolumeRow, "id = ?", volume.id)
        return found.head if found else None

    def volume(self, name: str) -> VolumeRow:
        """Return a volume by name, or raise VolumeNotFoundError."""
        found = self.row(VolumeRow, "name = ?", name)
        if found is None:
            raise VolumeNotFoundError(
                f"the store {self.path.parent} has no volume {name!r}; 'onionskin tree' lists them"
            )
        return found

    def layer(self, id: bytes) -> LayerRow:
        """Return a layer by id; that it is there is an invariant."""
        found = self.row(LayerRow, "id = ?", id)
        if found is None:
            raise FormatError(f"{self.path}: layer {id.hex()} is named but missing; restore the catalog from a copy")
        return found

    def chain(self, layer_id: bytes) -> list[LayerRow]:
        """Return a layer and all below it, bottom first."""
        text = (
            "WITH RECURSIVE up(id, depth) AS (SELECT ?, 0 UNION ALL "
            "SELECT layers.parent, depth + 1 FROM up JOIN layers ON layers.id = up.id WHERE layers.parent IS NOT NULL) "
            f"SELECT {', '.join('layers.' + column for column in _COLUMNS[LayerRow])} "
            "FROM up JOIN layers ON layers.id = up.id ORDER BY depth DESC"
        )
        with self._guard, self._errors():
            return [LayerRow(*row) for row in self._connection.execute(text, (layer_id,))]

    def segments_of(self, layers: list[LayerRow]) -> dict[bytes, list[SegmentRow]]:
        """Return the segments of each layer, spare ones included."""
        found: dict[bytes, list[SegmentRow]] = {layer.id: [] for layer in layers}
        ids = list(found)
        with self.reading():
            for first in range(0, len(ids), _VALUES_MAX):
                part = ids[first : first + _VALUES_MAX]
                for row in self.rows(SegmentRow, f"layer IN ({', '.join('?' * len(part))})", *part):
                    found[row.layer].append(row)
        return found

    def _execute(self, text: str, *values: Any) -> None:
        """Run a statement of a transaction, which has the guard and translates what is raised."""
        self._connection.execute(text, values)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            path, timeout=60, isolation_level=None, check_same_thread=False, cached_statements=256
        )
    except sqlite3.Error as error:
        raise _translated(error, path) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # BARRIER: catalog commits
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        connection.close()
        raise _translated(error, path) from error
    except UnicodeDecodeError as error:  # SQLite quotes damaged text in its messages
        connection.close()
        raise FormatError(f"{path} is damaged ({error}); restore it from a copy of the store") from error
    except BaseException:  # an interrupt
        connection.close()
        raise
    return connection


def _descriptors_of(path: Path) -> list[int]:
    """Return the descriptors through which SQLite has a file open in this process.

    A descriptor of our own must never be closed on a file of SQLite's: that releases every POSIX lock that the process has on
    it, and another process which closes the catalog then takes itself for the last and removes the log under us.
    """
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return []
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, by another thread
            if os.path.samestat(os.fstat(int(name)), wanted):
                found.append(int(name))
    return found


def _make(path: Path) -> None:
    """Make the catalog under another name and move it in place: a crash leaves a store or none.

    The name is durable once the catalog is opened, together with the store's directories, which are older: to change
    the journal mode SQLite makes a journal, and syncs the directory for it.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.new")
    connection = sqlite3.connect(draft, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")  # BARRIER: catalog schema
        connection.execute("BEGIN")
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute("INSERT INTO store VALUES (?, 0, ?)", (new_id(), b""))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        draft.unlink(missing_ok=True)
        raise _translated(error, path) from error
    finally:
        connection.close()
    try:
        os.link(draft, path)  # unlike a rename it never replaces the catalog of somebody who was faster
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _refusal(path: Path, otherwise: int) -> int:
    """Say why a file cannot be opened or written: SQLite keeps the errno to itself.

    A disk that is full to the last block, or the last inode, has no room for SQLite's log or its index; both fail in ways
    that SQLite reports as a fault of the medium, or as a file that cannot be opened.
    """
    with suppress(OSError):
        if path.is_dir():
            return EISDIR
        found = os.statvfs(path.parent)
        if found.f_flag & os.ST_RDONLY:
            return EROFS
        if not found.f_bavail or (found.f_files and not found.f_favail):
            return ENOSPC
    return otherwise


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    if isinstance(error, sqlite3.ProgrammingError):  # what this code asks is right, so the connection is closed
        return StateError(f"the store {path.parent} is closed; open it again")
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    if primary == sqlite3.SQLITE_FULL:
        return OSError(ENOSPC, "the disk is full; free some room, or discard snapshots", str(path))
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateError(f"{path} is locked by another process for over a minute; try again when it is done")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT):
        return FormatError(f"{path} is damaged ({error}); restore it from a copy of the store")
    if primary in (
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
    ):
        number = _refusal(path, EIO if primary == sqlite3.SQLITE_IOERR else EACCES)
        # SQLite's words are of what it was about; where the reason is known they would only mislead.
        return OSError(number, str(error) if number in (EIO, EACCES) else os.strerror(number), str(path))
    if isinstance(error, sqlite3.DatabaseError):
        return FormatError(f"{path}: {error}; restore it from a copy of the store")
    return StateError(f"{path}: {error}")
