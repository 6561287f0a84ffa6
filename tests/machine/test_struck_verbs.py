"""The verbs of machines, struck at calls that are spread over their run: all is done or nothing, and nothing is left over."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from support import struck_verbs
from support.guests import configuration, until

import onionskin
from onionskin.machine.machine import Machine

pytestmark = pytest.mark.slow
PLACES = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]


@pytest.fixture
def machine(store: onionskin.Store, qemu: list[str]) -> Machine:
    """A machine that runs, and has a snapshot."""
    one = configuration(qemu)
    made = store.create_machine(
        "lab", disks=["web", "data"], memory="16M", program=one.program, qemu_args=one.qemu_args
    )
    made.start()
    made.snapshot("first")
    return made


@pytest.fixture
def struck(vms: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run a verb, which is struck at an event, if one is given."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    work = tmp_path / "work"
    work.mkdir()
    line = [sys.executable, struck_verbs.__file__]
    with subprocess.Popen(line, stdin=PIPE, stdout=PIPE, text=True, env=environment) as program:

        def run(number: int, at: int, *words: str) -> dict[str, Any]:
            given = {"store": str(vms), "work": str(work), "words": ["machine", *words], "at": at, "number": number}
            print(json.dumps(given), file=program.stdin, flush=True)
            ended = json.loads(program.stdout.readline())
            where = f"at event {at}: {ended['status']}, {ended['out']!r}, {ended['err']!r}"
            assert ended["status"] in ((0, 128 + number, -number) if at else (0,)), where
            said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            last = ended["err"].splitlines()[-1:]
            assert ended["status"] != 128 + number or last[0].startswith(f"onionskin: {said}; "), where
            return ended

        yield run
        program.stdin.close()


def processes_of(vms: Path) -> set[int]:
    """The processes, of supervisors, servers and hypervisors, that have the store in their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(vms) in line:
                found.add(int(entry.name))
    return found


def forks_of(store: onionskin.Store) -> list[str]:
    return [info.name for info in store.machines() if info.name != "lab"]


def damage(store: onionskin.Store) -> list[str]:
    return [str(problem) for problem in store.check() if problem.severity == "error"]


signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@signals
def test_an_interrupted_snapshot_is_taken_or_not_and_the_machine_goes_on(
    store: onionskin.Store, machine: Machine, struck: Callable[..., dict[str, Any]], number: int
) -> None:
    events = struck(number, 0, "snapshot", "{store}/lab@whole")["events"]
    for count, place in enumerate(PLACES):
        ended = struck(number, max(1, round(place * events)), "snapshot", f"{{store}}/lab@s{count}")
        names = {one.name for one in machine.snapshots}
        assert f"s{count}" in names or ended["status"] != 0
        until(lambda: machine.state == "running")
        machine.snapshot(f"again{count}")
    assert damage(store) == []


@signals
def test_an_interrupted_revert_is_done_or_not_and_the_machine_goes_on(
    store: onionskin.Store, machine: Machine, struck: Callable[..., dict[str, Any]], number: int
) -> None:
    events = struck(number, 0, "revert", "{store}/lab@first", "--yes")["events"]
    for place in PLACES:
        struck(number, max(1, round(place * events)), "revert", "{store}/lab@first", "--yes")
        until(lambda: machine.state == "running")
        machine.snapshot()
    assert damage(store) == []


@signals
def test_interrupted_forks_are_all_there_and_run_or_none_is(
    store: onionskin.Store, vms: Path, machine: Machine, struck: Callable[..., dict[str, Any]], number: int
) -> None:
    alone = processes_of(vms)
    events = struck(number, 0, "fork", "{store}/lab@first", "-n", "2")["events"]
    for place in PLACES:
        for name in forks_of(store):
            store.open_machine(name).stop(force=True)
            store.open_machine(name).delete()
        until(lambda: processes_of(vms) == alone)
        ended = struck(number, max(1, round(place * events)), "fork", "{store}/lab@first", "-n", "2")
        forks = forks_of(store)
        assert len(forks) in ((2,) if ended["status"] == 0 else (0, 2)), (place, ended)
        until(lambda: all(store.open_machine(name).state == "running" for name in forks))  # noqa: B023
        if not forks:
            until(lambda: processes_of(vms) == alone)
    assert machine.state == "running"
    assert damage(store) == []


@signals
def test_an_interrupted_create_or_delete_makes_or_drops_all_of_a_machine_or_nothing(
    store: onionskin.Store, struck: Callable[..., dict[str, Any]], number: int
) -> None:
    create = ("create", "{store}/lab", "--disk", "web", "--memory", "1M")
    made = struck(number, 0, *create)["events"]
    dropped = struck(number, 0, "delete", "{store}/lab", "--yes")["events"]
    for place in PLACES:
        struck(number, max(1, round(place * made)), *create)
        names = {info.name for info in store.machines()}
        if not names:
            struck(number, 0, *create)
        struck(number, max(1, round(place * dropped)), "delete", "{store}/lab", "--yes")
        for info in store.machines():
            store.open_machine(info.name).delete()
        assert {info.name for info in store.volumes()} == {"web", "data"}
    assert damage(store) == []
