"""Sockets that the user's arguments have QEMU listen on: by a path that says all, they would be one for many machines."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.stand_in import CONFIGURATION, make_machine

import onionskin
from onionskin.base.sockets import UnixListener
from onionskin.errors import StateError
from onionskin.machine import fork, pool, qemu
from onionskin.machine.qemu_command import own_sockets


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with a machine that listens at a path which says all, and its snapshot."""
    with onionskin.Store(tmp_path / "vms") as store:
        make_machine(store)
        machine = store.open_machine("lab")
        monitor = f"unix:{tmp_path}/monitor,server=on,wait=off"
        machine._configure(lambda one: replace(one, qemu_args=("-qmp", monitor)))
        machine.snapshot("off")
        yield store


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["-qmp", "unix:/run/a,server=on,wait=off"], ["/run/a"]),
        (["-monitor", "unix:/run/a,b,server,nowait"], ["/run/a"]),
        (["-serial", "unix:/run/a,,b,server=yes"], ["/run/a,b"]),
        (["-chardev", "socket,id=x,path=/run/a,server=on", "-vnc", "unix:/run/v"], ["/run/a", "/run/v"]),
        (["-spice", "unix=on,addr=/run/s,disable-ticketing=on"], ["/run/s"]),
        (["-qmp", "unix:monitor,server=on,wait=off"], []),  # in the machine's directory
        (["-chardev", "socket,id=x,path=/run/a"], []),  # it connects
        (["-chardev", "socket,id=x,path=/run/a,server=off", "-vnc", ":0"], []),
        (["-drive", "file=/run/server,readonly=on"], []),
    ],
)
def test_sockets_with_a_path_that_says_all_are_found(words: list[str], paths: list[str]) -> None:
    assert own_sockets(replace(CONFIGURATION, qemu_args=tuple(words))) == [Path(path) for path in paths]


def test_nobody_loses_a_socket_to_a_machine_that_starts(tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    configuration = replace(CONFIGURATION, qemu_args=("-qmp", f"unix:{path},server=on,wait=off"))
    qemu._refuse_taken_sockets(configuration, "lab")
    listener = UnixListener(path)
    with pytest.raises(StateError, match=f"somebody listens on {path}, on which QEMU of machine 'lab' is to listen"):
        qemu._refuse_taken_sockets(configuration, "lab")
    listener.socket.close()
    qemu._refuse_taken_sockets(configuration, "lab")  # it was left, and nobody listens


def test_machines_that_would_take_a_socket_from_each_other_are_not_started_at_once(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(fork, "_start_some", lambda _store, those, _paused: started.append(len(those)) or [])
    machine = store.open_machine("lab")
    with pytest.raises(StateError, match=r"each of these machines would listen on .*monitor"):
        machine.fork("off", count=2)
    assert started == [] and [one.name for one in store.machines()] == ["lab"]
    machine.fork("off", count=1)
    assert started == [1]
    with pytest.raises(StateError, match=r"each of these machines would listen on .*monitor"):
        pool.start(store, machine._id, "off", 2)
