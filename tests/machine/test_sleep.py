"""A guest that sleeps (S3): QEMU before 9.0 neither stops its machine nor lets it go on, and says that it did."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import Console, build_tick_disk, configuration, until

import onionskin
from onionskin.errors import StateError
from onionskin.machine.machine import Machine

pytestmark = pytest.mark.slow  # each starts several processes
SLEEPS_AT = 20


@pytest.fixture
def lab(tmp_path: Path, qemu: list[str]) -> Iterator[Machine]:
    """A machine that sleeps behind its twentieth tick, and has a snapshot `awake`."""
    disk, one = build_tick_disk(tmp_path, f"--defsym=SLEEPS_AT={SLEEPS_AT}"), configuration(qemu)
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", base=disk).close()
        machine = store.create_machine("lab", disks=["web"], memory="16M", program=one.program, qemu_args=one.qemu_args)
        machine.start(paused=True)
        machine.snapshot("awake")
        yield machine
        machine.stop(force=True)


@pytest.fixture
def screen(lab: Machine) -> Iterator[Console]:
    """Its console, when it sleeps."""
    with Console(lab._directory / "console") as screen:
        lab.resume()
        screen.wait(lambda: screen.ticks[-1:] == [SLEEPS_AT])
        until(lambda: lab.status()["hypervisor"] == "suspended")
        yield screen


def can_stop_sleepers(lab: Machine) -> bool:
    return int(lab.status()["recorded"]["version"].partition(".")[0]) >= 9


def test_a_resume_wakes_it(lab: Machine, screen: Console) -> None:
    assert "its guest sleeps" in lab.status()["why"]
    lab.resume()
    assert lab.state == "running"


def test_a_revert_wakes_it_and_it_goes_on_from_the_snapshot(lab: Machine, screen: Console) -> None:
    lab.revert("awake")
    assert screen.wait_back(SLEEPS_AT - 1) == 1


def test_a_revert_that_is_refused_leaves_it_asleep(lab: Machine) -> None:
    lab.stop(force=True)
    with lab._store.open("web") as disk:
        disk.resize("2M")
    lab.start()
    until(lambda: lab.status()["hypervisor"] == "suspended")
    with pytest.raises(StateError, match=r"disk 'web' had .* stop the machine"):
        lab.revert("awake")
    assert lab.status()["hypervisor"] == "suspended"


def test_a_stop_wakes_it_so_that_it_hears_its_power_button(lab: Machine, screen: Console) -> None:
    with pytest.raises(StateError, match="did not shut down"):  # this guest has nothing to go on with when it is woken
        lab.stop(0)
    assert lab.state == "running"


def test_it_is_taken_and_paused_only_by_a_hypervisor_that_stops_it(lab: Machine, screen: Console) -> None:
    if can_stop_sleepers(lab):
        lab.snapshot("asleep")
        assert lab.pause()
        lab.resume()
        lab.revert("asleep")
        assert lab.status()["hypervisor"] == "suspended"
        return
    with pytest.raises(StateError, match="its guest sleeps"):
        lab.snapshot("asleep")
    with pytest.raises(StateError, match="sleeps"):
        lab.pause()
    assert [one.name for one in lab.snapshots] == ["awake"]
    assert not lab.status()["is_paused"]
