"""A store that is moved while it is open, and a copy of it, or another store, that is put in its place.

A copy has files of the same names, so whoever goes by names alone frees, and makes, files of the copy.
"""

import shutil
from pathlib import Path

import pytest

import onionskin

BLOCK = 4096
SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def exchange_for_a_copy(store: onionskin.Store) -> Path:
    """Move a store away, and put a copy in its place. Returns where the store is now."""
    store.finish_work()  # what it does in the background would make and remove files while they are copied
    path = store.path
    moved = path.with_name("moved")
    path.rename(moved)
    shutil.copytree(moved, path)
    return moved


def has_no_problem(path: Path) -> bool:
    with onionskin.Store(path) as store:
        return store.check() == []


def contents(path: Path, snapshot: str) -> bytes:
    with onionskin.Store(path) as store, store.open("v", snapshot=snapshot) as view:
        return view.read(0, 2 * BLOCK)


def test_what_is_freed_in_a_store_that_was_moved_is_not_freed_in_the_copy_in_its_place(path: Path) -> None:
    with onionskin.Store(path) as store:
        with store.create("v", size=SIZE) as volume:
            volume.write(0, b"a" * BLOCK)
            volume.snapshot("a")
            volume.write(0, b"b" * BLOCK)
            volume.snapshot("b")
        moved = exchange_for_a_copy(store)
        with pytest.raises(onionskin.StateError, match="put it back"):
            store.delete("v", recursive=True)
    for place in (path, moved):
        assert has_no_problem(place)
        assert contents(place, "a") == b"a" * BLOCK + bytes(BLOCK)
        assert contents(place, "b") == b"b" * BLOCK + bytes(BLOCK)


def test_work_that_was_noted_before_a_store_was_moved_is_not_done_in_the_copy(path: Path) -> None:
    with onionskin.Store(path) as store:
        with store.create("v", size=SIZE) as volume:
            volume.write(0, b"a" * BLOCK)
            volume.snapshot("a")
        with store.open("v", snapshot="a"):  # it keeps the file of the layer, so its removal is left for later
            store.delete("v", recursive=True)
            exchange_for_a_copy(store)
        store.finish_work()
    assert len(list((path / "segments").iterdir())) == len(list((path.with_name("moved") / "segments").iterdir()))


def test_a_write_to_a_store_that_was_moved_makes_no_file_in_another_store(path: Path) -> None:
    with onionskin.Store(path) as store, store.create("v", size=SIZE) as volume:
        volume.snapshot("empty")
        path.rename(path.with_name("moved"))
        onionskin.Store(path, create=True).close()
        with pytest.raises(onionskin.StateError, match="put it back"):
            volume.write(0, b"a" * BLOCK)
    assert [*(path / "segments").iterdir(), *(path / "layers").iterdir()] == []
    assert has_no_problem(path.with_name("moved"))


def test_a_log_is_not_made_in_another_store(path: Path) -> None:
    with onionskin.Store(path) as store:
        volume = store.create("v", size=SIZE)
        volume.write(0, b"a" * BLOCK)
        moved = path.with_name("moved")
        path.rename(moved)
        onionskin.Store(path, create=True).close()
        with pytest.raises(onionskin.StateError, match="put it back"):
            volume.flush()
        assert list((path / "layers").iterdir()) == []
        shutil.rmtree(path)
        moved.rename(path)
        volume.flush()
        volume.close()
    with onionskin.Store(path) as store, store.open("v", mode="r") as volume:
        assert volume.read(0, BLOCK) == b"a" * BLOCK


def test_a_snapshot_is_not_read_from_another_store(path: Path) -> None:
    with onionskin.Store(path) as store:
        with store.create("v", size=SIZE) as volume:
            volume.write(0, b"a" * BLOCK)
            volume.snapshot("a")
        with store.open("v", snapshot="a") as view:  # nothing is mapped before it is read
            exchange_for_a_copy(store)
            with pytest.raises(onionskin.StateError, match="put it back"):
                view.read(0, BLOCK)


def test_a_volume_of_a_store_that_was_moved_is_not_opened_in_the_copy(path: Path) -> None:
    with onionskin.Store(path) as store:
        store.create("v", size=SIZE).close()
        exchange_for_a_copy(store)
        with pytest.raises(onionskin.StateError, match="put it back"):
            store.open("v")
        with pytest.raises(onionskin.StateError, match="put it back"):
            store.open("v", mode="r")
    assert has_no_problem(path)


def test_a_store_that_is_put_back_goes_on(path: Path) -> None:
    with onionskin.Store(path) as store, store.create("v", size=SIZE) as volume:
        volume.write(0, b"a" * BLOCK)
        moved = path.with_name("moved")
        path.rename(moved)
        with pytest.raises(onionskin.StateError, match="put it back"):
            volume.snapshot("a")
        moved.rename(path)
        volume.snapshot("b")
        volume.write(0, b"b" * BLOCK)
    assert contents(path, "b")[:BLOCK] == b"a" * BLOCK
    assert has_no_problem(path)


def test_nothing_is_committed_to_a_log_of_the_catalog_that_was_removed(path: Path) -> None:
    with onionskin.Store(path) as store, store.create("v", size=SIZE) as volume:
        volume.write(0, b"a" * BLOCK)
        volume.snapshot("a")
        (path / "catalog.db-wal").unlink()
        with pytest.raises(onionskin.StateError, match="open it again"):
            volume.snapshot("b")
    assert contents(path, "a")[:BLOCK] == b"a" * BLOCK
    assert has_no_problem(path)
