"""Each scenario: whatever a crash leaves of it, nothing that was promised is lost."""

from pathlib import Path

import pytest
from crash.harness.judge import try_all
from crash.harness.scenarios import SCENARIOS, Scenario

import onionskin

SOURCE = Path(onionskin.__file__).parents[1]


@pytest.mark.parametrize("scenario", SCENARIOS[::4], ids=lambda scenario: scenario.name)
def test_no_crash_of_some_loses_what_was_promised(scenario: Scenario) -> None:
    _, outcome = try_all([(scenario.name, scenario.trial)], SOURCE, states=14)
    assert outcome.violation is None
    assert outcome.tried > 5


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_crash_loses_what_was_promised(scenario: Scenario) -> None:
    _, outcome = try_all([(scenario.name, scenario.trial)], SOURCE)
    assert outcome.violation is None
    assert outcome.tried > 10
