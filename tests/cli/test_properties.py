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


def test_the_defaults_of_a_store_are_set_got_and_shown(run: Run, vms: Path) -> None:
    assert ok(run("get", str(vms), "-H")) == "wipe\trelease\nblock-size\t4 KiB\n"
    assert "wipe=zero from now on" in ok(run("set", str(vms), "wipe=zero"))
    set_ = as_json(run("set", str(vms), "block-size=64K", "--json"))
    assert set_ == as_json(run("get", str(vms), "--json")) == {"path": str(vms), "wipe": "zero", "block_size": 65536}
    about = as_json(run("info", str(vms), "--json"))
    assert (about["default_wipe"], about["default_block_size"]) == ("zero", 65536)
    assert "wipe zero, blocks of 64 KiB" in ok(run("info", str(vms)))
    made = as_json(run("create", f"{vms}/new", "--size", "1M", "--json"))
    assert (made["wipe"], made["block_size"]) == ("zero", 65536)
    said = as_json(run("create", f"{vms}/said", "--size", "1M", "--wipe", "release", "--block-size", "4K", "--json"))
    assert (said["wipe"], said["block_size"]) == ("release", 4096)
    assert as_json(run("info", f"{vms}/web", "--json"))["wipe"] == "release"


@pytest.mark.parametrize("assignment", ["wipe=shred", "wipe", "base=x", "block-size=5000", "block-size"])
def test_what_cannot_be_a_default_is_wrong_usage(run: Run, vms: Path, assignment: str) -> None:
    assert run("set", str(vms), assignment).exit_code == 2
    assert as_json(run("get", str(vms), "wipe", "block-size", "--json"))["block_size"] == 4096


def test_a_store_has_no_size(run: Run, vms: Path) -> None:
    refused = run("get", str(vms), "size")
    assert refused.exit_code == 2 and "a store has no size" in refused.stderr
