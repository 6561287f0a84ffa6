"""One connection to a store's catalog: its version, its transactions, and rows of any table.

The queries of a table are in the module of its subject: `volumes`, `snapshots`, `layers`, `segments`, `work`. Only the
modules of this package use the methods that take an SQL condition; all others use the queries that have names.

What must hold: every change of more than one row is one transaction. No row names a file before the transaction that
connects row and file. An id or a lock byte is never used twice. A question about the tree is asked inside the
transaction that acts on the answer. SQLite provides the crash safety (WAL, a full sync at each commit but that of
`draw_lock_bytes`). It is never on the read or write path of a volume.
"""

import atexit
import fcntl
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ELOOP, ENOENT, ENOSPC, ENOTDIR
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from onionskin.base import forking
from onionskin.base.modes import make_file
from onionskin.base.paths import FilePath
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.waiting import within
from onionskin.catalog.copy_on_write import has_quotas, make_index_in_place, refuse_without_room
from onionskin.catalog.read_only import connect_to_read, copied, why_not_written
from onionskin.catalog.rows import (
    COLUMNS,
    KEYS,
    TABLES,
    Row,
    WorkRow,
    new_id,
)
from onionskin.catalog.schema import (
    APPLICATION_ID,
    SCHEMA,
    SCHEMA_VERSION,
    SOUND_ROW,
    SOUND_STORE,
    UNSOUND_WHOLES,
    UPGRADES,
    VALUES,
)
from onionskin.catalog.sqlite_errors import CommitUnknownError, damaged, primary_code, translated
from onionskin.errors import FormatError, OnionskinError, StateError, VolumeNotFoundError, moved_error

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

_VALUES_MAX = 500  # in one statement; SQLite allows 999 and more
_ROWS_TOGETHER = (100, 10, 1)  # in one statement, which takes half of the time of as many; it is written once for each
_BUSY_SECONDS = 60
_FAULTS_SHOWN = 20
# SQLite begins its log anew once it has 1,000 pages, each with 24 bytes; the last commit before may pass that.
LOG_BYTES = 1200 * (4096 + 24)
LOG_GROWS_BYTES = 128 << 10  # by which it is seen to grow: some commits
_LOG_STEP_BYTES = 512 << 10
_LOG_LEAVES_BYTES = 64 << 20  # of the disk; a smaller disk is left as it is
_COMMITS_FEW = 3  # a process that commits so often will go on
_FLOCK = struct.Struct("hhqqi4x")
_SHARED_BYTES = 0x40000002, 510  # of SQLite's locks: who has a catalog open read-locks some, and the last one locks all


class _Errors:
    """Raises what SQLite raises in its with block as the errors of this package.

    Each statement runs in one, so it is no generator: that would take as long as a small statement.
    """

    __slots__ = ("_of",)

    def __init__(self, of: "Connection") -> None:
        self._of = of

    def __enter__(self) -> None:
        if self._of._forked:
            raise forking.forked_error(f"the store {self._of.path.parent}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if isinstance(error, sqlite3.Error):
            raise translated(error, self._of.path) from error
        if isinstance(error, UnicodeDecodeError):  # SQLite quotes damaged text in its messages
            raise damaged(self._of.path, error) from error


class _Inherited:
    """The connections that a forked child has of its parent.

    SQLite keeps one note of its locks for all connections of a process to a file. In the child it says that locks are held
    which only the parent has. So the parent would take the child's log away, with what the child committed, or the child
    would wait for its own process for ever. Therefore the child closes what it inherited before it opens a catalog itself.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._connections: list[tuple[FilePath, sqlite3.Connection]] = []
        self._are_whole = True
        self._is_awaited = False  # whether `at_exit` is called

    def add(self, path: FilePath, connection: sqlite3.Connection | None, *, is_whole: bool) -> None:
        """Note a connection. In the child, right behind the fork."""
        self._guard = threading.Lock()  # another thread of the parent may have held the old one
        if not self._is_awaited:  # nobody else has what ends with the process, which may end at once (`cli`)
            self._is_awaited = True
            atexit.register(self.at_exit)
        self._are_whole &= is_whole
        with suppress(sqlite3.ProgrammingError):  # it is closed
            if connection is not None and connection.total_changes >= 0:
                self._connections.append((path, connection))

    def close(self) -> None:
        """Close them all. Raises StateError where a thread of the parent was in SQLite: then no call of it can end."""
        with self._guard:
            if not self._are_whole:
                raise StateError(
                    "this process was forked while its parent was changing or opening a store, so it can open none; start a "
                    "new process instead of forking (multiprocessing: spawn)"
                )
            while self._connections:
                path, connection = self._connections[-1]
                lock = _lock_against_last_close(path)
                try:
                    connection.close()
                finally:
                    if lock is not None:
                        os.close(lock)
                self._connections.pop()

    def at_exit(self) -> None:
        """Let the end of the process, which closes what is left, take no log away. The locks end with the process."""
        for path, _ in self._connections:
            with suppress(OSError, StateError):
                _lock_against_last_close(path)


def _lock_against_last_close(path: FilePath) -> int | None:
    """Lock a catalog so that a connection which is closed is not taken for the last one. Returns what unlocks it when closed.

    The last one removes the log by its name. An inherited connection may know another log than is there now: its parent
    closed the store, others opened it, and one of them was killed, so what it committed is in the new log alone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (ENOENT, ENOTDIR, ELOOP):
            return None  # SQLite leaves the log of a catalog that was moved alone
        raise
    try:
        if not within(_BUSY_SECONDS, lambda: _share_bytes_of_sqlite(descriptor)):
            raise StateError(
                f"another process has been closing {path} for over a minute, or was stopped in it; try again when it has "
                "ended"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _share_bytes_of_sqlite(descriptor: int) -> bool:
    """Share what the last one that closes a catalog locks alone. Unlike SQLite's locks, this counts in this process too."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, *_SHARED_BYTES, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


_inherited = _Inherited()


class Connection:
    """One connection to a store's catalog. Any thread may call the methods."""

    def __init__(self, path: FilePath, *, create: bool, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.is_not_its_own: str | None = None  # why nothing is changed: it is not the catalog of these files
        self._copy: TemporaryDirectory[str] | None = None
        self._guard = threading.RLock()
        self._forked = False
        self._changing = False
        self._is_unknown = False  # whether a commit has an unknown outcome, and no later commit overwrote it yet
        self._lock_byte_taken = 0
        self._syncs_commits = True  # as it was connected
        self._synced_version: int | None = None  # the commits of others up to this version are durable
        self._inode: tuple[int, int] | None = None  # of the file that is open; None: nothing is opened yet
        self._inode_of_log: tuple[int, int] | None = None  # None: the catalog is only read
        self._is_log_lost = False  # whether a sync of earlier commits failed, and the log was not replaced since
        self._are_references_sound = False  # whether this opening has found so: see `references`
        self._log_bytes = 0  # of its file, as the last transaction found it
        self._commits = 0
        self._log_is_left = False  # whether no room can be made in it
        self._rests = 0  # how often the thread that forks holds the guard
        self._needs_room = False  # whether a full quota would end the process, if nobody asked for it before
        forking.register(self)
        forking.register_resting(self)
        with self._guard:  # a fork waits
            _inherited.close()
            self._open(create)

    def _open(self, create: bool) -> None:
        if not self.path.exists():
            if not create:
                raise VolumeNotFoundError(
                    f"{self.path.parent} is not a store; 'onionskin create {self.path.parent}/VOLUME --size SIZE' makes one "
                    "with its first volume"
                )
            _make(self.path)
        if self.read_only:
            self._connection, self._copy = connect_to_read(self.path)
        else:
            self._connection = _connect(self.path)
            self._needs_room = has_quotas(self.path.parent)
        self._inode = _inode_at(self.path)
        try:
            with self._errors():
                self._check_version()
            if not self.read_only:
                self._inode_of_log = _inode_at(f"{self.path}-wal")  # SQLite has it open since the first question
        except BaseException:
            self.close()
            raise

    def refuse_moved(self) -> None:
        """Raise StateError if another store, or none, is where this one was opened: its files are reached by their names.

        A copy that was put there has files of the same names, which would be freed for what this catalog says.
        """
        if _inode_at(self.path) != self._inode:
            raise moved_error(self.path.parent)
        if self._inode_of_log is None:
            return
        found = _stat_at(f"{self.path}-wal")
        self._log_bytes = found.st_size if found else 0
        if _inode_of(found) != self._inode_of_log:
            raise StateError(
                f"{self.path}-wal was removed or replaced while the store was open, so what is committed from now on would "
                "be lost; close the store and open it again"
            )

    def _check_version(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise FormatError(f"{self.path} is a SQLite file, but not the catalog of a store")
        if version in UPGRADES:
            self._upgrade()
        elif version != SCHEMA_VERSION:
            raise FormatError(
                f"{self.path} has version {version}, and this onionskin knows only {SCHEMA_VERSION}; use a newer onionskin"
            )

    def _upgrade(self) -> None:
        """Bring an older catalog up to this version, unless another process has just done so.

        If the catalog may only be read, a private copy of it is upgraded.
        """
        if self.read_only and self._copy is None:
            self._connection.close()
            self._connection, self._copy = copied(self.path)
        with self._transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            for older in range(version, SCHEMA_VERSION):
                UPGRADES[older](self._connection)
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def unsound_rows(self) -> list[tuple[str, str, str]]:
        """Return (table, id as hex digits, reason) of each row that breaks a condition, and of what SQLite finds damaged.

        What SQLite finds has no table.
        """
        found: list[tuple[str, str, str]] = []
        with self.reading():
            # A damaged page may hide rows from one query and not from another, so it is looked for first.
            for (fault,) in self._connection.execute(f"PRAGMA integrity_check({_FAULTS_SHOWN})"):
                if fault != "ok":
                    found += [("", "", line) for line in fault.splitlines() if not line.startswith("***")]
            for kind, sound in SOUND_ROW.items():
                key = KEYS.get(kind, "id")
                for (id,) in self._connection.execute(
                    f"SELECT {key} FROM {TABLES[kind]} WHERE NOT coalesce({sound}, 0)"
                ):
                    found.append((TABLES[kind], _shown(id), "it has a value that none can have"))
            if self._connection.execute(f"SELECT 1 FROM store WHERE NOT coalesce({SOUND_STORE}, 0)").fetchone():
                found.append(("store", "", "it has a value that none can have"))
            if self._connection.execute("SELECT count(*) FROM store").fetchone() != (1,):
                found.append(("store", "", "it has not one row that says which store it is"))
            for what, query in UNSOUND_WHOLES.items():
                table, _, fault = what.partition(": ")
                found += [(table, _shown(id), fault) for (id,) in self._connection.execute(query)]
            for kind, table in TABLES.items():
                found += [(table, _shown(id), fault) for id, fault in self._dangling_in(table, KEYS.get(kind, "id"))]
        return found

    def _dangling_in(self, table: str, key: str) -> Iterator[tuple[Any, str]]:
        """Yield (key, reason) of each row of a table that names a row which is not there."""
        for _, _, other, column, named, *_ in self._connection.execute(f"PRAGMA foreign_key_list({table})").fetchall():
            query = (
                f"SELECT {key} FROM {table} AS one WHERE {column} IS NOT NULL"
                f" AND NOT EXISTS (SELECT 1 FROM {other} AS other WHERE other.{named or 'id'} = one.{column})"
            )
            for (id,) in self._connection.execute(query).fetchall():
                yield id, f"its {column} names a row of {other} that is not there"

    def sync_found(self) -> None:
        """Make the visible commits durable. After a crash, a visible commit may be one that a power loss would undo.

        What was moved out of the log was synced first, so the log holds all that is not durable yet. Its name is durable:
        SQLite syncs the log's header, and the directory with it, before the first frame.

        A commit of this connection has synced the log, with all that it saw there. So there is nothing to do where nobody
        else has committed since.

        Where a sync of the log fails, the kernel takes what it could not write for written, and the next sync says nothing.
        Later commits would stand behind the gap, and go with it. So all is moved out of the log, and it is begun anew.
        """
        self.refuse_moved()
        self.bury_unknown()
        seen = self._version_of_others()
        if seen == self._synced_version and not self._is_log_lost:
            return
        try:
            if not self._is_log_lost:
                self._sync_log()
        except OSError:
            self._is_log_lost = True
        if self._is_log_lost:
            self._replace_log()
        self._synced_version = seen

    def _replace_log(self) -> None:
        """Move all commits from the log to the catalog, and begin the log anew: nothing that is in it now counts then."""
        with self._guard, self._errors():
            busy, in_log, moved = self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if busy or in_log != moved:
            raise StateError(
                f"the log of {self.path} could not be made durable, and other processes that read it do not let it be "
                "replaced; close them, and try again"
            )
        self._is_log_lost = False
        try:
            with self._transaction():
                pass
        except BaseException:
            self._is_log_lost = True
            raise

    def _replace_log_if_possible(self) -> None:
        """Replace a log that was lost at once, before others commit behind the gap. If not, the next commit has to."""
        if self._is_log_lost:
            with suppress(sqlite3.Error, OSError, OnionskinError):
                self._replace_log()

    def _sync_log(self) -> None:
        """Sync the log. SQLite takes its locks on other files, so none is lost when this one is closed."""
        try:
            descriptor = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return  # all of it was moved to the catalog, and synced there
        try:
            os.fdatasync(descriptor)  # BARRIER: opened catalog
        finally:
            os.close(descriptor)

    # ---- room in the log ----

    @property
    def wants_room_in_log(self) -> bool:
        """Whether `make_room_in_log` has something to do, for a process that commits again and again."""
        grows = LOG_GROWS_BYTES <= self._log_bytes < LOG_BYTES
        return grows and self._commits >= _COMMITS_FEW and not self._log_is_left and not self.read_only

    def make_room_in_log(self) -> bool:
        """Write zeros behind the log, if it grows. A step of it; returns whether there is another.

        Where a commit makes the log grow, its sync has the file system commit its own journal too: on ext4 and XFS two
        flushes of the disk instead of one. SQLite knows each frame by its sums, so zeros are the end of the log for it. Only
        who may write commits writes to the log: so this holds SQLite's lock for that, and gives up where another has it.
        The log may have a new length then, and nothing else.
        """
        if self.read_only or self._needs_room or self._log_is_left or self._inode_of_log is None:
            return False
        with self._guard, DeferredInterrupt(), self._errors():
            self._connection.execute("PRAGMA busy_timeout = 0")  # who reads waits for the guard meanwhile
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self.refuse_moved()
                return LOG_GROWS_BYTES <= self._log_bytes < LOG_BYTES and self._lengthen_log()
            finally:
                self._roll_back()
                self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")

    def _lengthen_log(self) -> bool:
        """Write a step of zeros behind the log, to which nobody else writes now."""
        self._log_is_left = True  # where this ends in any other way than in the last line
        descriptor = os.open(f"{self.path}-wal", os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found, disk = os.fstat(descriptor), os.fstatvfs(descriptor)
            is_in_place = disk.f_files > 0  # btrfs counts no inodes, and overwrites nothing in place
            if (
                not is_in_place
                or disk.f_bavail * disk.f_frsize < _LOG_LEAVES_BYTES
                or _inode_of(found) != self._inode_of_log
            ):
                return False
            wanted = min(_LOG_STEP_BYTES, LOG_BYTES - found.st_size)
            if wanted > 0 and self._write_zeros(descriptor, wanted, found.st_size) < wanted:
                return False
        finally:
            os.close(descriptor)
        self._log_is_left = False
        return wanted > 0

    def _write_zeros(self, descriptor: int, count: int, offset: int) -> int:
        """Write zeros to the log. They are durable at once, so that no commit waits for them."""
        try:
            return os.pwrite(descriptor, bytes(count), offset)
        except OSError as error:
            # What commits before left to a later sync may be lost with this one: see `sync_found`.
            self._is_log_lost |= error.errno not in (ENOSPC, EDQUOT, EFBIG)
            raise

    # ---- transactions ----

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the body as one transaction that either is durable on return or did not happen.

        Raises
        ------
        OSError
            ENOSPC if the disk is full. The transaction did not happen.
        CommitUnknownError
            It is not known whether the transaction happened.

        Notes
        -----
        An interrupt that arrives meanwhile is raised behind the body, and nothing happened. One that arrives while COMMIT
        runs is raised after it, so the transaction has happened by then. Code that undoes the work around a transaction
        therefore asks the catalog first how the transaction ended. If it were raised
        in between, the transaction could be left open, with the lock that other threads wait for, until the exception is
        forgotten; and then what another transaction has done by then would be rolled back, and its rest would be done.
        """
        self.refuse_read_only()
        with self._transaction():
            yield

    def refuse_read_only(self) -> None:
        """Raise OSError if the store may only be read, and FormatError if its catalog does not belong to its files."""
        if self.is_not_its_own is not None:
            raise FormatError(self.is_not_its_own)
        if self.read_only:
            number, why = why_not_written(self.path)
            raise OSError(number, f"the store is read-only: {why}", str(self.path.parent))

    @contextmanager
    def _transaction(self, *, is_synced: bool = True) -> Iterator[None]:
        with self._guard, DeferredInterrupt() as interrupts, self._errors():
            if self._changing:  # the outer transaction would be rolled back, with all its changes so far
                raise AssertionError("a transaction was begun inside another one")
            stamp = os.urandom(16)
            self._roll_back()  # a second interrupt may have left a transaction open
            if is_synced and self._is_log_lost:
                self._replace_log()
            if self._needs_room:
                refuse_without_room(self.path)
            self._changing = True
            try:
                self._have_commits_synced(is_synced)
                self._connection.execute("BEGIN IMMEDIATE")
                self.refuse_moved()
                yield
                interrupts.handle_noted()  # so nothing was done, in nearly all cases
                self._stamp(stamp)
                seen = self._version_of_others()  # nobody else commits before this transaction ends
            except BaseException:
                self._changing = False
                self._are_references_sound = False  # they may have been looked at in what is undone now
                self._roll_back()
                raise
            self._changing = False
            try:
                self._connection.execute("COMMIT")
            except (sqlite3.Error, MemoryError) as error:
                was_unknown, self._is_unknown = self._is_unknown, True
                # With its own frames, those of commits before may be lost that nobody has synced: see `sync_found`.
                self._is_log_lost |= _may_be_whole(error) and self._synced_version != seen
                if not self._committed(stamp):
                    self._is_unknown = not self._bury(error) and was_unknown
                    self._replace_log_if_possible()
                    raise
                self._is_unknown = False
            except BaseException:
                self._roll_back()  # an interrupt before COMMIT began: nothing may read what is not so
                raise
            else:
                self._commits += 1
                self._is_unknown = False
                self._synced_version = seen if is_synced else None  # what it saw is visible, and may be lost

    def _stamp(self, stamp: bytes) -> None:
        """Write down by what this transaction is known where nobody knows how its COMMIT ended."""
        if self._connection.execute("UPDATE store SET stamp = ?", (stamp,)).rowcount != 1:
            raise damaged(self.path, "it has not one row that says which store it is")

    def _have_commits_synced(self, is_wanted: bool) -> None:
        """Have commits return when they are durable, or before. Each transaction says which, so no interrupt matters."""
        if self._syncs_commits == is_wanted:
            return
        self._syncs_commits = False  # it is only true where nothing came between
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if is_wanted else 'NORMAL'}")
        self._syncs_commits = is_wanted

    def bury_unknown(self) -> None:
        """Overwrite a commit of unknown outcome, if there was one. Until then, a crash may bring it back.

        This must be done before the commit could do harm: before a head is opened for writing, and before a file is
        freed that this commit may name, although no reader sees the commit.
        """
        if self._is_unknown and not self.read_only and self.is_not_its_own is None:
            with self._transaction():
                pass

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _committed(self, stamp: bytes) -> bool:
        """Whether a transaction whose COMMIT failed took effect after all. A new connection is used to find out."""
        try:
            self._roll_back()
            fresh = _connect(self.path)
            try:
                (found,) = fresh.execute("SELECT stamp FROM store").fetchone()
                return bool(found == stamp)
            finally:
                fresh.close()
        except (sqlite3.Error, OSError, OnionskinError, MemoryError) as error:
            raise CommitUnknownError(
                f"{self.path}: a commit failed and the catalog cannot be read: {_said(error)}; close the store, "
                "mend the disk, and open it again"
            ) from error

    def _bury(self, error: Exception) -> bool:
        """Make sure that a transaction whose COMMIT failed does not come back after a crash.

        If the whole transaction was written and only the sync failed, no reader sees it, because the log's index was
        not updated. But a process that makes the index anew after a crash would find the whole transaction in the log,
        below all later changes. The next commit overwrites it, so one is made at once. If a write failed, on a full
        disk for example, the log has only a part of the transaction, which SQLite never takes for a whole one.

        Returns whether the transaction could have come back.
        """
        if not _may_be_whole(error):
            return False
        try:
            self._have_commits_synced(True)
            self._connection.execute("BEGIN IMMEDIATE")
            self._stamp(os.urandom(16))
            self._connection.execute("COMMIT")
        except (sqlite3.Error, FormatError, MemoryError) as again:
            with suppress(sqlite3.Error, MemoryError):  # the next transaction does it
                self._roll_back()
            raise CommitUnknownError(
                f"{self.path}: a commit failed ({_said(error)}), and so did the next one ({_said(again)}): "
                "the first may be found done after a crash; close the store, mend the disk, and open it again"
            ) from error
        return True

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Run the body on one state of the catalog."""
        with self._guard, DeferredInterrupt(), self._errors():
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN")
                yield
            finally:
                self._roll_back()

    def _errors(self) -> "_Errors":
        return _Errors(self)

    def version(self) -> tuple[int, int]:
        """Return a version that changes with every commit, of this connection or of another.

        See https://www.sqlite.org/pragma.html#pragma_data_version.
        """
        with self._guard, self._errors():
            return self._version_of_others(), self._connection.total_changes

    def _version_of_others(self) -> int:
        """Return a version that changes with every commit of another connection."""
        with self._guard, self._errors():
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            return int(version)

    def close(self) -> None:
        """Close the connection, once the transaction or query of another thread has ended. Further calls do nothing.

        The module `sqlite3` frees what a statement of another thread still uses.
        """
        if not self._forked:
            with self._guard:
                self._connection.close()  # where the catalog was moved, SQLite leaves the log at the path alone
            if self._copy:
                self._copy.cleanup()

    def after_fork(self) -> None:
        """Mark the connection as unusable in a forked child, and replace the lock, which a parent's thread may hold."""
        self._forked = True
        _inherited.add(self.path, getattr(self, "_connection", None), is_whole=self._is_whole())
        self._rests = 0
        if self._copy:
            self._copy._finalizer.detach()  # type: ignore[attr-defined]  # the parent removes it
        self._guard = threading.RLock()

    def rest(self, seconds: float) -> bool:
        """Wait until no thread is in SQLite or in a transaction, so that a child can close what it inherits."""
        if not self._guard.acquire(timeout=seconds):
            return False
        self._rests += 1
        return True

    def go_on(self) -> None:
        """Let other threads into SQLite again."""
        self._rests -= 1
        self._guard.release()

    def _is_whole(self) -> bool:
        """Whether nothing was under way when this process was forked. Called in the child."""
        try:
            return self._rests > 0 and not self._connection.in_transaction
        except (AttributeError, sqlite3.Error):  # it was not opened, or closed again
            return self._rests > 0

    # ---- rows that fulfil an SQL condition: for the modules of this package ----

    def rows(self, kind: type[Row], condition: str = "1", *values: Any) -> list[Row]:
        """Return the rows of a table that fulfil an SQL condition.

        Raises
        ------
        FormatError
            One of the rows breaks a condition.
        """
        found = self._select(kind, condition, values)
        for row in found:
            if not row[-1]:
                raise self._unsound(kind, row[0])
        return [kind(*row[:-1]) for row in found]

    def _unsound(self, kind: type, id: object) -> FormatError:
        return damaged(self.path, f"the row {_shown(id)} of {TABLES[kind]} has a value that none can have")

    def sound_rows(self, kind: type[Row], condition: str = "1", *values: Any) -> list[Row]:
        """Return the sound rows, so that one bad row does not hide the others. `unsound_rows` returns the bad rows."""
        return [kind(*row) for *row, sound in self._select(kind, condition, values) if sound]

    def _select(self, kind: type[Row], condition: str, values: Iterable[Any]) -> list[Any]:
        text = _select_text(TABLES[kind], condition)
        with self._guard, self._errors():
            return self._connection.execute(text, tuple(values)).fetchall()

    def rows_in(
        self, kind: type[Row], column: str, wanted: Iterable[Any], condition: str = "1", *values: Any
    ) -> list[Row]:
        """Return the rows whose column has one of the wanted values, in one state of the catalog."""
        of, found = list(wanted), []
        with self.reading():
            for first in range(0, len(of), _VALUES_MAX):
                part = of[first : first + _VALUES_MAX]
                marks = ", ".join("?" * len(part))
                found += self.rows(kind, f"{column} IN ({marks}) AND {condition}", *part, *values)
        return found

    def row(self, kind: type[Row], condition: str, *values: Any) -> Row | None:
        """Return the one row that fulfils a condition, or None."""
        found = self.rows(kind, condition, *values)
        return found[0] if found else None

    def values(self, kind: type, columns: str, condition: str = "1", *values: Any) -> list[tuple[Any, ...]]:
        """Return some columns of the sound rows, or SQL expressions over them. This is cheaper than whole rows."""
        text = f"SELECT {columns} FROM {TABLES[kind]} WHERE coalesce({SOUND_ROW[kind]}, 0) AND {condition}"
        with self._guard, self._errors():
            return list(self._connection.execute(text, values))

    def values_in(self, kind: type, columns: str, column: str, wanted: Iterable[Any]) -> list[tuple[Any, ...]]:
        """Return columns of the sound rows whose column has one of the wanted values. Inside `reading`."""
        of, found = list(wanted), []
        for first in range(0, len(of), _VALUES_MAX):
            part = of[first : first + _VALUES_MAX]
            found += self.values(kind, columns, f"{column} IN ({', '.join('?' * len(part))})", *part)
        return found

    def has(self, kind: type, condition: str, *values: Any) -> bool:
        """Whether there is a row that fulfils a condition."""
        with self._guard, self._errors():
            return bool(
                self._connection.execute(f"SELECT 1 FROM {TABLES[kind]} WHERE {condition} LIMIT 1", values).fetchone()
            )

    def count(self, kind: type, condition: str, *values: Any) -> int:
        """Return how many rows fulfil a condition."""
        with self._guard, self._errors():
            (count,) = self._connection.execute(
                f"SELECT count(*) FROM {TABLES[kind]} WHERE {condition}", values
            ).fetchone()
        return int(count)

    def values_found(self, kind: type, column: str, wanted: Iterable[bytes]) -> set[bytes]:
        """Return which of these values a column has, in whatever rows; the rows may be unsound. There is an index on it."""
        of = list(wanted)
        found: set[bytes] = set()
        for first in range(0, len(of), _VALUES_MAX):
            part = of[first : first + _VALUES_MAX]
            # One step in the index for each value: a layer may have a hundred thousand children.
            text = (
                f"WITH wanted(value) AS (VALUES {', '.join(['(?)'] * len(part))}) "
                f"SELECT value FROM wanted WHERE EXISTS (SELECT 1 FROM {TABLES[kind]} WHERE {column} = value)"
            )
            with self._guard, self._errors():
                found.update(value for (value,) in self._connection.execute(text, part))
        return found

    def pairs_found(
        self, kind: type, columns: tuple[str, str], wanted: Iterable[tuple[Any, Any]]
    ) -> set[tuple[Any, Any]]:
        """Return which of these pairs two columns have, in whatever rows; the rows may be unsound. There is an index."""
        of = list(wanted)
        found: set[tuple[Any, Any]] = set()
        first, second = columns
        for at in range(0, len(of), _VALUES_MAX // 2):
            part = of[at : at + _VALUES_MAX // 2]
            text = (
                f"WITH wanted(one, two) AS (VALUES {', '.join(['(?, ?)'] * len(part))}) SELECT one, two FROM wanted "
                f"WHERE EXISTS (SELECT 1 FROM {TABLES[kind]} WHERE {first} = one AND {second} = two)"
            )
            with self._guard, self._errors():
                found.update(self._connection.execute(text, [value for pair in part for value in pair]))
        return found

    def delete_all(self, kind: type, column: str, wanted: Iterable[bytes]) -> None:
        """Remove the rows whose column has one of these values. Inside a transaction."""
        self._connection.executemany(f"DELETE FROM {TABLES[kind]} WHERE {column} = ?", [(value,) for value in wanted])

    def delete(self, kind: type, condition: str, *values: Any) -> None:
        """Remove rows. Inside a transaction."""
        self._execute(f"DELETE FROM {TABLES[kind]} WHERE {condition}", *values)

    # ---- rows of any table ----

    def all_sound(self, kind: type[Row]) -> list[Row]:
        """Return all sound rows of a table, in no order. One bad row does not hide the others."""
        return self.sound_rows(kind)

    def insert(self, row: Row) -> None:
        """Add a row. Inside a transaction."""
        self.insert_all([row])

    def insert_all(self, rows: Iterable[Row]) -> None:
        """Add rows of one table. Inside a transaction."""
        found: list[Any] = list(rows)  # each a tuple, in the order of the columns
        if not found:
            return
        kind = type(found[0])
        columns = COLUMNS[kind]
        check_rows(kind, columns, found)
        self._insert(kind, {}, dict(zip(columns, zip(*found, strict=True), strict=True)))

    def insert_copies(self, row: Row, **columns: Sequence[Any]) -> None:
        """Add rows that are as this one but for some columns, of which each has a value for each row. Inside a transaction.

        What the rows have in common is looked at, and handed to SQLite, once, and no row is made for each.
        """
        kind: Any = type(row)
        common = {name: value for name, value in zip(COLUMNS[kind], row, strict=True) if name not in columns}
        check_columns(kind, columns)
        check_values(kind, common.items())
        self._insert(kind, common, columns)

    def _insert(self, kind: type, common: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> None:
        """Add rows of values that were checked: those of `common` are in each row, and `columns` has those of all rows."""
        assert kind is not WorkRow  # `add_work` numbers those
        shared = tuple(common.values())
        rows = list(zip(*map(_quick_to_bind, columns.values()), strict=True))
        at = 0
        for together in _ROWS_TOGETHER:
            while together <= len(rows) - at and together * len(columns) <= _VALUES_MAX:
                values = [*shared, *chain.from_iterable(rows[at : at + together])]
                self._connection.execute(_insert_text(kind, tuple(common), tuple(columns), together), values)
                at += together

    def update(self, kind: type, id: bytes | int | str, **values: Any) -> None:
        """Change columns of the row whose key (`rows.KEYS`) this is. Inside a transaction."""
        check_values(kind, values.items())
        assignments = ", ".join(f"{column} = ?" for column in values)
        self._execute(f"UPDATE {TABLES[kind]} SET {assignments} WHERE {KEYS.get(kind, 'id')} = ?", *values.values(), id)

    def update_all(self, kind: type, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Change the same columns of many rows. Each of `rows` has their values, and then the row's key. In a transaction."""
        check_rows(kind, names, [row[:-1] for row in rows])
        assignments = ", ".join(f"{name} = ?" for name in names)
        text = f"UPDATE {TABLES[kind]} SET {assignments} WHERE {KEYS.get(kind, 'id')} = ?"
        self._connection.executemany(text, rows)

    def take_lock_byte(self) -> int:
        """Hand out a byte of the lock file that was never used. Inside a transaction."""
        return self.take_lock_bytes(1)[0]

    def take_lock_bytes(self, count: int) -> range:
        """Hand out `count` bytes of the lock file that were never used. Inside a transaction.

        A byte is not handed out again even if the transaction fails, because the caller may hold its lock already.
        """
        self._execute("UPDATE store SET next_lock_byte = max(next_lock_byte, ?) + ?", self._lock_byte_taken, count)
        with self._errors():
            last = self._last_lock_byte()
        if type(last) is not int or not count <= last < 1 << 61:
            raise damaged(self.path, f"the next lock byte cannot be {last!r}")
        self._lock_byte_taken = last
        return range(last - count + 1, last + 1)

    def draw_lock_bytes(self, count: int) -> range:
        """Hand out bytes of the lock file by themselves, in a commit that is not synced.

        After a power loss no process holds a lock on them, and a row that names one was committed later: what is durable of
        the log is its beginning, so where the row is, so is this. Where that later sync fails, this may be lost with it, and
        all that would come behind: so the log is replaced then.
        """
        self.refuse_read_only()
        with self._guard, self._transaction(is_synced=self._is_unknown):  # only a durable commit buries another one
            return self.take_lock_bytes(count)

    def last_lock_byte(self) -> int:
        """Return the last byte of the lock file that was handed out by a transaction that ended."""
        with self._guard, self._errors():
            return int(self._last_lock_byte())

    def _last_lock_byte(self) -> Any:
        found = self._connection.execute("SELECT next_lock_byte FROM store").fetchone()
        if found is None:
            raise damaged(self.path, "it has no row that says which store it is")
        return found[0]

    def _execute(self, text: str, *values: Any) -> None:
        """Run a statement of a transaction, which holds the guard and translates errors."""
        self._connection.execute(text, values)


_KINDS = {table: kind for kind, table in TABLES.items()}


@lru_cache(256)
def _select_text(table: str, condition: str) -> str:
    """Write a query for rows. The text is long, so it is kept: SQLite's module finds the statement by its hash."""
    kind = _KINDS[table]
    return f"SELECT {', '.join(COLUMNS[kind])}, coalesce({SOUND_ROW[kind]}, 0) FROM {table} WHERE {condition}"


@lru_cache(256)
def _insert_text(kind: type, common: tuple[str, ...], columns: tuple[str, ...], rows: int) -> str:
    """Write a statement that adds so many rows, given the values that all have, and then those of each row."""
    marks = ", ".join([*(f"?{number}" for number in range(1, len(common) + 1)), *("?" * len(columns))])
    return f"INSERT INTO {TABLES[kind]} ({', '.join(common + columns)}) VALUES {', '.join([f'({marks})'] * rows)}"


def _quick_to_bind(values: Sequence[Any]) -> Sequence[Any]:
    """Return values that SQLite's module takes for the same, and sooner: of bytes it looks for an adapter each time."""
    return list(map(bytearray, values)) if set(map(type, values)) == {bytes} else values


def check_values(kind: type, values: "Iterable[tuple[str, Any]]") -> None:
    """Refuse to write a value that would break its condition."""
    for column, value in values:
        if not VALUES[kind][column].holds(value):
            raise ValueError(f"{column} of {TABLES[kind]} cannot be {value!r}; nothing was changed")


def check_columns(kind: type, columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse to write columns of rows that have a value which would break its condition."""
    for column, values in columns.items():
        if not VALUES[kind][column].all_hold(values):
            check_values(kind, ((column, value) for value in values))


def check_rows(kind: type, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Refuse to write rows that have a value which would break its condition. They are looked at by column.

    A column in which all rows have one and the same object is looked at once.
    """
    by_column = (
        values[:1] if values[0] is values[-1] and len(set(map(id, values))) == 1 else values
        for values in zip(*rows, strict=True)
    )
    check_columns(kind, dict(zip(columns, by_column, strict=False)))


def _shown(id: object) -> str:
    return id.hex() if isinstance(id, bytes) else str(id)


def _stat_at(path: "FilePath | str") -> "os.stat_result | None":
    try:
        return os.stat(path)  # noqa: PTH116 - half the time of FilePath.stat
    except (FileNotFoundError, NotADirectoryError):  # another error says nothing of where the store is
        return None


def _inode_of(found: "os.stat_result | None") -> "tuple[int, int] | None":
    return (found.st_dev, found.st_ino) if found else None


def _inode_at(path: "FilePath | str") -> "tuple[int, int] | None":
    return _inode_of(_stat_at(path))


def _said(error: Exception) -> str:
    return str(error) or "no memory is left"


def _may_be_whole(error: Exception) -> bool:
    """Whether a commit that failed so may be in the log as a whole: its sync failed, or no memory was left behind that."""
    if not isinstance(error, sqlite3.Error):
        return True
    return primary_code(error) == sqlite3.SQLITE_IOERR and error.sqlite_errorcode != sqlite3.SQLITE_IOERR_WRITE


def _connect(path: FilePath) -> sqlite3.Connection:
    make_index_in_place(path)
    try:
        connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
    except sqlite3.Error as error:
        raise translated(error, path) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # BARRIER: catalog commits
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        # What a statement of many rows changes is copied first, to a file in /var/tmp otherwise.
        connection.execute("PRAGMA temp_store = MEMORY")
    except sqlite3.Error as error:
        connection.close()
        raise translated(error, path) from error
    except UnicodeDecodeError as error:  # SQLite quotes damaged text in its messages
        connection.close()
        raise damaged(path, error) from error
    except BaseException:  # an interrupt
        connection.close()
        raise
    return connection


def _make(path: FilePath) -> None:
    """Make the catalog under another name and then move it to its place, so that a crash leaves a whole store or none.

    The name is durable once the catalog is opened, and so are the store's directories, which are older: to change the
    journal mode, SQLite makes a journal and syncs the directory for it.
    """
    staged = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.new")
    # SQLite would make a file that every user can read. It gives its log and its index the mode of this file.
    os.close(make_file(staged))
    connection = sqlite3.connect(staged, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")  # BARRIER: catalog schema
        connection.execute("BEGIN")
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute("INSERT INTO store (uuid, next_lock_byte, stamp) VALUES (?, 0, ?)", (new_id(), b""))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        staged.unlink(missing_ok=True)
        raise translated(error, path) from error
    finally:
        connection.close()
    try:
        os.link(staged, path)  # unlike a rename, it never replaces the catalog of a process that was faster
    except FileExistsError:
        pass
    finally:
        staged.unlink()
