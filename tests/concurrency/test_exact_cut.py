"""No write comes between the cuts of a group, since all its volumes are held before any is cut; and where they are not?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crash.harness.drop_each_barrier import build
from pairs.faults_taken_out import TREE, built_tree

PROGRAM = Path(__file__).with_name("exact_cut.py")
HOLD_ALL = """    while (held < count && (status = onion_volume_seal_hold(volumes[held])) == 0)
        held++;
    *failed = held;
    for (uint32_t i = 0; i < held && status == 0; i++)
        if ((status = onion_volume_seal_cut(volumes[i])) < 0)
            *failed = i;
"""
HOLD_EACH = """    while (held < count && (status = onion_volume_seal_hold(volumes[held])) == 0) {
        if ((status = onion_volume_seal_cut(volumes[held])) < 0)
            break;
        onion_volume_seal_release(volumes[held++]);
    }
    *failed = held;
"""
SEAL = "csrc/volume/seal.c"


def stamps(store: Path, source: Path | None = None) -> tuple[int, int]:
    """Return what the snapshots of the first and the third have of a write to the first and a later one to the third."""
    environment = {**os.environ, **({"PYTHONPATH": str(source)} if source else {})}
    done = subprocess.run(
        [sys.executable, PROGRAM, store], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, third = map(int, done.stdout.split())
    return first, third


def test_a_group_holds_all_volumes_before_it_cuts_any(tmp_path: Path) -> None:
    first, third = stamps(tmp_path / "store")
    assert first >= third


def test_the_barrier_of_a_group_is_where_it_is_taken_out() -> None:
    assert (TREE / SEAL).read_text().count(HOLD_ALL) == 1


@pytest.mark.slow
def test_a_group_that_cuts_each_volume_by_itself_is_not_exact(tmp_path: Path) -> None:
    tree = built_tree(tmp_path, TREE)
    source = tree / SEAL
    source.write_text(source.read_text().replace(HOLD_ALL, HOLD_EACH))
    build(tree, SEAL)
    assert stamps(tmp_path / "store", tree / "src") == (0, 1)
