"""No write comes between the cuts of a group, since all its volumes are held before any is cut; and where they are not?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crash.harness.drop_each_barrier import build
from pairs.faults_taken_out import TREE, built_tree

PROGRAM = Path(__file__).with_name("exact_cut.py")
GROUP_CUT = "csrc/volume/group_cut.c"
HOLD = "        int status = onion_volume_seal_hold(at->volumes[*held]);\n"
CUT_AND_RELEASE = """        if (status == 0) {
            status = onion_volume_seal_cut(at->volumes[*held]);
            onion_volume_seal_release(at->volumes[*held]);
        }
"""
# What the code is, and what becomes of it: each volume is held, cut and released by itself.
EDITS = {
    HOLD: HOLD + CUT_AND_RELEASE,
    "        int status = onion_volume_seal_cut(at->volumes[i]);\n": "        int status = 0;\n",
    "        onion_volume_seal_release(at->volumes[i]);\n": "        (void)at;\n",
}


def stamps(store: Path, source: Path | None = None) -> tuple[int, int]:
    """Return what the snapshots of the first and the third have of a write to the first and a later one to the third."""
    environment = {**os.environ, **({"PYTHONPATH": str(source)} if source else {})}
    done = subprocess.run(
        [sys.executable, PROGRAM, store], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, third = map(int, done.stdout.split())
    return first, third


def test_a_group_holds_all_volumes_before_it_cuts_any(tmp_path: Path) -> None:
    first, third = stamps(tmp_path / "store")
    assert first >= third


def test_the_barrier_of_a_group_is_where_it_is_taken_out() -> None:
    code = (TREE / GROUP_CUT).read_text()
    assert [code.count(old) for old in EDITS] == [1, 1, 1]


@pytest.mark.slow
def test_a_group_that_cuts_each_volume_by_itself_is_not_exact(tmp_path: Path) -> None:
    tree = built_tree(tmp_path, TREE)
    source = tree / GROUP_CUT
    code = source.read_text()
    for old, new in EDITS.items():
        code = code.replace(old, new)
    source.write_text(code)
    build(tree, GROUP_CUT)
    assert stamps(tmp_path / "store", tree / "src") == (0, 1)
