"""The verbs get and set."""

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


def test_the_policy_is_set_and_got(run: Run, vms: Path) -> None:
    assert ok(run("get", f"{vms}/web", "wipe", "-H")) == "wipe\trelease\n"
    assert "wipe=zero now" in ok(run("set", f"{vms}/web", "wipe=zero"))
    assert as_json(run("get", f"{vms}/web", "wipe", "--json")) == {"name": "web", "wipe": "zero"}
    about = as_json(run("set", f"{vms}/web", "wipe=release", "--json"))
    assert about == as_json(run("get", f"{vms}/web", "--json"))
    assert about["wipe"] == as_json(run("info", f"{vms}/web", "--json"))["wipe"] == "release"


def test_properties_are_shown_for_people_and_exactly(run: Run, vms: Path) -> None:
    lines = ok(run("get", f"{vms}/web")).splitlines()
    assert [line.split()[0] for line in lines] == ["PROPERTY", "wipe", "size", "block-size", "base", "created"]
    assert (
        ok(run("get", f"{vms}/web", "size", "block-size", "base", "-Hp"))
        == "size\t1048576\nblock-size\t4096\nbase\t-\n"
    )
    assert ok(run("get", f"{vms}/web", "created", "-Hp")).split("\t")[1].strip().isdigit()


@pytest.mark.parametrize("assignment", ["wipe=shred", "wipe", "colour=red", "size=2M"])
def test_what_cannot_be_set_is_wrong_usage(run: Run, vms: Path, assignment: str) -> None:
    refused = run("set", f"{vms}/web", assignment)
    assert refused.exit_code == 2 and "zero" in refused.stderr


def test_the_policy_of_a_volume_that_is_open_is_not_changed(run: Run, vms: Path) -> None:
    with Store(vms, create=False) as store, store.open("web"):
        assert run("set", f"{vms}/web", "wipe=zero").exit_code == 5
    assert run("set", f"{vms}/none", "wipe=zero").exit_code == 3
