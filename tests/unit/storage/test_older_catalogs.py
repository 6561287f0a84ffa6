"""A catalog that does not belong to the files beside it: older, without its log, or another's. Nothing is changed then."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import onionskin
from onionskin import FormatError, Store
from onionskin.storage import mark
from onionskin.storage.layout import Layout

BLOCK = 4096


def contents(path: Path) -> dict[str, bytes]:
    """Return all that a store holds but its catalog, and what only an opening makes."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix in (".seg", ".map", ".dirty")
    }


def snapshot(path: Path, name: str, byte: bytes) -> None:
    with Store(path) as store, store.open("web") as web:
        web.write(0, byte * BLOCK)
        web.snapshot(name)
        web.write(BLOCK, byte * BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store(tmp_path / "store") as store:
        store.create("web", size="1M").close()
        store.create("db", size="1M").close()
    snapshot(tmp_path / "store", "a", b"a")
    return tmp_path / "store"


def use(path: Path) -> list[Callable[[Store], object]]:
    """Return what would change something."""
    return [
        lambda store: store.open("web"),
        lambda store: store.delete("db"),
        lambda store: store.create("new", size="1M"),
        lambda store: store.fork("web@a"),
        lambda store: store.expire(),
        lambda store: store.check(repair=True),
    ]


def refuses_all_and_reads(path: Path, match: str) -> None:
    before = contents(path)
    for change in use(path):
        with Store(path) as store, pytest.raises(FormatError, match=match):
            change(store)
    with Store(path) as store:
        assert store.read_only
        with store.open("web", snapshot="a") as view:
            assert view.read(0, 1) == b"a"
        assert any(one.severity == "error" and match in one.what for one in store.check())
        store.finish_work()
    assert contents(path) == before


def test_an_older_catalog_changes_and_frees_nothing_of_what_came_since(path: Path) -> None:
    older = (path / "catalog.db").read_bytes()
    snapshot(path, "b", b"b")
    snapshot(path, "c", b"c")
    newer = (path / "catalog.db").read_bytes()
    (path / "catalog.db").write_bytes(older)
    refuses_all_and_reads(path, "older than the files")
    (path / "catalog.db").write_bytes(newer)
    with Store(path) as store:
        assert not store.read_only
        for name in "abc":
            with store.open("web", snapshot=name) as view:
                assert view.read(0, 1) == name.encode()
        assert store.check() == []


def test_a_catalog_without_its_log_changes_and_frees_nothing(path: Path, tmp_path: Path) -> None:
    """As a backup leaves it that copies a store while it is open, and takes catalog.db for all of the catalog."""
    with Store(path) as store, store.open("web") as web:
        web.write(0, b"b" * BLOCK)
        web.snapshot("b")
        store.finish_work()
        shutil.copytree(path, tmp_path / "copy", ignore=shutil.ignore_patterns("catalog.db-*"))
    refuses_all_and_reads(tmp_path / "copy", "older than the files")


def test_a_catalog_with_the_log_of_another_store_changes_and_frees_nothing(path: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "other") as store:
        store.create("web", size="1M").close()
        log = (tmp_path / "other" / "catalog.db-wal").read_bytes()
    (path / "catalog.db-wal").write_bytes(log)
    before = contents(path)
    with Store(path) as store:
        assert store.read_only
        for change in (lambda: store.delete("web"), lambda: store.create("new", size="1M")):
            with pytest.raises(FormatError, match="another store"):
                change()
    assert contents(path) == before


def test_who_removes_the_mark_goes_on_with_an_older_catalog(path: Path) -> None:
    older = (path / "catalog.db").read_bytes()
    with Store(path) as store:
        store.create("later", size="1M").close()
    (path / "catalog.db").write_bytes(older)
    with Store(path) as store, pytest.raises(FormatError, match=f"remove {path}/mark"):
        store.delete("db")
    (path / "mark").unlink()
    with Store(path) as store:
        store.delete("db")
        with store.open("web") as web:
            web.snapshot("b")
    assert (path / "mark").exists()


def test_a_head_whose_successor_was_written_is_not_opened_by_an_older_catalog_without_a_mark(path: Path) -> None:
    older = (path / "catalog.db").read_bytes()
    snapshot(path, "b", b"b")
    newer = (path / "catalog.db").read_bytes()
    (path / "catalog.db").write_bytes(older)
    (path / "mark").unlink()
    before = contents(path)
    with Store(path) as store:
        with pytest.raises(FormatError, match="older than the files"):
            store.open("web")
        assert any("older than the files" in one.what for one in store.check())
        store.open("db").close()
    assert {name: before[name] for name in before} == {name: contents(path)[name] for name in before}
    (path / "catalog.db").write_bytes(newer)
    with Store(path) as store, store.open("web") as web:
        assert web.read(BLOCK, 1) == b"b"


def test_a_mark_that_is_none_says_nothing(path: Path) -> None:
    whole = (path / "mark").read_bytes()
    for wrong in (b"", whole[:-1], whole[:20] + b"\xff" + whole[21:], b"x" * len(whole)):
        (path / "mark").write_bytes(wrong)
        with Store(path) as store:
            assert not store.read_only
    (path / "mark").unlink()
    (path / "mark").write_bytes(whole)
    (path / "other name").hardlink_to(path / "mark")
    assert mark.read(Layout(onionskin.base.paths.FilePath(path)).mark) is None


def test_the_mark_never_says_what_the_catalog_has_not(path: Path) -> None:
    for name in "bcd":
        snapshot(path, name, b"x")
        with closing(sqlite3.connect(path / "catalog.db")) as catalog:
            (lock_bytes,) = catalog.execute("SELECT next_lock_byte FROM store").fetchone()
            (works,) = catalog.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence").fetchone()
        said = mark.read(Layout(onionskin.base.paths.FilePath(path)).mark)
        assert said is not None
        assert (said.lock_bytes, said.works) == (lock_bytes, works)


def test_who_only_looks_writes_no_mark(path: Path) -> None:
    (path / "mark").unlink()
    with Store(path) as store:
        assert sorted(store) == ["db", "web"]
    assert not (path / "mark").exists()
