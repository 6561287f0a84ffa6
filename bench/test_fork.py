"""A hundred durable forks of a snapshot of 2 GiB, against a hundred copies, on this disk, on XFS and on btrfs.

Whoever copies does it in one process, without starting a program for each copy, but for `qemu-img create`. XFS and btrfs
are loop images on this disk, so root and their mkfs are needed; where a peer is missing, its test says why it was
skipped.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rig.forks import (
    fork_hundred,
    overlay_hundred,
    qemu_img_hundred,
    reflink_hundred,
    store_to_fork,
    subvolume_hundred,
)
from rig.mounts import loop_mount, mount_missing
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

from onionskin.measure import peers
from onionskin.measure.timing import Contestant

OVERLAYS, QEMU_IMG = "qcow2 overlays, made in one process", "qemu-img create -b, fsync"
REFLINKS, SUBVOLUMES = "reflink copies of 10,000 extents", "btrfs subvolume snapshots"
INFO = {"bytes": 2 << 30, "copies": 100, "depth": 1, "cache": "hot"}
IMAGE_BYTES = 4 << 30


def _race(work: Path, others: dict[str, Callable[[Path], Contestant] | str], rounds: int) -> Race:
    with store_to_fork(work) as store:
        contestants: dict[str, Contestant | str] = {ENGINE: fork_hundred(store)}
        contestants |= {name: one if isinstance(one, str) else one(work) for name, one in others.items()}
        return run_race(contestants, rounds, **INFO)


@pytest.fixture(scope="module")
def races(setting: Setting) -> Iterator[dict[str, Race | str]]:
    rounds = max(5, setting.rounds)
    qemu = peers.missing("qemu-img") or qemu_img_hundred
    found: dict[str, Race | str] = {
        "disk": _race(setting.directory, {OVERLAYS: overlay_hundred, QEMU_IMG: qemu}, rounds)
    }
    for kind, others in (("xfs", {REFLINKS: reflink_hundred}), ("btrfs", {SUBVOLUMES: subvolume_hundred})):
        reason = mount_missing(kind)
        if reason:
            found[kind] = reason
            continue
        with ExitStack() as stack:
            work = stack.enter_context(loop_mount(setting.directory, kind, IMAGE_BYTES))
            found[kind] = _race(work, dict(others), rounds)
    yield found


@pytest.mark.benchmark(group="100 durable forks", timer=CLOCK)
@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("disk", ENGINE),
        ("disk", OVERLAYS),
        ("disk", QEMU_IMG),
        ("xfs", ENGINE),
        ("xfs", REFLINKS),
        ("btrfs", ENGINE),
        ("btrfs", SUBVOLUMES),
    ],
)
def test_fork(kind: str, member: str, races: dict[str, Race | str], show: Callable[[Race, str], None]) -> None:
    race = races[kind]
    if isinstance(race, str):
        pytest.skip(f"{member} on {kind}: {race}")
    show(race, member)
