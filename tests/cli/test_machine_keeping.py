"""The verbs that say which snapshots of a machine stay: hold, unhold, holds, note, rename and prune."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.machines import snapshot_live

import onionskin as library

Run = Callable[..., Result]


@pytest.fixture
def vms(tmp_path: Path, run: Run) -> str:
    """A store with machine lab, which has disk web, and its snapshots a, b and c."""
    vms = str(tmp_path / "vms")
    assert run("create", f"{vms}/web", "--size", "1M").exit_code == 0
    assert run("machine", "create", f"{vms}/lab", "--disk", "web", "--memory", "1M").exit_code == 0
    with library.Store(vms) as store:
        for name in "abc":
            snapshot_live(store, "lab", name, {"web": name.encode() * 4, "lab.ram": name.encode() * 4})
    return vms


def names(run: Run, vms: str) -> list[str]:
    return [one["name"] for one in json.loads(run("machine", "snapshots", f"{vms}/lab", "--json").stdout)]


def test_snapshots_of_a_machine_are_held_and_let_go(run: Run, vms: str) -> None:
    held = run("machine", "hold", f"{vms}/lab@a", f"{vms}/lab@b", "backup")
    assert held.stdout == f"{vms}/lab@a, {vms}/lab@b are held by backup\n", held.stderr
    rows = run("machine", "holds", f"{vms}/lab").stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["SNAPSHOT", "HOLDER"], ["a", "backup"], ["b", "backup"]]
    refused = run("machine", "merge", f"{vms}/lab@a")
    assert refused.exit_code == 5 and "held: lab@a by 'backup'" in refused.stderr
    assert "'onionskin machine unhold'" in refused.stderr
    assert run("machine", "unhold", f"{vms}/lab@a", "backup", "--json").exit_code == 0
    assert [one["snapshot"] for one in json.loads(run("machine", "holds", f"{vms}/lab", "--json").stdout)] == ["b"]
    assert run("machine", "holds", f"{vms}/lab@a", "--json").stdout.strip() == "[]"


def test_a_hold_without_a_holder_says_how_it_is_written(run: Run, vms: str) -> None:
    for verb in ("hold", "unhold"):
        refused = run("machine", verb, f"{vms}/lab@a")
        assert refused.exit_code == 2 and f"'onionskin machine {verb} {vms}/lab@a backup'" in refused.stderr


def test_ranges_of_a_machines_snapshots_are_held_merged_and_discarded(run: Run, vms: str) -> None:
    assert run("machine", "hold", f"{vms}/lab@b..", "backup").exit_code == 0
    assert [one["snapshot"] for one in json.loads(run("machine", "holds", f"{vms}/lab", "--json").stdout)] == ["b", "c"]
    assert run("machine", "unhold", f"{vms}/lab@b..@c", "backup").exit_code == 0
    told = run("machine", "merge", f"{vms}/lab@..@b", "--dry-run").stdout
    assert "lab@a" in told and "lab@b" in told and "lab@c" not in told
    assert json.loads(run("machine", "merge", f"{vms}/lab@..@b", "--json").stdout)["merged"] == ["a", "b"]
    done = run("machine", "discard", f"{vms}/lab@c..", "--yes", "--json")
    assert json.loads(done.stdout)["discarded"] == ["c"], done.stderr


def test_a_range_of_a_machine_whose_end_is_not_there_or_comes_first_is_refused(run: Run, vms: str) -> None:
    refused = run("machine", "merge", f"{vms}/lab@a..@x")
    assert refused.exit_code == 3 and f"onionskin machine snapshots {vms}/lab" in refused.stderr
    assert "machine 'lab' has no snapshot 'x'" in refused.stderr
    refused = run("machine", "merge", f"{vms}/lab@c..@a")
    assert refused.exit_code == 2 and "write the older one first" in refused.stderr
    assert names(run, vms) == ["a", "b", "c"]


def test_snapshots_of_two_machines_are_not_held_at_once(run: Run, vms: str) -> None:
    refused = run("machine", "hold", f"{vms}/lab@a", f"{vms}/other@a", "backup")
    assert refused.exit_code == 2 and "of several machines" in refused.stderr


def test_a_note_of_a_machines_snapshot_is_replaced_and_taken_away(run: Run, vms: str) -> None:
    assert run("machine", "note", f"{vms}/lab@b", "before the upgrade").stdout == f"noted with {vms}/lab@b\n"
    assert "before the upgrade" in run("machine", "snapshots", f"{vms}/lab").stdout
    assert run("machine", "note", f"{vms}/lab@b", "").stdout == f"{vms}/lab@b has no note any more\n"


@pytest.mark.parametrize("new", ["first", "@first", "{vms}/lab@first"])
def test_a_snapshot_of_a_machine_gets_another_name(run: Run, vms: str, new: str) -> None:
    done = run("machine", "rename", f"{vms}/lab@a", new.format(vms=vms))
    assert done.stdout == f"{vms}/lab@a is {vms}/lab@first now\n", done.stderr
    assert names(run, vms) == ["first", "b", "c"]


@pytest.mark.parametrize("new", ["{vms}/other@first", "{vms}/lab", "/tmp/elsewhere/lab@first"])
def test_a_snapshot_stays_with_its_machine(run: Run, vms: str, new: str) -> None:
    refused = run("machine", "rename", f"{vms}/lab@a", new.format(vms=vms))
    assert refused.exit_code == 2 and f"write {vms}/lab@NEW" in refused.stderr
    assert names(run, vms) == ["a", "b", "c"]


def test_what_no_rule_keeps_of_a_machine_is_dropped(run: Run, vms: str) -> None:
    assert run("machine", "hold", f"{vms}/lab@a", "backup").exit_code == 0
    told = run("machine", "prune", f"{vms}/lab", "--keep-last", "1", "--dry-run").stdout.splitlines()
    assert [row.split()[0] for row in told[:4]] == ["SNAPSHOT", "a", "b", "c"]
    assert told[1].endswith("held") and told[2].endswith("would be dropped") and told[3].endswith("last")
    assert "would come back; nothing was changed" in told[4] and names(run, vms) == ["a", "b", "c"]
    done = json.loads(run("machine", "prune", f"{vms}/lab", "--keep-last", "1", "--json").stdout)
    assert [(one["snapshot"], one["kept_by"]) for one in done] == [("a", ["held"]), ("b", []), ("c", ["last"])]
    assert names(run, vms) == ["a", "c"]


def test_a_prune_of_a_machine_without_a_rule_is_refused(run: Run, vms: str) -> None:
    refused = run("machine", "prune", f"{vms}/lab")
    assert refused.exit_code == 2 and "no rule says what to keep" in refused.stderr


@pytest.mark.parametrize("verb", ["snapshots", "info", "snapshot"])
def test_a_verb_of_volumes_points_to_those_of_machines(run: Run, vms: str, verb: str) -> None:
    refused = run(verb, f"{vms}/lab")
    assert refused.exit_code == 3 and "a machine has that name" in refused.stderr


def test_a_verb_of_machines_points_to_those_of_volumes(run: Run, vms: str) -> None:
    refused = run("machine", "status", f"{vms}/web")
    assert refused.exit_code == 3 and "a volume has that name" in refused.stderr
