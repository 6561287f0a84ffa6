"""Two verbs that are at work on one machine at once: what one of them did is not the other's success.

The second verb is carried out in the gap in which the first one holds nothing: a machine that is off was put back, and its
supervisor is not there yet.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.guests import Console, configuration

import onionskin
from onionskin.base.sockets import UnixListener
from onionskin.errors import StateError
from onionskin.machine import daemon, pool_server
from onionskin.machine import fork as fork_process
from onionskin.machine.machine import Machine

pytestmark = pytest.mark.slow  # each starts several processes


@pytest.fixture
def lab(store: onionskin.Store, qemu: list[str]) -> Machine:
    """A machine that is off, and was taken as `ready` and `later` while it ran."""
    one = configuration(qemu)
    machine = store.create_machine("lab", disks=["web"], memory="16M", program=one.program, qemu_args=one.qemu_args)
    machine.start()
    with Console(machine._directory / "console") as console:
        console.wait_ticks()
        machine.snapshot("ready")
        console.wait_ticks()
    machine.snapshot("later")
    machine.stop(force=True)
    return machine


@pytest.fixture
def before_start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done once, before the next supervisor is started."""

    def arrange(what: Callable[[], object]) -> None:
        start = daemon.start

        def late(*given: Any, **named: Any) -> None:
            monkeypatch.setattr(daemon, "start", start)
            what()
            start(*given, **named)

        monkeypatch.setattr(daemon, "start", late)

    return arrange


@pytest.mark.parametrize("other", ["discard", "forget its RAM", "put back to another"])
def test_a_revert_does_not_start_what_it_did_not_put_back(
    lab: Machine, store: onionskin.Store, before_start: Callable[[Callable[[], object]], None], other: str
) -> None:
    lab.revert("later")
    lab.stop(force=True)
    meanwhile = {
        "discard": lambda: lab.discard("later"),
        "forget its RAM": lambda: store._forget_ram_of_machine("lab"),
        "put back to another": lambda: store._revert_machine("lab", "ready"),
    }
    before_start(meanwhile[other])
    with pytest.raises(StateError, match="was put back, and before it was started somebody"):
        lab.revert("later")
    assert lab.state == "off"
    lab.revert("ready")
    assert lab.state == "running"


def test_a_revert_puts_a_machine_back_that_somebody_else_was_faster_to_start(
    lab: Machine, before_start: Callable[[Callable[[], object]], None]
) -> None:
    before_start(lab.start)
    lab.revert("ready")
    assert lab.state == "running"
    assert lab.info().stands_on == "ready"


def test_a_machine_that_is_renamed_before_its_supervisor_is_there_starts_and_no_other_one_that_has_its_name(
    lab: Machine, store: onionskin.Store, before_start: Callable[[Callable[[], object]], None]
) -> None:
    def rename() -> None:
        store.rename_machine("lab", "other")
        store.create_machine("lab", disks=["data"], memory="16M")

    before_start(rename)
    lab.revert("ready")
    assert (lab.state, lab._name) == ("running", "other")
    assert (store.open_machine("lab").state, store.machine_info("other").stands_on) == ("off", "ready")


def test_a_fork_that_is_renamed_before_its_supervisor_is_there_starts_and_no_other_one_that_has_its_name(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks = lab.fork("ready", count=2, start=False)
    ask = fork_process._ask

    def late(*given: Any) -> bool:
        for name, other in (("lab-1", "one"), ("lab-2", "lab-1")):
            store.rename_machine(name, other)
        store.create_machine("lab-2", disks=["data"], memory="16M")
        monkeypatch.setattr(fork_process, "_ask", ask)
        return ask(*given)

    monkeypatch.setattr(fork_process, "_ask", late)
    fork_process.start_all(store, [forks[0]._id])
    assert [(fork.state, fork._name) for fork in forks] == [("running", "one"), ("off", "lab-1")]
    assert store.open_machine("lab-2").state == "off"


def test_a_revert_puts_a_machine_back_in_place_that_was_started_before_its_disks_were(
    lab: Machine, store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = store._revert_machine

    def late(*given: Any) -> None:
        monkeypatch.setattr(store, "_revert_machine", put_back)
        lab.start()
        put_back(*given)

    monkeypatch.setattr(store, "_revert_machine", late)
    lab.revert("ready")
    assert lab.state == "running"
    assert lab.info().stands_on == "ready"


def test_a_fork_that_is_put_back_to_its_beginning_does_not_boot_instead(
    lab: Machine, store: onionskin.Store, before_start: Callable[[Callable[[], object]], None]
) -> None:
    (fork,) = lab.fork("ready")
    fork.stop(force=True)
    before_start(lambda: store._forget_ram_of_machine(fork.name))
    with pytest.raises(StateError, match="was put back, and before it was started somebody"):
        fork.revert_to_beginning()
    assert fork.state == "off"
    fork.revert_to_beginning()
    assert fork.state == "running"


def test_a_fresh_start_does_not_go_on_from_ram_to_which_it_was_put_back_meanwhile(
    lab: Machine, store: onionskin.Store, before_start: Callable[[Callable[[], object]], None]
) -> None:
    before_start(lambda: store._revert_machine("lab", "ready"))
    with pytest.raises(StateError, match="was put back meanwhile, so it would not boot"):
        lab.start(fresh=True)
    assert lab.state == "off"
    lab.start(fresh=True)
    assert lab.state == "running"


def test_of_two_pools_that_begin_at_once_the_second_finds_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []

    class Listener(UnixListener):
        def __init__(self, path: Path) -> None:
            descriptor = os.open(tmp_path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
            finally:
                os.close(descriptor)
            super().__init__(path)

    monkeypatch.setattr(pool_server, "UnixListener", Listener)
    left = tmp_path / ".pool.7"  # by one that was killed as it began
    left.touch()
    listener = pool_server.listen(tmp_path, b"snapshot")
    assert not left.exists()
    try:
        with pytest.raises(StateError, match="there is a pool of that snapshot already; end it first"):
            pool_server.listen(tmp_path, b"snapshot")
    finally:
        listener.close()
    assert held == [True]
