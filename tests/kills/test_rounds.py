"""The program that kills processes of machines: what it draws, and that a round of it ends well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills.plan import VERBS, plan, rounds_of

TESTS = Path(__file__).parents[1]


def test_each_gap_is_tried_before_any_is_tried_again_and_each_victim_in_turn() -> None:
    gaps = plan()
    assert {gap.verb for gap in gaps} == set(VERBS) and len(set(gaps)) == len(gaps)
    drawn = list(rounds_of(gaps, 4, 7, None))
    for number in range(4):
        assert {gap for gap, _ in drawn[number * len(gaps) : (number + 1) * len(gaps)]} == set(gaps)
    for gap in gaps:
        assert {victim for one, victim in drawn if one == gap} == set(gap.victims)


def test_only_those_are_killed_who_are_wanted() -> None:
    gaps = [gap for gap in plan() if gap.victims_of(["server"])]
    assert {victim for _, victim in rounds_of(gaps, 2, 0, ["server"])} == {"server"}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_round_of_each_verb_ends_well(verb: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "kills", "--verb", verb, "--rounds", "1", "--workers", "1"]
    for gap in ("Record.write after", "_ask after", "MachineControl.ask after"):
        line += ["--gap", gap]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    ended = subprocess.run(
        [*line, "--directory", str(tmp_path)], cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 failed" in ended.stdout
    assert list(tmp_path.iterdir()) == []
