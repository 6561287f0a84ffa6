"""A commit whose sync failed did not happen, and that is also so after a crash, when the catalog's log is read anew."""

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.catalog import Catalog, CommitUnknownError, connection
from onionskin.errors import StateError
from onionskin.operations import fold

BLOCK = 4096
INDEX_HEADER_BYTES = 96  # of SQLite's index of the log: two copies of what says how much of the log counts


class UnsyncedConnection:
    """The connection of a catalog, whose next commits fail as where the last sync of the log does.

    All frames are in the log then, and the index, by which everybody goes as long as nobody crashes, does not know them.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._index = connection, path.with_name(f"{path.name}-shm")
        self.failures = self.refused_writes = 0
        self.error: Exception = io_error(sqlite3.SQLITE_IOERR_FSYNC)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.refused_writes and not self.failures:
            self.refused_writes -= 1
            self._connection.execute("ROLLBACK")
            raise io_error(sqlite3.SQLITE_IOERR_WRITE)
        if statement != "COMMIT" or not self.failures:
            return self._connection.execute(statement, *values)
        self.failures -= 1
        with open(self._index, "r+b", buffering=0) as index:
            before = index.read(INDEX_HEADER_BYTES)
            self._connection.execute(statement)
            index.seek(0)
            index.write(before)
        raise self.error


def io_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        yield store


@pytest.fixture
def web(store: onionskin.Store) -> onionskin.Volume:
    """A volume with a snapshot `old`, whose commit is in the log."""
    web = store.create("web", size=16 * BLOCK)
    web.write(0, b"o" * BLOCK)
    web.snapshot("old")
    web.write(0, b"n" * BLOCK)
    return web


@pytest.fixture
def unsynced(store: onionskin.Store, web: onionskin.Volume) -> UnsyncedConnection:
    store.finish_work()
    connection = UnsyncedConnection(store._opened.catalog._connection, store._opened.catalog.path)
    store._opened.catalog._connection = connection  # type: ignore[assignment]
    return connection


def crashed(store: onionskin.Store) -> onionskin.Store:
    """Open what a crash leaves: all but the index, which the first one who opens the catalog makes anew from the log."""
    left = store.path.with_name("crashed")
    shutil.copytree(store.path, left, ignore=shutil.ignore_patterns("*-shm"))
    return onionskin.Store(left)


def errors_of(store: onionskin.Store) -> list[str]:
    return [problem.what for problem in store.check() if problem.severity == "error"]


@pytest.mark.parametrize("error", [io_error(sqlite3.SQLITE_IOERR_FSYNC), MemoryError()])
def test_what_is_flushed_after_a_snapshot_whose_commit_was_not_synced_is_there_after_a_crash(
    store: onionskin.Store, web: onionskin.Volume, unsynced: UnsyncedConnection, error: Exception
) -> None:
    """SQLite finds no memory for its index of the log when all of the commit is in the log: that is as a failed sync."""
    unsynced.failures, unsynced.error = 1, error
    with pytest.raises((OSError, MemoryError)):
        web.snapshot("new")
    web.write(BLOCK, b"later" * 100)
    web.flush()
    with crashed(store) as left, left.open("web") as found:
        assert found.read(BLOCK, 500) == b"later" * 100
        assert found.read(0, BLOCK) == b"n" * BLOCK
        assert [snapshot.name for snapshot in found.snapshots] == ["old"]
        found.snapshot("new")
        assert errors_of(left) == []


def test_a_rename_whose_commit_was_not_synced_stays_undone(
    store: onionskin.Store, unsynced: UnsyncedConnection
) -> None:
    unsynced.failures = 1
    with pytest.raises(OSError, match="disk I/O error"):
        store.rename("web", "new")
    with crashed(store) as left:
        assert [info.name for info in (*store.volumes(), *left.volumes())] == ["web", "web"]


def test_where_nothing_can_be_committed_any_more_a_volume_takes_no_write_that_a_crash_might_lose(
    store: onionskin.Store, web: onionskin.Volume, unsynced: UnsyncedConnection
) -> None:
    unsynced.failures = 2
    with pytest.raises(CommitUnknownError, match="may be found done after a crash"):
        web.snapshot("new")
    with pytest.raises(onionskin.OnionskinError):
        web.write(BLOCK, b"later")
        web.flush()
    with crashed(store) as left, left.open("web") as found:
        assert found.read(0, BLOCK) == b"n" * BLOCK
        assert {snapshot.name for snapshot in found.snapshots} <= {"old", "new"}
        assert errors_of(left) == []


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_where_nobody_can_ask_how_a_commit_ended_a_volume_takes_no_write_that_a_crash_might_lose(
    store: onionskin.Store,
    web: onionskin.Volume,
    unsynced: UnsyncedConnection,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(path: object) -> None:
        raise error

    unsynced.failures = 1
    with monkeypatch.context() as patch:
        patch.setattr(connection, "_connect", fail)
        with pytest.raises(CommitUnknownError, match="cannot be read"):
            web.snapshot("new")
    with pytest.raises(onionskin.OnionskinError):
        web.write(BLOCK, b"later")
        web.flush()
    with crashed(store) as left, left.open("web") as found:
        assert found.read(0, BLOCK) == b"n" * BLOCK
        assert errors_of(left) == []


def test_a_volume_whose_change_may_come_back_is_opened_only_once_that_is_over(
    store: onionskin.Store, web: onionskin.Volume, unsynced: UnsyncedConnection
) -> None:
    unsynced.failures, unsynced.refused_writes = 1, 2
    with pytest.raises(CommitUnknownError):
        web.snapshot("new")
    web.close()
    with pytest.raises(OSError, match="disk I/O error"):
        store.open("web")
    with store.open("web") as again:
        again.write(BLOCK, b"later" * 100)
        again.flush()
        with crashed(store) as left, left.open("web") as found:
            assert found.read(BLOCK, 500) == b"later" * 100
            assert errors_of(left) == []


def test_no_file_is_freed_that_a_change_which_may_come_back_names(
    store: onionskin.Store, web: onionskin.Volume, unsynced: UnsyncedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.snapshot("newer")
    web.write(0, b"N" * BLOCK)
    web.snapshot("newest")
    store.finish_work()
    write_map = fold.write_map

    def and_fail_to_commit(*arguments: Any) -> tuple[int, int, int]:
        unsynced.failures, unsynced.refused_writes = 1, 1000
        return write_map(*arguments)

    monkeypatch.setattr(fold, "write_map", and_fail_to_commit)
    with pytest.raises(CommitUnknownError):
        web.merge("newer")
    with crashed(store) as left:
        assert errors_of(left) == []
        with left.open("web", snapshot="newest") as found:
            assert found.read(0, BLOCK) == b"N" * BLOCK
    unsynced.refused_writes = 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_raised_before_a_commit_begins_leaves_nothing_open(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Nobody sees a volume then that was not made, and nobody else waits for a lock that nobody gives back."""
    catalog = store._opened.catalog
    connection = catalog._connection
    raised: list[str] = []

    class Interrupted(UnsyncedConnection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement == "COMMIT" and not raised:
                raised.append(statement)
                raise error
            return connection.execute(statement, *values)

    store.create("web", size=BLOCK).close()
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_connection", Interrupted(connection, catalog.path))
        with pytest.raises(error):
            store.fork("web", names=["job"])
    assert [info.name for info in store.volumes()] == ["web"]
    with onionskin.Store(store.path) as other:
        other.fork("web", names=["job"])


def committed(catalog: Catalog) -> int:
    with catalog.transaction():
        return catalog.take_lock_byte()


def after_a_power_loss(catalog: Catalog, lost: slice, salts: bytes, at: Path) -> Catalog:
    """Open what is on the disk, where this part of the log, as it was with these salts, was never written."""
    at.mkdir()
    log = catalog.path.with_name(f"{catalog.path.name}-wal")
    left = bytearray(log.read_bytes())
    if left[16:24] == salts:
        left[lost] = bytes(lost.stop - lost.start)
    (at / log.name).write_bytes(left)
    shutil.copy(catalog.path, at)
    return Catalog(at / catalog.path.name, create=False)


@pytest.mark.parametrize("by", ["mine", "others"])
@pytest.mark.parametrize("failures", [1, 2])
def test_no_later_commit_is_lost_with_lock_bytes_whose_sync_failed(tmp_path: Path, by: str, failures: int) -> None:
    """The kernel takes what it could not write for written. What is read back of the log after a power loss ends there."""
    mine, others = (Catalog(tmp_path / "catalog.db", create=True) for _ in range(2))
    log = tmp_path / "catalog.db-wal"
    committed(mine)
    begin, salts = log.stat().st_size, log.read_bytes()[16:24]
    {"mine": mine, "others": others}[by].draw_lock_bytes(2)
    end = log.stat().st_size
    connection = UnsyncedConnection(mine._connection, tmp_path / "catalog.db")
    connection.failures = failures
    mine._connection = connection  # type: ignore[assignment]
    with pytest.raises((OSError, CommitUnknownError), match="disk I/O error"):
        committed(mine)
    last = committed(mine)
    found = after_a_power_loss(mine, slice(begin, end), salts, tmp_path / "left")
    assert found.last_lock_byte() == last
    for catalog in (mine, others, found):
        catalog.close()


def test_a_log_that_has_a_gap_takes_no_commit_before_it_is_replaced(tmp_path: Path) -> None:
    mine, others = (Catalog(tmp_path / "catalog.db", create=True) for _ in range(2))
    committed(mine)
    mine.draw_lock_bytes(2)
    connection = UnsyncedConnection(mine._connection, tmp_path / "catalog.db")
    connection.failures = 1
    mine._connection.execute("PRAGMA busy_timeout = 0")
    mine._connection = connection  # type: ignore[assignment]
    with others.reading():
        others.defaults()
        with pytest.raises(OSError, match="disk I/O error"):
            committed(mine)
        for change in (lambda: committed(mine), mine.sync_found):
            with pytest.raises(StateError, match="could not be made durable"):
                change()
    assert committed(mine) > 3
    mine.sync_found()
    for catalog in (mine, others):
        catalog.close()
