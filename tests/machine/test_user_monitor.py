"""A machine whose user has a monitor, and lets it go on, resets it, or changes its devices at the wrong instant."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.guests import configuration, until
from support.lab import LabMachine

import onionskin
from onionskin.errors import StateError
from onionskin.machine import capture, restore
from onionskin.machine.monitor import Monitor

pytestmark = pytest.mark.slow  # each starts QEMU


@pytest.fixture
def lab(vms: Path, qemu: list[str], tmp_path: Path) -> Iterator[LabMachine]:
    made = configuration(qemu, qemu_args=("-qmp", "unix:user,server=on,wait=off"))
    with (
        onionskin.Store(vms) as store,
        LabMachine.make(store, "lab", ["web"], tmp_path / "lab", qemu, made=made).start() as lab,
    ):
        lab.console.wait_ticks()
        yield lab


@pytest.fixture
def user(lab: LabMachine) -> Iterator[Monitor]:
    with Monitor(lab.directory / "user", "lab") as user:
        yield user


def after(of: object, monkeypatch: pytest.MonkeyPatch, method: str, what: Callable[[], object]) -> None:
    """Have something done behind a step."""
    step = getattr(of, method)

    def call(*given: object) -> object:
        result = step(*given)
        what()
        return result

    monkeypatch.setattr(of, method, call)


@pytest.mark.parametrize(("command", "said"), [("cont", "let the machine go on"), ("system_reset", "was reset")])
def test_what_its_user_disturbs_is_not_taken_for_a_snapshot(
    lab: LabMachine, user: Monitor, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    with monkeypatch.context() as patched:

        def disturb() -> None:
            user.execute(command)
            heard = lab.process.monitor._standstill  # a reset is asked for, and done and reported a moment later
            until(lambda: heard.went_on or heard.was_reset)

        after(lab.running.guest_ram, patched, "collect", disturb)
        with pytest.raises(StateError, match=f"{said}.* while it stood still"):
            capture.snapshot(lab.running, "ready")
    assert not lab.process.is_paused
    lab.console.wait_ticks()
    capture.snapshot(lab.running, "ready")
    lab.console.wait_ticks()
    restore.revert(lab.running, "ready")
    lab.console.wait_ticks()


def test_a_device_that_its_user_adds_is_named_and_neither_taken_nor_put_back(lab: LabMachine, user: Monitor) -> None:
    capture.snapshot(lab.running, "ready")
    user.execute("device_add", {"driver": "virtio-rng-pci", "id": "hot"})
    with pytest.raises(StateError, match=r"has hot \(virtio-rng-pci\) in addition.*nothing was taken"):
        capture.snapshot(lab.running, "later")
    with pytest.raises(StateError, match=r"in addition.*nothing was changed"):
        restore.revert(lab.running, "ready")
    lab.console.wait_ticks()
