"""Whatever a verb is given, it works or raises before a row is written: the store opens afterwards."""

import enum
import fractions
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import onionskin
from onionskin.catalog import SnapshotRow

SIZE = 1 << 20


def create(**values: Any) -> Callable[[onionskin.Store], object]:
    return lambda store: store.create(**{"name": "q", "size": SIZE, **values}).close()


def snapshot(*arguments: Any, **values: Any) -> Callable[[onionskin.Store], object]:
    def take(store: onionskin.Store) -> None:
        with store.open("a") as volume:
            volume.snapshot(*arguments, **values)

    return take


VERBS: dict[str, Callable[[onionskin.Store], object]] = {
    "block size of NumPy": create(block_size=numpy.int64(8192)),
    "block size that is no power": create(block_size=8191),
    "fraction as block size": create(block_size=8192.0),
    "truth as block size": create(block_size=True),
    "truth as size": create(size=True),
    "fraction as size": create(size=fractions.Fraction(1 << 20)),
    "policy of NumPy": create(wipe=numpy.str_("zero")),
    "bytes as policy": create(wipe=b"zero"),
    "name of NumPy": create(name=numpy.str_("q")),
    "bytes as name": create(name=b"q"),
    "path as name": create(name=Path("q")),
    "number as name": create(name=1),
    "number as note": snapshot("n", 123),
    "bytes as note": snapshot("n", b"x"),
    "number of NumPy as note": snapshot("n", numpy.int64(5)),
    "fraction as note": snapshot("n", 1.5),
    "half a surrogate as note": snapshot("n", "\udc80"),
    "NUL in a note": snapshot("n", "a\0b"),
    "snapshot of NumPy": snapshot(numpy.str_("n")),
    "number as snapshot": snapshot(1),
    "no GUID": snapshot("n", guid="zz"),
    "bytes as GUID": snapshot("n", guid=b"0" * 16),
    "bytes as policy of a clone": lambda store: store.clone("a", "s", "b", wipe=b"zero"),
    "bytes as new name": lambda store: store.rename("a", b"x"),
    "half a surrogate as new name": lambda store: store.rename("a", "\udcff"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_verb_works_or_raises_and_the_store_is_good(
    tmp_path: Path, verb: Callable[[onionskin.Store], object]
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("a", size=SIZE) as volume:
            volume.snapshot("s")
        try:
            verb(store)
        except (TypeError, ValueError):
            assert [info.name for info in store.volumes()] == ["a"]
            assert [snapshot.name for snapshot in store.snapshots("a")] == ["s"]
    with onionskin.Store(tmp_path / "store") as store:
        for info in store.volumes():
            with store.open(info.name) as volume:
                assert volume.read(0, 1) == b"\0"
        assert store.check() == []


def test_a_message_names_some_of_many_clones(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M") as volume:
        volume.snapshot("s")
        for number in range(13):
            store.clone("v", "s", f"clone-{number:02}")
        with pytest.raises(onionskin.StateError, match="clone-09 and 3 more; delete"):
            volume.discard("s", recursive=True)


class Disk(str, enum.Enum):  # noqa: UP042  # a StrEnum prints as its text
    """Names as a program may have them: they print as Disk.WEB."""

    WEB = "web"
    CLEAN = "clean"
    COPY = "web@clean"


def test_a_member_of_an_enum_of_strings_names_what_its_text_names(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create(Disk.WEB, size="1M") as volume:
            assert volume.snapshot(Disk.CLEAN, Disk.COPY).note == "web@clean"
        assert store.snapshot_group({Disk.WEB: "group"})["web"].name == "group"
        store.open("web", snapshot=Disk.CLEAN).close()
        store.clone(Disk.COPY, "new")
        assert (Disk.WEB in store, list(store)) == (True, ["new", "web"])
        store.delete("new")
        store.delete(Disk.WEB, recursive=True)
        assert list(store) == []


def test_a_name_that_utf_8_cannot_hold_is_said_to_be_that(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, pytest.raises(ValueError, match="not text that UTF-8 can hold"):
        store.create("web\udc80", size="1M")


@pytest.mark.parametrize("note", ["a\0b", b"x", 7])
def test_a_row_that_would_not_be_believed_is_not_written(tmp_path: Path, note: Any) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M") as volume:
        volume.snapshot("s")
        row = store._opened.catalog.rows(SnapshotRow)[0]._replace(name="t", note=note)
        with pytest.raises(ValueError, match="nothing was changed"), store._opened.catalog.transaction():
            store._opened.catalog.insert(row)
        assert [snapshot.name for snapshot in volume.snapshots] == ["s"]


ASKED_FOR: dict[str, Callable[[onionskin.Store, Any], object]] = {
    "open": lambda store, name: store.open(name),
    "info": lambda store, name: store.info(name),
    "delete": lambda store, name: store.delete(name, recursive=True),
    "rename": lambda store, name: store.rename(name, "b"),
    "a view": lambda store, name: store.open("a", snapshot=name),
    "usage": lambda store, name: store.usage(name),
    "a machine": lambda store, name: store.machine_info(name),
    "a machine to open": lambda store, name: store.open_machine(name),
    "snapshots of a machine": lambda store, name: store.machine_snapshots(name),
    "usage of a machine": lambda store, name: store.machine_usage(name),
    "lineage of a machine": lambda store, name: store.machine_lineage(name),
    "a machine to rename": lambda store, name: store.rename_machine(name, "other"),
    "machines to delete": lambda store, name: store.delete_machines(name),
    "a note": lambda store, name: store.set_note("a", name, "text"),
}


@pytest.mark.parametrize("ask", ASKED_FOR.values(), ids=ASKED_FOR)
@pytest.mark.parametrize("name", [5, b"5", Path("5"), numpy.int64(5)], ids=repr)
def test_what_is_no_string_is_not_taken_for_the_name_that_it_prints_as(
    tmp_path: Path, ask: Callable[[onionskin.Store, Any], object], name: Any
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        for called in ("a", "5", "b'5'"):
            with store.create(called, size=SIZE) as volume:
                volume.snapshot("5")
        with pytest.raises(TypeError, match="is a str"):
            ask(store, name)
        assert list(store) == ["5", "a", "b'5'"] and store.snapshots("a")[0].note == ""


@pytest.mark.parametrize(
    "verb",
    [
        lambda store: store.set_labels("a", "job=1"),
        lambda store: store.volumes(labels="job=1"),
        lambda store: store.machines(labels="job=1"),
        lambda store: store.fork("a@s", labels="job=1"),
    ],
    ids=["set_labels", "volumes", "machines", "fork"],
)
def test_labels_that_are_no_mapping_are_named(tmp_path: Path, verb: Callable[[onionskin.Store], object]) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("a", size=SIZE) as volume:
            volume.snapshot("s")
        with pytest.raises(TypeError, match="labels are a mapping"):
            verb(store)


def test_an_empty_path_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path of a store is empty"):
        onionskin.Store("")
    assert list(tmp_path.iterdir()) == []


def test_the_geometry_of_an_open_volume_cannot_be_overwritten(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("a", size=SIZE, wipe="zero") as volume:
        for name, value in {"block_size": 8192, "wipe": "release"}.items():
            with pytest.raises(AttributeError):
                setattr(volume, name, value)
        assert (volume.block_size, volume.wipe) == (4096, "zero")
