"""Forks of a machine that are started at once: each has its supervisor and its server, and they share what can be shared."""

import hashlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.guests import SECONDS_MAX, Console, configuration, until
from support.processes import children_of, spare_of

import onionskin
from onionskin.errors import StateError
from onionskin.machine import fork as fork_process
from onionskin.machine.fork import start_all
from onionskin.machine.hypervisor import Configuration
from onionskin.machine.machine import Machine
from onionskin.machine.record import Record
from onionskin.operations import machines

pytestmark = pytest.mark.slow  # each starts several processes


@pytest.fixture
def lab(store: onionskin.Store, qemu: list[str]) -> Machine:
    """A machine that is off, and was taken as `ready` while it ran."""
    one = configuration(qemu)
    machine = store.create_machine(
        "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
    )
    machine.start()
    with Console(machine._directory / "console") as console:
        console.wait_ticks()
    machine.snapshot("ready")
    machine.stop(force=True)
    return machine


def record_of(machine: Machine) -> Record:
    found = Record.read(machine._directory)
    assert found is not None and found.hypervisor and found.server and found.supervisor
    return found


def test_forks_map_one_file_and_share_its_pages(lab: Machine) -> None:
    forks = lab.fork("ready", count=4)
    for fork in forks:
        with Console(fork._directory / "console") as console:
            console.wait_ticks()
    records = [record_of(fork) for fork in forks]
    assert len({record.ram_file for record in records}) == 1
    assert len({record.generation for record in records}) == 4


@pytest.fixture
def vms_in_memory(tick_disk: Path) -> Iterator[Path]:
    """A store on tmpfs, where whoever looks at a hole through a mapping makes a page of it."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        with onionskin.Store(Path(directory) / "vms") as store:
            store.create("web", base=tick_disk).close()
            store.create("data", size="1M").close()
        yield Path(directory) / "vms"


class TestInMemory:
    """Stores on tmpfs."""

    @pytest.fixture
    def vms(self, vms_in_memory: Path) -> Path:
        return vms_in_memory

    def test_eight_forks_and_their_snapshots_leave_the_ram_file_as_it_is(self, lab: Machine) -> None:
        check_ram_file_stays(lab)

    def test_a_snapshot_makes_no_page_of_the_empty_file_over_which_a_machine_boots(self, lab: Machine) -> None:
        lab.start()
        with Console(lab._directory / "console") as console:
            console.wait_ticks()
            check_snapshots_allocate_nothing([lab], Path(record_of(lab).ram_file))


def test_eight_forks_and_their_snapshots_leave_the_ram_file_as_it_is(lab: Machine) -> None:
    check_ram_file_stays(lab)


def check_ram_file_stays(lab: Machine) -> None:
    forks = lab.fork("ready", count=8)
    (file,) = {Path(record_of(fork).ram_file) for fork in forks}
    before = hashlib.sha256(file.read_bytes()).digest()
    for fork in forks:
        with Console(fork._directory / "console") as console:
            console.wait_ticks()
    check_snapshots_allocate_nothing(forks, file)
    for fork in forks:
        with Console(fork._directory / "console") as console:
            console.wait_ticks(1)
            fork.snapshot("live")
            fork.revert("still")
            console.wait_ticks(1)
    assert {record_of(fork).ram_file for fork in forks} == {str(file)}
    assert hashlib.sha256(file.read_bytes()).digest() == before


def check_snapshots_allocate_nothing(machines: list[Machine], file: Path) -> None:
    """Guests that run may make pages of the holes of a file on tmpfs: so all stand still meanwhile."""
    for machine in machines:
        machine.pause()
    before = file.stat().st_blocks
    for machine in machines:
        machine.snapshot("still")
    assert file.stat().st_blocks == before
    for machine in machines:
        machine.resume()


def test_a_fork_whose_server_dies_has_another_one(lab: Machine) -> None:
    (fork,) = lab.fork("ready", count=1)
    before = record_of(fork).server
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: record_of(fork).server != before)
    with Console(fork._directory / "console") as console:
        console.wait_ticks()


def test_what_keeps_one_from_starting_is_raised_and_the_others_run(lab: Machine, store: onionskin.Store) -> None:
    names = store.fork_machine("lab", "ready", count=2)
    row = machines.find(store._opened.catalog, names[0])
    broken = Configuration.from_json(re.sub(r'"cpu_model":"\w+"', '"cpu_model":"qemu64"', row.configuration))
    store._opened.change(lambda: store._opened.catalog.update_machine(row.id, configuration=broken.to_json()))
    with pytest.raises(StateError, match="CPU model"):
        start_all(store, names)
    assert store.open_machine(names[0]).state != "running"
    assert store.open_machine(names[1]).state == "running"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_next_call_is_served_by_the_process_that_is_loaded_and_by_another_one_after_its_end(lab: Machine) -> None:
    one, other = (record_of(lab.fork("ready")[0]).supervisor for _ in range(2))
    assert one and other
    loaded = parent_of(one.pid)
    assert parent_of(other.pid) == loaded
    os.kill(loaded, signal.SIGKILL)
    (fork,) = lab.fork("ready")
    with Console(fork._directory / "console") as console:
        console.wait_ticks()
    assert one.is_alive and other.is_alive


def processes_that_wait(lab: Machine) -> dict[str, int]:
    """Make a fork, and return the processes that wait for the next one of this test: it has another environment each time."""
    lab.fork("ready")
    until(lambda: spare_of(os.getpid()) is not None)
    supervisor = spare_of(os.getpid())
    assert supervisor is not None

    def found() -> dict[str, int]:
        servers = [pid for pid in in_session(supervisor) if parent_of(pid) not in (supervisor, parent_of(supervisor))]
        those = {"supervisor": [supervisor], "server": servers}
        those["hypervisor"] = [pid for pid in children_of(supervisor) if os.getsid(pid) == pid]
        return {who: pids[0] for who, pids in those.items() if pids}

    until(lambda: len(found()) == 3)
    return found()


def in_session(leader: int) -> list[int]:
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            if os.getsid(pid) == leader and pid != leader:
                found.append(pid)
    return found


def test_a_fork_has_the_processes_that_waited_for_it(lab: Machine) -> None:
    spare = processes_that_wait(lab)
    (fork,) = lab.fork("ready")
    record = record_of(fork)
    assert {who: getattr(record, who).pid for who in spare} == spare
    with Console(fork._directory / "console") as console:
        console.wait_ticks()
    words = Path(f"/proc/{spare['hypervisor']}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert f"guest={fork.name}".encode() in words
    fork.snapshot("here")
    fork.stop(force=True)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in spare.values()))


@pytest.mark.parametrize("who", ["supervisor", "server", "hypervisor"])
def test_a_fork_begins_though_a_process_was_killed_that_waited_for_it(lab: Machine, who: str) -> None:
    spare = processes_that_wait(lab)
    ended = os.pidfd_open(spare[who])
    os.kill(spare[who], signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)
    (fork,) = lab.fork("ready")
    with Console(fork._directory / "console") as console:
        console.wait_ticks()
    assert getattr(record_of(fork), who).pid != spare[who]


def test_several_forks_at_once_leave_what_waits_to_the_next_one(lab: Machine) -> None:
    spare = processes_that_wait(lab)
    lab.fork("ready", count=2)
    (fork,) = lab.fork("ready")
    assert getattr(record_of(fork).supervisor, "pid", 0) == spare["supervisor"]


def test_the_process_that_starts_forks_ends_with_the_one_that_asked_for_them(lab: Machine, vms: Path) -> None:
    script = "import onionskin, sys; onionskin.Store(sys.argv[1]).open_machine('lab').fork('ready', names=['f'])"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, vms], check=True, capture_output=True, timeout=SECONDS_MAX
    )
    supervisor = record_of(lab._store.open_machine("f")).supervisor
    assert supervisor and supervisor.is_alive
    started = Path(f"/proc/{parent_of(supervisor.pid)}/cmdline").read_bytes()
    assert b"onionskin.machine.fork" not in started


def test_a_call_that_is_interrupted_leaves_no_fork_whose_start_was_under_way(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[str] = []
    stop = Machine.stop

    def stop_those_that_are_seen(self: Machine, timeout: float | None = None, *, force: bool = False) -> None:
        stops.append(self.name)
        if len(stops) > 2:  # until then their supervisors have not opened them
            stop(self, timeout, force=force)

    def start_and_interrupt(*given: Any, **named: Any) -> None:
        start_all(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Machine, "stop", stop_those_that_are_seen)
    monkeypatch.setattr(fork_process, "start_all", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.fork("ready", count=2)
    assert len(stops) == 4
    assert [one.name for one in store.machines()] == ["lab"]


def test_the_next_call_does_not_hear_the_answer_to_one_that_was_interrupted(
    lab: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    process = fork_process._forking_process()
    with monkeypatch.context() as patches:
        patches.setattr(fork_process.socket, "send_fds", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lab.fork("ready")
    assert process.fileno() == -1  # it is closed
    assert [one.state for one in lab.fork("ready")] == ["running"]


def test_the_process_that_starts_forks_ends_without_a_word_when_nobody_waits_for_its_answer() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.send(b"{}")
    here.close()  # as the caller's end is who is killed, or interrupted
    with there:
        done = subprocess.run(
            [sys.executable, "-m", "onionskin.machine.fork", str(there.fileno())],
            pass_fds=[there.fileno()],
            capture_output=True,
            timeout=SECONDS_MAX,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_process_is_left_behind_a_fork(lab: Machine) -> None:
    (fork,) = lab.fork("ready", count=1)
    record = record_of(fork)
    fork.stop(force=True)
    until(lambda: not any(one.is_alive for one in (record.hypervisor, record.server, record.supervisor) if one))
    assert fork.state == "off"
