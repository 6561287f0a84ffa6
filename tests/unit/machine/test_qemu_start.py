"""How long somebody waits for a QEMU that was started to answer: longer as long as it was not stopped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onionskin.errors import StateError
from onionskin.machine import qemu
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
