"""A process whose cgroup is frozen, as that of a container that is paused: the kernel says of it that it sleeps."""

import os
from pathlib import Path

import pytest

from onionskin.control import client


@pytest.mark.parametrize(
    ("line", "file", "text", "is_frozen"),
    [
        ("0::/lab", "lab/cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/lab", "unified/lab/cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/lab", "lab/cgroup.events", "populated 1\nfrozen 0\n", False),
        ("6:freezer:/lab", "freezer/lab/freezer.state", "FROZEN\n", True),
        ("6:cpu,freezer:/lab", "freezer/lab/freezer.state", "FREEZING\n", True),
        ("6:freezer:/lab", "freezer/lab/freezer.state", "THAWED\n", False),
        ("6:cpu:/lab", "freezer/lab/freezer.state", "FROZEN\n", False),
        ("0::/other", "lab/cgroup.events", "frozen 1\n", False),
    ],
)
def test_a_process_whose_cgroup_is_frozen_is_stopped_and_thawing_lets_it_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, file: str, text: str, is_frozen: bool
) -> None:
    said = tmp_path / "cgroups" / file
    said.parent.mkdir(parents=True)
    said.write_text(text)
    process = tmp_path / "proc" / str(os.getpid())
    process.mkdir(parents=True)
    (process / "cgroup").write_text(f"9:devices:/\n{line}\n")
    (process / "stat").write_bytes(Path("/proc/self/stat").read_bytes())
    monkeypatch.setattr(client, "_CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(client, "_PROCESSES", tmp_path / "proc")
    assert client.is_stopped(os.getpid()) is is_frozen
    assert client.what_lets_it_go_on(os.getpid()) == ("thawing its cgroup" if is_frozen else "kill -CONT")
    assert not client.is_stopped(1 << 30)
