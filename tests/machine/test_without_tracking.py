"""Machines where writes to RAM cannot be noted: RAM is a file of each machine's own, which is compared with the store.

Once because the environment says so (ONIONSKIN_NO_TRACKING), once because a sandbox refuses a userfaultfd.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forbid_calls import (
    IOCTL,
    MADVISE,
    MEMFD_CREATE,
    PAGEMAP_SCAN,
    PIDFD_OPEN,
    PIDFD_SEND_SIGNAL,
    READ_PROCESS,
    WRITE_PROCESS,
    forbid,
)
from support.guests import Console, configuration, count_in, until
from support.servers import onionskin as command

import onionskin
from onionskin.errors import StateError
from onionskin.machine.machine import Machine
from onionskin.machine.qemu import _copy
from onionskin.machine.record import Record

pytestmark = pytest.mark.slow  # each starts several processes
SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONIONSKIN_NO_TRACKING", "1")


@pytest.fixture
def sandboxed(qemu: list[str], tmp_path: Path) -> list[str]:
    """A QEMU that is started in a sandbox."""
    filtering, program = tmp_path / "forbid_faults", tmp_path / "qemu"
    subprocess.run(["cc", "-static", "-o", filtering, SUPPORT / "forbid_faults.c"], check=True)
    found = shutil.which(qemu[0])
    program.write_text(f"#!{filtering} {found}\n")
    program.chmod(0o755)
    return [str(program), *qemu[1:]]


def make(vms: Path, qemu: list[str]) -> Iterator[Machine]:
    with onionskin.Store(vms) as store:
        one = configuration(qemu)
        yield store.create_machine(
            "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
        )
        machines = [store.open_machine(info.name) for info in store.machines()]
        for machine in machines:
            machine.stop(force=True)
        assert [copies(machine) for machine in machines] == [[] for _ in machines]


@pytest.fixture
def lab(vms: Path, qemu: list[str], environment: None) -> Iterator[Machine]:
    yield from make(vms, qemu)


@pytest.fixture
def tracked_lab(vms: Path, qemu: list[str]) -> Iterator[Machine]:
    """One whose writes could be noted."""
    yield from make(vms, qemu)


@pytest.fixture
def sandboxed_lab(vms: Path, sandboxed: list[str]) -> Iterator[Machine]:
    yield from make(vms, sandboxed)


def copies(machine: Machine) -> list[Path]:
    """The RAM of a machine that is in memory."""
    return list(Path("/dev/shm").glob(f"onionskin-{machine._directory.name}.*"))


def console_of(machine: Machine) -> Console:
    return Console(machine._directory / "console")


def record_of(machine: Machine) -> Record:
    found = Record.read(machine._directory)
    assert found is not None and found.supervisor and found.hypervisor
    return found


def check_life(lab: Machine) -> None:
    """Snapshots, reverts in place and from off, and forks are what they are with tracking, and the mode is pause."""
    lab.start()
    assert lab.status()["is_tracked"] is False
    with console_of(lab) as screen:
        screen.wait_ticks(5)
        taken = lab.snapshot("ready")
        assert taken.mode == "pause" and taken.pause_seconds > 0
        at = count_in(lab._store, "ready")
        screen.wait_past(at + 1)
        assert lab.snapshot("again").bytes_stored < taken.bytes_stored
        lab.revert("ready")
        assert screen.wait_back(0) in (at, at + 1)
        screen.wait_ticks(3)
        forks = lab.fork("ready", count=2, start=False)
        for fork in forks:
            fork.start(paused=True)  # what a machine says before somebody listens is lost
            with console_of(fork) as other:
                fork.resume()
                other.wait_ticks()
                assert other.ticks[0] in (at, at + 1)
            assert fork.status()["is_tracked"] is False
        screen.wait_ticks(3)
        for fork in forks:
            fork.stop(force=True)
    lab.stop(force=True)
    lab.revert("again")
    with console_of(lab) as screen:
        screen.wait_ticks(3)
        assert screen.ticks[0] > at


def test_a_machine_lives_without_tracking(lab: Machine) -> None:
    check_life(lab)


def test_a_machine_lives_in_a_sandbox_without_userfaultfd(sandboxed_lab: Machine) -> None:
    check_life(sandboxed_lab)


def start_without(lab: Machine, *call: int) -> "subprocess.CompletedProcess[str]":
    """Start it by a command that may not make a call of the kernel, nor what it starts."""
    return subprocess.run(
        [sys.executable, "-m", "onionskin", "machine", "start", f"{lab._store.path}/{lab.name}"],
        preexec_fn=lambda: forbid(*call),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("call", [(IOCTL, PAGEMAP_SCAN), (READ_PROCESS,), (WRITE_PROCESS,)])
def test_a_machine_whose_ram_cannot_be_scanned_read_or_written_is_started_without_tracking(
    tracked_lab: Machine, call: tuple[int, ...]
) -> None:
    assert start_without(tracked_lab, *call).returncode == 0
    assert tracked_lab.status()["is_tracked"] is False
    tracked_lab.snapshot("ready")
    tracked_lab.revert("ready")
    with console_of(tracked_lab) as screen:
        screen.wait_ticks()


@pytest.mark.parametrize(("call", "named"), [(PIDFD_OPEN, "pidfd_open"), (PIDFD_SEND_SIGNAL, "pidfd_send_signal")])
def test_a_machine_is_not_started_where_nobody_can_wait_for_the_end_of_its_processes_or_end_them(
    tracked_lab: Machine, call: int, named: str
) -> None:
    refused = start_without(tracked_lab, call)
    assert refused.returncode and f"({named}:" in refused.stderr
    assert tracked_lab.state == "off"


def test_a_machine_is_taken_and_put_back_in_a_sandbox_in_which_memory_cannot_be_dropped(tracked_lab: Machine) -> None:
    assert start_without(tracked_lab, MADVISE).returncode == 0
    assert tracked_lab.status()["is_tracked"] is True
    with console_of(tracked_lab) as screen:
        screen.wait_ticks()
        for name in ("first", "second"):
            tracked_lab.snapshot(name)
            count = count_in(tracked_lab._store, name)
            at = len(screen.ticks) - 1  # the guest may have said enough already
            screen.wait_past(count + 1)
            tracked_lab.revert(name)
            assert screen.wait_back(at) in (count, count + 1)


def test_a_snapshot_that_gets_no_file_in_memory_says_which_call_is_refused(tracked_lab: Machine) -> None:
    assert start_without(tracked_lab, MEMFD_CREATE).returncode == 0
    with pytest.raises(StateError, match="memfd_create"):
        tracked_lab.snapshot("ready")
    with console_of(tracked_lab) as screen:
        screen.wait_ticks()


def test_a_live_snapshot_without_tracking_is_refused_and_status_says_why(lab: Machine) -> None:
    lab.start()
    with pytest.raises(StateError, match="no live snapshot of it can be taken; use mode 'pause'"):
        lab.snapshot("ready", mode="live")
    assert lab.snapshots == []
    assert "cannot be tracked here: mode pause alone" in command("machine", "status", f"{lab._store.path}/lab").stdout
    assert lab.state == "running"


def test_a_machine_without_tracking_is_taken_over(lab: Machine) -> None:
    lab.start()
    with console_of(lab) as screen:
        screen.wait_ticks()
        lab.snapshot("before")
        record = record_of(lab)
        os.kill(record.supervisor.pid, signal.SIGKILL)
        until(lambda: not record.supervisor.is_alive)
        screen.wait_ticks()
        assert lab.snapshot("after").mode == "pause"
        lab.revert("before")
        screen.wait_ticks(3)


def test_ram_in_memory_goes_with_the_machine_also_where_all_of_it_was_killed(lab: Machine) -> None:
    lab.start()
    record = record_of(lab)
    assert copies(lab) == [Path(record.ram_file)]
    for process in (record.supervisor, record.hypervisor):
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not record.supervisor.is_alive and not record.hypervisor.is_alive)
    until(lambda: lab.state != "running")
    assert copies(lab) == []


def test_what_keeps_a_machine_without_tracking_from_starting_leaves_no_copy(
    vms: Path, qemu: list[str], environment: None
) -> None:
    for lab in make(vms, [*qemu, "-device", "no-such-device"]):
        with pytest.raises(StateError, match="no-such-device"):
            lab.start()
        assert copies(lab) == []


def test_ram_that_does_not_fit_in_memory_is_refused_before_a_guest_fills_it(directory: Path) -> None:
    """The kernel kills a process that writes to a page of a file for which a file system in memory has no room."""
    ram = directory / "ram"
    ram.touch()
    os.truncate(ram, 1 << 43)
    with pytest.raises(StateError, match=r"/dev/shm has .* left.*8 TiB"):
        _copy(ram, directory)
    assert list(Path("/dev/shm").glob(f"onionskin-{directory.name}.*")) == []
