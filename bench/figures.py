#!/usr/bin/env python3
"""Measures every figure that onionskin has to reach, and says which it reaches.

    python bench/figures.py [--directory DIR] [--only WORD ...] [--json FILE]

Each row is measured beside its peers in one run, contestants taking turns; a ratio is the median of the ratios of each
round. Needs a directory on ext4 with 20 GiB free; a peer that is missing makes its row `skipped`.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rig.disks import (
    BLOCK,
    GIB,
    blocks_of,
    make_flat,
    scattered,
    write_extents,
    write_layers,
)
from rig.flat import FlatFile
from rig.live_qemu import QEMU, live_disk
from rig.mounts import loop_mount, mount_missing
from rig.pauses import measure_pauses
from rig.waits import Stopwatch, undisturbed

import onionskin
from onionskin.kernels._blockmap import BlockMap
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, Samples, duration, interleave, one_round, ratio

MIB = 1 << 20
READS = 65536


@dataclass
class Figure:
    """One row: what was measured, what must be reached, what was found. passed None: skipped."""

    what: str
    target: str
    measured: str
    passed: bool | None
    detail: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "skipped"}[self.passed]
        return f"| {self.what} | {self.target} | {self.measured} | {verdict} |"


def skipped(what: str, target: str, reason: str) -> Figure:
    return Figure(what, target, reason, None)


def versus(what: str, least: float, samples: dict[str, Samples], slow: str, fast: str, **detail: Any) -> Figure:
    """A row in which `fast` has to be at least `least` times faster than `slow`."""
    found = ratio(samples, slow, fast)
    text = f"{found:.3g} x ({fast} {samples[fast]}, {slow} {samples[slow]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f">= {least:g} x", text, found >= least, {"ratio": found, "seconds": seconds, **detail})


def within(what: str, most: float, samples: dict[str, Samples], one: str, other: str) -> Figure:
    """A row in which `one` may take at most `most` times as long as `other`."""
    found = ratio(samples, one, other)
    text = f"{found:.3g} x ({one} {samples[one]}, {other} {samples[other]})"
    seconds = {name: sample.seconds for name, sample in samples.items()}
    return Figure(what, f"<= {most:g} x", text, found <= most, {"ratio": found, "seconds": seconds})


@contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A directory for one group of rows, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="figures-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


# ---- snapshot ----


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


# ---- read ----


@contextmanager
def layered(directory: Path, name: str, size: int, indices: Any, layers: int) -> Iterator[onionskin.Volume]:
    """A view of the top of a volume whose data lies in so many layers."""
    with onionskin.Store(directory / name) as store:
        with store.create("web", size=size) as web:
            write_layers(web, indices, layers)
        with store.open("web", snapshot=f"layer-{layers - 1}") as view:
            yield view


def batch_reads(directory: Path) -> Iterator[Figure]:
    size = GIB
    order = scattered(size // BLOCK, size // BLOCK)
    flat = FlatFile(make_flat(directory / "flat.raw", size))
    wanted = scattered(READS, size // BLOCK, seed=2)
    out = np.empty((READS, BLOCK), np.uint8)
    expected = blocks_of(wanted).reshape(out.shape)
    with layered(directory, "one", size, order, 1) as one, layered(directory, "deep", size, order, 256) as deep:
        contestants = {
            "pread loop": Contestant(undisturbed(lambda: flat.read_blocks(wanted, out))),
            "memcpy loop": Contestant(undisturbed(lambda: flat.copy_blocks(wanted, out))),
            "depth 1": Contestant(undisturbed(lambda: one.read_blocks(wanted, out))),
            "depth 256": Contestant(undisturbed(lambda: deep.read_blocks(wanted, out))),
        }
        for contestant in contestants.values():
            contestant.run()
            assert np.array_equal(out, expected)
        samples = interleave(contestants, 45)  # fewer do not tell 0.95 from 1 on a loaded machine
        yield versus("random 4 KiB batch reads, hot, against a pread loop", 1.5, samples, "pread loop", "depth 1")
        yield versus("the same at depth 256, against depth 1", 0.95, samples, "depth 1", "depth 256")
        yield from single_reads(one, flat, wanted)
        yield from threaded_reads(one, wanted)
    flat.close()


def single_reads(view: onionskin.Volume, flat: FlatFile, wanted: Any) -> Iterator[Figure]:
    offsets = [int(index) * BLOCK for index in wanted]
    buffer = bytearray(BLOCK)
    buffers, descriptor = [buffer], flat.descriptor

    def engine() -> None:
        for offset in offsets:
            view.readinto(offset, buffer)

    def system() -> None:
        for offset in offsets:
            os.preadv(descriptor, buffers, offset)

    def data_path() -> None:
        readinto = view.path.readinto
        for offset in offsets:
            readinto(offset, buffer)

    samples = interleave(
        {
            "readinto": Contestant(undisturbed(engine)),
            "preadv": Contestant(undisturbed(system)),
            "path.readinto": Contestant(undisturbed(data_path)),
        },
        9,
    )
    each = {name: duration(sample.median / len(offsets)) for name, sample in samples.items()}
    yield versus("one 4 KiB readinto, hot, against os.preadv", 1, samples, "preadv", "readinto", each=each)


def threaded_reads(view: onionskin.Volume, wanted: Any) -> Iterator[Figure]:
    parts = np.array_split(np.tile(wanted, 4), 256)
    outs = [np.empty((len(parts[0]), BLOCK), np.uint8) for _ in range(2)]

    def reader(number: int) -> float:
        with Stopwatch() as watch:
            for part in parts:
                view.read_blocks(part, outs[number])
        return watch.undisturbed

    with ThreadPoolExecutor(2) as pool:
        contestants = {
            "1 thread": Contestant(lambda: reader(0)),
            "2 threads": Contestant(lambda: max(pool.map(reader, range(2))) / 2),  # twice the work
        }
        samples = interleave(contestants, 15)
    yield versus("2 threads reading batches from Python, against 1", 1.7, samples, "1 thread", "2 threads")


def reads_against_qcow2(directory: Path) -> Iterator[Figure]:
    what, layers, size, cluster = "random 4 KiB reads at depth 64, against qemu-img bench", 64, GIB, 65536
    if reason := peers.missing("qemu-img", "qemu-io"):
        yield skipped(what, ">= 20 x", reason)
        return
    clusters = [int(c) * cluster for c in scattered(size // cluster, size // cluster)]
    image: Path | None = None
    with onionskin.Store(directory / "store") as store, store.create("web", size=size) as web:
        for number in range(layers):
            part = clusters[number::layers]
            write_extents(web, part, cluster, 90)
            web.snapshot(f"s{number}")
            image = peers.create_qcow2(directory / f"{number}.qcow2", size=None if image else size, backing=image)
            peers.qemu_io_write(image, part, cluster, 90)
        assert image
        top, step = image, size // 1000 * 618 // BLOCK * BLOCK + BLOCK
        wanted = (np.arange(READS, dtype=np.uint64) * np.uint64(step) % np.uint64(size)) // np.uint64(BLOCK)
        out = np.empty((READS, BLOCK), np.uint8)
        with store.open("web", snapshot=f"s{layers - 1}") as view:
            assert (view.read_blocks(wanted) == 90).all()
            contestants = {
                "read_blocks": Contestant(lambda: view.read_blocks(wanted, out) is None),
                "qemu-img bench, depth 1": Contestant(lambda: peers.qemu_bench(top, count=READS, step=step)),
                "qemu-img bench, depth 32": Contestant(lambda: peers.qemu_bench(top, count=READS, step=step, depth=32)),
            }
            samples = interleave(contestants, 5)
    best = min(list(samples)[1:], key=lambda name: samples[name].median)
    yield versus(what, 20, samples, best, "read_blocks")


# ---- write ----


def first_writes(directory: Path) -> Iterator[Figure]:
    size, writes = 2 * GIB, 50_000
    base = make_flat(directory / "base.raw", size)
    flat = FlatFile(make_flat(directory / "flat.raw", size))
    wanted = scattered(writes, size // BLOCK)
    data = blocks_of(wanted, generation=1)
    names = count()
    with onionskin.Store(directory / "store") as store:

        def fresh() -> onionskin.Volume:
            return store.create(f"v{next(names)}", base=base)

        def gone(volume: onionskin.Volume) -> None:
            assert np.array_equal(volume.read_blocks(wanted).reshape(-1), data)
            name = volume.name
            volume.close()
            store.delete(name)
            store._opened.finish_work()

        def engine(volume: onionskin.Volume) -> None:
            volume.write_blocks(wanted, data)
            volume.flush()

        def one_by_one(volume: onionskin.Volume) -> None:
            view = memoryview(data)
            for number, block in enumerate(wanted.tolist()):
                volume.write(block * BLOCK, view[number * BLOCK : (number + 1) * BLOCK])
            volume.flush()

        def system() -> None:
            flat.write_blocks(wanted, data)
            flat.flush()

        samples = interleave(
            {
                "write_blocks + flush": Contestant(engine, prepare=fresh, finish=gone),
                "write + flush": Contestant(one_by_one, prepare=fresh, finish=gone),
                "pwrite loop + fdatasync": Contestant(system),
            },
            5,
        )
    flat.close()
    what = "random 4 KiB first writes over a full base + flush, against a pwrite loop"
    yield versus(what, 0.8, samples, "pwrite loop + fdatasync", "write_blocks + flush")


def first_writes_against_qcow2(directory: Path) -> Iterator[Figure]:
    size, writes = 2 * GIB, 20_000
    whats = {"": ("the same, against qcow2 (default clusters)", 6), "extended_l2=on": ("... extended_l2=on", 2)}
    if reason := peers.missing("qemu-img"):
        for what, least in whats.values():
            yield skipped(what, f">= {least} x", reason)
        return
    base = make_flat(directory / "base.raw", size)
    step = size // 1000 * 618 // BLOCK * BLOCK + BLOCK
    wanted = (np.arange(writes, dtype=np.uint64) * np.uint64(step) % np.uint64(size)) // np.uint64(BLOCK)
    data = blocks_of(wanted)
    names = count()
    with onionskin.Store(directory / "store") as store:

        def engine(volume: onionskin.Volume) -> None:
            volume.write_blocks(wanted, data)
            volume.flush()

        def gone(volume: onionskin.Volume) -> None:
            name = volume.name
            volume.close()
            store.delete(name)
            store._opened.finish_work()

        def qcow2(options: str, depth: int) -> Contestant:
            image = directory / f"top-{options}-{depth}.qcow2"
            return Contestant(
                lambda _: peers.qemu_bench(image, count=writes, step=step, write=True, depth=depth),
                prepare=lambda: peers.create_qcow2(image, backing=base, options=options),
                finish=lambda _: image.unlink(),
            )

        contestants = {"engine": Contestant(engine, lambda: store.create(f"v{next(names)}", base=base), gone)}
        for options in whats:
            for depth in (1, 16):
                contestants[f"qcow2 {options} depth {depth}"] = qcow2(options, depth)
        samples = interleave(contestants, 3, warm_up=False)
    for options, (what, least) in whats.items():
        best = min((f"qcow2 {options} depth {d}" for d in (1, 16)), key=lambda name: samples[name].median)
        yield versus(what + ", qemu-img bench -w", least, samples, best, "engine")


FLUSH_PROGRAM = """
import os, sys, onionskin
store = onionskin.Store(sys.argv[1])
disk = store.create("web", size="1G")
disk.write(0, b"x" * 65536); disk.flush()
disk.write(0 if sys.argv[2] == "overwrites" else 1 << 20, b"y" * 65536)
os.close(os.open("/dev/null", os.O_RDONLY))
disk.flush()
os.close(os.open("/dev/zero", os.O_RDONLY))
"""


def flush_syncs(directory: Path) -> Iterator[Figure]:
    for kind, allowed in (("overwrites", 1), ("new blocks", 2)):
        what, target = f"flush in steady state, {kind}", f"{allowed} fdatasync"
        if reason := peers.missing("strace"):
            yield skipped(what, target, reason)
            continue
        trace = directory / "trace"
        program = [sys.executable, "-c", FLUSH_PROGRAM, directory / f"store-{allowed}", kind]
        peers.run("strace", "-f", "-e", "trace=openat,fsync,fdatasync,sync_file_range", "-o", trace, *program)
        body = re.search(r'"/dev/null".*?"/dev/zero"', trace.read_text(), re.S)
        assert body
        found = len(re.findall(r"\b(?:fdatasync|fsync|sync_file_range)\(", body[0]))
        yield Figure(what, target, f"{found}", found == allowed)


# ---- a writer's pause ----


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
    yield Figure(what, target, text, found <= 1e-3 and found < flush, {"snapshot": loaded, "idle": idle})


# ---- open and memory ----


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opens(directory: Path) -> Iterator[Figure]:
    extents, layers = 1_000_000, 64
    for size, title, most_open, most_bytes in ((64 * GIB, "64 GiB", 0.1, 16), (1024 * GIB, "1 TiB", 0.25, 48)):
        blocks = scattered(extents, size // BLOCK)
        with onionskin.Store(directory / title) as store:
            with store.create("web", size=size) as web:
                write_layers(web, blocks, layers)
            samples = Samples()
            for _ in range(7):
                with Stopwatch() as watch:
                    web = store.open("web")
                samples.seconds.append(watch.undisturbed)
                memory = web.path.memory_bytes
                web.close()
            what = f"open of 64 layers and 1,000,000 scattered extents, {title} disk"
            yield Figure(what, f"<= {duration(most_open)}", str(samples), samples.median <= most_open)
            each = memory / extents
            what = f"index memory, 1,000,000 blocks at random over {title}"
            yield Figure(what, f"<= {most_bytes} bytes a block", f"{each:.1f} bytes a block", each <= most_bytes)
            if size == 64 * GIB:
                yield from second_open(store, f"layer-{layers - 1}")
        shutil.rmtree(directory / title)


def second_open(store: onionskin.Store, snapshot: str) -> Iterator[Figure]:
    first, second, memories = Samples(), Samples(), []
    for _ in range(5):
        before = resident_bytes()
        with Stopwatch() as one:
            view = store.open("web", snapshot=snapshot)
        with view:
            first.seconds.append(one.undisturbed)
            between = resident_bytes()
            with Stopwatch() as other:
                view = store.open("web", snapshot=snapshot)
            with view:
                second.seconds.append(other.undisturbed)
                memories.append((between - before, resident_bytes() - between, view.path.memory_bytes))
    # Memory that an earlier open gave back and a later one takes again would hide what is new: the index says itself.
    resident, index_bytes = memories[0][1], memories[0][2]
    share = resident / max(index_bytes, memories[0][0])
    text = f"{second} (first {first}), {share:.0%} of the memory ({resident / MIB:.1f} MiB of {index_bytes / MIB:.1f})"
    passed = second.median <= 0.01 and share <= 0.1
    what = "a second open of the same snapshot, 1,000,000 extents"
    yield Figure(what, "<= 10 ms, <= 10% of the memory", text, passed, {"memory": memories})


def memory_of_a_sequence(directory: Path) -> Iterator[Figure]:
    blocks = (1 << 40) // BLOCK
    index = BlockMap(blocks)
    for start in range(0, blocks, 256):
        index.set(start, 256, (1 << 32) + start)
    found = index.memory_bytes
    index.close()
    yield Figure("index memory, 1 TiB written in sequence", "<= 16 MiB", f"{found / MIB:.1f} MiB", found <= 16 * MIB)


# ---- merge, wipe, revert ----


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

    def prepare_commit() -> tuple[Path, Path]:
        base = make_flat(directory / f"base-{next(names)}.raw", size)
        top = peers.create_qcow2(base.with_suffix(".qcow2"), backing=base)
        peers.qemu_io_write(top, offsets, extent, 90)
        return base, top

    def finish_commit(made: tuple[Path, Path]) -> None:
        check_extents(made[0], offsets, extent)
        for path in made:
            path.unlink()

    contestants = {
        "merge_into_base": Contestant(lambda made: made[1].merge_into_base(), prepare_engine, finish_engine),
        "qemu-img commit": Contestant(
            lambda made: peers.run("qemu-img", "commit", "-q", "-d", made[1]), prepare_commit, finish_commit
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


def wipes(directory: Path) -> Iterator[Figure]:
    plain = directory / "plain"
    names = count()
    with onionskin.Store(directory / "store") as store, store.create("web", size="2G", wipe="zero") as web:

        def prepare() -> None:
            name = f"s{next(names)}"
            web.snapshot(name)
            write_extents(web, range(0, GIB, MIB), MIB, 90)

        def engine(_: None) -> None:
            web.revert(f"s{next(names) - 1}")

        def remade() -> None:
            plain.write_bytes(b"")
            with plain.open("wb") as file:
                for _ in range(64):
                    file.write(b"\x5a" * (16 * MIB))
                os.fsync(file.fileno())

        dd = ["dd", "if=/dev/zero", f"of={plain}", "bs=1M", "count=1024", "conv=notrunc,fdatasync", "status=none"]
        contestants = {
            "revert with wipe": Contestant(engine, prepare),
            "dd": Contestant(lambda _: peers.run(*dd), remade),
            "shred": Contestant(lambda _: peers.run("shred", "-n0", "-z", plain), remade),
        }
        samples = interleave(contestants, 3)
    yield versus("wipe of 1 GiB, against dd of zeros with fdatasync", 0.9, samples, "dd", "revert with wipe")
    yield versus("wipe of 1 GiB, against shred -n0 -z", 3, samples, "shred", "revert with wipe")


def reverts(directory: Path) -> Iterator[Figure]:
    with onionskin.Store(directory / "store") as store, store.create("web", size="2G") as web:
        web.snapshot("clean")
        names = count()

        def changed() -> None:
            store._opened.finish_work()
            write_extents(web, range(0, GIB, MIB), MIB, 90)

        contestants = {
            "snapshot": Contestant(lambda _: web.snapshot(f"s{next(names)}"), lambda: web.write(0, b"x" * 65536)),
            "revert": Contestant(lambda _: web.revert("clean"), changed),
        }
        samples = interleave(contestants, 7)
    yield within("revert of 1 GiB of changes (release), against a snapshot", 5, samples, "revert", "snapshot")


GROUPS: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "snapshot-copy": snapshot_against_copy,
    "snapshot-qemu": snapshot_against_qemu,
    "snapshot-size": snapshot_of_a_large_disk,
    "read": batch_reads,
    "read-qcow2": reads_against_qcow2,
    "write": first_writes,
    "write-qcow2": first_writes_against_qcow2,
    "flush": flush_syncs,
    "pause": writer_pause,
    "open": opens,
    "memory": memory_of_a_sequence,
    "merge": merges,
    "merge-xfs": merge_on_xfs,
    "wipe": wipes,
    "revert": reverts,
}


def measured(group: str, directory: Path) -> Iterator[Figure]:
    """The rows of a group; one that breaks is a failed row, and the others go on."""
    with workspace(directory) as path:
        try:
            yield from GROUPS[group](path)
        except Exception as error:
            traceback.print_exc()
            yield Figure(group, "", f"broke: {error}", False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = []
    print("| what | must reach | measured | |\n|---|---|---|---|", flush=True)
    for group in options.only:
        for figure in measured(group, options.directory):
            print(figure, flush=True)
            figures.append(figure)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
