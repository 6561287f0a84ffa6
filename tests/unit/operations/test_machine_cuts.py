"""The two transactions of a snapshot of a machine: its disks are cut, and later all of it gets its name, or nothing."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.errors import SnapshotExistsError, StateError
from onionskin.operations import machines
from onionskin.operations.machine_snapshots import MachineCut

BLOCK = 4096
MEMORY = 1 << 20
CONFIGURATION = '{"memory_bytes":1048576}'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with machine lab, whose disks are web and data."""
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("web", "data"):
            with store.create(name, size="1M") as disk:
                disk.write(0, name.encode() * 1024)
        machines.create(
            store._opened, "lab", ["web", "data"], configuration=CONFIGURATION, memory_bytes=MEMORY, wipe=None
        )
        yield store


def commit(cut: MachineCut, name: str | None, ram: onionskin.Volume | None = None) -> None:
    cut.commit(
        name,
        "why",
        mode="off" if ram is None else "live",
        configuration=CONFIGURATION,
        recorded="" if ram is None else "{}",
        ram=None if ram is None else ram._opened.to_write(),
        state_bytes=0 if ram is None else BLOCK,
    )


def layers(store: onionskin.Store) -> int:
    with store._opened.catalog.reading():
        return len(store._opened.catalog.parents()) + len(store._opened.catalog.volumes())


def read_at(store: onionskin.Store, volume: str, snapshot: str, length: int = 8) -> bytes:
    with store.open(volume, snapshot=snapshot) as view:
        return view.read(0, length)


def test_disks_read_as_at_the_cut_whatever_was_written_before_the_commit(store: onionskin.Store) -> None:
    with store.open("web") as web, store.open("data") as data, store._open_to_write("lab.ram", for_machine=True) as ram:
        web.write(0, b"before")
        with store._cut_machine("lab") as cut:
            cut.seal()
            web.write(0, b"after!")
            data.write(0, b"after!")
            web.flush()
            ram.write(0, b"memory")
            commit(cut, "ready", ram)
        ram.write(0, b"later!")
    assert read_at(store, "web", "ready", 6) == b"before" and read_at(store, "data", "ready", 4) == b"data"
    assert read_at(store, "lab.ram", "ready", 6) == b"memory"
    with store.open("web") as web:
        assert web.read(0, 6) == b"after!"
    catalog = store._opened.catalog
    machine = machines.find(catalog, "lab")
    (taken,) = catalog.snapshots_of_machine(machine.id)
    assert (taken.name, taken.note, taken.mode, taken.parent) == ("ready", "why", "live", None)
    assert machine.stands_on == taken.id and len(catalog.disks_of_machine_snapshot(taken.id)) == 2
    assert store.check() == [] and not catalog.staged_volumes()


def test_when_cut_is_called_before_anything_is_durable_and_writers_go_on(store: onionskin.Store) -> None:
    with store.open("web") as web:
        with store._cut_machine("lab") as cut:
            cut.seal(lambda: web.write(0, b"after!"))
            commit(cut, "off")
        assert web.read(0, 6) == b"after!"
    assert read_at(store, "web", "off", 3) == b"web"


def test_nothing_folds_what_was_cut_before_it_has_its_name(store: onionskin.Store) -> None:
    """Forks of the disk as it is now fold the cut before them, where nothing else needs it."""
    with store.open("web") as web, store._cut_machine("lab") as cut:
        cut.seal()
        for count in range(3):
            web.write(0, b"%d" % count)
            store.delete(*store.fork("web"))
        commit(cut, "ready")
    assert read_at(store, "web", "ready", 3) == b"web"


@pytest.mark.parametrize("is_open", [False, True])
def test_what_is_abandoned_leaves_nothing(store: onionskin.Store, is_open: bool) -> None:
    store.finish_work()
    before = layers(store)
    opened = store.open("web") if is_open else None
    with store._cut_machine("lab") as cut:
        cut.seal()
        cut.abandon()
        cut.abandon()
        with pytest.raises(StateError):
            commit(cut, "ready")
    if opened:
        opened.write(0, b"x")
        opened.close()
    store.finish_work()
    assert layers(store) == before and store.snapshots("web") == [] and store.check() == []


def test_an_error_in_the_block_abandons_what_was_cut(store: onionskin.Store) -> None:
    before = layers(store)
    with pytest.raises(ZeroDivisionError), store._cut_machine("lab") as cut:
        cut.seal()
        _ = 1 // 0
    assert layers(store) == before and not store._opened.catalog.staged_volumes()


def test_what_a_killed_process_cut_folds_at_the_next_opening(store: onionskin.Store) -> None:
    before = layers(store)
    path = store.path
    child = os.fork()
    if not child:
        with onionskin.Store(path) as own, own._cut_machine("lab") as cut:
            cut.seal()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert len(store._opened.catalog.staged_volumes()) == 2
    for name in ("web", "data"):
        with store.open(name) as disk:
            assert disk.read(0, len(name)) == name.encode()
    store.finish_work()
    assert layers(store) == before and store.check() == []
    with store._cut_machine("lab") as cut:
        cut.seal()
        commit(cut, "ready")


def test_a_taken_name_is_refused_before_and_at_the_commit_and_nothing_is_named(store: onionskin.Store) -> None:
    with store.open("data") as data:
        data.snapshot("ready")
    with (
        store._open_to_write("lab.ram", for_machine=True) as ram,
        pytest.raises(SnapshotExistsError, match="data"),
        store._cut_machine("lab") as cut,
    ):
        with pytest.raises(SnapshotExistsError):
            cut.check("ready")
        cut.seal()
        commit(cut, "ready", ram)
    assert store.snapshots("web") == [] and store.snapshots("lab.ram") == []
    assert machines.find(store._opened.catalog, "lab").stands_on is None


def test_a_snapshot_without_a_name_has_the_time(store: onionskin.Store) -> None:
    for _ in range(2):
        with store._cut_machine("lab") as cut:
            cut.seal()
            commit(cut, None)
    machine = machines.find(store._opened.catalog, "lab")
    taken = store._opened.catalog.snapshots_of_machine(machine.id)
    assert [one.name for one in taken] == [one.name for one in store.snapshots("web")] and len(taken) == 2
    assert taken[1].parent == taken[0].id


def test_a_snapshot_taken_between_cut_and_commit_comes_after_it(store: onionskin.Store) -> None:
    with store.open("web") as web, store._cut_machine("lab") as cut:
        cut.seal()
        web.write(0, b"later")
        web.snapshot("between")
        commit(cut, "ready")
        assert [(one.name, one.parent) for one in web.snapshots] == [("ready", None), ("between", "ready")]


def test_the_cut_needs_a_machine_and_its_own_ram(store: onionskin.Store) -> None:
    with pytest.raises(onionskin.MachineNotFoundError), store._cut_machine("other"):
        pass
    with store.create("other", size="1M") as other, store._cut_machine("lab") as cut:
        with pytest.raises(StateError, match="not cut"):
            commit(cut, "ready")
        cut.seal()
        with pytest.raises(StateError, match="cut before"):
            cut.seal()
        with pytest.raises(ValueError, match="not the RAM"):
            commit(cut, "ready", other)
