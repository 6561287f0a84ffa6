"""Which snapshots of a machine stay: holds, retention, names and notes."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from support.machines import make_machine, snapshot_live

import onionskin
from onionskin.catalog import MachineSnapshotRow
from onionskin.errors import SnapshotExistsError, SnapshotNotFoundError, StateError, VolumeNotFoundError
from onionskin.operations import machine_keeping, machine_tree
from onionskin.operations.prune import Rules


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with machine lab, whose disks are web and data, and snapshots a, b and c of it."""
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("web", "data"):
            store.create(name, size="1M").close()
        make_machine(store, "lab", ["web", "data"])
        for name in "abc":
            snapshot_live(store, "lab", name, {"web": name.encode() * 4, "lab.ram": name.encode() * 4})
        yield store


@pytest.fixture
def lab(store: onionskin.Store) -> onionskin.Machine:
    """The machine."""
    return store.open_machine("lab")


def names(store: onionskin.Store, machine: str = "lab") -> list[str]:
    return [one.name for one in store.machine_snapshots(machine)]


# ---- holds ----


@pytest.mark.parametrize(
    "drop",
    [
        lambda lab: lab.merge("b"),
        lambda lab: lab.discard("b", recursive=True),
        lambda lab: lab.delete(recursive=True),
    ],
    ids=["merge", "discard", "delete"],
)
def test_what_is_held_is_not_dropped_until_all_who_hold_it_have_let_it_go(
    store: onionskin.Store, lab: onionskin.Machine, drop: Callable[[onionskin.Machine], object]
) -> None:
    lab.hold(["b", "c"], "backup")
    lab.hold("b", "audit")
    assert [(one.snapshot, one.holder, one.volume) for one in lab.holds()] == [
        ("b", "backup", "lab"), ("b", "audit", "lab"), ("c", "backup", "lab"),
    ]  # fmt: skip
    with pytest.raises(
        StateError, match=r"held: lab@b by 'backup', .*lab@b by 'audit'; .*'onionskin machine unhold' first"
    ):
        drop(lab)
    lab.unhold(["c", "b"], "backup")
    with pytest.raises(StateError, match="held: lab@b by 'audit'; nothing was dropped"):
        drop(lab)
    assert names(store) == ["a", "b", "c"] and [one.holder for one in lab.holds("b")] == ["audit"]
    lab.unhold("b", "audit")
    drop(lab)
    assert lab._store.holds() == []


def test_what_is_held_of_a_machine_is_held_of_its_disks_and_its_ram(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    lab.hold("a", "backup")
    assert [(one.volume, one.snapshot) for one in store.holds()] == [("data", "a"), ("lab.ram", "a"), ("web", "a")]


def test_all_of_several_snapshots_are_held_or_none_is(store: onionskin.Store, lab: onionskin.Machine) -> None:
    lab.hold("b", "backup")
    with pytest.raises(StateError, match="lab@b is held by 'backup' already"):
        lab.hold(["a", "b"], "backup")
    with pytest.raises(StateError, match="lab@a is not held by 'backup'; it is held by nobody"):
        lab.unhold(["b", "a"], "backup")
    with pytest.raises(SnapshotNotFoundError):
        lab.hold(["a", "missing"], "other")
    assert [(one.snapshot, one.holder) for one in lab.holds()] == [("b", "backup")]


def test_who_holds_a_disk_of_a_snapshot_keeps_the_snapshot_and_can_let_it_go(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    store.hold("web", "a", "me")
    with pytest.raises(StateError, match="held: lab@a by 'me'"):
        lab.merge("a")
    assert [one.holder for one in lab.holds("a")] == ["me"]
    lab.hold("a", "me")  # the rest of it
    lab.unhold("a", "me")
    assert lab.merge("a") == ["a"]


def test_a_snapshot_that_has_nothing_cannot_be_held(store: onionskin.Store) -> None:
    make_machine(store, "bare", [])
    bare = store.open_machine("bare")
    store._snapshot_machine_off("bare", "cold")
    with pytest.raises(StateError, match="neither disks nor RAM"):
        bare.hold("cold", "me")


# ---- names and notes ----


def test_a_snapshot_and_all_that_it_binds_get_the_new_name(store: onionskin.Store, lab: onionskin.Machine) -> None:
    lab.hold("a", "backup")
    lab.rename_snapshot("a", "first")
    lab.rename_snapshot("first", "first")
    (first, *_) = store.machine_snapshots("lab")
    assert (first.name, first.ram, first.disks) == (
        "first", "lab.ram@first", {"web": "web@first", "data": "data@first"},
    )  # fmt: skip
    assert [one.snapshot for one in lab.holds()] == ["first"]
    store._revert_machine("lab", "first")
    with store.open("web", mode="r") as web:
        assert web.read(0, 4) == b"aaaa"


def test_a_name_that_the_machine_or_a_disk_of_it_has_is_refused(store: onionskin.Store, lab: onionskin.Machine) -> None:
    with store.open("data") as data:
        data.snapshot("mine")
    for taken in ("b", "mine"):
        with pytest.raises(SnapshotExistsError, match=f"already has a snapshot '{taken}'"):
            lab.rename_snapshot("a", taken)
    with pytest.raises(ValueError, match="name"):
        lab.rename_snapshot("a", "x/y")
    assert names(store) == ["a", "b", "c"] and [one.name for one in store.snapshots("web")] == ["a", "b", "c"]


def test_a_note_is_that_of_the_snapshot_and_of_all_that_it_binds(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    lab.set_note("b", "before the upgrade")
    assert [one.note for one in store.machine_snapshots("lab")] == ["", "before the upgrade", ""]
    assert [one.note for one in store.snapshots("web")] == ["", "before the upgrade", ""]
    lab.set_note("b", "")
    assert {one.note for one in store.machine_snapshots("lab")} == {""}


# ---- retention ----


def test_what_no_rule_keeps_is_dropped_at_once_and_all_data_stays(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    planned = lab.prune(keep_last=1, dry_run=True)
    assert [(one.snapshot, one.kept_by) for one in planned] == [("a", ()), ("b", ()), ("c", ("last",))]
    assert names(store) == ["a", "b", "c"]
    assert lab.prune(keep_last=1) == planned and names(store) == ["c"]
    assert [one.name for one in store.snapshots("web")] == [one.name for one in store.snapshots("data")] == ["c"]
    with store.open("web", mode="r", snapshot="c") as web:
        assert web.read(0, 4) == b"cccc"
    assert lab.prune(keep_within=timedelta(days=1))[0].kept_by == ("within",)


def test_no_rule_at_all_is_refused(lab: onionskin.Machine) -> None:
    with pytest.raises(ValueError, match="no rule says what to keep"):
        lab.prune()


def test_what_is_held_or_about_to_be_gone_on_from_is_kept(store: onionskin.Store, lab: onionskin.Machine) -> None:
    lab.hold("a", "backup")
    store._revert_machine("lab", "b")
    found = {one.snapshot: one.kept_by for one in lab.prune(keep_last=1)}
    assert found == {"a": ("held",), "b": ("awaited",), "c": ("last",)}
    assert names(store) == ["a", "b", "c"]


def test_what_a_fork_that_never_ran_goes_on_from_is_kept(store: onionskin.Store, lab: onionskin.Machine) -> None:
    lab.fork("a", names=["one"], start=False)
    found = {one.snapshot: one.kept_by for one in lab.prune(keep_last=1)}
    assert found == {"a": ("awaited",), "b": (), "c": ("last",)}


def test_who_comes_to_hold_one_while_it_is_pruned_keeps_it_and_the_others_go(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    tries: list[list[str]] = []

    def merge(going: Sequence[MachineSnapshotRow]) -> None:
        if not tries:
            lab.hold("a", "backup")
        tries.append([row.name for row in going])
        machine_tree.merge(store._opened, "lab", tries[-1], [row.id for row in going])

    found = machine_keeping.prune(store._opened, "lab", Rules(last=1), merge)
    assert tries == [["a", "b"], ["b"]] and names(store) == ["a", "c"]
    assert [(one.snapshot, one.kept_by) for one in found] == [("a", ("held",)), ("b", ()), ("c", ("last",))]


def test_one_that_took_the_name_of_another_meanwhile_is_not_dropped_for_it(
    store: onionskin.Store, lab: onionskin.Machine
) -> None:
    def merge(going: Sequence[MachineSnapshotRow]) -> None:
        lab.rename_snapshot("c", "kept")
        lab.rename_snapshot("a", "c")
        lab.rename_snapshot("kept", "a")
        machine_tree.merge(store._opened, "lab", [row.name for row in going], [row.id for row in going])

    with pytest.raises(StateError, match="renamed meanwhile; nothing was dropped"):
        machine_keeping.prune(store._opened, "lab", Rules(last=1), merge)
    assert names(store) == ["c", "b", "a"]


# ---- words ----


def test_a_verb_of_volumes_says_that_a_name_is_a_machines(store: onionskin.Store) -> None:
    with pytest.raises(VolumeNotFoundError, match=r"no volume 'lab'; a machine has that name, .*'onionskin machine'"):
        store.open("lab")
    with pytest.raises(VolumeNotFoundError, match="no volume 'other'; 'onionskin tree' lists them"):
        store.open("other")
