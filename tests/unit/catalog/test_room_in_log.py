"""Room that is made behind a log that grows, so that the sync of a commit needs no commit of the file system's journal."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import Catalog
from onionskin.catalog.connection import LOG_BYTES, LOG_GROWS_BYTES
from onionskin.errors import StateError


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with_log = Catalog(tmp_path / "catalog.db", create=True)
    yield with_log
    with_log.close()


def log_bytes(catalog: Catalog) -> int:
    return Path(f"{catalog.path}-wal").stat().st_size


def commit(catalog: Catalog) -> int:
    with catalog.transaction():
        return catalog.take_lock_byte()


def grow(catalog: Catalog) -> int:
    """Commit until the log is seen to grow; return what the last commit wrote."""
    commit(catalog)
    while log_bytes(catalog) < LOG_GROWS_BYTES:
        commit(catalog)
    return commit(catalog)


def make_all_room(catalog: Catalog) -> None:
    while catalog.make_room_in_log():
        pass


def found_after_a_crash(catalog: Catalog, directory: Path) -> int:
    """Read the last lock byte as an opening finds it that has the catalog and its log, and makes the index anew."""
    directory.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{catalog.path}{suffix}", directory / f"catalog.db{suffix}")
    found = Catalog(directory / "catalog.db", create=False)
    try:
        return found.last_lock_byte()
    finally:
        found.close()


def test_commits_overwrite_the_room_and_the_log_keeps_its_length(catalog: Catalog, tmp_path: Path) -> None:
    before = grow(catalog)
    make_all_room(catalog)
    assert log_bytes(catalog) == LOG_BYTES
    assert found_after_a_crash(catalog, tmp_path / "before") == before
    catalog._connection.execute("PRAGMA wal_autocheckpoint = 10")
    for _ in range(30):  # SQLite begins the log anew meanwhile
        last = commit(catalog)
    assert log_bytes(catalog) == LOG_BYTES
    assert found_after_a_crash(catalog, tmp_path / "behind") == last


def test_each_step_leaves_all_commits_where_they_are(catalog: Catalog, tmp_path: Path) -> None:
    grow(catalog)
    steps = 0
    while catalog.make_room_in_log():
        steps += 1
        last = commit(catalog)
        assert found_after_a_crash(catalog, tmp_path / str(steps)) == last
    assert steps > 2


def test_a_log_of_one_commit_is_left(catalog: Catalog) -> None:
    commit(catalog)
    before = log_bytes(catalog)
    assert not catalog.make_room_in_log()
    assert log_bytes(catalog) == before


def test_the_log_is_left_while_another_connection_may_write_to_it(catalog: Catalog) -> None:
    grow(catalog)
    before = log_bytes(catalog)
    other = Catalog(catalog.path, create=False)
    try:
        with other.transaction():
            with pytest.raises((StateError, OSError)):
                catalog.make_room_in_log()
            assert log_bytes(catalog) == before
    finally:
        other.close()
    assert catalog._connection.execute("PRAGMA busy_timeout").fetchone() == (60_000,)
    make_all_room(catalog)
    assert log_bytes(catalog) == LOG_BYTES


def test_a_disk_that_is_nearly_full_is_left(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(catalog)
    before, look = log_bytes(catalog), os.fstatvfs
    full = list(look(os.open(catalog.path, os.O_RDONLY)))
    full[4] = 1  # f_bavail
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: os.statvfs_result(full))
    make_all_room(catalog)
    assert log_bytes(catalog) == before
    assert not catalog.wants_room_in_log  # nobody asks again


def test_behind_a_failed_write_the_next_commit_begins_the_log_anew(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(catalog)
    taken = catalog.draw_lock_bytes(1)[0]  # which is not synced

    def fail(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OSError, match="Input/output"):
            catalog.make_room_in_log()
    assert catalog._is_log_lost
    assert commit(catalog) == taken + 1
    assert not catalog._is_log_lost


def test_a_store_in_which_one_process_goes_on_committing_makes_the_room(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size=1 << 20) as web:
        log = Path(f"{store._opened.catalog.path}-wal")
        number = 0
        while log.stat().st_size < LOG_GROWS_BYTES:
            web.snapshot(f"s{number}")
            number += 1
        web.snapshot("last")
        store._opened.finish_work()
        assert log.stat().st_size == LOG_BYTES
    assert not log.exists()
    with onionskin.Store(tmp_path / "vms") as store:
        assert store.snapshots("web")[-1].name == "last"
        assert not [problem for problem in store.check() if problem.severity == "error"]
