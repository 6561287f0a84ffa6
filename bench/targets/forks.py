"""Forks: a hundred in one call, one among many volumes, from a fork to its first read, and dropping a hundred."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from rig.forks import (
    FORKS,
    MIB,
    SIZE_BYTES,
    fork_hundred,
    overlay_hundred,
    reflink_hundred,
    store_to_fork,
    subvolume_hundred,
)
from rig.mounts import loop_mount, mount_missing
from rig.nbd_first_read import first_blocks_at_once, read_first_block

import onionskin
from onionskin.measure.timing import Contestant, interleave
from targets.report import Figure, several, skipped, versus, within

IMAGE_BYTES = 4 << 30


def hundred_forks(directory: Path) -> Iterator[Figure]:
    what = "100 durable forks of a snapshot of 2 GiB, one call"
    with store_to_fork(directory) as store:
        samples = interleave({"fork": fork_hundred(store), "100 overlays": overlay_hundred(directory)}, 15)
    yield several(what, "<= 50 ms", samples["fork"].seconds, 50e-3)
    yield versus(f"{what}, against qcow2 overlays made in one process", 10, samples, "100 overlays", "fork")


def hundred_copies_elsewhere(directory: Path) -> Iterator[Figure]:
    """The same on file systems that share what is copied."""
    what = "100 durable forks of a snapshot of 2 GiB, one call"
    for kind, name, make in (
        ("xfs", "reflink copies of 10,000 extents", reflink_hundred),
        ("btrfs", "btrfs subvolume snapshots", subvolume_hundred),
    ):
        if reason := mount_missing(kind):
            yield skipped(f"{what}, against {name}", ">= 10 x", reason)
            continue
        with loop_mount(directory, kind, IMAGE_BYTES) as work, store_to_fork(work) as store:
            samples = interleave({f"fork on {kind}": fork_hundred(store), name: make(work)}, 3, warm_up=False)
        yield versus(f"{what}, against {name}", 10, samples, name, f"fork on {kind}")


def _with_volumes(store: onionskin.Store, wanted: int) -> onionskin.Store:
    for first in range(0, wanted, 10_000):
        store.fork("web@clean", count=min(10_000, wanted - first), pattern="other-{n}")
    return store


@contextmanager
def _store_of(directory: Path, volumes: int) -> Iterator[onionskin.Store]:
    directory.mkdir()
    with store_to_fork(directory) as store:
        yield _with_volumes(store, volumes)


def fork_among_many(directory: Path) -> Iterator[Figure]:
    def one(store: onionskin.Store) -> Contestant:
        names = count()
        return Contestant(lambda _: store.fork("web@clean", names=[f"one-{next(names)}"]), store._opened.finish_work)

    with _store_of(directory / "few", 10) as few, _store_of(directory / "many", 100_000) as many:
        samples = interleave({"10 volumes": one(few), "100,000": one(many)}, 60)
    yield within("one fork in a store of 100,000 volumes, against 10", 2, samples, "100,000", "10 volumes")


def first_read(directory: Path) -> Iterator[Figure]:
    """Fork after fork, as a service makes them: the stores take turns, and nothing clears the caches between two."""
    seconds: dict[str, list[float]] = {"10": [], "10,000": []}

    def one(store: onionskin.Store, number: int, kept: list[float]) -> None:
        store._opened.finish_work()
        start = time.perf_counter()
        (name,) = store.fork("web@clean", names=[f"read-{number}"])
        fork = store.open(name)
        block = fork.read(0, 4096)
        kept.append(time.perf_counter() - start)
        assert len(block) == 4096
        fork.close()

    with _store_of(directory / "few", 10) as few, _store_of(directory / "many", 10_000) as many:
        for number in range(200):
            one(few, number, seconds["10"])
            one(many, number, seconds["10,000"])
    for volumes, found in seconds.items():
        what = f"fork to the first 4 KiB read in the same process, {volumes} volumes"
        yield several(what, "<= 2 ms p50", found, 2e-3)


@contextmanager
def _served(store: Path, socket: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "onionskin", "serve", str(store), "--socket", str(socket)]
    command += ["--json", "--connections", "256"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout
        assert json.loads(server.stdout.readline())["ready"]
        yield
    finally:
        server.terminate()
        server.wait()


def first_read_over_nbd(directory: Path) -> Iterator[Figure]:
    """The forks are made by another process than the server, as by an orchestrator."""
    socket = directory / "nbd.sock"
    with store_to_fork(directory) as store, store.open("web", snapshot="clean") as clean:
        block = clean.read(0, 4096)
    alone: list[float] = []
    together: list[float] = []
    with (
        onionskin.Store(directory / "store") as store,
        _served(directory / "store", socket),
        first_blocks_at_once(directory, socket, block) as read_at_once,
    ):
        for number in range(200):
            start = time.perf_counter()
            store.fork("web@clean", names=[f"alone-{number}"])
            assert read_first_block(socket, f"alone-{number}") == block
            alone.append(time.perf_counter() - start)
        for turn in range(5):
            start = time.perf_counter()
            names = store.fork("web@clean", count=FORKS, pattern=f"turn-{turn}-{{n}}")
            made = time.perf_counter()
            ended = read_at_once(names)  # by the clock of perf_counter
            together += [end - made for end in ended]
            print(f"    one call {made - start:.4f} s, the last block {max(ended) - start:.4f} s", file=sys.stderr)
    what = "fork to the first 4 KiB read through the NBD export of a running server"
    yield several(what, "<= 5 ms p50", alone, 5e-3)
    yield several(f"{what}, 100 at once", "<= 20 ms p99", together, 20e-3, at=0.99)


def drop_of_forks(directory: Path) -> Iterator[Figure]:
    returned: list[float] = []
    freed: list[float] = []
    with store_to_fork(directory) as store:
        for turn in range(7):
            names = store.fork("web@clean", count=FORKS, pattern=f"drop-{turn}-{{n}}")
            for name in names:
                with store.open(name) as fork:
                    fork.write(0, os.urandom(MIB))
            store._opened.finish_work()
            start = time.perf_counter()
            assert store.delete(*names) >= FORKS * MIB
            returned.append(time.perf_counter() - start)
            store._opened.finish_work()
            freed.append(time.perf_counter() - start)
            assert sum(path.stat().st_size for path in (directory / "store/segments").iterdir()) < SIZE_BYTES // 64
    what = "drop of 100 forks with 1 MiB each, policy release"
    yield several(f"{what}: the call returns", "<= 20 ms", returned, 20e-3)
    yield several(f"{what}: the space is back", "<= 2 s", freed, 2)
