"""Several snapshots in one command, by their names and as ranges: all or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.store import Store

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


def names(run: Run, vms: Path) -> list[str]:
    return [one["name"] for one in as_json(run("snapshots", f"{vms}/web", "--json"))]


@pytest.fixture
def five(run: Run, vms: Path) -> Path:
    """web: clean, a, b, c and d, each with a block of its own, and a block that all of them wrote again."""
    for number, name in enumerate("abcd", 1):
        ok(run("write", f"{vms}/web", number * 4096, input=name * 4096))
        ok(run("write", f"{vms}/web", 0, input=name * 4096))
        ok(run("snapshot", f"{vms}/web@{name}"))
    return vms


CHOICES: list[tuple[tuple[str, ...], list[str]]] = [
    (("web@a", "web@c"), ["a", "c"]),
    (("web@c", "web@a", "web@c"), ["a", "c"]),
    (("web@a..@c",), ["a", "b", "c"]),
    (("web@b..@b",), ["b"]),
    (("web@c..",), ["c", "d"]),
    (("web@..@b",), ["clean", "a", "b"]),
    (("web@..@clean", "web@c.."), ["clean", "c", "d"]),
]


@pytest.mark.parametrize(("words", "chosen"), CHOICES)
def test_names_and_ranges_are_held_merged_and_let_go(
    run: Run, five: Path, words: tuple[str, ...], chosen: list[str]
) -> None:
    command = [f"{five}/{word}" for word in words]
    assert as_json(run("hold", *command, "backup", "--json"))["snapshots"] == chosen
    assert [one["snapshot"] for one in as_json(run("holds", f"{five}/web", "--json"))] == chosen
    assert run("merge", *command).exit_code == 5
    ok(run("unhold", *command, "backup"))
    assert as_json(run("merge", *command, "--json"))["merged"] == sorted(chosen)
    assert names(run, five) == [name for name in ("clean", "a", "b", "c", "d") if name not in chosen]
    for number, name in enumerate("dabcd"):
        assert run("read", f"{five}/web", number * 4096, 1).stdout == name
    assert as_json(run("check", five, "--json")) == []


@pytest.mark.parametrize("range", ["..", "..@", "a..@"])
@pytest.mark.parametrize(
    "words", [("discard",), ("merge",), ("hold", "me"), ("unhold", "me")], ids=lambda words: words[0]
)
def test_a_range_whose_end_has_no_name_is_wrong_usage(run: Run, five: Path, words: tuple[str, ...], range: str) -> None:
    verb, *rest = words
    refused = run(verb, f"{five}/web@{range}", *rest)
    assert refused.exit_code == 2 and "names no end of the range: write @A..@C" in refused.stderr


@pytest.mark.parametrize("words", [("web@b..@d",), ("web@b..",), ("web@c", "web@b", "web@d")])
def test_a_branch_is_discarded_by_all_its_names(run: Run, five: Path, words: tuple[str, ...]) -> None:
    command = [f"{five}/{word}" for word in words]
    said = as_json(run("discard", *command, "--dry-run", "--json"))
    assert said["snapshots"] == ["web@b", "web@c", "web@d"] and said["bytes_freed"] == 2 * 8192
    refused = run("discard", *command)
    assert refused.exit_code == 5 and all(f"web@{name}" in refused.stderr for name in "bcd")
    assert as_json(run("discard", *command, "--yes", "--json"))["discarded"] == ["b", "c", "d"]
    assert names(run, five) == ["clean", "a"]
    assert run("read", f"{five}/web", 0, 1).stdout == "b"


def test_none_is_dropped_where_one_cannot_be(run: Run, five: Path) -> None:
    before = names(run, five)
    ok(run("hold", f"{five}/web@b", "backup"))
    for command in (
        ("merge", f"{five}/web@a..@c"),
        ("merge", f"{five}/web@a", f"{five}/web@none"),
        ("discard", f"{five}/web@a..@c", "--yes"),  # d was taken after them
        ("discard", f"{five}/web@a..", "--yes"),
        ("unhold", f"{five}/web@a..@b", "backup"),
        ("hold", f"{five}/web@a..@b", "backup"),
    ):
        assert run(*command).exit_code in (3, 5), command
        assert run(*command, *(["--dry-run"] if command[0] in ("merge", "discard") else [])).exit_code in (3, 5)
        assert names(run, five) == before
        assert [one["snapshot"] for one in as_json(run("holds", f"{five}/web", "--json"))] == ["b"]


def test_a_branch_that_a_clone_stands_on_is_kept_whole(run: Run, five: Path) -> None:
    ok(run("clone", f"{five}/web@c", f"{five}/other"))
    assert "needed by other" in run("discard", f"{five}/web@b..", "--yes").stderr
    assert names(run, five) == ["clean", "a", "b", "c", "d"]
    ok(run("merge", f"{five}/web@b.."))
    assert run("read", f"{five}/other", 0, 1).stdout == "c"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("web@c..@a",), 2, "was taken before"),
        (("web@..",), 2, "no end"),
        (("web@a..@none",), 3, "'none'"),
        (("web@none..",), 3, "'none'"),
        (("web@a..b",), 3, "'a..b'"),
        (("web@a", "db@a"), 2, "not of one volume"),
    ],
)
def test_what_names_no_range_is_refused(run: Run, five: Path, words: tuple[str, ...], status: int, said: str) -> None:
    refused = run("merge", *(f"{five}/{word}" for word in words))
    assert refused.exit_code == status and said in refused.stderr
    assert len(names(run, five)) == 5


def test_a_name_with_dots_is_a_name_before_it_is_a_range(run: Run, five: Path) -> None:
    ok(run("snapshot", f"{five}/web@a.."))
    assert as_json(run("merge", f"{five}/web@a..", "--json"))["merged"] == ["a.."]


@pytest.mark.parametrize(("words", "chosen"), CHOICES)
def test_a_merge_gives_back_what_its_dry_run_said(
    run: Run, five: Path, words: tuple[str, ...], chosen: list[str]
) -> None:
    command = ["merge", *(f"{five}/{word}" for word in words)]
    said = as_json(run(*command, "--dry-run", "--json"))
    assert said["snapshots"] == [f"web@{name}" for name in chosen]
    assert "nothing was changed" in ok(run(*command, "--dry-run"))
    before = held_bytes(five)
    ok(run(*command))
    assert before - held_bytes(five) == said["bytes_freed"] > 0


def test_prune_says_how_much_comes_back(run: Run, five: Path) -> None:
    command = ("prune", f"{five}/web", "--keep-last", 2)
    assert "12 KiB would come back" in ok(run(*command, "--dry-run"))
    said = as_json(run(*command, "--dry-run", "--json"))
    assert [one.get("bytes_freed_together") for one in said] == [12288, 12288, 12288, None, None]
    before = held_bytes(five)
    ok(run(*command))
    assert before - held_bytes(five) == 12288
    assert "would come back" not in ok(run(*command, "--dry-run"))


def held_bytes(vms: Path) -> int:
    with Store(vms, create=False) as store:
        return sum(row.bytes_held for name in store for row in store.usage(name))


def test_the_names_alone_go_of_a_merge_into_the_base_or_a_dry_run_of_one(run: Run, five: Path) -> None:
    assert run("merge", f"{five}/web@a", f"{five}/web@b", "--into-base").exit_code == 2
    assert run("merge", f"{five}/web@a", "--into-base", "--dry-run").exit_code == 2
    assert len(names(run, five)) == 5
