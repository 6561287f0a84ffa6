"""A durable snapshot, against everything else that keeps a disk as it is now."""

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from rig.disks import make_flat
from rig.live_qemu import QEMU, live_disk
from rig.mounts import place_for_reflinks
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

LIVE = "QEMU live blockdev-snapshot-sync"
REFLINK = "cp --reflink + fsync"
MEMBERS = (ENGINE, "cp + fsync", "shutil.copyfile + fsync", REFLINK, "qemu-img create -b + fsync")
MEMBERS += ("qemu-img snapshot -c", LIVE)
DIRTY = 65536
XFS_BYTES = 512 << 20  # mkfs.xfs wants 300 MiB


@pytest.fixture(scope="module")
def race(setting: Setting) -> Iterator[Race]:
    work, names = setting.directory, count()
    base, copy, overlay = make_flat(work / "base.raw", setting.size_bytes), work / "copy", work / "overlay.qcow2"
    no_qemu = peers.missing("qemu-img")
    internal = work / "internal.qcow2"
    if no_qemu is None:
        peers.run("qemu-img", "convert", "-O", "qcow2", base, internal)

    def copyfile() -> None:
        shutil.copyfile(base, copy)
        peers.sync_file(copy)

    with (
        onionskin.Store(work / "store") as store,
        store.create("web", base=base) as web,
        place_for_reflinks(work, XFS_BYTES + 2 * setting.size_bytes) as shared,
    ):
        web.write(0, b"\x07" * DIRTY)
        web.snapshot("checked")
        web.write(0, b"\x08" * DIRTY)
        with store.open("web", snapshot="checked") as view:
            assert view.read(0, DIRTY) == b"\x07" * DIRTY
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(lambda _: web.snapshot(f"s{next(names)}"), lambda: web.write(0, b"\x07" * DIRTY)),
            "cp + fsync": Contestant(lambda: peers.full_copy(base, copy), finish=copy.unlink),
            "shutil.copyfile + fsync": Contestant(copyfile, finish=copy.unlink),
            "qemu-img create -b + fsync": no_qemu
            or Contestant(lambda: peers.sync_file(peers.create_qcow2(overlay, backing=base)), finish=overlay.unlink),
            "qemu-img snapshot -c": no_qemu
            or Contestant(lambda: peers.run("qemu-img", "snapshot", "-c", f"s{next(names)}", internal)),
        }
        contestants[REFLINK] = shared if isinstance(shared, str) else _reflink(base, shared)
        info = {"bytes": setting.size_bytes, "dirty_bytes": DIRTY, "block_size": 4096, "depth": 1, "cache": "hot"}
        if reason := peers.missing(QEMU, "qemu-img"):
            yield run_race(contestants | {LIVE: reason}, setting.rounds, **info)
            return
        image = peers.create_qcow2(work / "live.qcow2", size=setting.size_bytes)
        with live_disk(image) as live:
            contestants[LIVE] = Contestant(lambda _: live.snapshot(), lambda: live.write(0, DIRTY))
            yield run_race(contestants, setting.rounds, **info)


def _reflink(base: Path, directory: Path) -> Contestant:
    """Copy the base by sharing its extents; it is brought where files can, if they cannot where it is."""
    source, copy = base, directory / "shared.raw"
    if directory != base.parent:
        source = directory / base.name
        peers.full_copy(base, source)
    return Contestant(lambda: peers.reflink_copy(source, copy), finish=copy.unlink)


@pytest.mark.benchmark(group="snapshot", timer=CLOCK)
@pytest.mark.parametrize("member", MEMBERS)
def test_snapshot(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)
