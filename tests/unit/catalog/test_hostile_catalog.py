"""A catalog in which any one value is another than it was: an error that says so, or a store that works."""

import itertools
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from support.machines import make_machine, snapshot_live

import onionskin
from onionskin.catalog import SegmentRow
from onionskin.catalog.rows import KEYS, TABLES
from onionskin.catalog.schema import SCHEMA
from onionskin.operations import machine_removal, machine_usage, machines

VALUES = [
    None,
    -1,
    0,
    1,
    7,
    1 << 40,
    (1 << 63) - 1,
    -(1 << 63),
    1.5,
    "",
    "text",
    "a/b@c",
    "\0",
    b"",
    b"\xff" * 16,
    b"x" * 5000,
]
COLUMNS = [
    (statement.split()[2], column.split()[0])
    for statement in SCHEMA.strip().split(";\n")
    if statement.startswith("CREATE TABLE")
    for column in statement[statement.index("(") + 1 :].split("PRIMARY KEY (")[0].replace("\n", " ").split(", ")
    if column.strip(" );")
]


KEY_COLUMNS = {"store": "uuid"} | {TABLES[kind]: key for kind, key in KEYS.items()}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of row, without the constraints that would keep values out."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "base.raw").write_bytes(b"base" * 5000)
    with onionskin.Store(root / "store") as store:
        with store.create("web", base=root / "base.raw", digest=True) as web:
            web.write(0, b"one")
            web.snapshot("a", "note")
            web.write(9000, b"two")
            web.snapshot("b")
            web.trim(0, 4096)
        store.create("db", size="8M", wipe="zero").close()
        store.fork("web@a", names=["copy"], labels={"task": "42"}, lifetime="1h", idempotency_key="k")
        store.hold("web", "a", "backup")
        store.create("disk", size="64K").close()
        make_machine(store, "lab", ["disk"])
        for name in ("ready", "later"):
            snapshot_live(store, "lab", name, {"disk": b"disk", "lab.ram": b"memory"})
        store.fork_machine("lab@ready")
        with store._opened.catalog.transaction():
            row = store._opened.catalog.rows(SegmentRow)[0]
            store._opened.catalog.add_work("scrub", row.id, row.lock_byte, "zero")
    with closing(sqlite3.connect(root / "store" / "catalog.db")) as catalog:
        catalog.execute("PRAGMA writable_schema = ON")
        catalog.execute("UPDATE sqlite_schema SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")
        catalog.commit()
    (root / "store" / "reserve").unlink()
    return root / "store"


def use_machines(path: Path) -> None:
    """Do with a store all that reads the rows of machines, each for itself."""
    calls: list[Callable[[onionskin.Store], Any]] = [
        lambda store: store.volumes(owned=True),
        lambda store: store.machines(),
        lambda store: store.machine_info("lab-1"),
        lambda store: store.machine_snapshots("lab"),
        lambda store: store.machine_usage("lab"),
        lambda store: store.machine_lineage("lab-1"),
        lambda store: machines.refuse_written(store._opened, machines.beginning(store._opened, "lab-1").machine),
        lambda store: machine_usage.loss_of_discard(store._opened, "lab", ["later"], recursive=False),
        lambda store: store._snapshot_machine_off("lab", "off"),
        lambda store: store._revert_machine("lab", "ready"),
        lambda store: machines.beginning(store._opened, "lab"),
        lambda store: store.fork_machine("lab@ready", count=2),
        lambda store: store._merge_machine_snapshots("lab", "later"),
        lambda store: store._discard_machine_snapshots("lab", "ready", recursive=True),
        lambda store: store.rename_machine("lab-1", "box"),
        lambda store: machine_removal.loss_of_delete(store._opened, ["box", "lab-1"], recursive=True),
        lambda store: store.delete_machines("box", recursive=True),
        lambda store: store.delete_machines("lab", recursive=True),
    ]
    for call in calls:
        with suppress(onionskin.OnionskinError, OSError), onionskin.Store(path, create=False) as store:
            call(store)


def use(path: Path) -> None:
    """Do with a store all that reads its catalog, each for itself."""
    calls: list[Callable[[onionskin.Store], Any]] = [
        onionskin.Store.volumes,
        onionskin.Store.tree,
        onionskin.Store.check,
        lambda store: store.usage("web"),
        lambda store: store.diff("web", "a", "b"),
        lambda store: store.snapshots("web"),
        lambda store: store.open("web", snapshot="a").read(0, 1),
        lambda store: store.open("web", snapshot="b").view(0, 1),
        lambda store: store.open("db").read(0, 1),
        write_and_take_back,
        lambda store: store.clone("web", "b", "another"),
        lambda store: store.rename("copy", "other"),
        lambda store: store.holds("web"),
        lambda store: store.unhold("web", "a", "backup"),
        lambda store: store.lineage("copy"),
        lambda store: store.forks_of("web@a"),
        lambda store: store.volumes(labels={"task": "42"}),
        lambda store: store.fork("web@a", names=["copy"], labels={"task": "42"}, lifetime="1h", idempotency_key="k"),
        lambda store: store.fork("web"),
        lambda store: store.expire(),
        lambda store: store.delete("copy", "db"),
        lambda store: store.delete("web", recursive=True),
        lambda store: store.check(repair=True),
    ]
    for call in calls:
        with suppress(onionskin.OnionskinError, OSError), onionskin.Store(path, create=False) as store:
            call(store)


def write_and_take_back(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"3")
        web.snapshot("c")
        web.revert("a")
        web.merge("c")


@pytest.mark.parametrize(("table", "column"), COLUMNS)
@pytest.mark.slow
def test_any_value_of_a_column_is_refused_or_works(store_path: Path, tmp_path: Path, table: str, column: str) -> None:
    with closing(sqlite3.connect(store_path / "catalog.db")) as catalog:
        rows = catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    assert rows
    for value, row in itertools.product(VALUES, {0, rows - 1}):
        path = tmp_path / f"{row}-{VALUES.index(value)}"
        shutil.copytree(store_path, path)
        with suppress(sqlite3.IntegrityError), closing(sqlite3.connect(path / "catalog.db")) as catalog:
            key = KEY_COLUMNS.get(table, "id")
            (found,) = catalog.execute(f"SELECT {key} FROM {table} LIMIT 1 OFFSET {row}").fetchone()
            catalog.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (value, found))
            catalog.commit()
        with suppress(onionskin.FormatError):
            onionskin.Store(path, create=False).close()
            (use_machines if table.startswith("machine") else use)(path)
        shutil.rmtree(path)


def test_a_catalog_without_the_row_of_its_store_is_damage_and_is_not_changed(store_path: Path, tmp_path: Path) -> None:
    shutil.copytree(store_path, tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        catalog.execute("DELETE FROM store")
        catalog.commit()
    with onionskin.Store(tmp_path / "store") as store:
        for change in (lambda: store.clone("web", "a", "new"), lambda: store.rename("web", "new")):
            with pytest.raises(onionskin.FormatError, match="row that says which store it is"):
                change()
        assert "new" not in store


def test_layers_in_a_circle_are_refused_and_not_followed(store_path: Path, tmp_path: Path) -> None:
    shutil.copytree(store_path, tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        catalog.execute("UPDATE layers SET parent = id, base = NULL WHERE base IS NOT NULL")
        catalog.commit()
    with onionskin.Store(tmp_path / "store") as store:
        with pytest.raises(onionskin.FormatError, match="circle"):
            store.open("web")
        with pytest.raises(onionskin.FormatError, match="circle"):
            store.open("web", snapshot="a")
        store.open("db").close()
        assert any("circle" in fault for _, _, fault in store._opened.catalog.unsound_rows())


def test_lineage_in_a_circle_is_followed_once_and_keeps_nothing_from_being_dropped(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("a", size="1M").close()
        store.fork("a", names=["b"])
        store.fork("b", names=["c"])
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        ids = dict(catalog.execute("SELECT name, id FROM volumes"))
        for name, parent in (("a", "c"), ("b", "b")):
            catalog.execute("UPDATE lineage SET parent = ? WHERE name = ?", (ids[parent], name))
        catalog.commit()
    with onionskin.Store(tmp_path / "store") as store:
        assert [ancestor.name for ancestor in store.lineage("c")] == ["b"]
        assert [ancestor.name for ancestor in store.lineage("a")] == ["c", "b"]
        store.delete("a", "b", "c")
        assert len(store) == 0 and store.check() == []


def test_a_bad_row_of_one_volume_keeps_nobody_from_the_others(store_path: Path, tmp_path: Path) -> None:
    shutil.copytree(store_path, tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        catalog.execute("UPDATE snapshots SET note = ? WHERE name = 'a'", ("a\0b",))
        catalog.execute("UPDATE layers SET wipe = 'shred' WHERE id = (SELECT head FROM volumes WHERE name = 'web')")
        catalog.commit()
    with onionskin.Store(tmp_path / "store") as store:
        with store.open("db") as db:
            db.write(0, b"works")
            db.snapshot("one")
        with pytest.raises(onionskin.FormatError, match="layers"):
            store.open("web")
        assert {(table, bool(id)) for table, id, _ in store._opened.catalog.unsound_rows()} == {
            ("snapshots", True),
            ("layers", True),
        }


@pytest.mark.parametrize("role", ["own", "spare"])
@pytest.mark.parametrize("mode", ["w", "r"])
def test_a_head_without_a_segment_that_each_has_is_damage(
    store_path: Path, tmp_path: Path, role: str, mode: Literal["r", "w"]
) -> None:
    shutil.copytree(store_path, tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        catalog.execute("DELETE FROM segments WHERE role = ?", (role,))
        catalog.commit()
    with onionskin.Store(tmp_path / "store") as store:
        if (role, mode) == ("spare", "r"):  # which nobody needs to read
            store.open("db", mode=mode).close()
            return
        with pytest.raises(onionskin.FormatError, match=f"has (no|0) {role} segment"):
            store.open("db", mode=mode)


def test_a_merge_into_the_base_that_a_volume_does_not_have_is_damage(store_path: Path, tmp_path: Path) -> None:
    shutil.copytree(store_path, tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "catalog.db")) as catalog:
        catalog.execute(
            "INSERT INTO pending (kind, target, lock_byte, wipe, done_bytes)"
            " SELECT 'base-merge', head, 0, 'release', 0 FROM volumes WHERE name = 'db'"
        )
        catalog.commit()
    with (
        onionskin.Store(tmp_path / "store") as store,
        store.open("db") as db,
        pytest.raises(onionskin.FormatError, match="'db' into its base was begun, but it has no base"),
    ):
        db.merge_into_base()
