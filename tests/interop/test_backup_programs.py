"""borg and restic back up snapshots by the lines of docs/howto/backup.md, and give them back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin

pytestmark = pytest.mark.slow  # each runs a program of others several times

GUIDE = Path(__file__).parents[2] / "docs" / "howto" / "backup.md"


@pytest.fixture
def vms(tmp_path: Path) -> Path:
    """A store whose volume web differs in 4 KiB between its snapshots tuesday and wednesday."""
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="16M") as web:
        web.write(1 << 20, os.urandom(3 << 20))
        web.snapshot("tuesday")
        web.write(2 << 20, os.urandom(4096))
        web.snapshot("wednesday")
    return tmp_path / "vms"


def shell(root: Path, line: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BORG_BASE_DIR": str(root / "borg"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        "RESTIC_REPOSITORY": str(root / "restic"),
        "RESTIC_PASSWORD": "secret",
        "RESTIC_CACHE_DIR": str(root / "cache"),
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


def line_of_guide(begin: str) -> str:
    (line,) = [line for line in GUIDE.read_text().splitlines() if line.startswith(begin)]
    return line


def test_borg_stores_what_changed_and_gives_the_disk_back(vms: Path) -> None:
    root, create = vms.parent, line_of_guide("borg create")
    for line in ("borg init -e none backup", create.replace("wednesday", "tuesday"), create):
        done = shell(root, line)
        assert done.returncode == 0, done.stderr
    said = shell(root, "borg info --json backup::wednesday")
    stored = said.stdout.split('"deduplicated_size": ')[1].split(",")[0].split("\n")[0]
    assert int(stored) < 1 << 17, stored
    restored = shell(root, line_of_guide("borg extract"))
    assert restored.returncode == 0, restored.stderr
    assert shell(root, "onionskin compare vms/restored vms/web@wednesday").returncode == 0


def test_borg_makes_no_archive_where_the_export_fails(vms: Path) -> None:
    root = vms.parent
    assert shell(root, "borg init -e none backup").returncode == 0
    assert shell(root, line_of_guide("borg create").replace("web@wednesday", "web@none")).returncode != 0
    assert shell(root, "borg list --short backup").stdout == ""


def stored_by_restic(root: Path) -> list[str]:
    """Return the tag of each snapshot."""
    said = shell(root, "restic snapshots --json")
    assert said.returncode == 0, said.stderr
    return [one["tags"][0] for one in json.loads(said.stdout)]


def test_restic_takes_snapshots_from_a_pipe_and_gives_the_disk_back(vms: Path) -> None:
    root, backup = vms.parent, line_of_guide("onionskin export vms/web@wednesday - | restic")
    for line in ("restic init", backup.replace("wednesday", "tuesday"), backup):
        done = shell(root, line)
        assert done.returncode == 0, done.stderr
    assert stored_by_restic(root) == ["tuesday", "wednesday"]
    restored = shell(root, line_of_guide("restic dump"))
    assert restored.returncode == 0, restored.stderr
    assert shell(root, "onionskin compare vms/restored vms/web@wednesday").returncode == 0


@pytest.mark.parametrize("failing", ["false", "head -c 1M /dev/zero; false"], ids=["before a byte", "behind some"])
def test_restic_keeps_nothing_where_the_export_fails(vms: Path, failing: str) -> None:
    root, backup = vms.parent, line_of_guide("onionskin export vms/web@wednesday - | restic")
    assert shell(root, f"restic init && {backup.replace('wednesday', 'tuesday')}").returncode == 0
    _, pipe, rest = backup.partition(" | ")
    shell(root, f"({failing}){pipe}{rest}")
    assert stored_by_restic(root) == ["tuesday"]
