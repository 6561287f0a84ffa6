"""A machine that was found is meant, and not another one that has its name by the time at which something is done to it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machines import make_machine, snapshot_live

import onionskin
from onionskin.machine import daemon, fork, supervisor
from onionskin.machine.machine import Machine
from onionskin.operations import machine_forks, machines

Swap = Callable[[], None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with a machine `lab` and a machine `twin`: each has a disk and the snapshots `a` and `b`."""
    with onionskin.Store(tmp_path / "vms") as store:
        for name, disk in (("lab", "web"), ("twin", "data")):
            store.create(disk, size="1M").close()
            make_machine(store, name, [disk])
            for snapshot in ("a", "b"):
                snapshot_live(store, name, snapshot, {disk: f"{name} {snapshot}".encode()})
        yield store


@pytest.fixture
def lab(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine `lab`, which is started by nobody."""
    monkeypatch.setattr(daemon, "start", lambda *_, **__: None)
    monkeypatch.setattr(fork, "start_all", lambda *_, **__: None)
    monkeypatch.setattr(Machine, "_refuse_unlike", lambda *_: None)
    return store.open_machine("lab")


@pytest.fixture
def swap(store: onionskin.Store) -> Swap:
    """Give the name of `lab` to `twin`, once."""
    done: list[bool] = []

    def change() -> None:
        if not done:
            done.append(True)
            store.rename_machine("lab", "other")
            store.rename_machine("twin", "lab")

    return change


def before(monkeypatch: pytest.MonkeyPatch, holder: object, name: str, what: Callable[[], object]) -> None:
    """Have something done before a function is called."""
    call = getattr(holder, name)

    def late(*given: Any, **named: Any) -> Any:
        what()
        return call(*given, **named)

    monkeypatch.setattr(holder, name, late)


def looks(store: onionskin.Store, name: str) -> tuple[object, ...]:
    about = store.machine_info(name)
    taken = [one.name for one in store.machine_snapshots(name)]
    with store.open(about.disks[0].volume, mode="r") as disk:
        return about.begins, about.stands_on, taken, disk.read(0, 6)


VERBS: dict[str, tuple[Callable[[Machine], object], str]] = {
    "snapshot": (lambda lab: lab.snapshot("c"), "_snapshot_machine_off"),
    "revert": (lambda lab: lab.revert("a"), "_revert_machine"),
    "start fresh": (lambda lab: lab.start(fresh=True), "_forget_ram_of_machine"),
    "merge": (lambda lab: lab.merge("a"), "_merge_machine_snapshots"),
    "discard": (lambda lab: lab.discard("b"), "_discard_machine_snapshots"),
    "delete": (lambda lab: lab.delete(recursive=True), "_delete_machines"),
}
LEFT: dict[str, object] = {
    "snapshot": ("boots", "c", ["a", "b", "c"], b"lab b\0"),
    "revert": ("resumes", "a", ["a", "b"], b"lab a\0"),
    "start fresh": ("boots", "b", ["a", "b"], b"lab b\0"),
    "merge": ("boots", "b", ["b"], b"lab b\0"),
    "discard": ("boots", "a", ["a"], b"lab b\0"),
    "delete": None,
}


def begins_of(verb: str) -> str:
    return "resumes" if verb == "start fresh" else "boots"


def begin(store: onionskin.Store, verb: str) -> None:
    """Put both machines back, where the verb is to give up the RAM of one."""
    for name in ("lab", "twin") if begins_of(verb) == "resumes" else ():
        store._revert_machine(name, "b")


def check_left(store: onionskin.Store, verb: str) -> None:
    """The verb was done to the machine that was called `lab`, and to no other one."""
    assert looks(store, "lab") == (begins_of(verb), "b", ["a", "b"], b"twin b")
    wanted = LEFT[verb]
    if wanted is None:
        assert [one.name for one in store.machines()] == ["lab"]
    else:
        assert looks(store, "other") == wanted
    assert store.check() == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_done_to_the_machine_that_was_opened(
    lab: Machine, store: onionskin.Store, swap: Swap, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    call, inner = VERBS[verb]
    begin(store, verb)
    before(monkeypatch, store, inner, swap)
    call(lab)
    check_left(store, verb)


@pytest.mark.parametrize(
    ("verb", "holder", "step"),
    [
        ("snapshot", machines, "kept_off"),
        ("revert", onionskin.Store, "_open_ram"),
        ("revert", onionskin.Store, "_lock_volume"),
        ("start fresh", machines, "kept_off"),
        ("merge", machines, "snapshots_kept"),
        ("discard", machines, "kept_off"),
    ],
)
def test_the_machine_that_a_verb_found_is_the_one_that_it_keeps_off(
    store: onionskin.Store, swap: Swap, monkeypatch: pytest.MonkeyPatch, verb: str, holder: object, step: str
) -> None:
    verbs: dict[str, Callable[[], object]] = {
        "snapshot": lambda: store._snapshot_machine_off("lab", "c"),
        "revert": lambda: store._revert_machine("lab", "a"),
        "start fresh": lambda: store._forget_ram_of_machine("lab"),
        "merge": lambda: store._merge_machine_snapshots("lab", "a"),
        "discard": lambda: store._discard_machine_snapshots("lab", "b"),
    }
    begin(store, verb)
    before(monkeypatch, holder, step, swap)
    verbs[verb]()
    check_left(store, verb)


def test_forks_are_made_of_the_machine_that_was_opened(
    lab: Machine, store: onionskin.Store, swap: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, machine_forks, "fork_machine", swap)
    (made,) = lab.fork("a", start=False)
    assert [one.name for one in store.machine_lineage(made.name)] == ["other"]


def test_a_fork_is_the_one_that_was_made(lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_machine = machine_forks.fork_machine

    def late(*given: Any, **named: Any) -> Any:
        made = fork_machine(*given, **named)
        store.rename_machine("lab-1", "task")
        store.rename_machine("twin", "lab-1")
        return made

    monkeypatch.setattr(machine_forks, "fork_machine", late)
    (made,) = lab.fork("a", start=False)
    assert made._name == "task"
    made.delete()
    assert [one.name for one in store.machines()] == ["lab", "lab-1"]


def test_a_new_machine_is_the_one_that_was_made(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = machines.create

    def late(*given: Any, **named: Any) -> Any:
        made = create(*given, **named)
        store.rename_machine("new", "other")
        store.rename_machine("twin", "new")
        return made

    monkeypatch.setattr(machines, "create", late)
    assert store.create_machine("new", memory="1M")._name == "other"


def test_a_machine_that_waited_in_vain_is_dropped_and_no_other_one_that_has_its_name(store: onionskin.Store) -> None:
    for name in ("warm", "same"):
        make_machine(store, name, [])
        store._opened.catalog.update_machine(store.open_machine(name)._id, resumes=machines.RESUMES)
    one = supervisor.Supervisor(store, "warm", print, machine=store.open_machine("warm")._id)
    store.rename_machine("warm", "gone")
    store.rename_machine("same", "warm")
    one._drop()
    one._ends.close()
    assert [info.name for info in store.machines()] == ["lab", "twin", "warm"]
