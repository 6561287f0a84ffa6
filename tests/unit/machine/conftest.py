"""A store with a machine that a stand-in runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stand_in import LENGTH, StandIn, attach, make_machine

import onionskin

# A revert loads these in threads that run at the same time, and pytest, which rewrites what it loads, fails in that now and
# then: ast.parse of Python 3.11 counts the depth of one thread in another one's ("recursion depth mismatch").
import onionskin.control.groups
import onionskin.operations.forks
from onionskin.machine.running import Running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        make_machine(store)
        yield store


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "ram.empty"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    return path


@pytest.fixture
def process(tmp_path: Path, empty: Path) -> Iterator[StandIn]:
    process = StandIn(tmp_path / "run", empty)
    try:
        yield process
    finally:
        process.close()


@pytest.fixture
def running(store: onionskin.Store, process: StandIn, tmp_path: Path) -> Iterator[Running]:
    running = attach(store, process, tmp_path / "run")
    try:
        yield running
    finally:
        running.close()
