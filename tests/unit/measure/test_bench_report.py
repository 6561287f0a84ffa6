"""The report of ``onionskin bench``: what it says of known samples. Nothing here measures a time."""

import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import pytest

from onionskin.measure.headline import ENGINE, Comparison
from onionskin.measure.report import Axis, draw_chart, draw_page, draw_table, times
from onionskin.measure.results import as_benchmarks, describe_machine, file_system_of
from onionskin.measure.timing import Contestant, Samples, duration, interleave, ratio

WHEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
MACHINE = {"processor": "A <fast> one", "cores": "2"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def comparisons() -> list[Comparison]:
    return [
        Comparison(
            "snapshot",
            "a durable <snapshot>",
            {ENGINE: Samples([0.001, 0.002, 0.003]), "cp & fsync": Samples([1.0, 2.0, 3.0])},
            {"bytes": 4096, "cache": "hot"},
            {"reflink": "the file system has no reflink"},
        ),
        Comparison("read", "reads", {ENGINE: Samples([0.01, 0.01]), "pread": Samples([0.005, 0.005])}),
    ]


def text_of(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_chart_is_an_svg_document_with_a_row_for_each_member(comparisons: list[Comparison]) -> None:
    root = ElementTree.fromstring(draw_chart(comparisons))
    dots = list(root.iter(f"{SVG}circle"))
    assert root.tag == f"{SVG}svg"
    assert len(dots) == 4
    assert sum("engine" in dot.attrib["class"] for dot in dots) == 2


def test_the_chart_says_times_and_factors_and_escapes_names(comparisons: list[Comparison]) -> None:
    texts = text_of(draw_chart(comparisons))
    assert {"2 ms", "2 s", "1,000 x", "0.5 x", "cp & fsync", "a durable <snapshot>"} <= set(texts)


def test_what_takes_longer_is_further_right(comparisons: list[Comparison]) -> None:
    places = [float(dot.attrib["cx"]) for dot in ElementTree.fromstring(draw_chart(comparisons)).iter(f"{SVG}circle")]
    assert places[0] < places[1]
    assert places[3] < places[2]


def test_nothing_is_drawn_outside_the_chart(comparisons: list[Comparison]) -> None:
    root = ElementTree.fromstring(draw_chart(comparisons))
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        for name, most in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.attrib.get(name, 0)) <= most


def test_an_axis_covers_whole_decades_and_is_never_empty() -> None:
    assert Axis.over([0.002, 0.5]) == Axis(-3, 0)
    assert Axis.over([1.0]) == Axis(0, 1)


def test_chart_and_page_follow_light_and_dark_and_load_nothing(comparisons: list[Comparison]) -> None:
    for drawn in (draw_chart(comparisons), draw_page(comparisons, MACHINE, WHEN)):
        assert "prefers-color-scheme:dark" in drawn
        assert not re.search(r"""(?:src|href)=|url\(|@import|<script""", drawn)


def test_the_page_names_the_machine_the_date_and_what_was_left_out(comparisons: list[Comparison]) -> None:
    page = draw_page(comparisons, MACHINE, WHEN)
    assert "A &lt;fast&gt; one" in page
    assert "2026-01-02 03:04 UTC" in page
    assert "reflink: the file system has no reflink" in page


def test_the_table_has_a_row_for_each_member_and_its_title_once(comparisons: list[Comparison]) -> None:
    lines = draw_table(comparisons).splitlines()
    assert len(lines) == 2 + 4
    assert lines[3] == "|  | cp & fsync | 2 s | 1,000 x |"
    assert lines[4] == "| reads | onionskin | 10 ms | 1 |"


def test_the_json_has_the_keys_that_pytest_benchmark_compares(comparisons: list[Comparison]) -> None:
    document = as_benchmarks(comparisons, MACHINE, WHEN)
    assert document.keys() >= {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    first = document["benchmarks"][1]
    assert first["group"] == "snapshot"
    assert first["extra_info"] == {"title": "a durable <snapshot>", "bytes": 4096, "cache": "hot"}
    assert first["stats"]["median"] == 2.0
    assert first["stats"]["rounds"] == 3
    assert first["stats"]["data"] == [1.0, 2.0, 3.0]
    assert first["stats"].keys() >= {"min", "max", "mean", "stddev", "iqr", "q1", "q3", "ops", "outliers", "total"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us"), (5e-8, "50 ns"), (0.99999, "1 s")]
)
def test_a_time_is_written_with_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("factor", "text"), [(0.333, "0.33 x"), (3.14, "3.1 x"), (31.4, "31 x"), (1234.5, "1,200 x")])
def test_a_factor_pretends_to_no_digits(factor: float, text: str) -> None:
    assert times(factor) == text


def test_a_ratio_is_of_each_round() -> None:
    assert ratio({"a": Samples([2.0, 40.0, 6.0]), "b": Samples([1.0, 10.0, 2.0])}, "a", "b") == 3.0


def test_contestants_take_turns_and_prepare_outside() -> None:
    calls: list[str] = []
    contestants = {
        "a": Contestant(lambda made: calls.append(f"a{made}") or 1.5, lambda: 7, lambda made: calls.append("end")),
        "b": Contestant(lambda: calls.append("b") or 0.5),
    }
    samples = interleave(contestants, 2, warm_up=False)
    assert calls == ["a7", "end", "b", "b", "a7", "end"]
    assert samples["a"].seconds == [1.5, 1.5]  # what a contestant says of itself counts
    assert samples["b"].median == 0.5


def test_one_sample_has_no_spread() -> None:
    assert Samples([3.0]).quartiles == (3.0, 3.0)
    assert Samples([3.0]).spread == 0


def test_the_machine_is_named(tmp_path: Path) -> None:
    machine = describe_machine(tmp_path)
    assert machine["processor"]
    assert machine["file system"] == file_system_of(tmp_path)
