"""The verbs that say which snapshots stay."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.cli.keeping import DurationType

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


@pytest.fixture
def three(run: Run, vms: Path) -> Path:
    """Snapshots clean, b and c, taken within one hour or so."""
    for number, name in enumerate("bc", 1):
        ok(run("write", f"{vms}/web", number * 4096, input=name))
        ok(run("snapshot", f"{vms}/web@{name}"))
    return vms


def test_a_snapshot_is_held_and_let_go(run: Run, three: Path) -> None:
    held = as_json(run("hold", f"{three}/web@b", "backup", "--json"))
    assert held == {"volume": "web", "snapshot": "b", "snapshots": ["b"], "holder": "backup"}
    refused = run("merge", f"{three}/web@b")
    assert refused.exit_code == 5 and "web@b by 'backup'" in refused.stderr and "unhold" in refused.stderr
    (one,) = as_json(run("holds", f"{three}/web", "--json"))
    assert (one["snapshot"], one["holder"]) == ("b", "backup") and one["created"].endswith("Z")
    assert as_json(run("holds", f"{three}/web@c", "--json")) == []
    assert "backup" in ok(run("holds", f"{three}/web@b"))
    assert "not held by backup any more" in ok(run("unhold", f"{three}/web@b", "backup"))
    ok(run("merge", f"{three}/web@b"))


def test_the_holds_of_a_store_are_listed_by_volume(run: Run, three: Path) -> None:
    ok(run("clone", f"{three}/web@b", f"{three}/copy"))
    ok(run("snapshot", f"{three}/copy@z"))
    assert as_json(run("holds", three, "--json")) == []
    for name, holder in (("web@c", "one"), ("copy@z", "two"), ("web@b", "late"), ("web@b", "later")):
        ok(run("hold", f"{three}/{name}", holder))
    found = as_json(run("holds", three, "--json"))
    assert [(one["volume"], one["snapshot"], one["holder"]) for one in found] == [
        *(("copy", "z", "two"), ("web", "b", "late"), ("web", "b", "later"), ("web", "c", "one")),
    ]
    assert ok(run("holds", three)).splitlines()[1].split()[:2] == ["copy@z", "two"]


@pytest.mark.parametrize("verb", ["hold", "unhold"])
def test_a_hold_without_a_holder_says_that_one_is_wanted(run: Run, three: Path, verb: str) -> None:
    refused = run(verb, f"{three}/web@b")
    assert refused.exit_code == 2 and f"{verb} {three}/web@b backup" in refused.stderr
    refused = run(verb, "backup")
    assert refused.exit_code == 2 and f"{verb} STORE/VOLUME@SNAPSHOT backup" in refused.stderr


def test_a_note_is_changed(run: Run, three: Path) -> None:
    assert as_json(run("note", f"{three}/web@b", "after the update", "--json"))["note"] == "after the update"
    assert "after the update" in ok(run("snapshots", f"{three}/web"))
    assert "no note any more" in ok(run("note", f"{three}/web@b", ""))
    assert run("note", f"{three}/web@z", "x").exit_code == 3


def test_prune_says_first_what_would_go_and_then_drops_it(run: Run, three: Path) -> None:
    ok(run("hold", f"{three}/web@clean", "backup"))
    text = ok(run("prune", f"{three}/web", "--keep-last", 1, "--dry-run"))
    assert "would be dropped" in text and "held" in text
    assert len(as_json(run("snapshots", f"{three}/web", "--json"))) == 3
    found = as_json(run("prune", f"{three}/web", "--keep-last", 1, "--json"))
    assert [(one["snapshot"], one["kept_by"]) for one in found] == [("clean", ["held"]), ("b", []), ("c", ["last"])]
    assert [one["name"] for one in as_json(run("snapshots", f"{three}/web", "--json"))] == ["clean", "c"]
    assert run("read", f"{three}/web", 0, 5).stdout == "clean"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ((), "no rule"),
        (("--keep-daily", "1", "--time-zone", "Middle/Earth"), "no time zone"),
        (("--keep-daily", "-2"), "-2"),
        (("--keep-within", "soon"), "no time"),
        (("--keep-within", ""), "no time"),
        (("--keep-within", "1d2y"), "no time"),
    ],
)
def test_rules_that_cannot_be_are_wrong_usage(run: Run, three: Path, options: tuple[str, ...], fault: str) -> None:
    refused = run("prune", f"{three}/web", *options)
    assert refused.exit_code == 2 and fault in refused.stderr
    assert len(as_json(run("snapshots", f"{three}/web", "--json"))) == 3


def test_prune_takes_a_time_zone_and_a_time(run: Run, three: Path) -> None:
    found = as_json(run("prune", f"{three}/web", "--keep-within", "2d", "--time-zone", "Europe/Berlin", "--json"))
    assert [one["kept_by"] for one in found] == [["within"]] * 3


@pytest.mark.parametrize(
    ("text", "days"), [("36h", 1.5), ("14d", 14), ("8w", 56), ("6m", 186), ("1y6m", 552), ("1y2m3w4d12h", 453.5)]
)
def test_a_time_is_written_as_restic_and_borg_write_it_and_none_is_shorter_here(text: str, days: float) -> None:
    assert DurationType().convert(text, None, None) == timedelta(days=days)
