"""Machines in a store: what they are made of, what belongs to them, and what volume verbs leave alone because of it."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.machines import CONFIGURATION, MEMORY, make_machine, read_head, snapshot_live

import onionskin
from onionskin.errors import MachineExistsError, MachineNotFoundError, StateError, VolumeExistsError
from onionskin.operations import losses, machine_removal, machines


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with machine lab, whose disks are web and data, and volume other."""
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("web", "data", "other"):
            store.create(name, size="1M").close()
        make_machine(store, "lab", ["web", "data"])
        yield store


def test_a_disk_that_is_in_use_is_said_to_belong_to_its_machine_before_anything_else(store: onionskin.Store) -> None:
    with store.open("web"), pytest.raises(StateError, match="belongs to machine 'lab'"):
        store.delete("web")


def test_a_machine_is_listed_with_its_disks_and_its_ram_only_if_asked(store: onionskin.Store) -> None:
    (about,) = store.machines()
    assert about == store.machine_info("lab")
    assert [(disk.name, disk.volume, disk.is_owned) for disk in about.disks] == [
        ("web", "web", False),
        ("data", "data", False),
    ]
    assert (about.memory_bytes, about.state, about.begins, about.stands_on) == (MEMORY, "off", "boots", None)
    assert list(store) == ["data", "other", "web"] == [one.name for one in store.volumes()] and len(store) == 3
    assert [one.name for one in store.volumes(owned=True)] == ["data", "lab.ram", "other", "web"]
    assert store.info("lab.ram").size_bytes > MEMORY
    assert store.check() == []


def test_a_machine_runs_while_somebody_has_its_ram(store: onionskin.Store) -> None:
    with store._open_to_write("lab.ram", for_machine=True):
        assert store.machine_info("lab").state == "running"
        with pytest.raises(StateError, match="machine 'lab' runs"):
            store.rename_machine("lab", "new")
        with pytest.raises(StateError, match="machine 'lab' runs"):
            store.delete_machines("lab")
    assert store.machine_info("lab").state == "off"


def test_names_are_checked_and_taken_once(store: onionskin.Store) -> None:
    with pytest.raises(MachineExistsError):
        make_machine(store, "lab", ["other"])
    for name in ("", "a/b", "a@b", "x" * 252, "."):
        with pytest.raises(ValueError):
            make_machine(store, name, [])
    make_machine(store, "web", [])  # beside the volume of that name
    store.create("full.ram", size="1M").close()
    with pytest.raises(VolumeExistsError):
        make_machine(store, "full", [])
    with pytest.raises(MachineNotFoundError):
        store.machine_info("full")


def test_a_disk_belongs_to_one_machine(store: onionskin.Store) -> None:
    for disks in (["web"], ["other", "lab.ram"]):
        with pytest.raises(StateError, match="belongs to machine 'lab'"):
            make_machine(store, "second", disks)
    with pytest.raises(ValueError, match="twice"):
        make_machine(store, "second", ["other", "other"])
    with pytest.raises(onionskin.VolumeNotFoundError):
        make_machine(store, "second", ["missing"])
    with pytest.raises(ValueError, match="at most 16"):
        make_machine(store, "second", [str(number) for number in range(17)])
    assert [one.name for one in store.machines()] == ["lab"]


def test_ram_is_wiped_as_the_strictest_disk(store: onionskin.Store) -> None:
    store.create("secret", size="1M", wipe="zero").close()
    make_machine(store, "second", ["other", "secret"])
    make_machine(store, "third", [], "zero")
    assert [store.info(f"{name}.ram").wipe for name in ("lab", "second", "third")] == ["release", "zero", "zero"]


VERBS: dict[str, Callable[[onionskin.Store], Any]] = {
    "delete": lambda store: store.delete("other", "web", recursive=True),
    "delete its RAM": lambda store: store.delete("lab.ram", recursive=True),
    "rename": lambda store: store.rename("web", "new"),
    "rename its RAM": lambda store: store.rename("lab.ram", "new"),
    "revert": lambda store: store.open("web").revert("own"),
    "discard below the head": lambda store: store.open("web").discard("own", recursive=True),
    "discard what is bound": lambda store: store.open("web").discard("ready"),
    "merge what is bound": lambda store: store.open("web").merge("ready"),
    "rename what is bound": lambda store: store.rename_snapshot("web", "ready", "new"),
    "write its RAM": lambda store: store.open("lab.ram"),
    "ask what a revert drops": lambda store: losses.of_revert(store._opened, "web", "own"),
    "ask what a deletion drops": lambda store: losses.of_delete(store._opened, ["data"], recursive=True),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_volume_verb_leaves_alone_what_belongs_to_a_machine(store: onionskin.Store, verb: str) -> None:
    with store.open("web") as web:
        web.snapshot("own")
    snapshot_live(store, "lab", "ready", {"web": b"disk", "lab.ram": b"memo"})
    with pytest.raises(StateError, match=r"belongs? to (machine 'lab'|snapshots of machines)"):
        VERBS[verb](store)
    store.close()
    with onionskin.Store(store.path) as again:
        assert read_head(again, "web") == b"disk" and [one.name for one in again.snapshots("web")] == ["own", "ready"]
        assert len(again.volumes(owned=True)) == 4 and again.check() == []


def test_a_disk_of_a_machine_has_snapshots_of_its_own(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {"web": b"disk"})
    with store.open("web") as web:
        web.write(0, b"more")
        web.snapshot("mine")
        web.merge("mine")
        web.snapshot("mine")
    store.rename_snapshot("web", "mine", "own")
    kept = store.prune("web", keep_last=1)
    assert [(one.snapshot, one.kept_by) for one in kept] == [("ready", ("held",)), ("own", ("last",))]


def test_rename_takes_the_volumes_along_that_go_with_it(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {"lab.ram": b"memo"})
    store.fork_machine("lab@ready")
    store.rename_machine("lab-1", "copy")
    assert [one.name for one in store.machines()] == ["copy", "lab"]
    hidden = {one.name for one in store.volumes(owned=True)} - set(store)
    assert hidden == {"lab.ram", "copy.ram", "copy.web", "copy.data"}
    with pytest.raises(MachineExistsError):
        store.rename_machine("copy", "lab")
    assert [one.name for one in store.lineage("copy.ram")] == ["lab.ram"]


def test_delete_keeps_the_disks_and_drops_the_names_of_its_snapshots(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {"web": b"one!", "lab.ram": b"memo"})
    snapshot_live(store, "lab", "later", {"web": b"two!"})
    with pytest.raises(StateError, match="recursive"):
        store.delete_machines("lab")
    loss = machine_removal.loss_of_delete(store._opened, ["lab"], recursive=True)
    assert loss.volumes == ("lab.ram",) and loss.snapshots == ("lab@ready", "lab@later") and loss.is_lost
    store.delete_machines("lab", recursive=True)
    store.finish_work()
    assert store.machines() == [] and [one.name for one in store.volumes(owned=True)] == ["data", "other", "web"]
    assert store.snapshots("web") == [] and read_head(store, "web") == b"two!" and store.check() == []
    store.rename("web", "new")


def test_delete_is_of_all_or_of_none(store: onionskin.Store) -> None:
    make_machine(store, "second", [])
    snapshot_live(store, "lab", "ready", {})
    with pytest.raises(StateError):
        store.delete_machines("second", "lab")
    with pytest.raises(MachineNotFoundError):
        store.delete_machines("second", "missing")
    assert [one.name for one in store.machines()] == ["lab", "second"]
    store.delete_machines("second", "lab", recursive=True)
    assert store.machines() == []


def test_a_hold_on_a_snapshot_of_a_disk_keeps_the_snapshot_of_the_machine(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {})
    store.hold("web", "ready", "backup")
    for drop in (
        lambda: store._merge_machine_snapshots("lab", "ready"),
        lambda: store._discard_machine_snapshots("lab", "ready"),
        lambda: store.delete_machines("lab", recursive=True),
    ):
        with pytest.raises(StateError, match="backup"):
            drop()
    assert [one.name for one in store.machine_snapshots("lab")] == ["ready"]


def test_a_machine_whose_time_is_over_goes_with_its_volumes_and_not_before(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {"web": b"disk", "lab.ram": b"memo"})
    store.fork_machine("lab@ready", names=["gone", "busy"], lifetime=timedelta(microseconds=1), labels={"task": "42"})
    store.fork_machine("lab@ready", names=["kept"], lifetime="1h")
    assert [one.name for one in store.machines(labels={"task": "42"})] == ["busy", "gone"]
    with store._open_to_write("busy.ram", for_machine=True):
        assert store.expire() == ["gone"]
    assert store.expire() == ["busy"]
    assert [one.name for one in store.machines()] == ["kept", "lab"]
    assert {one.name for one in store.volumes(owned=True)} == {
        *("lab.ram", "kept.ram", "kept.web", "kept.data", "web", "data", "other")
    }


def test_a_damaged_configuration_is_said(store: onionskin.Store) -> None:
    machine = machines.find(store._opened.catalog, "lab")
    store._opened.change(lambda: store._opened.catalog.update_machine(machine.id, configuration="[]"))
    with pytest.raises(onionskin.FormatError, match="does not say how much RAM"):
        store.machines()
    assert CONFIGURATION != "[]"
