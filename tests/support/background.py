"""The background of a store, where a test does its work itself, at the moments that it is about."""

import pytest

import onionskin


def leave_work_to_the_test(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the background end what it is at, and do nothing from now on: any commit may ask it to."""
    monkeypatch.setattr(store._opened, "wake", lambda: None)
    store.finish_work()
