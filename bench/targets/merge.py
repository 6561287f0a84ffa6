"""Merging into the base, against qemu-img commit; and of a name between layers."""

import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from rig.commit import qemu_commit
from rig.disks import GIB, make_flat, scattered, write_extents
from rig.mounts import loop_mount, mount_missing

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, Samples, interleave
from targets.report import Figure, skipped, versus

MIB = 1 << 20


def merge_into_base_against_commit(
    directory: Path, extent: int, spacing: int, what: str, least: float
) -> Iterator[Figure]:
    """Fold 1 GiB of extents at random places of a full base into it; the results are compared."""
    if reason := peers.missing("qemu-img", "qemu-io"):
        yield skipped(what, f">= {least} x", reason)
        return
    size = GIB * spacing
    offsets = [int(i) * extent for i in scattered(GIB // extent, size // extent)]
    names = count()

    def prepare_engine() -> tuple[onionskin.Store, onionskin.Volume, Path]:
        base = make_flat(directory / f"base-{next(names)}.raw", size)
        store = onionskin.Store(directory / f"store-{next(names)}")
        web = store.create("web", base=base)
        write_extents(web, offsets, extent, 90)
        return store, web, base

    def finish_engine(made: tuple[onionskin.Store, onionskin.Volume, Path]) -> None:
        store, web, base = made
        web.close()
        store.close()
        check_extents(base, offsets, extent)
        base.unlink()
        shutil.rmtree(store.path)

    contestants = {
        "merge_into_base": Contestant(lambda made: made[1].merge_into_base(), prepare_engine, finish_engine),
        "qemu-img commit": qemu_commit(
            directory, size, offsets, extent, check=lambda base: check_extents(base, offsets, extent)
        ),
    }
    samples = interleave(contestants, 3, warm_up=False)
    yield versus(what, least, samples, "qemu-img commit", "merge_into_base")
    COMMITS.setdefault(extent, samples["qemu-img commit"])


COMMITS: dict[int, Samples] = {}


def check_extents(base: Path, offsets: list[int], length: int) -> None:
    with base.open("rb") as file:
        for offset in offsets[:: max(1, len(offsets) // 256)]:
            file.seek(offset)
            assert file.read(length) == b"\x5a" * length


def merges(directory: Path) -> Iterator[Figure]:
    what = "merge_into_base of 1 GiB of scattered 64 KiB extents, against qemu-img commit"
    yield from merge_into_base_against_commit(directory, 65536, 2, what, 2)
    yield from merge_between_layers(directory)


def merge_between_layers(directory: Path) -> Iterator[Figure]:
    what = "merge of a name between two layers, the same 1 GiB, against qemu-img commit"
    commit = COMMITS.get(65536)
    if commit is None:
        yield skipped(what, ">= 50 x", "qemu-img commit was not measured")
        return
    offsets = [int(i) * 65536 for i in scattered(GIB // 65536, 2 * GIB // 65536)]
    samples = Samples()
    for number in range(3):
        with onionskin.Store(directory / f"merge-{number}") as store, store.create("web", size="2G") as web:
            write_extents(web, offsets[: len(offsets) // 2], 65536, 90)
            web.snapshot("lower")
            write_extents(web, offsets[len(offsets) // 2 :], 65536, 90)
            web.snapshot("upper")
            web.write(0, b"x" * 4096)
            start = time.perf_counter()
            web.merge("lower")
            samples.seconds.append(time.perf_counter() - start)
            assert all(web.read(offset + 4096, 1) == b"\x5a" for offset in offsets[::64])
        shutil.rmtree(directory / f"merge-{number}")
    yield versus(what, 50, {"merge": samples, "qemu-img commit": commit}, "qemu-img commit", "merge")


def merge_on_xfs(directory: Path) -> Iterator[Figure]:
    what = "merge_into_base of 1 GiB in 1 MiB extents on XFS with reflink, against qemu-img commit"
    if reason := mount_missing("xfs"):
        yield skipped(what, ">= 8 x", reason)
        return
    with loop_mount(directory, "xfs", 12 * GIB) as mounted:
        yield from merge_into_base_against_commit(mounted, MIB, 2, what, 8)
