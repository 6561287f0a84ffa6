"""The table of several runs that `python -m targets --summary` prints goes into docs/performance.md as it is."""

from collections.abc import Iterable
from typing import Any

from targets.report import summary


def rows(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Return the rows of the table, without its head."""
    return summary(lines).splitlines()[2:]


def run(value: float | None, *, passed: bool = True, unit: str = "x", measured: str = "") -> dict[str, Any]:
    row = {"place": "disk", "what": "a row", "target": ">= 1 x", "measured": measured}
    return {**row, "value": value, "unit": unit, "passed": passed}


def test_a_cell_has_the_median_of_the_runs_and_their_range() -> None:
    assert rows([run(1), run(3), run(2)]) == ["| a row | >= 1 x | 2 x (1 to 3) |"]


def test_a_row_that_missed_its_aim_in_one_run_is_bold() -> None:
    assert rows([run(1), run(0.5, passed=False), run(2)]) == ["| a row | >= 1 x | **1 x (0.5 to 2)** |"]


def test_a_row_without_a_number_has_the_words_of_its_last_run() -> None:
    assert rows([run(None, measured="9 bytes"), run(None, measured="8 bytes")]) == ["| a row | >= 1 x | 8 bytes |"]


def test_a_thousand_is_no_power_of_ten() -> None:
    assert rows([run(1001.4), run(916)]) == ["| a row | >= 1 x | 959 x (916 to 1,001) |"]
