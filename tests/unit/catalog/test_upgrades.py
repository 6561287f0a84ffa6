"""A store that an older onionskin made is opened, and is of this version from then on; an older onionskin refuses it."""

import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from support.older_stores import make_older, tables_of, version_of

import onionskin
from onionskin.catalog import SCHEMA_VERSION, connection
from onionskin.catalog.schema import UPGRADES

BLOCK = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with a volume, a snapshot that somebody holds, and a clone of it."""
    path = tmp_path / "store"
    with onionskin.Store(path) as store:
        with store.create("web", size="1M") as web:
            web.write(0, b"a" * BLOCK)
            web.snapshot("clean")
        store.clone("web", "clean", "copy")
        store.hold("web", "clean", "backup")
    return path


@pytest.mark.parametrize("version", UPGRADES)
def test_a_store_of_each_older_version_is_opened_read_and_changed(path: Path, version: int) -> None:
    tables = tables_of(path)
    make_older(path, version)
    with onionskin.Store(path) as store:
        with store.open("copy", mode="r") as copy:
            assert copy[:BLOCK] == b"a" * BLOCK
        assert [one.name for one in store.lineage("copy")] == ["web"] and store.forks_of("web@clean") == ["copy"]
        assert len(store.holds("web")) == (version >= 4)
        store.fork("web@clean", labels={"task": "42"}, lifetime="1h", idempotency_key="k")
        store.delete("copy")
        assert store.check() == []
    assert version_of(path) == SCHEMA_VERSION and tables_of(path) == tables


def test_forks_of_a_store_of_version_4_are_as_those_of_a_new_one(path: Path) -> None:
    """Version 4 was the first with holds, and had no lineage, no labels and no lifetimes."""
    make_older(path, 4)
    with onionskin.Store(path) as store:
        assert store.fork("web@clean", count=2) == ["web-1", "web-2"]
        assert store.forks_of("web") == ["copy", "web-1", "web-2"]
        store.rename("copy", "other")
        assert store.info("other").expires is None and store.info("other").labels == {} and store.expire() == []


def test_a_store_of_version_5_makes_volumes_as_it_did(path: Path) -> None:
    """Version 5 was the last one without defaults of a store."""
    make_older(path, 5)
    with onionskin.Store(path) as store:
        assert store.defaults() == ("release", BLOCK)
        store.set_defaults(wipe="zero")
        store.create("new", size="1M").close()
        assert (store.info("new").wipe, store.info("web").wipe) == ("zero", "release")


@pytest.mark.parametrize("known", [4, 5, 6])
def test_an_older_onionskin_refuses_a_store_of_this_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    """It compares the version with those that it knows, as this one does with a version to come."""
    monkeypatch.setattr(connection, "SCHEMA_VERSION", known)
    for later in range(known, SCHEMA_VERSION):
        monkeypatch.delitem(UPGRADES, later)
    with pytest.raises(
        onionskin.FormatError, match=rf"has version 7, and this onionskin knows only {known}; use a newer"
    ):
        onionskin.Store(path)


def upgrade_killed_at(path: Path, statement: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Open a store in a child that SIGKILL ends before this statement of the upgrade; False: none is left."""
    upgrade, seen = connection.Connection._upgrade, []

    def count(text: str) -> None:
        seen.append(text)
        if len(seen) == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Any) -> None:
        self._connection.set_trace_callback(count)
        upgrade(self)
        self._connection.set_trace_callback(None)

    child = os.fork()
    if not child:
        try:
            with monkeypatch.context() as patch:
                patch.setattr(connection.Connection, "_upgrade", counted)
                connection.Connection(path / "catalog.db", create=False).close()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("version", "statements"), [(4, 21), (5, 14), (6, 12)])
def test_a_kill_in_the_upgrade_leaves_the_old_version_or_the_new_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: int, statements: int
) -> None:
    tables = tables_of(path)
    make_older(path, version)
    older, statement = tables_of(path), 1
    while upgrade_killed_at(path, statement, monkeypatch):
        assert (version_of(path), tables_of(path)) == (version, older)
        statement += 1
    assert statement > statements
    assert (version_of(path), tables_of(path)) == (SCHEMA_VERSION, tables)
    with onionskin.Store(path) as store:
        assert [one.name for one in store.lineage("copy")] == ["web"] and store.check() == []


def test_a_step_that_fails_leaves_the_old_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_older(path, 3)

    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("no room")

    monkeypatch.setitem(UPGRADES, 4, fail)
    with pytest.raises(onionskin.OnionskinError):
        onionskin.Store(path)
    assert version_of(path) == 3 and "holds" not in tables_of(path)
