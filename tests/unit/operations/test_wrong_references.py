"""One wrong value in a catalog: what seems to be needed by nobody is kept, so that the value mended gives all back."""

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from onionskin import FormatError, OnionskinError, Store
from onionskin.catalog import new_id
from onionskin.operations import reclaim, staged_volumes

BLOCK = 4096


def change(path: Path, statement: str, *values: Any) -> None:
    """Write into a catalog as another program does, or as a bit that flips: nothing is refused."""
    with closing(sqlite3.connect(path / "catalog.db")) as catalog, catalog:
        assert catalog.execute(statement, values).rowcount == 1


def ask(path: Path, query: str, *values: Any) -> Any:
    with closing(sqlite3.connect(path / "catalog.db")) as catalog:
        (found,) = catalog.execute(query, values).fetchone()
    return found


@contextmanager
def wrong(path: Path, table: str, column: str, key: str, of: Any, value: Any) -> Iterator[None]:
    """Have a value be another one for the time of the block."""
    right = ask(path, f"SELECT {column} FROM {table} WHERE {key} = ?", of)
    change(path, f"UPDATE {table} SET {column} = ? WHERE {key} = ?", value, of)
    yield
    if key == column:
        of = value
    change(path, f"UPDATE {table} SET {column} = ? WHERE {key} = ?", right, of)


def open_and_work(path: Path, *names: str) -> None:
    """Do all that an opening does by itself, in the store and with volumes."""
    with Store(path) as store:
        for name in names:
            with suppress(OnionskinError), store.open(name) as volume:
                volume.flush()
        staged_volumes.drop_dead(store._opened)
        reclaim.do_work(store._opened)
        store.finish_work()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with a volume that has three snapshots, each with blocks that the next one hides."""
    with Store(tmp_path / "store") as store, store.create("web", size="1M") as web:
        for name in "abc":
            web.write(0, name.encode() * BLOCK)
            web.write(BLOCK * (ord(name) - 90), name.encode() * BLOCK)
            web.snapshot(name)
        web.write(0, b"h" * BLOCK)
    return tmp_path / "store"


def is_whole(path: Path) -> None:
    with Store(path) as store:
        for name in "abc":
            with store.open("web", snapshot=name) as view:
                assert view.read(0, BLOCK) == name.encode() * BLOCK
                assert view.read(BLOCK * (ord(name) - 90), BLOCK) == name.encode() * BLOCK
        with store.open("web") as web:
            assert web.read(0, BLOCK) == b"h" * BLOCK
        assert [one for one in store.check() if one.severity == "error"] == []


def layer_of(path: Path, name: str) -> bytes:
    found: bytes = ask(path, "SELECT layer FROM snapshots WHERE name = ?", name)
    return found


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_a_snapshot_that_names_no_layer_has_nothing_joined_or_freed(
    tmp_path: Path, wipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store"
    with Store(path) as store, store.create("web", size="1M", wipe=wipe) as web:
        for name in "abc":
            web.write(0, name.encode() * BLOCK)
            web.write(BLOCK * (ord(name) - 90), name.encode() * BLOCK)
            web.snapshot(name)
        web.write(0, b"h" * BLOCK)
    with wrong(path, "snapshots", "layer", "name", "b", new_id()):
        open_and_work(path, "web")
        assert any("row" in one.getMessage() and "of snapshots" in one.getMessage() for one in caplog.records)
        with Store(path) as store:
            with store.open("web", snapshot="c") as view:  # what is sound is read
                assert view.read(0, BLOCK) == b"c" * BLOCK
            assert any("snapshots" in one.where and "layers" in one.what for one in store.check())
    is_whole(path)


def test_a_fork_that_stands_on_no_layer_has_nothing_joined_that_it_stood_on(path: Path) -> None:
    with Store(path) as store:
        store.fork("web@a", names=["fork"])
        with store.open("web") as web:
            web.merge("a")  # the layer stays, since the fork stands on it
    head = ask(path, "SELECT head FROM volumes WHERE name = 'fork'")
    with wrong(path, "layers", "parent", "id", head, new_id()):
        open_and_work(path, "web")
    with Store(path) as store, store.open("fork") as fork:
        assert fork.read(0, BLOCK) == b"a" * BLOCK
        assert store.check() == []


def test_no_snapshot_is_discarded_while_a_row_names_nothing(path: Path) -> None:
    with (
        wrong(path, "snapshots", "layer", "name", "a", new_id()),
        Store(path) as store,
        store.open("web") as web,
        pytest.raises(FormatError, match="nothing is dropped"),
    ):
        web.discard("b", recursive=True)
    is_whole(path)


def test_forks_are_dropped_though_a_row_elsewhere_names_nothing(path: Path) -> None:
    """Nothing but the volume itself names its head."""
    with Store(path) as store:
        store.fork("web@c", count=2)
    with wrong(path, "snapshots", "layer", "name", "a", new_id()), Store(path) as store:
        store.delete("web-1", "web-2")
        assert list(store) == ["web"]
    is_whole(path)


def test_a_volume_under_another_id_is_not_opened_for_writing_and_loses_nothing(path: Path) -> None:
    """What a process left that was killed is found by the id."""
    child = os.fork()
    if child == 0:
        try:
            web = Store(path).open("web")
            web.write(5 * BLOCK, b"u" * BLOCK)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)  # others of this process may have ended, too
    id = ask(path, "SELECT id FROM volumes WHERE name = 'web'")
    with wrong(path, "volumes", "id", "id", id, new_id()):
        with Store(path) as store:
            with pytest.raises(FormatError, match=f"lineage has the id {id.hex()}"):
                store.open("web")
            with store.open("web", mode="r") as web:
                assert web.read(0, BLOCK) == b"h" * BLOCK
        open_and_work(path, "web")
    with Store(path) as store, store.open("web") as web:
        assert web.read(5 * BLOCK, BLOCK) == b"u" * BLOCK
    is_whole(path)


def test_a_volume_under_another_id_does_not_expire(path: Path) -> None:
    """Its snapshots and its forks seem to be of another one."""
    with Store(path) as store:
        store.create("tmp", size="1M").close()
        with store.open("tmp") as tmp:
            tmp.write(0, b"t" * BLOCK)
    change(path, "UPDATE volumes SET expires_ns = 1 WHERE name = 'tmp'")
    id = ask(path, "SELECT id FROM volumes WHERE name = 'tmp'")
    with wrong(path, "volumes", "id", "id", id, new_id()), Store(path) as store:
        assert store.expire() == []
    with Store(path) as store:
        assert store.expire() == ["tmp"]


def test_a_volume_whose_snapshot_names_another_volume_does_not_expire(path: Path) -> None:
    change(path, "UPDATE volumes SET expires_ns = 1 WHERE name = 'web'")
    with Store(path) as store, store.open("web") as web:
        web.merge(["b", "c"])
    with wrong(path, "snapshots", "volume", "name", "a", new_id()), Store(path) as store:
        with pytest.raises(FormatError, match="nothing is dropped"):
            store.expire()
        assert list(store) == ["web"]


def test_a_volume_whose_name_begins_like_a_staged_one_by_a_flipped_bit_is_not_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store"
    with Store(path) as store, store.create("Alpha", size="1M") as alpha:
        alpha.write(0, b"a" * BLOCK)
    with wrong(path, "volumes", "name", "name", "Alpha", "@lpha"):
        open_and_work(path)
        assert "@lpha" in caplog.text
    with Store(path) as store, store.open("Alpha", mode="r") as alpha:
        assert alpha.read(0, BLOCK) == b"a" * BLOCK


def joined(path: Path) -> tuple[bytes, bytes]:
    """Have the head of `web` own the segments of a layer; returns a segment of another layer, and that head."""
    with Store(path) as store, store.open("web") as web:
        web.merge("c")
        store.finish_work()
    head = ask(path, "SELECT head FROM volumes WHERE name = 'web'")
    assert ask(path, "SELECT count(*) FROM segments WHERE layer = ? AND role = 'sealed'", head) >= 1
    segment = ask(path, "SELECT id FROM segments WHERE layer = ?", layer_of(path, "a"))
    return segment, head


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_a_segment_whose_row_names_another_layer_is_not_freed(
    tmp_path: Path, wipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store"
    with Store(path) as store:
        for name in ("web", "db"):
            with store.create(name, size="1M", wipe=wipe) as volume:
                volume.write(0, name.encode() * 100)
                volume.snapshot("a")
                volume.write(BLOCK, b"h" * BLOCK)
    segment = ask(
        path,
        "SELECT segments.id FROM segments JOIN snapshots ON snapshots.layer = segments.layer "
        "JOIN volumes ON volumes.id = volume WHERE volumes.name = 'db'",
    )
    head = ask(path, "SELECT head FROM volumes WHERE name = 'web'")
    with wrong(path, "segments", "layer", "id", segment, head):
        open_and_work(path, "web")
        open_and_work(path, "web")
        assert f"the row {segment.hex()} of segments" in caplog.text
    with Store(path) as store, store.open("db", snapshot="a") as view:
        assert view.read(0, 2) == b"db"
        assert store.check() == []


def test_slots_are_freed_of_no_segment_whose_row_names_another_layer(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Work that a process left is done by the next opening, which believes what the row of the segment says."""
    segment = ask(path, "SELECT id FROM segments WHERE layer = ?", layer_of(path, "a"))
    byte = ask(path, "SELECT lock_byte FROM segments WHERE id = ?", segment)
    for layer in (new_id(), layer_of(path, "c")):
        change(
            path, "INSERT INTO pending (kind, target, lock_byte, wipe) VALUES ('scrub', ?, ?, 'zero')", segment, byte
        )
        with wrong(path, "segments", "layer", "id", segment, layer):
            open_and_work(path)
            assert ask(path, "SELECT count(*) FROM pending") == 1
            assert f"the row {segment.hex()} of segments" in caplog.text
        open_and_work(path)
        assert ask(path, "SELECT count(*) FROM pending") == 0
        caplog.clear()
    is_whole(path)


def test_layers_are_not_joined_while_a_segment_of_one_is_said_to_be_of_no_layer(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The value is wrong from when the volume is open, as an opening refuses it."""
    segment, layer = ask(path, "SELECT id FROM segments WHERE layer = ?", layer_of(path, "a")), layer_of(path, "a")
    with Store(path) as store, store.open("web") as web:
        with wrong(path, "segments", "layer", "id", segment, new_id()):
            web.merge("a")
            assert f"names the segment {segment.hex()}" in caplog.text
        assert store._opened.catalog.has_layer(layer)
    with Store(path) as store, store.open("web") as web:
        assert web.read(BLOCK * (ord("a") - 90), BLOCK) == b"a" * BLOCK
        assert [one for one in store.check() if one.severity == "error"] == []


def test_references_are_looked_at_once_for_each_opening(path: Path) -> None:
    with Store(path) as store, store.open("web") as web:
        catalog, seen = store._opened.catalog, []
        catalog._connection.set_trace_callback(seen.append)
        web.discard("c")
        web.snapshot("d")
        web.discard("d")
        catalog._connection.set_trace_callback(None)
    assert len([text for text in seen if "one.layer)" in text]) == 1


def test_check_says_which_row_names_nothing(path: Path) -> None:
    head = ask(path, "SELECT head FROM volumes WHERE name = 'web'")
    with wrong(path, "layers", "parent", "id", head, new_id()), Store(path) as store:
        assert any(f"table layers, row {head.hex()}" in one.where for one in store.check())
    is_whole(path)
