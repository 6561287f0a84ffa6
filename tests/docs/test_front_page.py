"""What is drawn and recorded for the first pages is what the program draws and prints now."""

import sys
from pathlib import Path

import pytest
from docs.blocks import ROOT, blocks_of

sys.path.insert(0, str(ROOT / "tools"))
import draw_front_page
import record_session

README = (ROOT / "README.md").read_text()
FIRST_LINES = 60


def test_the_trees_on_the_front_page_are_those_of_its_example(tmp_path: Path) -> None:
    drawn = draw_front_page.draw_trees(*draw_front_page.trees_of_the_example(tmp_path))
    assert drawn == (ROOT / "docs/before-after.svg").read_text(), "run tools/draw_front_page.py"


def test_the_example_is_six_commands_which_make_what_is_drawn() -> None:
    example = next(block for block in blocks_of(ROOT / "README.md") if block.language == "console")
    commands = [line.split()[-4 if "|" in line else 1 :] for line in example.text.splitlines() if line[0] == "$"]
    assert [(words[1], words[2]) for words in commands] == [
        ("create", "lab/web"),
        ("snapshot", "lab/web@clean"),
        ("write", "lab/web"),
        ("snapshot", "lab/web@broken"),
        ("revert", "lab/web@clean"),
        ("tree", "lab"),
    ]
    assert example.line < FIRST_LINES


def test_the_chart_on_the_front_page_shows_the_table_of_measurements() -> None:
    assert draw_front_page.draw_factors(README) == (ROOT / "docs/factors.svg").read_text(), (
        "run tools/draw_front_page.py"
    )
    groups = draw_front_page.factors(README)
    assert len(groups) == 5 and all(ways for _, ways in groups)


@pytest.mark.parametrize("picture", ["before-after.svg", "factors.svg"])
def test_a_picture_of_the_front_page_is_small_and_fits_a_telephone(picture: str) -> None:
    drawn = (ROOT / "docs" / picture).read_text()
    assert len(drawn) < 4000
    assert f'width="{draw_front_page.WIDTH}"' in drawn and draw_front_page.WIDTH <= 360


def test_the_boxes_of_the_first_screen_are_wrapped_on_a_telephone_and_the_example_need_not_be() -> None:
    style = (ROOT / "docs/static/narrow.css").read_text()
    assert 'section#onionskin > div[class*="highlight-"] pre' in style and "white-space: pre-wrap" in style
    example = next(block for block in blocks_of(ROOT / "README.md") if block.language == "console")
    assert max(map(len, example.text.splitlines())) <= 56  # characters of 0.65rem in 400 pixels, less the margins


@pytest.mark.slow
def test_the_recorded_session_is_what_the_tutorial_prints_now(tmp_path: Path) -> None:
    made = record_session.record(record_session.TUTORIAL.read_text(), tmp_path)
    kept = (ROOT / "docs/session.md").read_text()
    assert record_session.masked(made) == record_session.masked(kept), "run tools/record_session.py"


def test_a_recording_differs_in_times_alone() -> None:
    one, two = "made 2026-11-26 07:22:12\n", "made 2027-01-01 00:00:00\n"
    assert record_session.masked(one) == record_session.masked(two)
    assert record_session.masked(one) != record_session.masked(f"{two}holds 8 MiB")
