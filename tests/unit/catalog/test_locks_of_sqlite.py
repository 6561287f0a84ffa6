"""Nothing in this process gives up the locks that SQLite has on a catalog: the close of any descriptor would."""

import fcntl
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import onionskin
from onionskin.base.paths import FilePath
from onionskin.catalog import beside_sqlite, copy_on_write, read_only, sqlite_errors
from onionskin.catalog.sqlite_errors import translated

# SQLite's range of shared locks: whoever has the catalog open has one there, and the last one removes the log.
OTHERS_LOOK = """
import fcntl, struct, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("locked")
"""


def is_locked(catalog: Path) -> bool:
    found = subprocess.run([sys.executable, "-c", OTHERS_LOOK, catalog], capture_output=True, check=True, timeout=300)
    return found.stdout == b"locked\n"


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="64K").close()
    return tmp_path / "store" / "catalog.db"


def test_a_look_at_a_damaged_catalog_keeps_the_locks_of_who_opens_it_meanwhile(
    catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[sqlite3.Connection] = []

    class Os:
        """The module, where another thread opens the catalog behind the first descriptor that is there for the look."""

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def pread(self, *given: int) -> bytes:
            if not others:
                others.append(sqlite3.connect(catalog, isolation_level=None))
                others[0].execute("SELECT count(*) FROM volumes").fetchone()
            return os.pread(*given)

    monkeypatch.setattr(sqlite_errors, "os", Os())
    monkeypatch.setattr(beside_sqlite, "os", Os())
    error = sqlite3.DatabaseError("file is not a database")
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    assert isinstance(translated(error, FilePath(catalog)), onionskin.FormatError)
    with closing(others[0]):
        assert is_locked(catalog)
    assert not is_locked(catalog)


def test_a_private_copy_of_a_catalog_leaves_the_locks_of_who_has_it_open(catalog: Path) -> None:
    with onionskin.Store(catalog.parent, create=False) as store:
        connection, directory = read_only.copied(FilePath(catalog))
        with directory, closing(connection):
            assert connection.execute("SELECT name FROM volumes").fetchall() == [("web",)]
        assert is_locked(catalog)
        assert "web" in store


def test_an_index_for_btrfs_has_its_name_when_nothing_here_closes_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "catalog.db").touch(mode=0o640)
    seen: list[bool] = []

    class NoInodes:
        f_files = 0

    def ioctl(descriptor: int, *_: object) -> bytes:
        seen.append((tmp_path / "catalog.db-shm").exists())
        return bytes(8)

    monkeypatch.setattr(copy_on_write.os, "statvfs", lambda _: NoInodes)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    copy_on_write.make_index_in_place(FilePath(tmp_path / "catalog.db"))
    assert seen == [False, False]
    assert (tmp_path / "catalog.db-shm").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalog.db", "catalog.db-shm"]
