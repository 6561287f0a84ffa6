"""A machine with Linux in it: its console, its agent, its shutdown, and what a fork is told.

The guest boots once for all tests, and each begins with a fork of a snapshot of it.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import Console
from support.linux_guest import counts, wait_counts

import onionskin
from onionskin.errors import StateError
from onionskin.machine.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def fork(booted: Machine) -> Iterator[Machine]:
    (made,) = booted.fork("up", count=1)
    yield made
    made.stop(force=True)
    made.delete(recursive=True)


def screen_of(machine: Machine) -> Console:
    return Console(machine._directory / "console")


def test_a_restored_guest_goes_on_at_the_next_count(booted: Machine, fork: Machine) -> None:
    with screen_of(fork) as screen:
        wait_counts(screen, 5)
        assert counts(screen.text)[0] > 20
        assert "ready" not in screen.text  # it did not boot


def test_the_agent_freezes_the_file_system_for_a_snapshot_and_thaws_it(fork: Machine) -> None:
    with screen_of(fork) as screen:
        wait_counts(screen, 3)
        taken = fork.snapshot("frozen", freeze=True)
        assert taken.frozen == ("/mnt",)
        wait_counts(screen, 10)  # which writes to it


def test_whatever_goes_on_from_a_snapshot_that_was_frozen_is_thawed(fork: Machine) -> None:
    """Its RAM has the file system frozen: nobody in the guest would thaw it, and each write would wait for ever."""
    with screen_of(fork) as screen:
        wait_counts(screen, 3)
        fork.snapshot("frozen", freeze=True)
        fork.revert("frozen")
        wait_counts(screen, 10)
        fork.pause()
        fork.revert("frozen")
        fork.snapshot("frozen still")
        fork.resume()
        wait_counts(screen, 10)
    fork.stop(force=True)
    fork.revert("frozen still")
    with screen_of(fork) as screen:
        wait_counts(screen, 10)
    (second,) = fork.fork("frozen")
    try:
        with screen_of(second) as screen:
            wait_counts(screen, 10)
    finally:
        second.stop(force=True)
        second.delete()
    with fork.pool("frozen", warm=1):
        (third,) = fork.fork("frozen")
    try:
        with screen_of(third) as screen:
            wait_counts(screen, 10)
    finally:
        third.stop(force=True)
        third.delete()


def test_the_agent_tells_the_guest_its_name_and_the_time(fork: Machine) -> None:
    with screen_of(fork) as screen:
        wait_counts(screen, 3)
        begun = time.time()
        assert fork.tell("another", clock=True) == []
        whole = re.compile(r"host another at (\d+)\s")  # of a line that is still being said, there is less
        screen.wait(lambda: whole.search(screen.text) is not None)
        said = int(whole.findall(screen.text)[-1])
        assert begun - 5 < said < time.time() + 5


def test_a_guest_shuts_down_when_it_is_asked(fork: Machine) -> None:
    with screen_of(fork) as screen:
        wait_counts(screen, 3)
        fork.stop(300)
        screen.wait_end()
        assert "goodbye" in screen.text
    assert fork.state == "off"


def test_a_guest_without_an_agent_is_not_frozen_and_that_is_said(tmp_path: Path, tick_disk: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", base=tick_disk).close()
        machine = store.create_machine("plain", disks=["web"], memory="16M")
        machine.start()
        try:
            with Console(machine._directory / "console") as screen:
                screen.wait_ticks()
                with pytest.raises(StateError, match="no guest agent answers"):
                    machine.snapshot("frozen", freeze=True)
                assert machine.snapshots == []
                screen.wait_ticks()
        finally:
            machine.stop(force=True)
