"""Names of snapshots on the command line: given later, given by the time, and of two volumes at once."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


@pytest.mark.parametrize("new", ["first", "@first", "{}/web@first"])
def test_a_snapshot_gets_another_name(run: Run, vms: Path, new: str) -> None:
    ok(run("clone", f"{vms}/web@clean", f"{vms}/other"))
    ok(run("hold", f"{vms}/web@clean", "backup"))
    before = as_json(run("info", f"{vms}/web@clean", "--json"))
    del before["chain"]
    renamed = as_json(run("rename", f"{vms}/web@clean", new.format(vms), "--json"))
    assert renamed | {"used_bytes": 0, "written_bytes": 4096} == before | {"name": "first"}
    assert [one["name"] for one in as_json(run("snapshots", f"{vms}/web", "--json"))] == ["first"]
    assert run("read", f"{vms}/other", 0, 5).stdout == "clean"
    assert as_json(run("holds", f"{vms}/web@first", "--json"))[0]["holder"] == "backup"


def test_a_taken_name_of_a_snapshot_is_refused(run: Run, vms: Path) -> None:
    ok(run("snapshot", f"{vms}/web@b"))
    assert run("rename", f"{vms}/web@clean", "b").exit_code == 4
    assert run("rename", f"{vms}/web@none", "c").exit_code == 3


def test_a_snapshot_without_a_name_says_which_it_got(run: Run, vms: Path) -> None:
    said = ok(run("snapshot", f"{vms}/web"))
    found = re.fullmatch(re.escape(f"took {vms}/web@") + r"(\d{8}T\d{6}\.\d{3}Z)\n", said)
    assert found
    assert [one["name"] for one in as_json(run("snapshots", f"{vms}/web", "--json"))] == ["clean", found[1]]


def test_two_volumes_are_compared_and_streamed_across_clones(run: Run, vms: Path, tmp_path: Path) -> None:
    ok(run("clone", f"{vms}/web@clean", f"{vms}/other"))
    ok(run("write", f"{vms}/other", 8192, input="x" * 4096))
    found = as_json(run("diff", f"{vms}/web@clean", f"{vms}/other", "--json"))
    assert found["extents"] == [{"offset": 8192, "length": 4096, "state": "data"}]
    assert (found["from_volume"], found["from"], found["to_volume"], found["to"]) == ("web", "clean", "other", None)
    ok(run("snapshot", f"{vms}/other@done"))
    assert as_json(run("diff", f"{vms}/web@clean", f"{vms}/other@done", "--json"))["bytes"] == 4096
    stream = tmp_path / "stream"
    sent = as_json(run("delta", f"{vms}/web@clean", f"{vms}/other@done", "--output", stream, "--json"))
    assert (sent["from_volume"], sent["to_volume"], sent["data_bytes"]) == ("web", "other", 4096)
    assert as_json(run("apply", f"{vms}/web", stream, "--json"))["name"] == "done"
    assert run("read", f"{vms}/web", 8192, 4).stdout == "xxxx"


def test_a_snapshot_that_is_missing_is_named_though_the_head_is_of_another_volume(run: Run, vms: Path) -> None:
    ok(run("clone", f"{vms}/web@clean", f"{vms}/other"))
    refused = run("diff", f"{vms}/web@none", f"{vms}/other")
    assert refused.exit_code == 3 and "'none'" in refused.stderr
