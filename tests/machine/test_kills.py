"""A supervisor, a server of disks or a hypervisor that is killed at some instant of a snapshot, a revert or a fork.

What must hold afterwards: the snapshot is there as a whole, or nothing of it; earlier ones can be gone back to; the machine
runs, or is off and says so; it never stands still unnoticed; and the store has no problem.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.guests import SECONDS_MAX, Console, configuration, until
from support.rounds import rounds

import onionskin
from onionskin.errors import OnionskinError
from onionskin.machine.machine import Machine
from onionskin.machine.record import Record

ROUNDS = rounds(4, 30)
RESTARTS = 4  # fewer than those of a server of disks within a minute
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def lab(vms: Path, qemu: list[str]) -> Iterator[Machine]:
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
        finally:
            machine.stop(force=True)


def killed_in(work: Callable[[], object], machine: Machine, victim: str, seconds: float) -> bool:
    """Kill a process of a machine so long after some work on it was begun. Return whether the work ended well."""
    record = Record.read(machine._directory)
    assert record is not None
    process = getattr(record, victim)
    done: list[object] = []

    def run() -> None:
        with suppress(OnionskinError, OSError):
            done.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(seconds)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.is_alive)  # on a busy host that is some time after the signal
    thread.join(SECONDS_MAX)
    assert not thread.is_alive(), f"{victim}: the work did not end"
    return bool(done)


def delays(machine: Machine, seed: int, most: float, count: int = ROUNDS) -> Iterator[float]:
    """From at once to after the end, most of them early. The machine has another supervisor now and then."""
    draw = random.Random(seed)
    for number in range(count):
        if number and not number % RESTARTS:
            machine.stop(force=True)
            machine.revert("ready")
        yield draw.random() ** 2 * most


def check_right(machine: Machine) -> None:
    """The machine runs, or says why not; and can be put back to its first snapshot either way."""
    status = machine.status()
    assert status["state"] in ("running", "failed", "off"), status
    if status["state"] == "failed":
        assert status["why"], status
    machine.revert("ready")
    assert machine.state == "running"
    with Console(machine._directory / "console") as screen:
        screen.wait_ticks(3)
    assert [problem for problem in machine._store.check() if problem.severity == "error"] == []


@pytest.mark.parametrize("victim", ["supervisor", "server", "hypervisor"])
def test_a_kill_in_a_snapshot_leaves_all_of_it_or_nothing(lab: Machine, victim: str) -> None:
    for number, delay in enumerate(delays(lab, 1, 0.6)):
        name = f"s{number}"
        ended = killed_in(lambda name=name: lab.snapshot(name), lab, victim, delay)
        check_right(lab)
        there = {one.name: one.mode for one in lab.snapshots}
        assert name in there or not ended
        if name in there:
            if there[name] == "off":  # the hypervisor was killed before it was asked: the machine was off
                lab.stop(force=True)
            lab.revert(name)
            with Console(lab._directory / "console") as screen:
                screen.wait_ticks(3)


@pytest.mark.parametrize("victim", ["supervisor", "server", "hypervisor"])
def test_a_kill_in_a_revert_leaves_a_machine_that_can_be_put_back_again(lab: Machine, victim: str) -> None:
    for delay in delays(lab, 2, 0.5):
        killed_in(lambda: lab.revert("ready"), lab, victim, delay)
        check_right(lab)


@pytest.mark.parametrize("victim", ["supervisor", "server", "hypervisor"])
def test_a_kill_of_the_origin_in_a_fork_leaves_whole_forks(lab: Machine, victim: str) -> None:
    for delay in delays(lab, 3, 1.5, rounds(2, 30)):
        made: list[Machine] = []
        killed_in(lambda made=made: made.extend(lab.fork("ready", count=2)), lab, victim, delay)
        assert {info.name for info in lab._store.machines()} == {"lab", *(fork.name for fork in made)}
        for fork in made:
            with Console(fork._directory / "console") as screen:
                screen.wait_ticks(3)
            fork.stop(force=True)
            fork.delete(recursive=True)
        check_right(lab)
