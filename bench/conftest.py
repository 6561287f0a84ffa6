"""The suite's options, and how samples of interleaved rounds become benchmarks.

Every module runs one race: its contestants take turns, once a module, so that what the machine does meanwhile hits all
alike. Each member of the race is a test of its own, which shows its samples to pytest-benchmark through a clock that
replays them: tables, JSON and ``compare`` work as always. Nothing here passes or fails by a time.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.race import CLOCK, Race, Setting

from onionskin.base.sizes import parse_size


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("onionskin")
    group.addoption("--size", default="256M", help="size of the disks that are measured (default: 256M)")
    group.addoption(
        "--disk", default=None, help="a directory on the disk that is measured (default: the temporary one)"
    )
    group.addoption("--rounds", type=int, default=5, help="how often each contestant runs (default: 5)")


@pytest.fixture(scope="module")
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    option = request.config.getoption
    with tempfile.TemporaryDirectory(prefix="onionskin-bench-", dir=option("--disk")) as directory:
        yield Setting(Path(directory), parse_size(option("--size")), option("--rounds"))


@pytest.fixture
def show(benchmark: Any) -> Callable[[Race, str], None]:
    """Give a function that shows one member of a race as this test's benchmark."""

    def shown(race: Race, member: str) -> None:
        if member in race.skipped:
            pytest.skip(race.skipped[member])
        samples = race.samples[member]
        benchmark.extra_info.update(race.info_of(member))
        CLOCK.load(samples.seconds)
        benchmark.pedantic(lambda: None, rounds=len(samples.seconds), iterations=1, warmup_rounds=0)

    return shown
