"""Snapshots: against a full copy, against QEMU's, of a large disk, and what a writer notices of one."""

import os
import statistics
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from rig.disks import GIB, make_flat
from rig.live_qemu import QEMU, live_disk
from rig.pauses import measure_pauses

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, duration, interleave, one_round
from targets.report import Figure, skipped, versus, within


def dirty_snapshot(volume: onionskin.Volume, *, flushed: bool = False) -> Contestant:
    """Snapshot a volume in which 64 KiB were written since the last one; `flushed`: and made durable, as a guest does."""
    names = count()
    prefix = "f" if flushed else "d"

    def write() -> None:
        volume.write(0, b"\x07" * 65536)
        if flushed:
            volume.flush()
        volume.store._opened.finish_work()  # the files for the next head: a snapshot right behind another waits for them

    return Contestant(lambda _: volume.snapshot(f"{prefix}{next(names)}"), prepare=write)


def snapshot_against_copy(directory: Path) -> Iterator[Figure]:
    flat = make_flat(directory / "base.raw", 2 * GIB)
    copy = directory / "copy.raw"
    with onionskin.Store(directory / "store") as store, store.create("web", base=flat) as web:

        def several(one: Contestant) -> float:
            return statistics.median(one_round(one) for _ in range(15))

        def settled() -> None:
            copy.unlink(missing_ok=True)
            os.sync()

        copying = Contestant(lambda _: peers.full_copy(flat, copy), settled)
        dirty, flushed = dirty_snapshot(web), dirty_snapshot(web, flushed=True)
        contestants = {
            "snapshot": Contestant(lambda _: several(dirty), os.sync),
            "snapshot, flushed": Contestant(lambda _: several(flushed), os.sync),
            "cp + fsync": copying,
        }
        samples = interleave(contestants, 5)
    what = "durable snapshot of 2 GiB, against a full copy"
    yield versus(f"{what}; 64 KiB dirty", 1000, samples, "cp + fsync", "snapshot")
    yield versus(f"{what}; flushed before", 1000, samples, "cp + fsync", "snapshot, flushed")


def snapshot_against_qemu(directory: Path) -> Iterator[Figure]:
    what = "durable snapshot, against QEMU's live blockdev-snapshot-sync"
    if reason := peers.missing(QEMU, "qemu-img"):
        yield skipped(what, ">= 4 x", reason)
        return
    image = peers.create_qcow2(directory / "disk.qcow2", size=2 * GIB)
    with (
        onionskin.Store(directory / "store") as store,
        store.create("web", size=2 * GIB) as web,
        live_disk(image) as live,
    ):
        qemu = Contestant(lambda _: live.snapshot(), prepare=lambda: live.write(0, 65536))
        samples = interleave({"snapshot": dirty_snapshot(web), "qemu": qemu}, 40)
    yield versus(what, 4, samples, "qemu", "snapshot")


def snapshot_of_a_large_disk(directory: Path) -> Iterator[Figure]:
    with (
        onionskin.Store(directory / "store") as store,
        store.create("small", size="1G") as small,
        store.create("large", size="1T") as large,
    ):
        samples = interleave({"1 GiB": dirty_snapshot(small), "1 TiB": dirty_snapshot(large)}, 60)
    yield within("snapshot of 1 TiB, against 1 GiB", 1.2, samples, "1 TiB", "1 GiB")


def writer_pause(directory: Path) -> Iterator[Figure]:
    what, target = "longest pause of a writer (2 threads, 4 KiB) beside a snapshot", "<= 1 ms at p99, < a flush"
    if reason := peers.missing("gcc"):
        yield skipped(what, target, reason)
        return
    windows = measure_pauses(directory, 300)
    flush = statistics.median(window.took for window in windows["flush"])
    loaded, idle = ([window.pause for window in windows[kind]] for kind in ("snapshot", "idle"))
    found = float(np.percentile(loaded, 99))
    text = (
        f"{duration(found)} at p99, median {duration(statistics.median(loaded))} (idle: p99"
        f" {duration(float(np.percentile(idle, 99)))}); a flush takes {duration(flush)}; turns of other programs apart"
    )
    detail = {"snapshot": loaded, "idle": idle}
    yield Figure(what, target, text, found <= 1e-3 and found < flush, detail, found, "s")
