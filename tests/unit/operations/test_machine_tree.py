"""Snapshots of machines: reverting to one, dropping some, forks, and what the next start begins with."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.machines import make_machine, read_head, snapshot_live

import onionskin
from onionskin.errors import FormatError, MachineExistsError, SnapshotNotFoundError, StateError
from onionskin.operations import forks, machine_forks, machine_tree, machines

SECRET = b"a token that only RAM has, and nothing else"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with machine lab, whose disks are web and data."""
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("web", "data"):
            store.create(name, size="1M").close()
        make_machine(store, "lab", ["web", "data"])
        yield store


def names(store: onionskin.Store, machine: str = "lab") -> list[str]:
    return [one.name for one in store.machine_snapshots(machine)]


def begins(store: onionskin.Store, machine: str = "lab") -> machines.Beginning:
    return machines.beginning(store._opened, machine)


def three(store: onionskin.Store, mode: str = "live") -> None:
    """Take snapshots a, b and c, each with its name on disk web and in RAM."""
    for name in "abc":
        snapshot_live(store, "lab", name, {"web": name.encode() * 4, "lab.ram": name.encode() * 4})


# ---- off ----


def test_a_snapshot_of_a_machine_that_is_off_has_its_disks_and_its_configuration(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"disk")
    taken = store._snapshot_machine_off("lab", "cold", "why")
    assert (taken.mode, taken.ram, taken.disks) == ("off", None, {"web": "web@cold", "data": "data@cold"})
    assert (taken.note, taken.parent) == ("why", None) and store.machine_snapshots("lab") == [taken]
    with store._open_to_write("lab.ram", for_machine=True), pytest.raises(StateError, match="runs"):
        store._snapshot_machine_off("lab", "again")
    assert store.machine_info("lab").stands_on == "cold" and begins(store).ram is None
    assert store._snapshot_machine_off("lab", None).parent == "cold"


# ---- revert ----


def test_a_revert_puts_all_disks_back_and_the_next_start_goes_on_from_the_ram(store: onionskin.Store) -> None:
    three(store)
    store._revert_machine("lab", "b")
    assert read_head(store, "web") == b"bbbb" and read_head(store, "lab.ram") == b"bbbb"
    found = begins(store)
    assert (found.ram, found.is_reverting, found.state_bytes) == (("lab.ram", "b"), False, 4096)
    assert found.key == store.snapshots("lab.ram")[1].guid and found.recorded == '{"version":"7.2"}'
    assert store.machine_info("lab").begins == "resumes" and names(store) == ["a", "b", "c"]
    with pytest.raises(StateError, match="about to go on"):
        store._snapshot_machine_off("lab", "cold")
    machines.note_running(store._opened, found.machine.id)
    assert begins(store).ram is None
    snapshot_live(store, "lab", "d", {})
    assert {one.name: one.parent for one in store.machine_snapshots("lab")} == {"a": None, "b": "a", "c": "b", "d": "b"}


def change_catalog(store: onionskin.Store, statement: str) -> None:
    """Damage the catalog."""
    with closing(sqlite3.connect(store.path / "catalog.db")) as catalog:
        catalog.execute(statement)
        catalog.commit()


def test_no_machine_is_put_back_to_a_snapshot_that_has_not_all_of_its_disks(store: onionskin.Store) -> None:
    """All of them would go on from one instant but the one of which nothing says where it was."""
    three(store)
    change_catalog(store, "DELETE FROM machine_snapshot_disks WHERE position = 1")
    with pytest.raises(FormatError, match="a part of snapshot 'b' of machine 'lab' is missing"):
        store._revert_machine("lab", "b")
    with pytest.raises(FormatError, match="a part of snapshot 'b' of machine 'lab' is missing"):
        machine_tree.RevertInPlace(store._opened, "lab", "b")
    assert read_head(store, "web") == b"cccc"
    assert [one for one in store.check() if one.severity == "error" and "snapshot" in str(one)]


def test_a_machine_one_of_whose_disks_keeps_its_ram_is_said_to_be_damaged(store: onionskin.Store) -> None:
    change_catalog(store, "UPDATE machines SET ram = (SELECT volume FROM machine_disks WHERE position = 0)")
    with pytest.raises(FormatError, match="is no volume, or the one that keeps its RAM"):
        store._snapshot_machine_off("lab", "cold")


def test_a_revert_to_a_snapshot_without_ram_boots(store: onionskin.Store) -> None:
    store._snapshot_machine_off("lab", "cold")
    three(store)
    store._revert_machine("lab", "cold")
    assert (
        begins(store).ram is None
        and store.machine_info("lab").begins == "boots"
        and read_head(store, "web") == bytes(4)
    )


def test_a_revert_that_a_user_of_a_disk_is_in_the_way_of_changes_nothing(store: onionskin.Store) -> None:
    three(store)
    with store.open("data", mode="r"), pytest.raises(StateError, match="'data' is open for reading"):
        store._revert_machine("lab", "a")
    assert store.machine_info("lab").begins == "boots" and store.machine_info("lab").stands_on == "c"
    assert read_head(store, "web") == b"cccc"


def test_a_revert_that_fails_at_the_second_disk_is_noted_and_ended_by_another_one(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(store)
    put_back = store._put_back

    def fail_at_data(volume: str, *how: Any) -> None:
        if volume == "data":
            raise StateError("volume 'data' fails")
        put_back(volume, *how)

    monkeypatch.setattr(store, "_put_back", fail_at_data)
    with pytest.raises(StateError, match="its next start puts all of them back to 'a'"):
        store._revert_machine("lab", "a")
    monkeypatch.undo()
    assert begins(store).is_reverting and store.machine_info("lab").begins == "reverting"
    with pytest.raises(StateError, match="put back"):
        store._snapshot_machine_off("lab", "cold")
    store._revert_machine("lab", "a")
    assert not begins(store).is_reverting and read_head(store, "web") == b"aaaa"


def test_a_disk_that_was_written_since_the_revert_keeps_the_ram_from_being_loaded(store: onionskin.Store) -> None:
    three(store)
    store._revert_machine("lab", "a")
    machines.refuse_written(store._opened, begins(store).machine)
    with store.open("data") as data:
        data.write(0, b"x")
    with pytest.raises(StateError, match="volume 'data' was written to since"):
        machines.refuse_written(store._opened, begins(store).machine)


def test_a_revert_of_a_machine_that_runs_or_to_nothing_changes_nothing(store: onionskin.Store) -> None:
    three(store)
    with store._open_to_write("lab.ram", for_machine=True), pytest.raises(StateError, match="runs"):
        store._revert_machine("lab", "a")
    with pytest.raises(SnapshotNotFoundError):
        store._revert_machine("lab", "z")
    assert store.machine_info("lab").begins == "boots" and read_head(store, "web") == b"cccc"


# ---- dropping ----


@pytest.mark.parametrize("merged", [["a"], ["b"], ["c"], ["a", "b"], ["a", "b", "c"]])
def test_merge_drops_names_and_keeps_what_the_others_read(store: onionskin.Store, merged: list[str]) -> None:
    three(store)
    assert store._merge_machine_snapshots("lab", merged) == merged
    left = [name for name in "abc" if name not in merged]
    assert names(store) == left and [one.name for one in store.snapshots("lab.ram")] == left
    assert [one.parent for one in store.machine_snapshots("lab")] == ([None, *left] if left else [])[: len(left)]
    for name in left:
        for volume in ("web", "lab.ram"):
            with store.open(volume, snapshot=name) as view:
                assert view.read(0, 4) == name.encode() * 4
    assert read_head(store, "web") == b"cccc" and store.check() == []
    assert store.machine_info("lab").stands_on == (left[-1] if left else None)
    store.finish_work()
    with store._opened.catalog.reading():
        assert not store._opened.catalog.unnamed_of_volume(machines.find(store._opened.catalog, "lab").ram)


def test_merge_while_it_runs_leaves_the_ram_of_the_run_alone(store: onionskin.Store) -> None:
    three(store)
    with store._open_to_write("lab.ram", for_machine=True) as ram:
        ram.write(4096, b"runs")
        store._merge_machine_snapshots("lab", "c")
        assert (ram.read(0, 4), ram.read(4096, 4)) == (b"cccc", b"runs")


def test_discard_needs_recursive_for_what_was_taken_after(store: onionskin.Store) -> None:
    three(store)
    with pytest.raises(StateError, match="taken after a: b, c"):
        store._discard_machine_snapshots("lab", "a")
    assert names(store) == ["a", "b", "c"]


def test_discard_of_a_machine_that_is_off_puts_it_back_to_the_lowest(store: onionskin.Store) -> None:
    three(store)
    assert store._discard_machine_snapshots("lab", "b", recursive=True) == ["b", "c"]
    assert names(store) == ["a"] and read_head(store, "web") == b"bbbb" and begins(store).ram is None
    assert store.machine_info("lab").stands_on == "a" and store.check() == []
    assert [one.name for one in store.snapshots("lab.ram")] == ["a"] and read_head(store, "lab.ram") == b"aaaa"


def test_a_discard_that_is_refused_leaves_the_disks_as_they_are(store: onionskin.Store) -> None:
    three(store)
    with store.open("web") as web:
        web.write(0, b"late")
    store.fork_machine("lab@c")
    with pytest.raises(StateError, match="have not run yet: lab-1"):
        store._discard_machine_snapshots("lab", "c")
    machines.note_running(store._opened, machines.find(store._opened.catalog, "lab-1").id)
    with pytest.raises(StateError, match=r"is needed by lab-1\.(web|data|ram)"):
        store._discard_machine_snapshots("lab", "c")
    with store.open("data"), pytest.raises(StateError, match="'data' is open for writing"):
        store._discard_machine_snapshots("lab", "b", recursive=True)
    assert read_head(store, "web") == b"late" and names(store) == ["a", "b", "c"]


def test_discard_on_another_branch_leaves_the_disks_alone(store: onionskin.Store) -> None:
    three(store)
    store._revert_machine("lab", "a")
    with store._open_to_write("lab.ram", for_machine=True):  # it runs
        assert store._discard_machine_snapshots("lab", "b", recursive=True) == ["b", "c"]
        with pytest.raises(StateError, match=r"about to go on|runs on"):
            store._discard_machine_snapshots("lab", "a")
    assert names(store) == ["a"] and read_head(store, "web") == b"aaaa" and store.check() == []


def test_discard_of_what_it_runs_on_is_refused(store: onionskin.Store) -> None:
    three(store)
    with (
        store._open_to_write("lab.ram", for_machine=True),
        pytest.raises(StateError, match="runs on what would be discarded"),
    ):
        store._discard_machine_snapshots("lab", "c")
    assert names(store) == ["a", "b", "c"]


def test_what_a_user_took_of_a_disk_after_a_snapshot_is_not_discarded_unasked(store: onionskin.Store) -> None:
    three(store)
    with store.open("web") as web:
        web.snapshot("mine")
    with pytest.raises(StateError, match="mine"):
        store._discard_machine_snapshots("lab", "c")
    assert names(store) == ["a", "b", "c"]
    store._discard_machine_snapshots("lab", "c", recursive=True)
    assert names(store) == ["a", "b"] and [one.name for one in store.snapshots("web")] == ["a", "b"]


@pytest.mark.parametrize("how", ["discard", "delete"])
def test_no_byte_of_discarded_ram_stays_on_the_medium_with_policy_zero(tmp_path: Path, how: str) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        store.create("web", size="1M", wipe="zero").close()
        make_machine(store, "lab", ["web"])
        snapshot_live(store, "lab", "ready", {"lab.ram": SECRET})
        snapshot_live(store, "lab", "later", {"lab.ram": SECRET[::-1]})
        found = [path for path in store.path.rglob("*.seg") if SECRET in path.read_bytes()]
        held = [os.open(path, os.O_RDONLY) for path in store.path.rglob("*.seg")]
        assert found
        if how == "discard":
            store._discard_machine_snapshots("lab", "ready", recursive=True)
        else:
            store.delete_machines("lab", recursive=True)
        store.finish_work()
        assert store.check() == []
    for descriptor in held:
        data = os.pread(descriptor, 1 << 22, 0)
        os.close(descriptor)
        assert SECRET not in data and SECRET[::-1] not in data


# ---- forks ----


def test_forks_have_disks_and_ram_of_their_own_and_begin_as_the_snapshot(store: onionskin.Store) -> None:
    three(store)
    assert store.fork_machine("lab@b", count=2, labels={"task": "42"}, lifetime="1h") == ["lab-1", "lab-2"]
    (one, _) = store.machines(labels={"task": "42"})
    assert [(disk.name, disk.volume, disk.is_owned) for disk in one.disks] == [
        ("web", "lab-1.web", True),
        ("data", "lab-1.data", True),
    ]
    assert one.begins == "resumes" and one.expires and store.info("lab-1.web").expires is None
    assert begins(store, "lab-1").ram == ("lab-1.ram", None)
    assert begins(store, "lab-1").key == begins(store, "lab-2").key == store.snapshots("lab.ram")[1].guid
    assert read_head(store, "lab-1.web") == read_head(store, "lab-1.ram") == b"bbbb"
    machines.refuse_written(store._opened, begins(store, "lab-1").machine)
    with store.open("lab-2.web") as disk:
        disk.write(0, b"own!")
    assert read_head(store, "web") == b"cccc" and read_head(store, "lab-1.web") == b"bbbb"
    with pytest.raises(StateError, match="written to since"):
        machines.refuse_written(store._opened, begins(store, "lab-2").machine)
    assert store.fork_machine("lab@b") == ["lab-3"] and store.check() == []


def test_a_fork_of_a_fork_is_a_machine_like_any_other(store: onionskin.Store) -> None:
    three(store)
    store.fork_machine("lab@a")
    snapshot_live(store, "lab-1", "own", {"lab-1.web": b"fork", "lab-1.ram": b"fork"})
    assert store.fork_machine("lab-1@own", names=["deep"]) == ["deep"]
    assert read_head(store, "deep.web") == read_head(store, "deep.ram") == b"fork"
    assert [one.name for one in store.machine_info("deep").disks] == ["web", "data"]
    with pytest.raises(StateError, match="forked from lab-1: deep"):
        store.delete_machines("lab-1", recursive=True)
    store.delete_machines("deep", "lab-1", recursive=True)
    assert names(store) == ["a", "b", "c"] and store.check() == []


def test_a_fork_of_a_snapshot_without_ram_boots(store: onionskin.Store) -> None:
    store._snapshot_machine_off("lab", "cold")
    store.fork_machine("lab@cold", labels={"task": "1"}, lifetime="1h")
    about = store.machine_info("lab-1")
    assert (about.begins, about.labels) == ("boots", {"task": "1"}) and about.expires
    assert [one.name for one in store.lineage("lab-1.ram")] == ["lab.ram"]


def test_one_key_makes_forks_once(store: onionskin.Store) -> None:
    three(store)
    made = store.fork_machine("lab@a", count=2, idempotency_key="k")
    assert store.fork_machine("lab@a", count=2, idempotency_key="k") == made and len(store.machines()) == 3
    with pytest.raises(StateError, match="was used for another"):
        store.fork_machine("lab@b", count=2, idempotency_key="k")
    with pytest.raises(StateError, match="was used for another"):
        store.fork("web@a", count=2, idempotency_key="k")


def test_one_key_finds_the_machines_that_it_made_and_no_other_of_their_names(store: onionskin.Store) -> None:
    three(store)
    wanted = forks.check_wanted("lab@a", None, None, 2, None, "k", None, None, None)
    made = machine_forks.fork_machine(store._opened, wanted)
    assert list(made) == ["lab-1", "lab-2"] and all(made.values())
    store.rename_machine("lab-1", "kept")
    store.delete_machines("lab-2", recursive=True)
    store.fork_machine("lab@b", names=["lab-1", "lab-2"])
    again = machine_forks.fork_machine(store._opened, wanted)
    assert again == {"lab-1": made["lab-1"], "lab-2": b""}
    with pytest.raises(onionskin.MachineNotFoundError, match="lab-2 of the machines"):
        store.open_machine("lab").fork("a", count=2, idempotency_key="k")


def test_a_name_that_is_taken_makes_no_fork_at_all(store: onionskin.Store) -> None:
    three(store)
    store.create("two.data", size="1M").close()
    with pytest.raises(onionskin.VolumeExistsError, match=r"two\.data"):
        store.fork_machine("lab@a", names=["one", "two"])
    with pytest.raises(MachineExistsError):
        store.fork_machine("lab@a", names=["one", "lab"])
    with pytest.raises(ValueError, match="one of its snapshots"):
        store.fork_machine("lab")
    assert [one.name for one in store.machines()] == ["lab"] and len(store.volumes(owned=True)) == 4


def test_what_a_fork_that_never_ran_begins_with_is_not_dropped(store: onionskin.Store) -> None:
    three(store)
    store.fork_machine("lab@c")
    for drop in (store._merge_machine_snapshots, store._discard_machine_snapshots):
        with pytest.raises(StateError, match="have not run yet: lab-1"):
            drop("lab", "c")
    machines.note_running(store._opened, machines.find(store._opened.catalog, "lab-1").id)
    store._merge_machine_snapshots("lab", "c")
    assert read_head(store, "lab-1.web") == b"cccc"


# ---- the beginning of a fork ----


def forked(store: onionskin.Store) -> str:
    """Fork machine lab as its snapshot b, and write to the fork's disk and RAM, which ran."""
    (name,) = store.fork_machine("lab@b")
    snapshot_live(store, name, "own", {f"{name}.web": b"fork", f"{name}.ram": b"fork"})
    return name


def test_a_fork_is_put_back_to_what_it_was_made_from_and_keeps_its_snapshots(store: onionskin.Store) -> None:
    three(store)
    name = forked(store)
    with store.open(f"{name}.data") as data:
        data.write(0, b"late")
    store._put_machine_back_to_beginning(name)
    assert read_head(store, f"{name}.web") == b"bbbb" and read_head(store, f"{name}.ram") == b"bbbb"
    assert read_head(store, f"{name}.data") == bytes(4)
    found = begins(store, name)
    assert (found.ram, found.state_bytes, found.recorded) == ((f"{name}.ram", None), 4096, '{"version":"7.2"}')
    assert found.key == store.snapshots("lab.ram")[1].guid and names(store, name) == ["own"]
    machines.refuse_written(store._opened, found.machine)
    store._revert_machine(name, "own")
    assert read_head(store, f"{name}.web") == b"fork"
    assert store.check() == []


def test_a_fork_of_a_machine_that_was_off_is_put_back_to_its_disks_and_boots(store: onionskin.Store) -> None:
    store._snapshot_machine_off("lab", "cold")
    (name,) = store.fork_machine("lab@cold")
    snapshot_live(store, name, "own", {f"{name}.web": b"fork", f"{name}.ram": b"fork"})
    store._put_machine_back_to_beginning(name)
    assert read_head(store, f"{name}.web") == bytes(4) and read_head(store, f"{name}.ram") == bytes(4)
    assert begins(store, name).ram is None and store.machine_info(name).begins == "boots"


def test_what_is_no_fork_or_whose_beginning_is_gone_is_not_put_back_to_it(store: onionskin.Store) -> None:
    three(store)
    name = forked(store)
    with pytest.raises(StateError, match="'lab' is no fork"):
        store._put_machine_back_to_beginning("lab")
    store._merge_machine_snapshots("lab", "b")
    with pytest.raises(StateError, match="was forked from is gone"):
        store._put_machine_back_to_beginning(name)
    assert read_head(store, f"{name}.web") == b"fork"


def test_a_fork_whose_disk_is_in_use_is_not_put_back(store: onionskin.Store) -> None:
    three(store)
    name = forked(store)
    with store.open(f"{name}.data", mode="r"), pytest.raises(StateError, match="is open for reading"):
        store._put_machine_back_to_beginning(name)
    with store._open_to_write(f"{name}.ram", for_machine=True), pytest.raises(StateError, match="runs"):
        store._put_machine_back_to_beginning(name)
    assert store.machine_info(name).stands_on == "own" and read_head(store, f"{name}.web") == b"fork"


def test_what_a_killed_fork_left_unflushed_is_dropped_with_its_head(store: onionskin.Store) -> None:
    three(store)
    name = forked(store)
    program = (
        "import os, sys, onionskin\n"
        "store = onionskin.Store(sys.argv[1])\n"
        "disk = store.open(sys.argv[2])\n"
        "disk.write(0, b'lost')\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, store.path, f"{name}.web"], check=True)
    store._put_machine_back_to_beginning(name)
    assert read_head(store, f"{name}.web") == b"bbbb"
    machines.refuse_written(store._opened, begins(store, name).machine)


# ---- a fresh start ----


def test_ram_is_forgotten_and_the_next_start_boots(store: onionskin.Store) -> None:
    three(store)
    store._revert_machine("lab", "b")
    (name,) = store.fork_machine("lab@b")
    for machine in ("lab", name):
        assert store.machine_info(machine).begins == "resumes"
        assert not machines.has_unnamed_ram(store._opened, machine)  # a snapshot has it
        store._forget_ram_of_machine(machine)
        assert store.machine_info(machine).begins == "boots" and begins(store, machine).ram is None
    assert read_head(store, "web") == read_head(store, f"{name}.web") == b"bbbb"


def test_ram_is_not_forgotten_before_a_revert_has_ended(store: onionskin.Store) -> None:
    three(store)
    machine = machines.find(store._opened.catalog, "lab")
    target = machines.find_snapshot(store._opened.catalog, machine, "a")
    machines.note_reverting(store._opened, machine.id, target.id)
    store._forget_ram_of_machine("lab")
    assert read_head(store, "web") == b"aaaa" and store.machine_info("lab").begins == "boots"
    with store._open_to_write("lab.ram", for_machine=True), pytest.raises(StateError, match="runs"):
        store._forget_ram_of_machine("lab")
