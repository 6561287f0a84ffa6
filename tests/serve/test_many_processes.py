"""Whoever is killed or stopped in whatever it does: nobody finds anything but what was acknowledged."""

from pathlib import Path

import pytest
from serve.many_processes import soak


def report(tmp_path: Path, seconds: float, seed: int) -> list[str]:
    outcome = soak(tmp_path, seconds, seed, verbs_min=11)
    print(f"{outcome.verbs} verbs, {outcome.kills} kills, {outcome.stops} stops")
    return outcome.violations


def test_processes_that_are_killed_and_stopped_lose_nothing(tmp_path: Path) -> None:
    assert report(tmp_path, 5, seed=1) == []


@pytest.mark.slow
def test_processes_that_are_killed_and_stopped_for_a_minute_lose_nothing(tmp_path: Path) -> None:
    assert report(tmp_path, 60, seed=2) == []
