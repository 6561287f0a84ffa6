"""Merging: of a name between layers, and of scattered extents into the base; and copying all out."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from rig.commit import overlay, qemu_commit
from rig.disks import make_flat, scattered, write_extents
from rig.race import CLOCK, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

INTO_BASE = "onionskin merge_into_base"
MEMBERS = (INTO_BASE, "onionskin merge of a name", "qemu-img commit", "onionskin export", "qemu-img convert")
EXTENT = 65536
Made = tuple[onionskin.Store, onionskin.Volume, Path]


@pytest.fixture(scope="module")
def race(setting: Setting) -> Race:
    work, size, names = setting.directory, setting.size_bytes, count()
    offsets = [int(i) * EXTENT for i in scattered(size // EXTENT // 2, size // EXTENT)]
    out = work / "out.raw"

    def changed() -> Made:
        number = next(names)
        base = make_flat(work / f"base-{number}.raw", size)
        store = onionskin.Store(work / f"store-{number}")
        web = store.create("web", base=base)
        write_extents(web, offsets[::2], EXTENT, 90)
        web.snapshot("lower")
        write_extents(web, offsets[1::2], EXTENT, 90)
        return store, web, base

    def gone(made: Made) -> None:
        store, web, base = made
        for offset in offsets[::64]:
            assert web.read(offset, EXTENT) == b"\x5a" * EXTENT
        web.close()
        store.close()
        shutil.rmtree(store.path)
        base.unlink()

    def into_base(made: Made) -> None:
        made[1].merge("lower")
        made[1].merge_into_base()

    def removed(paths: tuple[Path, Path]) -> None:
        for path in (*paths, out):
            path.unlink(missing_ok=True)

    def convert(paths: tuple[Path, Path]) -> None:
        peers.run("qemu-img", "convert", "-O", "raw", paths[1], out)
        peers.sync_file(out)

    no_qemu = peers.missing("qemu-img", "qemu-io")
    contestants: dict[str, Contestant | str] = {
        INTO_BASE: Contestant(into_base, changed, gone),
        "onionskin merge of a name": Contestant(lambda made: made[1].merge("lower"), changed, gone),
        "onionskin export": Contestant(lambda made: made[1].export(out), changed, gone),
        "qemu-img commit": no_qemu or qemu_commit(work, size, offsets, EXTENT),
        "qemu-img convert": no_qemu or Contestant(convert, lambda: overlay(work, size, offsets, EXTENT), removed),
    }
    info = {"bytes": len(offsets) * EXTENT, "block_size": 4096, "extent_bytes": EXTENT, "depth": 2, "cache": "hot"}
    return run_race(contestants, min(3, setting.rounds), engine=INTO_BASE, warm_up=False, **info)


@pytest.mark.benchmark(group="merge, hot", timer=CLOCK)
@pytest.mark.parametrize("member", MEMBERS)
def test_merge(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)
