"""Machines whose disks are served, as they are while a guest runs: cut, put back and tidied through the control socket."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from support.machines import CONFIGURATION, make_machine, snapshot_live

import onionskin
from onionskin.control import groups
from onionskin.errors import StateError
from onionskin.nbd.server import Limits, Server
from onionskin.operations import machine_tree, machines
from onionskin.storage.open_store import OpenStore

MIB = 1 << 20
BACKGROUND = "onionskin pending work"  # a thread that makes and removes files at any time


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        for name in ("web", "data"):
            store.create(name, size=MIB).close()
        make_machine(store, "lab", ["web", "data"])
        yield store


@pytest.fixture
def server(store: onionskin.Store) -> Iterator[Server]:
    """A server of both disks, with a store of its own."""
    with ExitStack() as stack:
        server = Server(limits=Limits(), allow_revert=True, log=lambda line: None)
        stack.callback(server.close)
        for name in ("web", "data"):
            server.exports.add_volume(store.path, name)
        yield server


def disk_of(server: Server, name: str) -> Any:
    return server.exports.table.served[name].volume


def snapshot(store: onionskin.Store, name: str) -> None:
    with store._open_to_write("lab.ram", for_machine=True) as ram, store._cut_machine("lab") as cut:
        cut.seal()
        cut.commit(name, mode="pause", configuration=CONFIGURATION, ram=ram._opened.to_write(), state_bytes=1)


def read_at(store: onionskin.Store, volume: str, name: str) -> bytes:
    with store.open(volume, snapshot=name) as view:
        return view.read(0, 4)


def layers(store: onionskin.Store) -> int:
    return len(store._opened.catalog.parents())


def test_served_disks_are_cut_at_one_instant_and_named_at_the_commit(store: onionskin.Store, server: Server) -> None:
    web, data = disk_of(server, "web"), disk_of(server, "data")
    with store._open_to_write("lab.ram", for_machine=True) as ram, store._cut_machine("lab") as cut:
        web.write(0, b"then")
        cut.seal(lambda: data.write(0, b"late"))
        for disk in (web, data):
            disk.write(0, b"late")
            disk.flush()
        cut.commit("ready", mode="live", configuration=CONFIGURATION, ram=ram._opened.to_write(), state_bytes=1)
    assert (read_at(store, "web", "ready"), read_at(store, "data", "ready")) == (b"then", bytes(4))
    assert web.read(0, 4) == data.read(0, 4) == b"late"


def test_a_server_waits_for_a_machine_that_is_long_in_stopping(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does while its caller says so. Meanwhile what the guest writes is answered: else the machine would not stop."""
    hear = groups.Talk.hear
    asked: list[str] = []

    def hear_and_note(self: groups.Talk, *steps: str) -> dict[str, Any]:
        found = hear(self, *steps)
        asked.append(str(found.get("step")))
        return found

    def stop(keep_waiting: Callable[[], None]) -> None:
        for _ in range(3):
            keep_waiting()
            disk_of(server, "web").write(0, b"then")
            disk_of(server, "web").flush()

    monkeypatch.setattr(groups.Talk, "hear", hear_and_note)
    with store._open_to_write("lab.ram", for_machine=True) as ram, store._cut_machine("lab") as cut:
        cut.seal(when_ready=stop)
        cut.commit("ready", mode="live", configuration=CONFIGURATION, ram=ram._opened.to_write(), state_bytes=1)
    assert [step for step in asked if step != "enter"] == ["wait", "wait", "wait", "begin", "sync", "end"]
    assert read_at(store, "web", "ready") == b"then"


def test_who_is_long_in_stopping_a_machine_is_not_waited_for_without_end(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(keep_waiting: Callable[[], None]) -> None:
        monkeypatch.setattr(groups, "GROUP_SECONDS", -1.0)
        keep_waiting()

    with store._cut_machine("lab") as cut, pytest.raises(StateError, match="has not begun"):
        cut.seal(when_ready=stop)
    monkeypatch.undo()
    snapshot(store, "ready")


def test_what_is_abandoned_of_served_disks_goes_with_the_next_cut(store: onionskin.Store, server: Server) -> None:
    before = layers(store)
    for _ in range(4):
        with store._cut_machine("lab") as cut:
            cut.seal()
            disk_of(server, "web").write(0, b"more")
    assert layers(store) <= before + 2 and not store._opened.catalog.staged_volumes()
    snapshot(store, "ready")
    assert read_at(store, "web", "ready") == b"more"


def test_a_machine_is_put_back_while_its_disks_are_served(store: onionskin.Store, server: Server) -> None:
    snapshot(store, "ready")
    disk_of(server, "web").write(0, b"late")
    with onionskin.connect(store, "web") as live, pytest.raises(StateError, match="belongs to machine 'lab'"):
        live.revert("ready")
    store._revert_machine("lab", "ready")
    assert disk_of(server, "web").read(0, 4) == bytes(4)
    assert machines.beginning(store._opened, "lab").ram == ("lab.ram", "ready")


def parts_of(store: onionskin.Store, name: str) -> list[machine_tree.Part]:
    return machine_tree._parts(store._opened.catalog, "lab", name)[2]


def put_together(store: onionskin.Store, name: str) -> bool:
    catalog = store._opened.catalog
    machine = machines.find(catalog, "lab")
    snapshot_id = machines.find_snapshot(catalog, machine, name).id
    return store._put_back_together(parts_of(store, name), machine, snapshot_id)


def test_a_server_puts_all_disks_of_a_machine_back_in_one_transaction(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(store, "ready")
    for name in ("web", "data"):
        disk_of(server, name).write(0, b"late")
    changes = []
    change = OpenStore.change

    def note(opened: OpenStore, call: Any) -> Any:
        if threading.current_thread().name != BACKGROUND:
            changes.append(call)
        return change(opened, call)

    monkeypatch.setattr(OpenStore, "change", note)
    assert put_together(store, "ready")
    assert len([one for one in changes if "_forget" not in one.__qualname__]) == 1
    assert disk_of(server, "web").read(0, 4) == disk_of(server, "data").read(0, 4) == bytes(4)
    assert machines.beginning(store._opened, "lab").is_reverting  # its RAM is not put back yet
    store._revert_machine("lab", "ready")
    assert not machines.beginning(store._opened, "lab").is_reverting


def test_a_server_that_fails_to_put_one_disk_back_puts_none_back(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(store, "ready")
    for name in ("web", "data"):
        disk_of(server, name).write(0, b"late")

    def fail(catalog: object, machine: bytes, snapshot: bytes) -> None:
        raise StateError("the note could not be written")

    monkeypatch.setattr(machines, "write_reverting", fail)
    with pytest.raises(StateError, match="could not be written"):
        put_together(store, "ready")
    monkeypatch.undo()
    assert not machines.beginning(store._opened, "lab").is_reverting
    for name in ("web", "data"):
        disk = disk_of(server, name)
        assert disk.read(0, 4) == b"late"
        disk.write(0, b"more")  # it goes on
        disk.flush()
        assert disk.read(0, 4) == b"more"


def test_a_server_that_has_not_all_disks_puts_none_back(store: onionskin.Store) -> None:
    with closing(Server(limits=Limits(), allow_revert=True, log=lambda line: None)) as server:
        server.exports.add_volume(store.path, "web")
        snapshot(store, "ready")
        disk_of(server, "web").write(0, b"late")
        assert not put_together(store, "ready")
        assert disk_of(server, "web").read(0, 4) == b"late"
        assert not machines.beginning(store._opened, "lab").is_reverting
        store._revert_machine("lab", "ready")  # one by one
        assert disk_of(server, "web").read(0, 4) == bytes(4)


def test_a_server_that_does_not_let_its_disk_change_is_found_before_the_revert_is_noted(store: onionskin.Store) -> None:
    snapshot(store, "ready")
    snapshot(store, "later")
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    try:
        server.exports.add_volume(store.path, "data")
        with pytest.raises(StateError, match="serve with --allow-revert; nothing was changed"):
            store._revert_machine("lab", "ready")
    finally:
        server.close()
    assert (store.machine_info("lab").begins, store.machine_info("lab").stands_on) == ("boots", "later")


def test_a_server_puts_back_a_disk_only_for_its_own_machine(store: onionskin.Store, server: Server) -> None:
    snapshot(store, "ready")
    make_machine(store, "second", [])
    guid = store.snapshots("web")[0].guid
    with pytest.raises(StateError, match="belongs to machine 'lab'"):
        groups.revert_served(store, "web", "ready", guid, "second")
    with pytest.raises(onionskin.MachineNotFoundError):
        groups.revert_served(store, "web", "ready", guid, "third")
    assert not groups.revert_served(store, "lab.ram", "ready", guid, "lab")


def test_a_merge_folds_in_the_server(store: onionskin.Store, server: Server) -> None:
    before = layers(store)
    for name in "abc":
        disk_of(server, "web").write(0, name.encode())
        snapshot(store, name)
    store._merge_machine_snapshots("lab", ["a", "b", "c"])
    assert layers(store) == before and disk_of(server, "web").read(0, 1) == b"c"


def test_a_server_of_the_whole_store_offers_no_ram_and_no_disks_of_forks(store: onionskin.Store) -> None:
    snapshot_live(store, "lab", "ready", {})
    store.fork_machine("lab@ready", lifetime="1s")
    server = Server(limits=Limits(), allow_revert=True, log=lambda line: None)
    try:
        server.exports.add_store(store.path)
        assert sorted(server.exports.table.served) == ["data", "web"]
        offered = [name for name, _ in server.exports.names_behind("")]
        assert not [name for name in offered if name.startswith("lab")]
    finally:
        server.close()
