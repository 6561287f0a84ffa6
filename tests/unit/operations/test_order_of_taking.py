"""Snapshots are listed in the order in which they were taken, also where the clock went back between two of them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin

NAMES = ["third", "first", "second"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[onionskin.Store]:
    """A store whose clock goes back by an hour with each snapshot; web has all of them, fan has each on its own branch."""
    now = [time.time_ns()]

    def earlier() -> int:
        now[0] -= 3600 * 10**9
        return now[0]

    monkeypatch.setattr(time, "time_ns", earlier)
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            for name in NAMES:
                web.snapshot(name)
        with store.create("fan", size="1M") as fan:
            fan.snapshot("root")
            for name in NAMES:
                fan.revert("root")
                fan.write(0, name.encode())
                fan.snapshot(name)
        yield store


def test_snapshots_and_usage_are_in_the_order_of_taking(store: onionskin.Store) -> None:
    assert [row.name for row in store.snapshots("web")] == NAMES
    assert [row.snapshot for row in store.usage("web")] == [*NAMES, None]


def test_branches_of_the_tree_are_in_the_order_of_taking(store: onionskin.Store) -> None:
    roots = {node.name: node for node in store.tree()}
    assert [node.name for node in roots["fan@root"].children] == [f"fan@{name}" for name in NAMES]
