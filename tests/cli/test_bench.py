"""The verb `bench`: what it writes, not how fast anything is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
GROUPS = ["snapshot", "read", "write", "revert", "merge"]


@pytest.mark.slow
def test_bench_writes_a_page_a_chart_and_json_and_leaves_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = Path("disk")  # relative, as the default is: the peers run elsewhere
    work.mkdir()
    page, chart, saved = tmp_path / "report.html", tmp_path / "chart.svg", tmp_path / "bench.json"
    result = run("bench", work, "--size", "64M", "--rounds", 2, "--report", page, "--chart", chart, "--save", saved)
    assert result.exit_code == 0, result.output
    assert list(work.iterdir()) == []
    assert chart.read_text() in page.read_text()
    benchmarks = json.loads(saved.read_text())["benchmarks"]
    assert sorted({benchmark["group"] for benchmark in benchmarks}) == sorted(GROUPS)
    assert all(benchmark["stats"]["rounds"] == 2 for benchmark in benchmarks)


def test_a_disk_too_small_to_measure_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("bench", tmp_path, "--size", "1M")
    assert result.exit_code == 2
    assert "67108864" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_missing_or_none_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, status in ((tmp_path / "none", 3), (tmp_path / "file", 1)):
        result = run("bench", path)
        assert result.exit_code == status
        assert str(path) in result.stderr


@pytest.mark.parametrize("option", ["--report", "--chart", "--save"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path, option: str
) -> None:
    for path in (tmp_path / "none" / "file", tmp_path):
        refused = run("bench", tmp_path, "--size", "64M", option, path)
        assert refused.exit_code == 2
        assert str(path) in refused.stderr and "measuring" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
