"""Shells complete verbs, stores, volumes and snapshots; bash although it splits words at '@'."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onionskin.cli.app import onionskin
from onionskin.nbd import fuse_mount

Run = Callable[..., Result]


def completed(line: str) -> list[str]:
    """Ask as the bash script does."""
    environment = {"_ONIONSKIN_COMPLETE": "bash_complete", "_ONIONSKIN_LINE": line}
    answer = CliRunner().invoke(onionskin, [], env=environment)
    return [text for kind, _, text in (one.partition(",") for one in answer.stdout.splitlines()) if kind == "plain"]


def test_verbs_complete() -> None:
    assert completed("onionskin sna") == ["snapshot", "snapshots"]


def test_help_completes_verbs_and_those_of_machines() -> None:
    assert completed("onionskin help sna") == ["snapshot", "snapshots"]
    assert completed("onionskin help machine sta") == ["start", "status"]
    assert completed("onionskin help list ") == []


def test_what_can_be_set_completes(vms: Path) -> None:
    assert completed(f"onionskin set {vms}/web w") == ["wipe=release", "wipe=zero"]
    assert completed(f"onionskin set {vms} b") == ["block-size="]


def test_volumes_complete(run: Run, vms: Path) -> None:
    run("create", f"{vms}/db", "--size", "1M")
    assert sorted(completed(f"onionskin info {vms}/")) == [f"{vms}/db", f"{vms}/web"]
    assert completed(f"onionskin flatten {vms}/w") == [f"{vms}/web"]


def test_snapshots_complete_where_one_is_wanted(run: Run, vms: Path) -> None:
    run("snapshot", f"{vms}/web@two")
    assert completed(f"onionskin revert {vms}/") == [f"{vms}/web@clean", f"{vms}/web@two"]
    assert completed(f"onionskin revert --yes {vms}/web@t") == [f"{vms}/web@two"]
    assert completed(f"onionskin info {vms}/web@c") == [f"{vms}/web@clean"]
    assert completed(f"onionskin map --rows 4 {vms}/web@c") == [f"{vms}/web@clean"]


def test_what_can_be_served_completes(run: Run, vms: Path) -> None:
    assert completed(f"onionskin serve {vms}/w") == [f"{vms}/web"]
    assert completed(f"onionskin serve {vms}/web {vms}/web@c") == [f"{vms}/web@clean"]


def test_what_is_mounted_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(
        b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        b"60 22 0:50 / /mnt/a\\040b ro shared:2 - fuse.nbdfuse nbdfuse ro\n"
        b"61 22 0:51 / /mnt/c ro - fuse nbdfuse ro\n"
        b"62 22 0:52 / /mnt/d ro - fuse.sshfs host: ro\n"
    )
    assert fuse_mount.mounted(table) == [Path("/mnt/a b"), Path("/mnt/c")]
    found = fuse_mount.mounted(table)
    monkeypatch.setattr(fuse_mount, "mounted", lambda: found)
    assert completed("onionskin umount /mnt/c") == ["/mnt/c"]
    assert completed("onionskin umount /mnt/") == ["/mnt/a b", "/mnt/c"]


def test_names_that_are_to_be_made_do_not_complete(vms: Path) -> None:
    assert completed(f"onionskin create {vms}/w") == []
    assert completed(f"onionskin snapshot {vms}/w") == [f"{vms}/web"]
    assert completed(f"onionskin snapshot {vms}/web@c") == []


def test_a_directory_that_is_no_store_offers_nothing_and_stays(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert completed(f"onionskin info {tmp_path}/plain/") == []
    (tmp_path / "plain" / "catalog.db").write_text("not a catalog")
    assert completed(f"onionskin info {tmp_path}/plain/") == []
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["catalog.db"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_ONIONSKIN_COMPLETE" in script
    assert f"{shell}_complete" in script


def bash(line: str, breaks: str) -> list[str]:
    """Complete a line in a real bash, which is told where words break."""
    program = f"""
        onionskin() {{ {sys.executable} -m onionskin "$@"; }}
        compopt() {{ :; }}
        eval "$(onionskin completion bash)"
        COMP_WORDBREAKS=$'{breaks}' COMP_LINE='{line}' COMP_POINT={len(line)}
        _onionskin_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    shell = subprocess.run(["bash", "-c", program], check=True, capture_output=True, text=True)
    return shell.stdout.split()


def test_bash_gets_what_it_puts_behind_the_part_that_it_keeps(vms: Path) -> None:
    line = f"onionskin revert {vms}/web@cl"
    assert bash(line, r" \t\n") == [f"{vms}/web@clean"]
    assert bash(line, r" \t\n@") == ["@clean"]
    assert bash(f"onionskin revert {vms}/we", r" \t\n@") == [f"{vms}/web@clean"]


def test_the_end_of_a_range_completes_with_snapshots_of_its_volume(run: Run, vms: Path) -> None:
    for name in ("web@two", "web@three"):
        run("snapshot", f"{vms}/{name}")
    run("clone", f"{vms}/web@clean", f"{vms}/copy")
    run("snapshot", f"{vms}/copy@two")
    both = [f"{vms}/web@clean..@three", f"{vms}/web@clean..@two"]
    assert completed(f"onionskin merge {vms}/web@clean..@t") == both
    assert completed(f"onionskin hold {vms}/web@clean..@three") == both[:1]
    assert completed(f"onionskin revert {vms}/web@clean..@t") == []  # which takes one
