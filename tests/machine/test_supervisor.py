"""Machines with their supervisors: processes that stay, are asked, and are killed."""

import array
import ctypes
import fcntl
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.guests import SECONDS_MAX, Console, configuration, count_in, has_ended, stop_process, until
from support.logs import words_of

import onionskin
from onionskin.base.sockets import credentials_of
from onionskin.errors import FormatError, SnapshotExistsError, SnapshotNotFoundError, StateError
from onionskin.machine.machine import Machine
from onionskin.machine.monitor import Monitor
from onionskin.machine.record import Record, who_is_under_way

pytestmark = pytest.mark.slow  # each starts several processes
_PIDFD_GETFD = 438  # asm-generic/unistd.h; Python 3.11 does not have the call
PATIENCE = Path(__file__).parent.parent / "support" / "patience"


@pytest.fixture
def store(vms: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(vms) as store:
        yield store


@pytest.fixture
def lab(store: onionskin.Store, qemu: list[str]) -> Iterator[Machine]:
    """A machine of the disks web and data, which is off, and is ended with the test."""
    one = configuration(qemu)
    machine = store.create_machine(
        "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
    )
    yield machine
    machine.stop(force=True)


def console(machine: Machine) -> Console:
    return Console(machine._directory / "console")


def found(machine: Machine) -> Record:
    record = Record.read(machine._directory)
    assert record is not None
    return record


def pid_of(machine: Machine, what: str) -> int:
    process = getattr(found(machine), what)
    assert process is not None
    return int(process.pid)


@pytest.fixture
def unsaved(tmp_path: Path) -> tuple[str, ...]:
    """Arguments for QEMU with which it saves no machine, for a reason that onionskin does not know by name."""
    path = tmp_path / "seed.vdi"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", path, "1M"], check=True)
    return ("-drive", f"if=none,id=seed,format=vdi,file={path},readonly=on")


def test_a_machine_that_qemu_could_take_no_snapshot_of_is_not_started(
    store: onionskin.Store, qemu: list[str], unsaved: tuple[str, ...]
) -> None:
    given = configuration(qemu, qemu_args=unsaved)
    lab = store.create_machine("lab", disks=["web"], memory="16M", program=given.program, qemu_args=given.qemu_args)
    with pytest.raises(StateError, match=r"vdi.*so no snapshot of the machine could be taken"):
        lab.start()
    assert lab.state == "off"


def test_what_keeps_snapshots_from_being_taken_is_said_before_one_is_wanted(
    store: onionskin.Store, qemu: list[str], unsaved: tuple[str, ...], tmp_path: Path
) -> None:
    """A script starts QEMU as if it had learned of it only behind its start."""
    script = tmp_path / "script"
    script.write_text(
        '#!/bin/bash\nfor one; do [ "$one" = -only-migratable ] || given+=("$one"); done\n'
        f'exec {shlex.join(qemu)} "${{given[@]}}"\n'
    )
    script.chmod(0o700)
    lab = store.create_machine("lab", disks=["web"], memory="16M", program=str(script), qemu_args=unsaved)
    lab.start()
    try:
        (why,) = lab.status()["no_snapshot"]
        assert "vdi" in why
        with pytest.raises(StateError, match="vdi"):
            lab.snapshot("none")
        assert lab.state == "running"
        assert not lab.snapshots
    finally:
        lab.stop(force=True)


def test_a_machine_starts_runs_and_is_stopped_by_its_power_button(lab: Machine) -> None:
    assert lab.state == "off"
    lab.start()
    assert lab.state == "running"
    assert lab.status()["no_snapshot"] == []
    with console(lab) as screen:
        screen.wait_ticks()
        lab.stop(SECONDS_MAX)
        screen.wait_end()
        assert "off" in screen.text
    assert lab.state == "off"
    assert Record.read(lab._directory) is None


def test_damaged_device_state_of_a_machine_that_is_off_is_found_before_its_disks_are_put_back(
    store: onionskin.Store, lab: Machine
) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        lab.snapshot("ready")
        screen.wait_ticks()
    lab.stop(force=True)
    damage_state(store, "ready")
    before = read_disk(store)
    for _ in range(2):
        with pytest.raises(FormatError, match=r"the state of the devices in the RAM volume 'lab\.ram' is damaged"):
            lab.revert("ready")
        assert lab.state == "off"
        assert (
            read_disk(store) == before
        )  # it is not noted that it is being put back, either: the next start would do so
    lab.start(fresh=False)
    assert lab.state == "running"


def damage_state(store: onionskin.Store, snapshot: str) -> None:
    """Change a byte of a page of the state of the devices on the disk."""
    with store.open("lab.ram", snapshot=snapshot) as ram:
        state = ram.read(16 << 20, store.open_machine("lab").snapshots[0].state_bytes)
    pages = [state[at : at + 4096] for at in range(0, len(state) - 4096, 4096)]
    page = max(pages, key=lambda one: len(set(one)))
    # Not the catalog: who closes a file of SQLite's gives up the locks that this process has on it.
    for path in (store.path / "segments").iterdir():
        if (at := path.read_bytes().find(page)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 100)
                file.write(bytes([page[100] ^ 1]))


def read_disk(store: onionskin.Store) -> bytes:
    with store.open("web", mode="r") as disk:
        return disk.read(0, 1 << 20)


def make_staying(store: onionskin.Store, qemu: list[str]) -> Machine:
    """A machine whose QEMU stays when its guest has shut down, with a monitor for its user."""
    one = configuration(qemu, qemu_args=("-no-shutdown", "-qmp", "unix:user,server=on,wait=off"))
    return store.create_machine("lab", disks=["web"], memory="16M", program=one.program, qemu_args=one.qemu_args)


def test_a_machine_is_stopped_whose_hypervisor_stays_when_its_guest_has_shut_down(
    store: onionskin.Store, qemu: list[str]
) -> None:
    staying = make_staying(store, qemu)
    staying.start()
    try:
        with console(staying) as screen:
            screen.wait_ticks()
        staying.stop(SECONDS_MAX)
        assert staying.state == "off"
    finally:
        staying.stop(force=True)


def test_a_guest_that_has_shut_down_in_a_hypervisor_that_stays_goes_on_from_a_snapshot(
    store: onionskin.Store, qemu: list[str]
) -> None:
    staying = make_staying(store, qemu)
    staying.start()
    try:
        with console(staying) as screen:
            screen.wait_ticks()
            staying.snapshot("ready")
            with Monitor(staying._directory / "user", "lab") as user:
                user.execute("system_powerdown")
            until(lambda: staying.status()["hypervisor"] == "shutdown")
            assert "has shut down" in staying.status()["why"]
            hypervisor = pid_of(staying, "hypervisor")
            staying.revert("ready")
            assert staying.state == "running" and pid_of(staying, "hypervisor") == hypervisor
            screen.wait_ticks()
            with Monitor(staying._directory / "user", "lab") as user:
                user.execute("system_powerdown")
            until(lambda: staying.status()["hypervisor"] == "shutdown")
        staying.stop()
        assert staying.state == "off"
    finally:
        staying.stop(force=True)


@pytest.fixture
def full(lab: Machine) -> Iterator[Callable[[bool], None]]:
    """The machine runs, has a snapshot `ready`, and stands still since its store takes nothing more; this makes room."""
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
    lab.snapshot("ready")
    server = pid_of(lab, "server")

    def limit(size: int) -> None:
        resource.prlimit(server, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(0)
    until(lambda: "no room is left" in lab.status()["why"])
    yield lambda has_room: limit(resource.RLIM_INFINITY if has_room else 0)


def test_a_machine_whose_store_was_full_goes_on_from_a_snapshot_by_itself(
    lab: Machine, full: Callable[[bool], None]
) -> None:
    assert lab.state == "paused"
    full(True)
    lab.revert("ready")
    assert (lab.state, lab.status()["why"]) == ("running", "")
    with console(lab) as screen:
        screen.wait_ticks()


def test_a_machine_that_its_user_paused_when_its_store_was_full_stays_so_behind_a_revert(
    lab: Machine, full: Callable[[bool], None]
) -> None:
    full(True)
    lab.pause()
    lab.revert("ready")
    assert lab.state == "paused"
    lab.resume()
    assert lab.state == "running"


def test_a_guest_that_cannot_shut_down_since_the_store_is_full_is_said_to_stand_still_and_ends_when_there_is_room(
    lab: Machine, full: Callable[[bool], None]
) -> None:
    with pytest.raises(StateError, match="stands still: a disk had an error, as no room is left"):
        lab.stop(1_000_000)
    assert lab.state == "paused"
    full(True)
    with suppress(StateError):  # it may have ended before it says that it goes on
        lab.resume()
    until(lambda: lab.state == "off")


def test_its_disks_are_free_when_it_has_stopped(lab: Machine, store: onionskin.Store) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        lab.stop(force=True)
    with store.open("web") as web:
        assert int.from_bytes(web.read(512, 4), "little") >= 3


def test_a_machine_that_is_stopped_by_force_is_off_and_not_failed(lab: Machine) -> None:
    lab.start()
    lab.stop(force=True)
    assert lab.state == "off"
    lab.stop(force=True)  # once more does nothing


def test_of_two_starts_at_once_one_wins_and_the_other_says_so(lab: Machine) -> None:
    def start(_: int) -> str:
        try:
            lab._start()
        except StateError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(start, range(2)))
    assert said[0] == ""
    assert "machine 'lab' runs" in said[1] or "held" in said[1]
    assert lab.state == "running"
    with pytest.raises(StateError, match="runs already"):
        lab.start()


def test_a_guest_that_does_not_shut_down_in_time_runs_on(store: onionskin.Store, qemu: list[str]) -> None:
    one = configuration(qemu)
    deaf = store.create_machine("deaf", memory="16M", program=one.program, qemu_args=one.qemu_args)
    deaf.start()  # it has no disk to boot from, so nothing hears the power button
    try:
        with pytest.raises(StateError, match=r"did not shut down within 0\.01 s"):
            deaf.stop(0.01)
        assert deaf.state == "running"
    finally:
        deaf.stop(force=True)


def test_a_machine_that_its_user_paused_stays_paused_behind_a_snapshot(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        assert lab.pause() is True
        assert lab.pause() is False
        assert lab.state == "paused" and "user" in lab.status()["why"]
        taken = lab.snapshot("still")
        assert taken.pause_seconds == 0
        assert lab.state == "paused"
        lab.resume()
        screen.wait_ticks()
    assert lab.state == "running"


def test_a_snapshot_is_taken_while_it_runs_and_reverting_goes_on_from_it_in_place(
    lab: Machine, store: onionskin.Store
) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        taken = lab.snapshot("ready", "a note")
        assert (taken.name, taken.mode, taken.disks) == ("ready", "live", ("web", "data"))
        at = count_in(store, "ready")
        screen.wait_past(at + 1)
        before = pid_of(lab, "hypervisor")
        lab.revert("ready")
        assert screen.wait_back(0) in (at, at + 1)
        screen.wait_ticks(3)
        assert pid_of(lab, "hypervisor") == before
    with pytest.raises(SnapshotExistsError):
        lab.snapshot("ready")
    with pytest.raises(SnapshotNotFoundError):
        lab.revert("gone")
    assert lab.state == "running"


def test_a_machine_that_is_off_is_started_by_a_revert_and_goes_on(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks(10)
        lab.snapshot("ready")
        lab.stop(force=True)
    lab.revert("ready")
    assert found(lab).mapped is not None  # it began from RAM
    with console(lab) as screen:
        screen.wait_ticks()
        assert screen.ticks[0] >= 10
    assert lab.state == "running"


def test_a_fork_goes_on_beside_its_origin(lab: Machine, store: onionskin.Store) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks(10)
        lab.snapshot("ready")
        forks = lab.fork("ready", count=2)
        try:
            for fork in forks:
                with console(fork) as other:
                    other.wait_ticks()
                    assert other.ticks[0] >= 10
                assert found(fork).mapped is not None  # it began from RAM
                assert fork.status()["generation"] != lab.status()["generation"]
            screen.wait_ticks()
        finally:
            for fork in forks:
                fork.stop(force=True)
    store.delete_machines(*(fork.name for fork in forks))


def test_a_guest_whose_console_nobody_read_at_the_snapshot_goes_on_in_a_fork(lab: Machine) -> None:
    lab.start()
    with lab.console() as unread:
        before = -1
        while (there := bytes_in(unread)) > before:  # until the guest stands still, as no more of what it says is taken
            before = there
            time.sleep(0.5)
        lab.snapshot("unread")
    lab.stop(force=True)
    (fork,) = lab.fork("unread", count=1)
    try:
        with console(fork) as screen:
            screen.wait_ticks()
    finally:
        fork.stop(force=True)
        fork.delete()


def bytes_in(connection: socket.socket) -> int:
    """Return how many bytes wait to be read."""
    room = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, room)
    return room[0]


def test_a_machine_that_would_go_on_from_ram_boots_afresh(lab: Machine, store: onionskin.Store) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks(20)
    lab.snapshot("ready")
    lab.stop(force=True)
    (fork,) = lab.fork("ready", start=False)
    fork.start(fresh=True, paused=True)
    try:
        with console(fork) as screen:
            fork.resume()
            screen.wait_ticks(1)
            assert found(fork).mapped is None and screen.ticks[0] < 20
        fork.stop(force=True)
        fork.revert_to_beginning()
        with console(fork) as screen:
            screen.wait_ticks(1)
            assert found(fork).mapped is not None and screen.ticks[0] >= 20
        with pytest.raises(StateError, match="runs; stop it first"):
            fork.revert_to_beginning()
    finally:
        fork.stop(force=True)


def test_a_guest_is_told_another_generation_id_by_each_revert_also_behind_a_killed_supervisor(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        lab.snapshot("ready")
        told = [lab.status()["generation"]]
        for _ in range(2):
            lab.revert("ready")
            told.append(lab.status()["generation"])
        record = found(lab)
        assert record.supervisor is not None and record.generation == told[0] and record.told == told[2]
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        assert lab.status()["generation"] == told[2]
        lab.revert("ready")
        told.append(lab.status()["generation"])
        screen.wait_ticks()
    assert len(set(told)) == 4


# ---- kills ----


def test_a_killed_server_of_the_disks_is_started_again_and_the_guest_goes_on(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        killed = pid_of(lab, "server")
        os.kill(killed, signal.SIGKILL)
        until(lambda: pid_of(lab, "server") != killed)
        screen.wait_ticks(10)
    assert lab.state == "running"
    assert lab.status()["server_restarts"] == 1


def test_a_machine_whose_record_cannot_be_written_is_not_left_paused_and_outlives_its_server(lab: Machine) -> None:
    lab.start()
    record = found(lab)
    assert record.supervisor is not None and record.server is not None
    (lab._directory / f"running.json.{record.supervisor.pid}").mkdir()  # in the way, as a full disk is
    with console(lab) as screen:
        with pytest.raises(OSError, match="running"):
            lab.pause()
        assert lab.state == "running"
        os.kill(record.server.pid, signal.SIGKILL)
        until(lambda: lab.status()["server_restarts"] == 1)
        screen.wait_ticks(10)


def test_a_server_that_dies_again_and_again_is_given_up_and_that_is_said(
    lab: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PATIENCE))  # on a busy host five deaths take longer than a minute
    lab.start()
    monkeypatch.undo()
    for _ in range(6):
        killed = pid_of(lab, "server")
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: pid_of(lab, "server") != killed or lab.state == "failed")
    assert "died 5 times" in lab.status()["why"]
    lab.stop(force=True)
    assert lab.state == "off"
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()


def test_a_stop_with_a_dead_server_ends_with_an_error_in_bounded_time_and_the_machine_goes_on(
    lab: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        server = pid_of(lab, "server")
        stop_process(server)
        try:
            with pytest.raises(StateError, match="did not answer 'stop'"):
                lab.pause()
        finally:
            os.kill(server, signal.SIGCONT)
        screen.wait_ticks(5)
    assert lab.state == "running"
    assert words_of(caplog, "onionskin.machine.control") == [
        f"waiting for process {server}, which serves the disks of machine 'lab': it is stopped; kill -CONT lets it go on, or "
        "thawing its cgroup"
    ]


def test_a_machine_whose_supervisor_was_killed_is_taken_over_by_the_next_command(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        lab.snapshot("before")
        record = found(lab)
        assert record.supervisor is not None and record.hypervisor is not None
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        assert lab.state == "running"
        assert pid_of(lab, "hypervisor") == record.hypervisor.pid
        assert pid_of(lab, "server") == record.server.pid
        screen.wait_ticks()
        lab.snapshot("after")
        screen.wait_ticks(10)
        lab.revert("before")
        screen.wait_ticks(5)
        lab.revert("after")
        screen.wait_ticks(5)
    lab.stop(SECONDS_MAX)
    assert lab.state == "off"


def test_what_a_killed_supervisor_was_writing_goes_with_the_takeover_and_of_a_machine_that_is_off_with_the_next_look(
    lab: Machine,
) -> None:
    lab.start()
    drafts = [lab._directory / name for name in ("running.json.7", "running.json.7.next")]
    for kills, state in ((["supervisor"], "running"), (["supervisor", "server", "hypervisor"], "off")):
        for process in [getattr(found(lab), one) for one in kills]:
            os.kill(process.pid, signal.SIGKILL)
            until(lambda process=process: not process.is_alive)
        for draft in drafts:
            draft.touch()
        until(lambda state=state: lab.state == state and not any(draft.exists() for draft in drafts))


def test_a_takeover_that_took_longer_than_somebody_is_waited_for_is_found(
    lab: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.start()
    record = found(lab)
    os.kill(record.supervisor.pid, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive)
    start, late = Machine._start, [0.0]

    def start_slowly(machine: Machine) -> None:
        start(machine)
        late[0] += 3600

    monkeypatch.setattr(Machine, "_start", start_slowly)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], sleep=time.sleep)
    monkeypatch.setattr("onionskin.machine.machine.time", clock)
    assert lab.state == "running" and late == [3600]


def test_of_two_that_take_a_machine_over_at_once_the_second_finds_it(
    lab: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.start()
    record = found(lab)
    os.kill(record.supervisor.pid, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive)
    start = Machine._start

    def start_second(machine: Machine) -> None:
        start(machine)
        start(machine)

    monkeypatch.setattr(Machine, "_start", start_second)
    assert lab.state == "running"


def test_a_machine_that_a_killed_supervisor_left_standing_still_goes_on(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        record = found(lab)
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        replace(record, is_standing=True).write(lab._directory)  # as in the middle of a snapshot
        with Monitor(lab._directory / "qmp", "lab") as monitor:
            monitor.execute("stop")
        assert lab.state == "running"
        screen.wait_ticks()


def test_a_machine_that_its_user_stopped_past_onionskin_stays_so_when_it_is_taken_over(
    store: onionskin.Store, qemu: list[str]
) -> None:
    lab = make_staying(store, qemu)
    lab.start()
    try:
        lab.snapshot("ready")
        with Monitor(lab._directory / "user", "lab") as user:
            user.execute("stop")
        lab.snapshot("still")
        lab.revert("ready")
        record = found(lab)
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        assert lab.state == "paused"
        lab.resume()
        assert lab.state == "running"
    finally:
        lab.stop(force=True)


def test_a_guest_that_has_shut_down_in_a_hypervisor_that_stays_is_taken_over(
    store: onionskin.Store, qemu: list[str]
) -> None:
    staying = make_staying(store, qemu)
    staying.start()
    try:
        with console(staying) as screen:
            screen.wait_ticks()
            with Monitor(staying._directory / "user", "lab") as user:
                user.execute("system_powerdown")
            until(lambda: staying.status()["hypervisor"] == "shutdown")
        record = found(staying)
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        assert "has shut down" in staying.status()["why"]
        assert pid_of(staying, "hypervisor") == record.hypervisor.pid
    finally:
        staying.stop(force=True)


def test_a_machine_that_its_user_paused_is_still_paused_when_it_is_taken_over(lab: Machine) -> None:
    lab.start()
    lab.pause()
    record = found(lab)
    os.kill(record.supervisor.pid, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive)
    assert lab.state == "paused"
    assert "user" in lab.status()["why"]


def test_what_a_killed_supervisor_left_can_be_ended_by_force_also_where_it_answers_nothing(lab: Machine) -> None:
    lab.start()
    record = found(lab)
    os.kill(record.supervisor.pid, signal.SIGKILL)
    stop_process(record.hypervisor.pid)
    until(lambda: not record.supervisor.is_alive)
    lab.stop(force=True)
    assert not record.hypervisor.is_alive and not record.server.is_alive
    assert lab.state == "off"
    lab.start()
    assert lab.state == "running"


def test_supervisor_and_server_killed_together_are_both_followed(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        record = found(lab)
        for process in (record.supervisor, record.server):
            os.kill(process.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive and not record.server.is_alive)
        assert lab.state == "running"
        screen.wait_ticks(5)


_TAKES_OVER_IN_VAIN = """
import sys
import onionskin
from onionskin.machine import qemu, supervisor

def answer_nothing(*given, **named):
    raise onionskin.StateError("it answers nothing")

qemu.adopt = answer_nothing
supervisor.Supervisor(onionskin.Store(sys.argv[1]), "lab", print).begin()
"""


def test_a_takeover_that_fails_behind_the_start_of_a_server_leaves_it_to_the_next_one(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        record = found(lab)
        for process in (record.supervisor, record.server):
            os.kill(process.pid, signal.SIGKILL)
        until(lambda: has_ended(record.supervisor.pid) and has_ended(record.server.pid))
        taking = [sys.executable, "-c", _TAKES_OVER_IN_VAIN, lab._store.path]
        assert "it answers nothing" in subprocess.run(taking, capture_output=True, text=True).stderr
        assert lab.state == "running"
        screen.wait_ticks(5)


@pytest.mark.parametrize("log", ["supervisor.log", "server.log", "qemu.log"])
def test_no_file_is_written_to_that_a_link_in_the_place_of_a_log_leads_to(
    lab: Machine, tmp_path: Path, log: str
) -> None:
    other = tmp_path / "of somebody"
    other.write_text("precious")
    lab._directory.mkdir(parents=True)
    (lab._directory / log).symlink_to(other)
    with pytest.raises(OSError, match=log):
        lab.start()
    assert other.read_text() == "precious" and lab.state == "off"


def test_a_killed_hypervisor_is_reported_and_the_machine_starts_again(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        os.kill(pid_of(lab, "hypervisor"), signal.SIGKILL)
        screen.wait_end()
    until(lambda: Record.read(lab._directory) is None)
    assert lab.state == "failed"
    assert "ended with -9" in lab.status()["why"]
    lab.start()
    assert lab.state == "running"


def test_a_killed_hypervisor_is_never_said_to_be_paused(lab: Machine) -> None:
    lab.start()
    os.kill(pid_of(lab, "hypervisor"), signal.SIGKILL)
    assert lab.state in ("running", "failed")  # it may not have died yet
    until(lambda: lab.state == "failed")
    lab.start()
    assert lab.state == "running"


def test_a_machine_whose_monitor_was_disconnected_can_be_taken_and_put_back(lab: Machine) -> None:
    lab.start()
    cut_connections(pid_of(lab, "supervisor"), pid_of(lab, "hypervisor"))
    until(lambda: lab.state == "running")
    lab.snapshot("behind")
    lab.revert("behind")
    with console(lab) as screen:
        screen.wait_ticks()


def cut_connections(pid: int, other: int) -> None:
    """Shut what a process has of connections to another one that listens."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    count = 0
    for one in os.listdir(f"/proc/{pid}/fd"):
        copy = libc.syscall(_PIDFD_GETFD, process, int(one), 0)
        if copy < 0 or not stat.S_ISSOCK(os.fstat(copy).st_mode):
            continue
        with socket.socket(fileno=copy) as connection:
            if connection.family == socket.AF_UNIX and credentials_of(connection)[0] == other:
                with suppress(OSError):
                    if str(connection.getpeername()).endswith("qmp"):
                        connection.shutdown(socket.SHUT_RDWR)
                        count += 1
    os.close(process)
    assert count == 1


def test_all_killed_leaves_a_machine_that_starts_again(lab: Machine) -> None:
    lab.start()
    lab.snapshot("ready")
    record = found(lab)
    for process in (record.supervisor, record.server, record.hypervisor):
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not any(one.is_alive for one in (record.supervisor, record.server, record.hypervisor)))
    assert lab.state in ("off", "failed")
    lab.revert("ready")
    with console(lab) as screen:
        screen.wait_ticks()


def test_a_machine_whose_supervisor_was_killed_and_whose_directory_was_removed_starts_again(lab: Machine) -> None:
    lab.start()
    record = found(lab)
    os.kill(record.supervisor.pid, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive)
    shutil.rmtree(lab._directory)
    lab.start()  # nobody could reach those that ran
    assert not record.hypervisor.is_alive and not record.server.is_alive
    with console(lab) as screen:
        screen.wait_ticks()


@pytest.mark.parametrize("gone", ["its socket", "its directory"])
def test_a_machine_whose_socket_is_gone_is_said_to_run_with_what_ends_it(
    lab: Machine, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        record = found(lab)
        if gone == "its socket":
            (lab._directory / "control").unlink()
        else:
            shutil.rmtree(lab._directory)
        monkeypatch.setattr("onionskin.machine.machine.STARTING_SECONDS", 0.1)
        with pytest.raises(StateError, match=f"'kill {record.supervisor.pid}' has its guest shut down"):
            lab.status()
        monkeypatch.undo()
        os.kill(record.supervisor.pid, signal.SIGTERM)
        screen.wait_end()
    until(lambda: not record.supervisor.is_alive)
    assert lab.state == "off"


def test_a_machine_says_that_it_begins_and_ends_as_long_as_nobody_can_reach_it(
    store: onionskin.Store, qemu: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\ncp under-way.json {tmp_path}/begins 2>/dev/null\nexec {shlex.join(qemu)} "$@"\n')
    script.chmod(0o700)
    lab = store.create_machine("lab", disks=["web"], memory="16M", program=str(script))
    lab.start()
    record = found(lab)
    assert record.supervisor is not None and record.server is not None
    assert f'"pid": {record.supervisor.pid},' in (tmp_path / "begins").read_text()
    assert who_is_under_way(lab._directory) is None
    stop_process(record.server.pid)
    with ThreadPoolExecutor(1) as threads:
        ends = threads.submit(lab.stop, force=True)
        until(lambda: who_is_under_way(lab._directory) == record.supervisor)
        os.kill(record.server.pid, signal.SIGCONT)
        ends.result()
    until(lambda: not record.supervisor.is_alive)  # type: ignore[union-attr]
    assert not (lab._directory / "under-way.json").exists()


def test_sigterm_has_the_guest_shut_down_in_order(lab: Machine) -> None:
    lab.start()
    with console(lab) as screen:
        screen.wait_ticks()
        record = found(lab)
        os.kill(record.supervisor.pid, signal.SIGTERM)
        screen.wait_end()
        assert "off" in screen.text
    until(lambda: not record.supervisor.is_alive)
    assert lab.state == "off"
