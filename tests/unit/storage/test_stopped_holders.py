"""What another process has locked that was stopped, or is in a debugger: nobody waits for it for ever, without a word."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import onionskin
from onionskin.base.paths import FilePath
from onionskin.catalog import connection
from onionskin.catalog.sqlite_errors import translated
from onionskin.storage import locks

_HOLD_BYTES = """
import fcntl, os, struct, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int(sys.argv[2]), int(sys.argv[3]), 0)
fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
print("held", flush=True)
sys.stdin.read()
"""
_HOLD_DIRECTORY = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(program: str, *arguments: object) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.kill()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
    return tmp_path / "store"


def test_an_opening_waits_for_a_time_for_who_has_the_store_alone_and_says_what_is_in_the_way(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STORE_SECONDS", 0.0)
    with (
        holding(_HOLD_BYTES, root / "lock", 0, 1),
        pytest.raises(onionskin.StateError, match="alone for a minute"),
    ):
        onionskin.Store(root)
    onionskin.Store(root).close()


def test_an_opening_goes_on_without_who_has_the_directory_alone_for_long(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "DIRECTORY_SECONDS", 0.0)
    with holding(_HOLD_DIRECTORY, root), onionskin.Store(root) as store, store.open("web") as web:
        web.write(0, b"x" * 4096)
        web.snapshot("s")


def test_a_forked_child_says_that_the_catalog_is_being_closed_by_a_process_that_does_not_go_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_BUSY_SECONDS", 0)
    with (
        holding(_HOLD_BYTES, root / "catalog.db", *connection._SHARED_BYTES),
        pytest.raises(onionskin.StateError, match="for over a minute"),
    ):
        connection._lock_against_last_close(FilePath(root / "catalog.db"))
    descriptor = connection._lock_against_last_close(FilePath(root / "catalog.db"))
    assert descriptor is not None
    os.close(descriptor)


def test_a_log_whose_index_is_half_written_is_not_called_damage() -> None:
    """SQLite says so where the process that writes it was stopped: a store that is restored then loses what came since."""
    error = sqlite3.OperationalError("locking protocol")
    error.sqlite_errorcode = sqlite3.SQLITE_PROTOCOL
    told = translated(error, FilePath("/store/catalog.db"))
    assert type(told) is onionskin.StateError
    assert "does not go on" in str(told)
