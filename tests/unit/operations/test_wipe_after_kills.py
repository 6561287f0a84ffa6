"""Policy `zero` after random operations and kills: nothing is left on the device that no volume and no snapshot reads."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import image_of, unmount

import onionskin
from onionskin.operations import reclaim

WORK = Path(__file__).with_name("wiping_work.py")
CANARY = re.compile(rb"canary-zero-[0-9a-f]{16}!")


def canaries_on(image: Path) -> set[bytes]:
    """Return what is found in an image, holes passed over. A canary begins at the start of a block."""
    found: set[bytes] = set()
    with image.open("rb") as file:
        at, end = 0, image.stat().st_size
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            file.seek(at)
            part = file.read(1 << 22)
            found.update(CANARY.findall(part))
            at += len(part)
    return found


def canaries_read(store: onionskin.Store) -> set[bytes]:
    """Return what volumes and snapshots read, after the work that was left is done."""
    found: set[bytes] = set()
    for info in store.volumes():
        with store.open(info.name) as volume:
            found.update(CANARY.findall(volume.read(0, volume.size_bytes)))
            for snapshot in volume.snapshots:
                with store.open(info.name, snapshot=snapshot.name) as view:
                    found.update(CANARY.findall(view.read(0, view.size_bytes)))
    reclaim.work_soon(store._opened)
    store.finish_work()
    return found


def work_and_kill(root: Path, outside: Path, seed: int, seconds: float) -> None:
    """Let a process work, and kill it: when that is decides nothing but what it was at."""
    child = subprocess.Popen([sys.executable, WORK, root, outside, str(seed)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"begun\n"
        time.sleep(seconds)
        assert child.poll() is None, "it ended by itself"
        child.kill()


def run(mount, tmp_path: Path, seed: int, rounds: int, seconds: float) -> None:
    root = mount(64 << 20)
    chosen = random.Random(seed)
    for number in range(rounds):
        work_and_kill(root / "store", tmp_path, seed + number, chosen.uniform(0.05, 1) * seconds)
        with onionskin.Store(root / "store") as store:
            wanted = canaries_read(store)
            assert [problem for problem in store.check() if problem.what.startswith(("pending", "a file"))] == []
        os.sync()
        assert canaries_on(image_of(root)) - wanted == set(), f"seed {seed}, round {number}"
    unmount(root)
    assert wanted <= canaries_on(image_of(root))
    assert canaries_on(image_of(root)) - wanted == set()


@pytest.mark.parametrize("system", ["ext4", pytest.param("xfs", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_nothing_is_left_after_random_operations_and_kills(
    request: pytest.FixtureRequest, tmp_path: Path, system: str
) -> None:
    run(request.getfixturevalue(f"{system}_mount"), tmp_path, seed=1, rounds=3, seconds=1.0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 600, 100))
@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_nothing_is_left_after_many(request: pytest.FixtureRequest, tmp_path: Path, system: str, seed: int) -> None:
    run(request.getfixturevalue(f"{system}_mount"), tmp_path, seed=seed, rounds=40, seconds=4.0)
