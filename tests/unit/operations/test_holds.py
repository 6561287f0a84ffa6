"""A snapshot that somebody holds is not dropped, whatever for; it may get another name and another note."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.older_stores import make_older

import onionskin
from onionskin.catalog import SCHEMA_VERSION, SnapshotRow
from onionskin.storage.open_store import OpenStore

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store whose web has the snapshots a, b and c, one on the other."""
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            for number, name in enumerate("abc"):
                web.write(number * BLOCK, name.encode() * BLOCK)
                web.snapshot(name)
        yield store


def names(store: onionskin.Store) -> list[str]:
    return [row.name for row in store.snapshots("web")]


def on_volume(change: Callable[[onionskin.Volume], object]) -> Callable[[onionskin.Store], None]:
    def call(store: onionskin.Store) -> None:
        with store.open("web") as web:
            change(web)

    return call


DROPS = {
    "merge": on_volume(lambda web: web.merge("b")),
    "discard": on_volume(lambda web: web.discard("b", recursive=True)),
    "discard of one below": on_volume(lambda web: web.discard("a", recursive=True)),
    "delete": lambda store: store.delete("web", recursive=True),
}


@pytest.mark.parametrize("drop", DROPS)
def test_a_held_snapshot_is_not_dropped_and_its_holder_is_named(store: onionskin.Store, drop: str) -> None:
    store.hold("web", "b", "backup")
    with pytest.raises(onionskin.StateError, match=r"web@b by 'backup'.*unhold"):
        DROPS[drop](store)
    assert names(store) == ["a", "b", "c"]
    store.unhold("web", "b", "backup")
    DROPS[drop](store)
    assert "web" not in store or "b" not in names(store)
    assert store.check() == []


@pytest.mark.parametrize("drop", DROPS)
def test_a_hold_that_is_taken_just_before_the_drop_counts(
    store: onionskin.Store, drop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what a verb looks at first and its transaction: the question is asked inside."""
    change = OpenStore.change

    def hold_first(self: OpenStore, what: Callable[[], object]) -> object:
        if self is store._opened and not store.holds("web"):
            with onionskin.Store(store.path) as other:
                other.hold("web", "b", "late")
        return change(self, what)

    monkeypatch.setattr(OpenStore, "change", hold_first)
    with pytest.raises(onionskin.StateError, match="web@b by 'late'"):
        DROPS[drop](store)
    assert names(store) == ["a", "b", "c"]


def test_what_does_not_ask_about_holds_fails_at_the_catalog(store: onionskin.Store) -> None:
    """As a process does that was started with an older onionskin: of what it tries nothing happens."""
    store.hold("web", "b", "backup")
    catalog = store._opened.catalog
    with pytest.raises(onionskin.FormatError, match="FOREIGN KEY"):
        store._opened.change(lambda: catalog.delete(SnapshotRow, "1"))
    assert names(store) == ["a", "b", "c"]


def test_other_snapshots_are_dropped_and_the_disk_is_used(store: onionskin.Store) -> None:
    store.hold("web", "b", "backup")
    with store.open("web") as web:
        web.merge("a")
        web.discard("c")
        web.write(0, b"x" * BLOCK)
        web.revert("b")
        assert web[: 3 * BLOCK : 1] == b"a" * BLOCK + b"b" * BLOCK + bytes(BLOCK)
    assert names(store) == ["b"] and store.check() == []


def test_several_hold_one_snapshot_and_each_lets_go_for_itself(store: onionskin.Store) -> None:
    for name, holder in (("c", "cron"), ("b", "cron"), ("b", "audit")):
        store.hold("web", name, holder)
    assert [(hold.snapshot, hold.holder) for hold in store.holds("web")] == [
        ("b", "cron"),
        ("b", "audit"),
        ("c", "cron"),
    ]
    assert [hold.holder for hold in store.holds("web", "c")] == ["cron"] and store.holds("web", "a") == []
    store.unhold("web", "b", "cron")
    with pytest.raises(onionskin.StateError, match=r"web@b by 'audit'"), store.open("web") as web:
        web.merge("b")
    with pytest.raises(onionskin.StateError, match=r"not held by 'cron'; it is held by audit"):
        store.unhold("web", "b", "cron")
    with pytest.raises(onionskin.StateError, match="held by nobody"):
        store.unhold("web", "a", "cron")
    with pytest.raises(onionskin.StateError, match="held by 'audit' already"):
        store.hold("web", "b", "audit")


def test_a_hold_outlives_the_process_and_goes_with_the_name(store: onionskin.Store) -> None:
    store.hold("web", "b", "backup")
    store.rename_snapshot("web", "b", "kept")
    store.rename("web", "www")
    with onionskin.Store(store.path) as again:
        assert [hold.snapshot for hold in again.holds("www")] == ["kept"]
        with pytest.raises(onionskin.StateError, match="www@kept by 'backup'"):
            again.delete("www", recursive=True)


@pytest.mark.parametrize("call", ["hold", "unhold", "holds"])
def test_what_is_not_there_is_not_held(store: onionskin.Store, call: str) -> None:
    more = () if call == "holds" else ("backup",)
    with pytest.raises(onionskin.SnapshotNotFoundError):
        getattr(store, call)("web", "z", *more)
    with pytest.raises(onionskin.VolumeNotFoundError):
        getattr(store, call)("mail", "a", *more)


def test_a_holder_has_a_name_that_prints_on_a_line(store: onionskin.Store) -> None:
    for holder in ("", "two\nlines"):
        with pytest.raises(ValueError, match="holder"):
            store.hold("web", "a", holder)


def test_a_store_of_the_version_before_holds_learns_to(store: onionskin.Store) -> None:
    store.close()
    make_older(store.path, 3)
    with onionskin.Store(store.path) as again:
        again.hold("web", "a", "backup")
        assert len(again.holds("web")) == 1 and again.check() == []


def test_an_onionskin_that_does_not_know_holds_refuses_the_store(store: onionskin.Store) -> None:
    """It compares the version with those that it knows, of which the greatest was 3."""
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        assert catalog.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert SCHEMA_VERSION > 3


# ---- names and notes ----


def test_a_snapshot_gets_another_name_and_stays_what_it_is(store: onionskin.Store) -> None:
    store.clone("web", "b", "copy")
    before = {row.name: row for row in store.snapshots("web")}
    with store.open("web", snapshot="b") as view, store.open("web") as web:
        store.rename_snapshot("web", "b", "before the upgrade")
        assert view[:BLOCK] == b"a" * BLOCK
        web.write(0, b"x")
        web.revert("before the upgrade")
        assert web[:1] == b"a"
    after = {row.name: row for row in store.snapshots("web")}
    assert list(after) == ["a", "before the upgrade", "c"] and after["c"].parent == "before the upgrade"
    assert after["before the upgrade"].guid == before["b"].guid
    assert store.check() == []


def test_a_name_that_is_taken_is_refused(store: onionskin.Store) -> None:
    with pytest.raises(onionskin.SnapshotExistsError, match="'c'"):
        store.rename_snapshot("web", "b", "c")
    store.rename_snapshot("web", "b", "b")
    with pytest.raises(ValueError, match="snapshot"):
        store.rename_snapshot("web", "b", "x@y")
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.rename_snapshot("web", "z", "y")
    assert names(store) == ["a", "b", "c"]


def test_a_note_is_changed_and_taken_away(store: onionskin.Store) -> None:
    for note in ("before the upgrade\nof the database", ""):
        store.set_note("web", "b", note)
        assert [row.note for row in store.snapshots("web")] == ["", note, ""]
    with pytest.raises(ValueError, match="at most"):
        store.set_note("web", "b", "x" * (1 << 17))
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.set_note("web", "z", "y")
