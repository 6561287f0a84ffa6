"""borg backs up snapshots by the lines of docs/howto/backup.md, and gives them back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onionskin

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
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=root, env=environment, capture_output=True, text=True, timeout=120
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
