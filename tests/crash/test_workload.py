"""Whatever a crash leaves of a store, it opens as it was before or after the operation that was under way."""

from pathlib import Path

import pytest
from crash.harness.judge import drawn_trial, try_all
from crash.harness.model import STEPS

import onionskin

SOURCE = Path(onionskin.__file__).parents[1]


@pytest.mark.parametrize("wipe", ["release", pytest.param("zero", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [1, 4])
def test_a_crash_leaves_each_operation_done_or_not_begun(seed: int, wipe: str) -> None:
    _, outcome = try_all([drawn_trial(seed, wipe, steps=10, states=12, recoveries=2)], SOURCE)
    assert outcome.violation is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 8])
def test_a_crash_leaves_each_operation_done_or_not_begun_in_long_workloads(seed: int) -> None:
    _, outcome = try_all([drawn_trial(seed, "release", steps=STEPS, states=300, recoveries=4)], SOURCE)
    assert outcome.violation is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 8])
def test_a_crash_of_long_workloads_that_wipe_leaves_nothing(seed: int) -> None:
    _, outcome = try_all([drawn_trial(seed, "zero", steps=STEPS, states=300, recoveries=4)], SOURCE)
    assert outcome.violation is None
