"""A process of a machine that is killed in a gap between two steps of what is done to the machine.

`support/gaps` kills, in the supervisor itself. What must hold afterwards is as in test_kills.py, which draws the instants.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.gap import Gap
from support.gap_places import (
    OF_A_PAUSE,
    OF_A_POOL,
    OF_A_RESTART,
    OF_A_RESUME,
    OF_A_REVERT,
    OF_A_SERVER_THAT_CUTS,
    OF_A_SERVER_THAT_REVERTS,
    OF_A_SNAPSHOT,
    OF_A_START,
    OF_A_STOP,
    OF_A_TAKEOVER,
    OF_WHO_ASKS,
    OF_WHO_FORKS,
    WITH_DISKS,
    places_of,
)
from support.guests import SECONDS_MAX, Console, configuration, end_machines, until
from support.processes import processes_in
from support.rounds import ALL

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine import pool as pools
from onionskin.machine.machine import Machine
from onionskin.machine.record import Record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
VICTIMS = ("supervisor", "server", "hypervisor")
# Of a command itself, whose machine runs meanwhile, or is off.
OF_COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("running", "fork", "@ready"): OF_WHO_FORKS,
    ("running", "merge", "@ready"): ("merge",),
    ("running", "snapshot", "@asked"): OF_WHO_ASKS,
    ("running", "revert", "@ready", "--yes"): OF_WHO_ASKS,
    ("running", "stop", "", "--force"): OF_WHO_ASKS,
    ("off", "start", ""): ("start",),
    ("off", "revert", "@ready", "--yes"): ("note_reverting", "revert", "note_reverted", "start"),
    ("off", "snapshot", "@off"): (
        "MachineCut.seal",
        "MachineCut._insert_pins",
        "MachineCut._write",
        "MachineCut.commit",
    ),
    ("off", "discard", "@ready", "--yes"): ("discard",),
    ("off", "delete", "", "--recursive", "--yes"): ("delete",),
}


def in_gaps(steps: tuple[str, ...], *, few: int) -> pytest.MarkDecorator:
    """Run a test in a few gaps that are spread over all, on one machine; or, with all rounds, in each gap on its own."""
    found = places_of(steps)
    if ALL:
        return pytest.mark.parametrize("places", [pytest.param((one,), id=one.replace(" ", "-")) for one in found])
    return pytest.mark.parametrize("places", [pytest.param(found[:: -(-len(found) // few)], id="few")])


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
            end_machines(store)


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
@in_gaps(OF_A_SNAPSHOT, few=4)
def test_a_kill_in_a_gap_of_a_snapshot_leaves_all_of_it_or_nothing(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    check_snapshots(lab, gap, places, victim)


@in_gaps(OF_A_SERVER_THAT_CUTS, few=2)
def test_a_server_that_dies_in_a_gap_of_a_cut_leaves_all_of_the_snapshot_or_nothing(
    lab: Machine, gap: Gap, places: tuple[str, ...]
) -> None:
    check_snapshots(lab, gap, places, "itself")


def check_snapshots(lab: Machine, gap: Gap, places: tuple[str, ...], victim: str) -> None:
    for number, where in enumerate(places):
        if number % 4 == 3:
            restart(lab)  # a server that dies more often within a minute is given up
        gap.arm(where, victim)
        why = failure_of(lambda: lab.snapshot(f"s{number}"))  # noqa: B023
        assert gap.disarm(), f"{where}: a snapshot does not come there: {why}"
        taken = why is None
        there = f"s{number}" in {one.name for one in lab.snapshots}
        assert there or not taken, where
        check_runs(lab)
        if there:
            lab.revert(f"s{number}")
            with Console(lab._directory / "console") as screen:
                screen.wait_ticks(2)


def failure_of(call: Callable[[], object]) -> Exception | None:
    """Call, and return what failed: somebody may be killed meanwhile."""
    try:
        call()
    except (OnionskinError, OSError) as error:
        return error
    return None


def restart(machine: Machine) -> None:
    machine.stop(force=True)
    machine.revert("ready")


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_START, few=5)
def test_a_kill_in_a_gap_of_the_start_of_forks_leaves_whole_forks_or_none(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
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
        assert made or victim != "server" or where not in WITH_DISKS, where  # the server is started again
        for fork in made:
            check_fork(fork, where)
            fork.stop(force=True)
            fork.delete()
        wait_for_ends(lab._store, {lab._directory.name}, where)
    check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_POOL, few=2)
def test_a_kill_in_a_gap_of_a_fork_from_a_pool_leaves_whole_forks_or_none(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "TAKE_SECONDS", float(SECONDS_MAX))  # on a busy host forks would do without the pool
    for where in places:
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
@in_gaps((*OF_A_START, "make_waiting"), few=3)
def test_a_kill_in_a_gap_of_the_start_of_a_pool_leaves_no_process_behind(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
        gap.arm(where, victim)
        with suppress(OnionskinError, OSError), lab.pool("ready", warm=2):
            pass
        gap.disarm()
        wait_for_ends(lab._store, {lab._directory.name}, where)
    check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_REVERT, few=4)
def test_a_kill_in_a_gap_of_a_revert_leaves_a_machine_that_can_be_put_back_again(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    check_reverts(lab, gap, places, victim)


def test_a_guest_that_goes_on_from_a_revert_is_not_to_be_put_back_again(lab: Machine, gap: Gap) -> None:
    gap.arm("QemuProcess.resume after", "supervisor")
    failure_of(lambda: lab.revert("ready"))
    assert gap.disarm()
    assert lab.state == "running"
    lab.snapshot("behind")
    with Console(lab._directory / "console") as screen:
        screen.wait_ticks(2)


@in_gaps(OF_A_SERVER_THAT_REVERTS, few=2)
def test_a_server_that_dies_in_a_gap_of_a_revert_leaves_a_machine_that_can_be_put_back_again(
    lab: Machine, gap: Gap, places: tuple[str, ...]
) -> None:
    check_reverts(lab, gap, places, "itself")


def check_reverts(lab: Machine, gap: Gap, places: tuple[str, ...], victim: str) -> None:
    for number, where in enumerate(places):
        if number % 4 == 0:
            restart(lab)  # it has its RAM over the file of the snapshot then
        gap.arm(where, victim)
        why = failure_of(lambda: lab.revert("ready"))
        assert gap.disarm(), f"{where}: a revert does not come there: {why}"
        check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_PAUSE, few=2)
def test_a_kill_in_a_gap_of_a_pause_leaves_a_machine_that_says_how_it_is(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
        gap.arm(where, victim)
        why = failure_of(lambda: lab.pause())
        assert gap.disarm(), f"{where}: a pause does not come there: {why}"
        status = lab.status()
        assert status["state"] in ("paused", "running", "failed", "off"), (where, status)
        if status["state"] == "paused":
            assert status["why"], (where, status)
            lab.resume()
        check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_RESUME, few=2)
def test_a_machine_that_was_resumed_goes_on_behind_kills_in_gaps_of_that_and_of_a_snapshot(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for number, where in enumerate(places):
        lab.pause()
        gap.arm(where, victim)
        why = failure_of(lambda: lab.resume())
        assert gap.disarm(), f"{where}: a resume does not come there: {why}"
        if lab.state == "paused":  # it was killed before that
            lab.resume()
        if lab.state == "running":
            gap.arm("QemuProcess.save_state before", "supervisor")
            while not gap.is_met:  # it is refused while the server of the disks is started again
                with suppress(OnionskinError, OSError):
                    lab.snapshot(f"behind-{number}")
                    assert gap.is_met, "a snapshot does not come there"
            assert lab.state == "running", where
        check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_STOP, few=2)
def test_a_kill_in_a_gap_of_a_stop_leaves_no_process_that_nobody_ends(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
        gap.arm(where, victim)
        with suppress(OnionskinError, OSError):
            lab.stop(force=True)
        gap.disarm()  # where the victim has ended already, nobody is killed
        lab.stop(force=True)
        assert lab.state in ("off", "failed"), where
        wait_for_ends(lab._store, set(), where)
        check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_TAKEOVER, few=3)
def test_a_kill_in_a_gap_of_a_takeover_leaves_a_machine_that_can_be_put_back(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
        kill(lab, "supervisor")
        gap.arm(where, victim)
        why = failure_of(lab.status)
        assert gap.disarm(), f"{where}: a takeover does not come there: {why}"
        check_runs(lab)


@pytest.mark.parametrize("victim", VICTIMS)
@in_gaps(OF_A_RESTART, few=3)
def test_a_kill_in_a_gap_of_the_restart_of_a_server_leaves_a_machine_that_can_be_put_back(
    lab: Machine, gap: Gap, places: tuple[str, ...], victim: str
) -> None:
    for where in places:
        gap.arm(where, victim)
        kill(lab, "server")
        if (where, victim) not in (("DiskServer.restart before", "server"), ("DiskServer.begin before", "server")):
            until(lambda: gap.is_met)  # else there is none to kill
        gap.disarm()
        check_runs(lab)
        restart(lab)


@pytest.mark.parametrize(
    ("command", "where"),
    [
        pytest.param(command, where, id=f"{command[0]}-{command[1]}-{where}".replace(" ", "-"))
        for command, steps in OF_COMMANDS.items()
        for where in (places_of(steps) if ALL else places_of(steps)[-2:-1])
    ],
)
def test_a_command_that_is_killed_in_a_gap_leaves_all_or_nothing(
    lab: Machine, gap: Gap, command: tuple[str, ...], where: str
) -> None:
    store, (state, verb, at, *flags) = lab._store, command
    if state == "off":
        lab.stop(force=True)
    gap.arm(where, "itself")
    line = [sys.executable, "-m", "onionskin", "machine", verb, f"{store.path}/lab{at}", *flags]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert (ended.returncode, gap.disarm()) == (-signal.SIGKILL, True), ended
    there = {info.name: store.open_machine(info.name) for info in store.machines()}
    assert "lab" in there or where == "delete after"
    wait_for_ends(store, {one._directory.name for one in there.values()}, where)
    for fork in (one for name, one in there.items() if name != "lab"):
        assert fork.state in ("running", "off"), fork.status()
        until(lambda fork=fork: is_dropped(fork))  # its supervisor may have been about to begin, and nobody have it yet
    if "lab" in there:
        is_taken = where not in ("merge after", "discard after")
        (check_runs if is_taken else check_starts)(lab)
        taken = {one.name for one in lab.snapshots}
        assert taken - {"off", "asked"} == ({"ready"} if is_taken else set())
    assert [problem for problem in store.check() if problem.severity == "error"] == []


def is_dropped(machine: Machine) -> bool:
    """End and delete a machine, and return whether it is gone: somebody may be about to start it."""
    machine.stop(force=True)
    return failure_of(machine.delete) is None


def check_starts(machine: Machine) -> None:
    """The machine runs, or boots."""
    if machine.state == "off":
        machine.start()
    with Console(machine._directory / "console") as screen:
        screen.wait_ticks(2)


def kill(machine: Machine, victim: str) -> None:
    record = Record.read(machine._directory)
    assert record is not None
    process = getattr(record, victim)
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.is_alive)


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
    while left := {process: at for process, at in processes_in(store.path / "machines").items() if at not in known}:
        assert time.monotonic() < deadline, (where, left)
        time.sleep(0.02)
