"""How long a QEMU is waited for that starts, or that is to stop its machine: longer as long as who it waits for is at it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onionskin.errors import StateError
from onionskin.machine import qemu
from onionskin.machine.monitor import MonitorTimeout
from onionskin.machine.qemu import QemuProcess


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A QEMU that answers when it was asked for the third time, and for which nobody has to wait any more after the first."""
    tries: list[Path] = []

    def connect(path: Path, name: str, on_event: object) -> str:
        tries.append(path)
        if len(tries) < 3:
            raise ConnectionRefusedError
        return "the monitor"

    monkeypatch.setattr(qemu, "Monitor", connect)
    monkeypatch.setattr(qemu, "START_SECONDS", -1.0)
    return SimpleNamespace(
        directory=Path("lab"), name="lab", pid=5, wait=lambda seconds: None, _said=lambda: "see the log"
    )


def test_a_qemu_that_is_at_it_is_waited_for(starting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "is_stopped", lambda pid: False)
    assert QemuProcess._connect(starting, None) == "the monitor"  # type: ignore[comparison-overlap]


def test_a_qemu_that_was_stopped_is_not_waited_for(starting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "is_stopped", lambda pid: pid == 5)
    with pytest.raises(StateError, match="did not answer within 0 s: see the log"):
        QemuProcess._connect(starting, None)


def test_no_qemu_is_waited_for_without_end(starting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "is_stopped", lambda pid: False)
    monkeypatch.setattr(qemu, "START_SECONDS_MAX", -1.0)
    with pytest.raises(StateError, match="did not answer within 0 s"):
        QemuProcess._connect(starting, None)


@pytest.mark.parametrize("is_free", [True, False])
def test_a_console_that_was_in_use_before_a_state_is_loaded_is_looked_at_again(is_free: bool) -> None:
    """Who was connected may have gone since, and a guest hangs whose console nobody has then."""
    chardevs = [{"label": "console", "filename": "disconnected:unix:console" if is_free else "unix:console"}]
    answers = [{}, {}, [], [], {"status": "prelaunch"}, chardevs]
    process = SimpleNamespace(_opening=("state-1", lambda: answers))
    node, known = QemuProcess._opened_node(process, Path("state"), ())  # type: ignore[arg-type]
    assert (node, known) == ("state-1", answers[-2:] if is_free else [])


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_machine_whose_disks_are_served_has_longer_to_stop_and_one_that_does_not_goes_on(ends_well: bool) -> None:
    asked: list[tuple[str, bool]] = []

    class Monitor:
        def execute(self, command: str, *, seconds: float, seconds_max: float, is_at_it: object) -> None:
            asked.append((command, seconds_max > seconds and is_at_it is process.are_disks_served))
            if not ends_well:
                raise MonitorTimeout("it did not answer")

        def request(self, command: str) -> None:
            asked.append((command, False))

    process: Any = SimpleNamespace(monitor=Monitor(), are_disks_served=lambda: True)
    if ends_well:
        assert QemuProcess.pause(process, runs=True)
    else:
        with pytest.raises(MonitorTimeout):
            QemuProcess.pause(process, runs=True)
    assert asked == [("stop", True)] + [("cont", False)] * (not ends_well)
