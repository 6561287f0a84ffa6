"""The background of a store: where a test does its work itself, at the moments that it is about, and behind the test."""

import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import onionskin

# They work on for some seconds without a caller: they log, sync and close files, and call what a later test has patched.
NAMES = {"onionskin pending work", "onionskin RAM file"}
SECONDS_MAX = 60  # a test that failed may have left one that rests for an hour


def leave_work_to_the_test(store: "onionskin.Store", monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the background end what it is at, and do nothing from now on: any commit may ask it to."""
    monkeypatch.setattr(store._opened, "wake", lambda: None)
    store.finish_work()


def wait_for_background() -> None:
    """Wait for the threads that work for stores which nobody closed, or files which nobody gave up, to end."""
    for thread in threading.enumerate():
        if thread.name in NAMES:
            thread.join(SECONDS_MAX)
