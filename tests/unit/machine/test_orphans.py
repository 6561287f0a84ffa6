"""What a killed supervisor left that no record names, and what ends it."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin
from onionskin.errors import StateError
from onionskin.machine import orphans
from onionskin.machine.record import make_directory

LISTEN = """
import signal, socket, sys
one = socket.socket(socket.AF_UNIX)
one.bind(sys.argv[1])
one.listen()
print(flush=True)
signal.pause()
"""


def test_a_directory_without_processes_has_nothing_to_end(tmp_path: Path) -> None:
    assert not orphans.are_there(tmp_path)
    (tmp_path / "qmp").touch()
    orphans.end(tmp_path)
    assert not orphans.are_there(tmp_path)


def test_what_listens_in_the_directory_is_found_and_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LISTEN, tmp_path / "qmp"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert orphans.are_there(tmp_path)
        orphans.end(tmp_path)
        assert process.wait() != 0
    assert not orphans.are_there(tmp_path)  # the socket is there, and nobody listens


@pytest.mark.parametrize("log", orphans.LOGS)
def test_what_was_started_and_listens_nowhere_yet_is_found_by_its_log_and_ended(tmp_path: Path, log: str) -> None:
    with (
        (tmp_path / log).open("w") as file,
        subprocess.Popen(["sleep", "inf"], stderr=file) as process,
        subprocess.Popen(["sleep", "inf"], stdout=file) as other,
    ):
        assert orphans.are_there(tmp_path)
        orphans.end(tmp_path)
        assert process.wait() != 0
        assert other.poll() is None
        other.kill()
    assert not orphans.are_there(tmp_path)


def test_what_runs_in_a_directory_that_was_removed_is_found_and_ended(tmp_path: Path) -> None:
    directory = tmp_path / "lab"
    directory.mkdir()
    with (directory / "qemu.log").open("w") as file, subprocess.Popen(["sleep", "inf"], stderr=file) as process:
        (directory / "qemu.log").unlink()
        directory.rmdir()
        assert orphans.are_there(directory)
        orphans.end(directory)
        assert process.wait() != 0
    assert not orphans.are_there(directory)


def test_servers_of_disks_are_ended_and_the_hypervisor_is_left(tmp_path: Path) -> None:
    hypervisor, server = orphans.LOGS
    with (
        (tmp_path / hypervisor).open("w") as qemu_log,
        (tmp_path / server).open("w") as server_log,
        subprocess.Popen(["sleep", "inf"], stderr=qemu_log) as stays,
        subprocess.Popen(["sleep", "inf"], stderr=server_log) as goes,
    ):
        orphans.end_servers(tmp_path)
        assert goes.wait() != 0
        assert stays.poll() is None
        stays.kill()


def test_a_machine_is_not_deleted_while_a_process_of_it_is_there(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size="1M").close()
        machine = store.create_machine("lab", disks=["web"], memory="16M")
        directory = make_directory(store.path, machine._id)
        with (directory / "qemu.log").open("w") as log, subprocess.Popen(["sleep", "inf"], stderr=log) as process:
            with pytest.raises(StateError, match=f"its supervisor left when it was killed: {process.pid}; end them"):
                store.delete_machines("lab")
            assert [one.name for one in store.machines()] == ["lab"]
            machine.delete()  # it ends them
            assert process.wait() != 0
        assert store.machines() == []


def test_copies_of_the_ram_of_this_machine_alone_are_dropped(tmp_path: Path) -> None:
    one, other = tmp_path / "vms/machine-of-test", tmp_path / "copy-of-vms/machine-of-test"
    for directory in (one, other):
        directory.mkdir(parents=True)
    copies = [orphans.copy_of_ram(directory, 1) for directory in (one, other)]
    for copy in copies:
        copy.touch()
    try:
        assert orphans.are_there(one)
        orphans.end(one)
        assert [copy.exists() for copy in copies] == [False, True]
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)


def test_a_copy_of_ram_that_no_process_has_is_dropped_though_its_directory_is_gone(tmp_path: Path) -> None:
    directory = tmp_path / "machine-of-test"
    directory.mkdir()
    copies = [orphans.copy_of_ram(directory, number) for number in (1, 2, 3)]
    others = copies[0].with_name(f"{copies[0].name}.not"), copies[0].with_name("onionskin-of-test.locked.ram")
    directory.rmdir()
    mine, forgotten, its = (orphans.make_copy(copy) for copy in copies)
    try:
        others[0].touch()
        others[1].symlink_to(tmp_path / "elsewhere")
        with subprocess.Popen(["sleep", "1000"], pass_fds=[its]) as hypervisor:
            os.close(forgotten)
            os.close(its)
            orphans.drop_forgotten_copies()
            assert [copy.exists() for copy in copies] == [True, False, True]
            hypervisor.kill()
        orphans.drop_forgotten_copies()
        assert [copy.exists() for copy in copies] == [True, False, False]
        assert others[0].exists() and others[1].is_symlink()
    finally:
        os.close(mine)
        for copy in (*copies, *others):
            copy.unlink(missing_ok=True)


def test_a_copy_of_ram_that_somebody_drops_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "machine-of-test").mkdir()
    copy = orphans.copy_of_ram(tmp_path / "machine-of-test", 1)
    flock, locked = fcntl.flock, []

    def lock(descriptor: int, how: int) -> None:
        locked.append(how)
        if len(locked) == 1:
            orphans._drop_if_forgotten(copy)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    descriptor = orphans.make_copy(copy)
    try:
        assert copy.stat().st_ino == os.fstat(descriptor).st_ino
    finally:
        copy.unlink()
        os.close(descriptor)
