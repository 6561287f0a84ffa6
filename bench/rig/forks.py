"""Stores whose snapshot is forked, and the contestants that make a hundred copies of a disk."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant
from rig.copies import make_overlays, make_reflinks, make_scattered, make_subvolumes, qcow2_overlay, sync_directory
from rig.disks import GIB, make_flat

FORKS = 100
SIZE_BYTES = 2 * GIB
EXTENTS = 10_000
MIB = 1 << 20


@contextmanager
def store_to_fork(directory: Path) -> Iterator[onionskin.Store]:
    """Make a store with a snapshot, `web@clean`, of a disk of 2 GiB of which 16 MiB are written. Both are open."""
    with onionskin.Store(directory / "store") as store, store.create("web", size=SIZE_BYTES) as web:
        for offset in range(0, 16 * MIB, MIB):
            web.write(offset, os.urandom(MIB))
        web.snapshot("clean")
        yield store


def fork_hundred(store: onionskin.Store) -> Contestant:
    """Make a hundred forks in one call, and drop them outside of the timing."""
    rounds = count()
    names: list[str] = []

    def fork(_: None) -> None:
        names[:] = store.fork("web@clean", count=FORKS, pattern=f"round-{next(rounds)}-{{n}}")

    def drop(_: None) -> None:
        assert len(names) == FORKS
        store.delete(*names)
        store._opened.finish_work()

    return Contestant(fork, store._opened.finish_work, drop)


def _copies(work: Path, make: Callable[[list[Path]], object], *, copies: int = FORKS) -> Contestant:
    """Make copies in a directory of their own. If they are fewer than a hundred, the time of a hundred is reckoned."""
    directory = work / "copies"

    def paths() -> list[Path]:
        directory.mkdir()
        sync_directory(work)
        return [directory / f"copy-{number}" for number in range(copies)]

    def timed(made: list[Path]) -> float:
        start = time.perf_counter()
        make(made)
        return (time.perf_counter() - start) * FORKS / copies

    return Contestant(timed, paths, lambda _: shutil.rmtree(directory))


def overlay_hundred(work: Path) -> Contestant:
    """Write a hundred qcow2 overlays in this process."""
    base = make_scattered(work / "base.raw", SIZE_BYTES, 16)
    image = qcow2_overlay(SIZE_BYTES, base)
    trial = work / "trial.qcow2"
    make_overlays(image, [trial])
    if peers.missing("qemu-img") is None:
        peers.run("qemu-img", "check", "-q", trial)  # it is an image to those who use it
    trial.unlink()
    return _copies(work, lambda paths: make_overlays(image, paths))


def qemu_img_hundred(work: Path) -> Contestant:
    """Run `qemu-img create -b` a hundred times, and sync each image and their directory."""
    base = make_scattered(work / "base-of-qemu.raw", SIZE_BYTES, 16)

    def create(paths: list[Path]) -> None:
        for path in paths:
            peers.sync_file(peers.create_qcow2(path, backing=base))
        sync_directory(paths[0].parent)

    return _copies(work, create)


def reflink_hundred(work: Path) -> Contestant:
    """Share the extents of a scattered image five times, which takes long enough."""
    source = make_scattered(work / "scattered.raw", SIZE_BYTES, EXTENTS)
    return _copies(work, lambda paths: make_reflinks(source, paths), copies=5)


def subvolume_hundred(work: Path) -> Contestant:
    """Snapshot a btrfs subvolume that holds a disk a hundred times."""
    source = work / "subvolume"
    peers.run("btrfs", "subvolume", "create", source)
    make_flat(source / "disk.raw", 16 * MIB)
    peers.run("btrfs", "filesystem", "sync", work)
    return _copies(work, lambda paths: make_subvolumes(source, paths))
