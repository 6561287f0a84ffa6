"""The demo of a machine, as a user runs it: what it proves, what it leaves, and what it says where something is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.linux_guest import kernel_package

SECONDS_MAX = 1500  # of a busy machine


def demo(temporary: Path, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "onionskin", "demo", "--machine", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        env=os.environ | {"TMPDIR": str(temporary)} | environment,
    )


def processes_with(text: Path) -> list[str]:
    """Return the command lines of the processes that name a path."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(text) in words and int(directory.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_of_a_machine_proves_what_it_shows_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "temporary").mkdir()
    package = kernel_package(tmp_path / "packages")
    ended = demo(tmp_path / "temporary", "--packages", package.parent, "--json")
    assert ended.returncode == 0, ended.stderr
    value = json.loads(ended.stdout)
    proofs = [step["what"] for step in value["steps"] if step["proof"]]
    assert "it counts on at the next tick" in proofs and "check finds no problem in the store" in proofs
    assert [step["proof"] for step in value["steps"] if step["proof"]] == ["proved"] * 8
    assert len(value["times"]) == 7 and all(one["seconds"] > 0 and one["other_seconds"] > 0 for one in value["times"])
    assert value["forks"] == 8
    assert list((tmp_path / "temporary").iterdir()) == []
    assert processes_with(tmp_path / "temporary") == []


def test_a_disk_that_is_too_small_for_a_system_is_refused(tmp_path: Path) -> None:
    ended = demo(tmp_path, "--size", "1M")
    assert ended.returncode != 0 and "too small" in ended.stderr


def test_what_the_demo_needs_and_is_not_here_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    ended = demo(tmp_path, "--packages", tmp_path / "none", PATH=str(tmp_path / "none"))
    assert ended.returncode not in (0, 1)
    assert len(ended.stderr.splitlines()) == 1
    for what in ("qemu-system-x86", "qemu-utils", "busybox-static", "linux-image-cloud-amd64"):
        assert what in ended.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "none"]
