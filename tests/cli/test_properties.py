"""The verbs get and set."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.errors import StateError
from onionskin.operations.forks import LABELS_MAX
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
    assert [line.split()[0] for line in lines] == [
        "PROPERTY",
        "wipe",
        "size",
        "block-size",
        "base",
        "created",
        "expires",
        "labels",
    ]
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


@pytest.mark.parametrize("verb", [["set"], ["get"], ["info"]], ids=lambda words: words[0])
def test_of_a_store_that_is_missing_it_is_said_how_one_is_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = ["wipe=zero"] if verb == ["set"] else []
    refused = run(*verb, "vms", *rest)
    assert refused.exit_code == 3 and list(tmp_path.iterdir()) == []
    assert "'vms' does not exist as a store; 'onionskin create vms/VOLUME --size SIZE' makes one" in refused.stderr
    refused = run(*verb, "./vms", *rest)
    assert refused.exit_code == 3 and "neither './vms' nor . is a store; 'onionskin create STORE/" in refused.stderr
    refused = run("list", "vms")
    assert refused.exit_code == 3 and "is not a store; 'onionskin create" in refused.stderr


def test_a_lifetime_is_given_counted_from_now_and_taken_away(run: Run, vms: Path) -> None:
    before = time.time()
    about = as_json(run("set", f"{vms}/web", "lifetime=2h", "--json"))
    assert about["expires"] == as_json(run("info", f"{vms}/web", "--json"))["expires"]
    assert (
        7199 <= int(ok(run("get", f"{vms}/web", "expires", "-Hp")).split()[1]) - before <= 7200 + time.time() - before
    )
    assert ok(run("set", f"{vms}/web", "lifetime=none")).endswith("has lifetime=none now\n")
    assert ok(run("get", f"{vms}/web", "expires", "-H")) == "expires\t-\n"
    assert run("set", f"{vms}/web", "lifetime=soon").exit_code == 2


def test_labels_are_put_on_and_taken_away_one_by_one(run: Run, vms: Path) -> None:
    ok(run("set", f"{vms}/web", "label:task=42"))
    ok(run("set", f"{vms}/web", "label:by=ci=1"))
    assert as_json(run("get", f"{vms}/web", "labels", "--json"))["labels"] == {"task": "42", "by": "ci=1"}
    assert ok(run("list", vms, "-H", "-o", "name,labels", "--label", "task=42")) == "web\tby=ci=1 task=42\n"
    assert ok(run("set", f"{vms}/web", "label:task=")).endswith("has no label:task any more\n")
    assert "by=ci=1" in ok(run("info", f"{vms}/web")) and "task" not in ok(run("info", f"{vms}/web"))
    assert run("set", f"{vms}/web", "label:=x").exit_code == 2
    assert run("set", f"{vms}/web", "label:task").exit_code == 2


def test_the_disks_of_a_machine_go_by_its_lifetime_and_labels_alone(vms: Path) -> None:
    with Store(vms) as store:
        store.create_machine("lab", disks=["web"], memory="64M")
        for name in ("web", "lab.ram"):
            with pytest.raises(StateError, match=r"belongs to machine 'lab'.*machines have lifetimes of their own"):
                store.set_lifetime(name, "1h")
            with pytest.raises(StateError, match=r"belongs to machine 'lab'.*machines have labels of their own"):
                store.set_labels(name, {"a": "b"})


def test_a_lifetime_that_ends_behind_the_last_day_is_refused_by_that_day(
    vms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(vms) as store:
        monkeypatch.setattr(time, "time_ns", lambda: (1 << 63) - 3_600_000_000_000)
        store.set_lifetime("web", 3599)
        with pytest.raises(ValueError, match="2262-04-11"):
            store.set_lifetime("web", "1h")
        with pytest.raises(ValueError, match="2262-04-11"):
            store.fork("web", "clean", lifetime="1h")
        assert list(store) == ["web"]


def test_more_labels_than_there_may_be_change_nothing(vms: Path) -> None:
    with Store(vms) as store:
        store.set_labels("web", {str(number): "x" for number in range(LABELS_MAX)})
        with pytest.raises(ValueError, match="at most"):
            store.set_labels("web", {"one more": "x"})
        found = store.set_labels("web", {"one more": "x", "0": None})
        assert len(found) == LABELS_MAX and store.info("web").labels == found
