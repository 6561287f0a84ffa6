"""What info says of a store, of a volume, and of what they stand on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.cli import volumes

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


def test_a_store_is_described(run: Run, vms: Path) -> None:
    about = as_json(run("info", vms, "--json"))
    assert (about["path"], about["volumes"], about["snapshots"]) == (str(vms), 1, 1)
    text = ok(run("info", f"{vms}/"))
    assert f"store        {vms}" in text and "none waits" in text and "left over" not in text
    (vms / "segments" / f"{'a' * 32}.seg").write_bytes(b"x" * 4096)
    assert "4 KiB in files that nothing names" in ok(run("info", vms))


def test_a_store_in_the_current_directory_needs_no_slash(run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vms.parent)
    assert "volumes      1" in ok(run("info", "vms"))
    refused = run("info", "none")
    assert refused.exit_code == 2 and "does not exist as a store" in refused.stderr


def test_a_volume_shows_its_layers_down_to_the_base(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "disk.raw"
    base.write_bytes(b"b" * 8192)
    ok(run("create", f"{tmp_path}/vms/web", "--base", base, "--size", "1M"))
    ok(run("write", f"{tmp_path}/vms/web", 0, input=b"x" * 4096))
    ok(run("snapshot", f"{tmp_path}/vms/web@clean"))
    lines = ok(run("info", f"{tmp_path}/vms/web")).splitlines()[-4:]
    assert [line.split()[0] for line in lines] == ["LAYER", "head", "snapshot", "base,"]
    assert "web@clean" in lines[2] and "4 KiB" in lines[2] and lines[3].endswith(str(base)) and "8 KiB" in lines[3]
    chain = as_json(run("info", f"{tmp_path}/vms/web@clean", "--json"))["chain"]
    assert [(one["kind"], one["bytes_held"], one["format"]) for one in chain] == [
        ("snapshot", 4096, None),
        ("base", 8192, "raw"),
    ]
    base.unlink()
    assert "missing" in ok(run("info", f"{tmp_path}/vms/web"))


def test_of_a_long_chain_the_beginning_and_the_end_are_shown(
    run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "_LAYERS_SHOWN", 3)
    for name in "abc":
        ok(run("snapshot", f"{vms}/web@{name}"))
    lines = ok(run("info", f"{vms}/web")).splitlines()[-4:]
    assert "web@c" not in lines[0] and lines[2].startswith("... 3 more") and "web@clean" in lines[3]
