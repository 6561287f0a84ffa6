"""An interrupt that Python turned into another error is still an interrupt to who pressed Ctrl-C."""

import threading
from typing import Any

import pytest

from onionskin.cli import exit_status
from onionskin.cli.app import onionskin


def test_an_interrupt_that_lost_the_lock_of_a_condition_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> int:
        condition = threading.Condition(threading.Lock())
        with condition:
            condition.release()  # as an interrupt within its wait does
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(exit_status.Verbs, "_run", run)
    with pytest.raises(SystemExit) as ended:
        onionskin(["list", "store"])
    assert ended.value.code == exit_status.INTERRUPTED
    assert capsys.readouterr().err.startswith("onionskin: interrupted; ")


def test_another_error_of_the_system_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(exit_status.Verbs, "_run", run)
    with pytest.raises(RuntimeError, match="can't start"):
        onionskin(["list", "store"])
