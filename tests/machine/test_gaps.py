"""A process of a machine that is killed in a gap between two steps of a snapshot, or of the start of forks.

`support/gaps` kills, in the supervisor itself. What must hold afterwards is as in test_kills.py, which draws the instants.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.gap import Gap
from support.guests import SECONDS_MAX, Console, configuration
from support.rounds import ALL

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine import pool as pools
from onionskin.machine.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
VICTIMS = ("supervisor", "server", "hypervisor")
OF_A_SNAPSHOT = (
    *("GuestRam.stream", "MachineCut.check", "QemuProcess.prepare_state", "GuestRam.collect", "QemuProcess.pause"),
    *("MachineCut.seal", "QemuProcess.save_state", "QemuProcess.resume", "QemuProcess.finish_state"),
    *("UnsavedRam.save", "StateFile.save", "MachineCut._insert_pins", "MachineCut._write", "MachineCut.commit"),
)
OF_A_START = (
    *("QemuHypervisor.check", "RamFiles.use", "fork", "be_supervisor", "Prepared.__init__", "DiskServer.begin"),
    *(
        "QemuHypervisor.launch",
        "DiskServer.wait_ready",
        "QemuProcess._connect",
        "QemuProcess.note_writes",
        "QemuProcess.load_state",
    ),
    *("settle", "Record.write", "note_running", "QemuProcess.resume", "ControlServer.__init__"),
)

OF_A_POOL = ("Supervisor.adopt", "DiskServer.rename", "QemuProcess.resume")


def gaps(steps: tuple[str, ...], few: int) -> list[str]:
    """Return all gaps, or a few of them that are spread over all. Behind the end of a supervisor nobody can be met."""
    found = [
        f"{step} {when}" for step in steps for when in ("before", "after") if f"{step} {when}" != "be_supervisor after"
    ]
    return found if ALL else found[:: -(-len(found) // few)]


@pytest.fixture
def lab(vms: Path, qemu: list[str], gap: Gap) -> Iterator[Machine]:
    """A machine that runs, with a snapshot `ready`."""
    with onionskin.Store(vms) as store:
        one = configuration(qemu)
        machine = store.create_machine(
            "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
        )
        machine.start()
        try:
            with Console(machine._directory / "console") as screen:
                screen.wait_ticks(5)
            machine.snapshot("ready")
            yield machine
        finally:  # forks of a test that failed too: the next run in the same directory would find them
            for info in store.machines():
                store.open_machine(info.name).stop(force=True)


def check_runs(machine: Machine) -> None:
    """The machine runs, or says that it failed; the store has no problem; the machine can be put back."""
    status = machine.status()
    assert status["state"] in ("running", "failed", "off"), status
    machine.revert("ready")
    assert machine.state == "running"
    with Console(machine._directory / "console") as screen:
        screen.wait_ticks(2)
    assert [problem for problem in machine._store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_in_a_gap_of_a_snapshot_leaves_all_of_it_or_nothing(lab: Machine, gap: Gap, victim: str) -> None:
    for number, where in enumerate(gaps(OF_A_SNAPSHOT, 4)):
        if number % 4 == 3:
            restart(lab)  # a server that dies more often within a minute is given up
        gap.arm(where, victim)
        try:
            taken = bool(lab.snapshot(f"s{number}"))
        except (OnionskinError, OSError):
            taken = False
        assert gap.disarm(), f"{where}: a snapshot does not come there"
        there = f"s{number}" in {one.name for one in lab.snapshots}
        assert there or not taken, where
        check_runs(lab)
        if there:
            lab.revert(f"s{number}")
            with Console(lab._directory / "console") as screen:
                screen.wait_ticks(2)


def restart(machine: Machine) -> None:
    machine.stop(force=True)
    machine.revert("ready")


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_in_a_gap_of_the_start_of_forks_leaves_whole_forks_or_none(lab: Machine, gap: Gap, victim: str) -> None:
    for where in gaps(OF_A_START, 4):
        gap.arm(where, victim)
        made: list[Machine] = []
        try:
            made = lab.fork("ready", count=2)
        except (OnionskinError, OSError):
            assert [one.name for one in lab._store.machines()] == ["lab"], where
        met = gap.disarm()  # where the victim is not there yet, nobody is killed
        assert met or victim != "supervisor", f"{where}: the start of a fork does not come there"
        directories = {path.name for path in lab._directory.parent.iterdir()}
        known = {one._directory.name for one in (lab, *made)}
        assert directories == known, where
        wait_for_ends(lab._store, known, where)
        for fork in made:
            check_fork(fork, where)
            fork.stop(force=True)
            fork.delete()
        wait_for_ends(lab._store, {lab._directory.name}, where)
    check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_in_a_gap_of_a_fork_from_a_pool_leaves_whole_forks_or_none(
    lab: Machine, gap: Gap, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "TAKE_SECONDS", float(SECONDS_MAX))  # on a busy host forks would do without the pool
    for where in gaps(OF_A_POOL, 2):
        made: list[Machine] = []
        with lab.pool("ready", warm=2):
            gap.arm(where, victim)
            with suppress(OnionskinError, OSError):
                made = lab.fork("ready", count=2)
            assert gap.disarm(), f"{where}: a fork from a pool does not come there"
            there = {info.name for info in lab._store.machines() if "pool" not in info.labels}
            assert there == {"lab", *(one.name for one in made)}, where
            for fork in made:
                check_fork(fork, where)
        wait_for_ends(lab._store, {one._directory.name for one in (lab, *made)}, where)
        for fork in made:
            fork.stop(force=True)
            fork.delete()
        wait_for_ends(lab._store, {lab._directory.name}, where)
    check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_in_a_gap_of_the_start_of_a_pool_leaves_no_process_behind(lab: Machine, gap: Gap, victim: str) -> None:
    for where in gaps(OF_A_START, 3):
        gap.arm(where, victim)
        with suppress(OnionskinError, OSError), lab.pool("ready", warm=2):
            pass
        gap.disarm()
        wait_for_ends(lab._store, {lab._directory.name}, where)
    check_runs(lab)


def check_fork(fork: Machine, where: str) -> None:
    state = fork.state
    assert state in ("running", "failed"), (where, fork.status())
    if state == "failed":
        fork.start()
    with Console(fork._directory / "console") as screen:
        screen.wait_ticks(2)


def wait_for_ends(store: onionskin.Store, known: set[str], where: str) -> None:
    """Wait until there are processes in the directories of these machines alone."""
    deadline = time.monotonic() + SECONDS_MAX
    while left := {process: at for process, at in processes_of(store).items() if at not in known}:
        assert time.monotonic() < deadline, (where, left)
        time.sleep(0.02)


def processes_of(store: onionskin.Store) -> dict[str, str]:
    """Return the processes that work or log in the directories of machines, and the names of those, which may be gone."""
    root = f"{store.path.resolve() / 'machines'}/"
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for link in ("cwd", "fd/2"):
                with suppress(OSError):  # it has ended
                    at = str((process / link).readlink())
                    if at.startswith(root):
                        found[process.name] = at.removeprefix(root).partition("/")[0].removesuffix(" (deleted)")
    return found
