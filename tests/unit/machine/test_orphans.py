"""What a killed supervisor left that no record names, and what ends it."""

import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.errors import StateError
from onionskin.machine import orphans, qemu
from onionskin.machine.leftovers import drop_leftovers
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


def test_drafts_that_a_killed_process_left_are_found_and_dropped(tmp_path: Path) -> None:
    kept = {"running.json", "ended.json", "control", "nbd", "supervisor.log"}
    left = {"running.json.7", "running.json.7.next", "ended.json.7", "under-way.json.7", ".control.7", ".nbd.7"}
    for name in kept | left:
        (tmp_path / name).touch()
    assert orphans.are_there(tmp_path)
    orphans.end(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
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


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Names of copies of RAM, in memory where no other process drops any."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        monkeypatch.setattr(orphans, "_SHARED_MEMORY", Path(memory))
        (tmp_path / "machine-of-test").mkdir()
        yield [orphans.copy_of_ram(tmp_path / "machine-of-test", number) for number in (1, 2, 3)]


def test_copies_of_the_ram_of_this_machine_alone_are_dropped(copies: list[Path], tmp_path: Path) -> None:
    one, other = tmp_path / "machine-of-test", tmp_path / "copy-of-vms/machine-of-test"
    other.mkdir(parents=True)
    its, others = copies[0], orphans.copy_of_ram(other, 1)
    its.touch()
    others.touch()
    assert orphans.are_there(one)
    orphans.end(one)
    assert not its.exists() and others.exists()


def test_a_copy_of_ram_that_no_process_has_is_dropped_though_its_directory_is_gone(
    copies: list[Path], tmp_path: Path
) -> None:
    others = copies[0].with_name(f"{copies[0].name}.not"), copies[0].with_name("onionskin-of-test.locked.ram")
    (tmp_path / "machine-of-test").rmdir()
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


def test_a_copy_of_ram_is_not_dropped_where_a_hypervisor_has_it_by_another_descriptor(copies: list[Path]) -> None:
    """A program that starts it may have closed what it was handed, and the supervisor may have been killed."""
    os.close(orphans.make_copy(copies[0]))
    with copies[0].open("r+b") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    with mapped:
        orphans.drop_forgotten_copies()
        assert copies[0].exists()
    orphans.drop_forgotten_copies()
    assert not copies[0].exists()


def test_a_copy_of_ram_is_locked_as_long_as_it_is_open(copies: list[Path]) -> None:
    made = orphans.make_copy(copies[0])
    with copies[0].open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(made)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("by", ["a start", "dropping"])
def test_forgotten_copies_of_ram_are_dropped_by_a_start_that_makes_one_and_when_snapshots_are_dropped(
    copies: list[Path], tmp_path: Path, by: str
) -> None:
    os.close(orphans.make_copy(copies[0]))
    if by == "dropping":
        with onionskin.Store(tmp_path / "vms") as store:
            drop_leftovers(store, [])
    else:
        (tmp_path / "ram").write_bytes(bytes(4096))
        path, descriptor = qemu._copy(tmp_path / "ram", tmp_path / "machine-of-test")
        assert path.exists()
        os.close(descriptor)
    assert not copies[0].exists()


def test_a_copy_of_ram_is_not_dropped_as_long_as_somebody_has_it_locked(copies: list[Path]) -> None:
    """A kernel may not know leases, by which it is seen that it is open."""
    os.close(orphans.make_copy(copies[0]))
    with copies[0].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        orphans.drop_forgotten_copies()
        assert copies[0].exists()
    orphans.drop_forgotten_copies()
    assert not copies[0].exists()


def test_a_copy_of_ram_is_not_dropped_that_was_made_in_the_place_of_a_forgotten_one(
    copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(orphans.make_copy(copies[0]))
    refuse, made = orphans._refuse_open, []

    def refuse_and_be_followed(descriptor: int) -> None:
        refuse(descriptor)
        copies[0].unlink()
        made.append(orphans.make_copy(copies[0]))

    monkeypatch.setattr(orphans, "_refuse_open", refuse_and_be_followed)
    orphans.drop_forgotten_copies()
    assert copies[0].exists()
    os.close(made[0])


def test_a_copy_of_ram_of_another_user_is_neither_opened_nor_dropped(
    copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root could."""
    os.close(orphans.make_copy(copies[0]))
    opened: list[object] = []
    with monkeypatch.context() as patch:
        user, open_file = os.geteuid(), os.open
        patch.setattr(os, "geteuid", lambda: user + 1)
        patch.setattr(os, "open", lambda path, *how: (opened.append(path), open_file(path, *how))[1])
        orphans.drop_forgotten_copies()
    assert copies[0].exists() and copies[0] not in opened
    orphans.drop_forgotten_copies()
    assert not copies[0].exists()


def test_a_copy_of_ram_that_somebody_drops_before_it_is_locked_is_made_again(
    copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, locked = fcntl.flock, []

    def lock(descriptor: int, how: int) -> None:
        locked.append(how)
        if len(locked) == 1:
            orphans._drop_if_forgotten(copies[0])
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(orphans, "_refuse_open", lambda descriptor: None)  # as where there are no leases
    descriptor = orphans.make_copy(copies[0])
    try:
        assert copies[0].stat().st_ino == os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
