"""The members of a group share a store: each may run its machines, and one machine is run by one of them at a time."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.stand_in import CONFIGURATION, RECORDED, make_machine

import onionskin
from onionskin.base.sockets import UnixListener
from onionskin.errors import StateError
from onionskin.machine import fork, orphans, record
from onionskin.machine.machine import Machine
from onionskin.machine.record import ProcessId, Record

GROUP, MEMBER = 65500, 65501
ANOTHER = """
import os, pkgutil, sys
import numpy
import onionskin
for module in pkgutil.walk_packages(onionskin.__path__, "onionskin."):
    if not module.name.startswith(("onionskin.pytest_plugin", "onionskin.__main__", "onionskin.machine._preload")):
        __import__(module.name)
from onionskin.machine.record import UNDER_WAY, make_directory, open_log, write_json
root, group, user, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([])
os.setresgid(group, group, group)
os.setresuid(user, user, user)
with onionskin.Store(root, trust=True) as store:
    machine = store.open_machine("lab")
    if what == "files":
        directory = make_directory(root, machine._id)
        os.close(open_log(directory / "supervisor.log", os.O_APPEND))
        write_json(directory / UNDER_WAY, {})
    else:
        try:
            getattr(machine, what)()
        except onionskin.StateError as error:
            print(error)
"""
RUNNING = Record(
    *(None, None, None, CONFIGURATION.to_json(), RECORDED.to_json(), "", "", "", True, None)  # type: ignore[arg-type]
)


@pytest.fixture
def store() -> Iterator[onionskin.Store]:
    # Not in pytest's directory, which each run of it closes to others anew.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        with onionskin.Store(Path(directory) / "vms", group=GROUP) as store:
            make_machine(store)
            yield store


@pytest.fixture
def directory(store: onionskin.Store) -> Path:
    return record.make_directory(store.path, store.open_machine("lab")._id)


def as_another(store: onionskin.Store, what: str) -> str:
    words = [sys.executable, "-c", ANOTHER, str(store.path), str(GROUP), str(MEMBER), what]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_what_one_member_left_of_a_machine_another_one_goes_on_with(store: onionskin.Store, directory: Path) -> None:
    before = os.umask(0o077)
    try:
        os.close(record.open_log(directory / "supervisor.log", os.O_APPEND))
        record.write_json(directory / record.UNDER_WAY, {})
    finally:
        os.umask(before)
    as_another(store, "files")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"supervisor.log": 0o660, record.UNDER_WAY: 0o660}
    assert (directory / record.UNDER_WAY).stat().st_uid == MEMBER


def test_a_machine_that_another_member_runs_is_said_to_be_run_by_him(store: onionskin.Store, directory: Path) -> None:
    machine = store.open_machine("lab")
    listener = UnixListener(directory / record.CONTROL)
    try:
        with store._open_ram(machine._row):
            assert f"machine 'lab' runs as user {os.geteuid()}; that user alone" in as_another(store, "status")
    finally:
        listener.socket.close()
    assert as_another(store, "status") == ""  # it was killed: the socket stays, and says nothing


def test_what_another_member_runs_whose_supervisor_was_killed_is_neither_taken_over_nor_deleted(
    store: onionskin.Store, directory: Path
) -> None:
    replace(RUNNING, hypervisor=ProcessId.of(os.getpid())).write(directory)
    assert "and its supervisor was killed; that user alone" in as_another(store, "status")
    with pytest.raises(StateError, match=f"has processes that its supervisor left when it was killed: {os.getpid()}"):
        store._delete_machines(["lab"], recursive=True)
    assert [one.name for one in store.machines()] == ["lab"]


def test_sockets_that_another_users_killed_processes_left_are_in_nobodys_way(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("files of another user are made by root alone")
    for name in ("control", "nbd", "qmp"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / name))
    os.chown(tmp_path / "control", MEMBER, -1)
    os.chown(tmp_path / "qmp", MEMBER, -1)
    orphans.end(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [
        "nbd"
    ]  # what is one's own is looked at, and replaced, by who needs it


def test_no_fork_is_left_where_one_that_never_ran_could_not_even_be_stopped(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = store.open_machine("lab")
    machine.snapshot("off")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fork, "start_all", fail)
    monkeypatch.setattr(Machine, "stop", fail)
    with pytest.raises(PermissionError):
        machine.fork("off", count=2)
    assert [one.name for one in store.machines()] == ["lab"]
