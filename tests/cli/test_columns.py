"""Tables whose columns, order and form the user chooses, as those know who know zfs and rbd."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.cli import listing
from onionskin.operations import space, usage
from onionskin.store import Store

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


@pytest.fixture
def two(run: Run, vms: Path) -> Path:
    """web: clean (4 KiB), then 8 KiB in its head; db: a clone of it with 16 KiB."""
    ok(run("clone", f"{vms}/web@clean", f"{vms}/db"))
    ok(run("write", f"{vms}/web", 4096, input=b"h" * 8192))
    ok(run("write", f"{vms}/db", 0, input=b"d" * 16384))
    return vms


def test_a_list_shows_what_volumes_use_and_what_was_written_since_their_last_snapshots(run: Run, two: Path) -> None:
    lines = ok(run("list", two)).splitlines()
    assert lines[0].split() == ["VOLUME", "SIZE", "USED", "WRITTEN", "SNAPSHOTS", "WIPE", "BASE", "HELD-BY"]
    found = {one["name"]: (one["used_bytes"], one["written_bytes"]) for one in as_json(run("list", two, "--json"))}
    assert found == {"web": (12288, 8192), "db": (16384, 16384)}


def test_a_script_gets_tabs_exact_numbers_and_no_heading(run: Run, two: Path) -> None:
    assert ok(run("list", two, "-H", "-p", "-o", "name,used,base")) == "db\t16384\t-\nweb\t12288\t-\n"
    assert ok(run("list", two, "-Ho", "written,name")) == "16 KiB\tdb\n8 KiB\tweb\n"
    (line, *_) = ok(run("snapshots", f"{two}/web", "-Hp")).splitlines()
    name, size, used, written, taken, parent, note = line.split("\t")
    assert (name, size, used, written, parent, note) == ("clean", "1048576", "0", "4096", "-", "as installed")
    assert int(taken) > 1_700_000_000


@pytest.mark.parametrize(
    "name", ["\u0645\u06cc\u200c\u062e", "磁\u3000碟", "a\u00a0b", "👩\u200d👧", "\U0001fae9", "\u200bweb"]
)
def test_a_script_gets_a_name_as_it_is(run: Run, vms: Path, name: str) -> None:
    base = vms.parent / f"{name}.raw"
    base.write_bytes(bytes(1 << 20))
    ok(run("create", f"{vms}/{name}", "--base", base))
    assert sorted(ok(run("list", vms, "-Ho", "name")).splitlines()) == sorted(["web", name])
    assert ok(run("get", f"{vms}/{name}", "base", "-H")) == f"base\t{base}\n"
    shown = [line.split("  ")[0] for line in ok(run("list", vms, "-o", "name")).splitlines()]
    assert shown[1:] == sorted(["web", "\ufffdweb" if name[0] == "\u200b" else name])
    ok(run("snapshot", f"{vms}/{name}@s", "--note", "two\tcells\x1b\u202e"))
    assert ok(run("snapshots", f"{vms}/{name}", "-Ho", "name,note")) == "s\ttwo\ufffdcells\ufffd\ufffd\n"


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ((), ["db", "web"]),
        (("--reverse",), ["web", "db"]),
        (("--sort", "used"), ["web", "db"]),
        (("-s", "used", "--reverse"), ["db", "web"]),
        (("--sort", "created"), ["web", "db"]),
        (("--sort", "base"), ["db", "web"]),  # none has one
        (("--sort", "-used"), ["db", "web"]),
        (("--sort=-used", "--reverse"), ["web", "db"]),
        (("--sort", "size,used"), ["web", "db"]),
        (("-s", "size", "-s", "-used"), ["db", "web"]),
        (("--sort", "base,-name"), ["web", "db"]),
    ],
)
def test_rows_are_sorted_by_any_column_and_either_way(
    run: Run, two: Path, order: tuple[str, ...], names: list[str]
) -> None:
    assert ok(run("list", two, "-Ho", "name", *order)).split() == names
    assert [one["name"] for one in as_json(run("list", two, "--json", *order))] == names


def test_a_column_that_is_none_is_wrong_usage_and_the_message_lists_those_there_are(run: Run, two: Path) -> None:
    for options in (("-o", "name,colour"), ("--sort", "colour"), ("--sort", "used,-colour")):
        refused = run("list", two, *options)
        assert refused.exit_code == 2 and "written" in refused.stderr


def test_the_size_of_files_is_not_asked_for_where_no_column_shows_it(
    run: Run, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_segment_files", None)
    assert ok(run("list", two, "-Ho", "name,size")) == "db\t1 MiB\nweb\t1 MiB\n"
    monkeypatch.setattr(space, "_FILES_QUICK", 1)
    assert ok(run("list", two)).splitlines()[1].split()[:5] == ["db", "1", "MiB", "-", "-"]
    with Store(two, create=False) as store:
        assert not listing.is_quick(store)
        assert [one.used_bytes for one in store.volumes(space=False)] == [None, None]


def test_snapshots_show_what_dropping_one_alone_gives_back(run: Run, two: Path) -> None:
    ok(run("snapshot", f"{two}/web@b"))
    ok(run("write", f"{two}/web", 4096, input=b"again"))
    rows = [line.split("\t") for line in ok(run("snapshots", f"{two}/web", "-Hpo", "name,used,written")).splitlines()]
    assert rows == [["clean", "0", "4096"], ["b", "4096", "8192"]]
    found = as_json(run("snapshots", f"{two}/web", "--json", "--sort", "used", "--reverse"))
    assert [(one["name"], one["used_bytes"], one["written_bytes"]) for one in found] == [
        ("b", 4096, 8192),
        ("clean", 0, 4096),
    ]


def test_snapshots_are_listed_where_a_map_is_damaged_and_only_who_asks_for_its_bytes_is_refused(
    run: Run, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (two / "layers").iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    assert ok(run("snapshots", f"{two}/web", "-Hpo", "name,size")) == "clean\t1048576\n"
    assert ok(run("snapshots", f"{two}/web", "-H")).split("\t")[2:4] == ["-", "-"]
    assert as_json(run("snapshots", f"{two}/web", "--json"))[0]["used_bytes"] is None
    assert run("snapshots", f"{two}/web", "-o", "name,used").exit_code == 6


def test_maps_are_not_read_where_that_takes_long_and_nobody_asked(
    run: Run, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "_MAP_BYTES_QUICK", 0)
    assert ok(run("snapshots", f"{two}/web", "-H")).split("\t")[2:4] == ["-", "-"]
    assert ok(run("snapshots", f"{two}/web", "-Hpo", "used,written")) == "0\t4096\n"


def test_the_snapshots_of_a_store_are_listed_with_their_volumes(run: Run, vms: Path) -> None:
    ok(run("clone", f"{vms}/web@clean", f"{vms}/copy"))
    ok(run("write", f"{vms}/copy", 0, input=b"x" * 8192))
    ok(run("snapshot", f"{vms}/copy@done"))
    ok(run("create", f"{vms}/alone", "--size", "1M"))
    rows = ok(run("snapshots", vms)).splitlines()
    assert "USED" not in rows[0] and [row.split()[0] for row in rows[1:]] == ["copy@done", "web@clean"]
    assert ok(run("snapshots", vms, "-Hp", "-o", "name,written")) == "copy@done\t8192\nweb@clean\t4096\n"
    found = as_json(run("snapshots", vms, "--json"))
    assert [(one["volume"], one["name"], one["written_bytes"]) for one in found] == [
        *(("copy", "done", None), ("web", "clean", None)),
    ]
