"""The headline comparison: what onionskin does for a disk, beside what a user would do without it, in one run.

Each comparison checks bytes once before it is timed. Durable operations are timed with their sync. All reads are hot:
everything fits the page cache, and was read before.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from onionskin.errors import VerifyError
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, Samples, interleave, one_round
from onionskin.store import Store
from onionskin.volume import Volume

BLOCK = 4096
EXTENT = 65536
DEPTH = 32
READS = 16384
WRITES = 8192
SIZE_BYTES_MIN = 64 << 20
ENGINE = "onionskin"

Progress = Callable[[str], None]


@dataclass
class Comparison:
    """One thing that was done in several ways. `samples` are seconds of one operation; the engine's are ENGINE."""

    group: str
    title: str
    samples: dict[str, Samples]
    extra_info: dict[str, object] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def compare(directory: Path, size_bytes: int, rounds: int, progress: Progress) -> list[Comparison]:
    """Run every comparison in a directory of its own below `directory`, which is gone afterwards."""
    if size_bytes < SIZE_BYTES_MIN:
        raise ValueError(f"the size is {size_bytes} bytes; at least {SIZE_BYTES_MIN} are needed")
    work = Path(tempfile.mkdtemp(prefix="onionskin-bench-", dir=directory))
    try:
        base = _make_image(work / "base.raw", size_bytes)
        found = []
        for step in (_snapshot, _read, _write, _revert, _merge):
            progress(step.__name__.lstrip("_"))
            found.append(step(work, base, rounds))
        return found
    finally:
        shutil.rmtree(work)


def _make_image(path: Path, size_bytes: int) -> Path:
    """Write an image without holes, whose blocks differ, and sync it."""
    with path.open("wb") as file:
        for start in range(0, size_bytes // BLOCK, WRITES):
            numbers = np.arange(start, min(start + WRITES, size_bytes // BLOCK), dtype=np.uint64)
            file.write(np.repeat(numbers + np.uint64(1), BLOCK // 8).data)
        os.fsync(file.fileno())
    return path


def _scattered(number: int, out_of: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.random.default_rng(1).choice(out_of, min(number, out_of), replace=False).astype(np.uint64)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise VerifyError(f"the bytes differ after {what}; nothing was timed; please report this")


def _new_volume(store: Store, base: Path, names: Iterator[int]) -> Volume:
    return store.create(f"disk-{next(names)}", base=base)


def _drop(volume: Volume) -> None:
    store, name = volume.store, volume.name
    volume.close()
    store.delete(name, recursive=True)
    store.finish_work()


def _snapshot(work: Path, base: Path, rounds: int) -> Comparison:
    names, copy, overlay = count(), work / "copy.raw", work / "overlay.qcow2"
    with Store(work / "snapshot") as store, store.create("disk", base=base) as disk:
        contestants = {
            ENGINE: Contestant(lambda: _median_snapshot(disk, names)),
            "full copy (cp, fsync)": Contestant(lambda: peers.full_copy(base, copy), finish=copy.unlink),
        }
        skipped = {}
        if peers.can_reflink(work):
            contestants["reflink copy (cp, fsync)"] = Contestant(
                lambda: peers.reflink_copy(base, copy), finish=copy.unlink
            )
        else:
            skipped["reflink copy (cp, fsync)"] = "the file system has no reflink"
        if reason := peers.missing("qemu-img"):
            skipped["qcow2 overlay (qemu-img create, fsync)"] = reason
        else:
            contestants["qcow2 overlay (qemu-img create, fsync)"] = Contestant(
                lambda: peers.sync_file(peers.create_qcow2(overlay, backing=base)), finish=overlay.unlink
            )
        samples = interleave(contestants, rounds)
    info = {"bytes": base.stat().st_size, "dirty_bytes": EXTENT, "cache": "hot"}
    return Comparison("snapshot", "durable snapshot, 64 KiB dirty", samples, info, skipped)


def _median_snapshot(disk: Volume, names: Iterator[int]) -> float:
    """Take a few, since the first pays for what the disk still has to write of a full copy."""
    one = Contestant(lambda _: disk.snapshot(f"s{next(names)}"), lambda: disk.write(0, b"x" * EXTENT))
    return statistics.median(one_round(one) for _ in range(9))


def _read(work: Path, base: Path, rounds: int) -> Comparison:
    size = base.stat().st_size
    step = size // 1000 * 618 // BLOCK * BLOCK + BLOCK
    wanted = (np.arange(READS, dtype=np.uint64) * np.uint64(step) % np.uint64(size)) // np.uint64(BLOCK)
    out = np.empty((READS, BLOCK), np.uint8)
    clusters = [int(c) * EXTENT for c in _scattered(size // EXTENT, size // EXTENT)]
    has_qemu = peers.missing("qemu-img", "qemu-io")
    with Store(work / "read") as store, store.create("disk", base=base) as disk:
        top = base
        for layer in range(DEPTH):
            for offset in clusters[layer::DEPTH]:
                disk.write(offset, b"\x5a" * EXTENT)
            disk.snapshot(f"s{layer}")
            if has_qemu is None:
                top = peers.create_qcow2(work / f"chain-{layer}.qcow2", backing=top)
                peers.qemu_io_write(top, clusters[layer::DEPTH], EXTENT, 0x5A)
        flat = os.open(base, os.O_RDONLY)
        offsets = [int(index) * BLOCK for index in wanted]
        row = [bytearray(BLOCK)]
        with store.open("disk", snapshot=f"s{DEPTH - 1}") as view:
            _check(bool((view.read_blocks(wanted) == 0x5A).all()), "reading through the layers")
            contestants = {
                ENGINE: Contestant(lambda: view.read_blocks(wanted, out) is None),
                "flat file (os.preadv)": Contestant(lambda: [os.preadv(flat, row, offset) for offset in offsets]),
            }
            if has_qemu is None:
                contestants[f"qcow2, depth {DEPTH} (qemu-img bench)"] = Contestant(
                    lambda: peers.qemu_bench(top, count=READS, step=step, depth=16)
                )
            samples = interleave(contestants, rounds)
        os.close(flat)
    for path in work.glob("chain-*.qcow2"):
        path.unlink()
    info = {"bytes": READS * BLOCK, "block_size": BLOCK, "depth": DEPTH, "cache": "hot"}
    skipped = {"qcow2 (qemu-img bench)": has_qemu} if has_qemu else {}
    return Comparison("read", f"{READS} random 4 KiB reads at depth {DEPTH}", samples, info, skipped)


def _write(work: Path, base: Path, rounds: int) -> Comparison:
    size, names, overlay = base.stat().st_size, count(), work / "overlay.qcow2"
    step = size // 1000 * 618 // BLOCK * BLOCK + BLOCK
    wanted = (np.arange(WRITES, dtype=np.uint64) * np.uint64(step) % np.uint64(size)) // np.uint64(BLOCK)
    data = np.repeat(wanted + np.uint64(7), BLOCK // 8).view(np.uint8)
    flat = work / "flat.raw"
    peers.full_copy(base, flat)
    descriptor = os.open(flat, os.O_RDWR)
    rows = [(int(index) * BLOCK, data[at * BLOCK : at * BLOCK + BLOCK].tobytes()) for at, index in enumerate(wanted)]

    def engine(disk: Volume) -> None:
        disk.write_blocks(wanted, data)
        disk.flush()

    def plain() -> None:
        for offset, row in rows:
            os.pwrite(descriptor, row, offset)
        os.fdatasync(descriptor)

    with Store(work / "write") as store:
        disk = _new_volume(store, base, names)
        engine(disk)
        _check(bool((disk.read_blocks(wanted).reshape(-1) == data).all()), "writing blocks")
        _drop(disk)
        contestants = {
            ENGINE: Contestant(engine, lambda: _new_volume(store, base, names), _drop),
            "flat file (os.pwrite, fdatasync)": Contestant(plain),
        }
        reason = peers.missing("qemu-img")
        if reason is None:
            contestants["qcow2 (qemu-img bench -w)"] = Contestant(
                lambda _: peers.qemu_bench(overlay, count=WRITES, step=step, write=True, depth=16),
                lambda: peers.create_qcow2(overlay, backing=base),
                lambda _: overlay.unlink(),
            )
        samples = interleave(contestants, rounds)
    os.close(descriptor)
    flat.unlink()
    info = {"bytes": WRITES * BLOCK, "block_size": BLOCK, "depth": 1, "cache": "hot"}
    skipped = {"qcow2 (qemu-img bench -w)": reason} if reason else {}
    return Comparison("write", f"{WRITES} random 4 KiB first writes over a base, flushed", samples, info, skipped)


def _revert(work: Path, base: Path, rounds: int) -> Comparison:
    changed, copy = base.stat().st_size // 2, work / "copy.raw"
    with Store(work / "revert") as store, store.create("disk", base=base) as disk:
        disk.snapshot("clean")

        def change() -> None:
            store.finish_work()
            for offset in range(0, changed, 1 << 20):
                disk.write(offset, b"\x5a" * (1 << 20))
            disk.flush()

        change()
        disk.revert("clean")
        _check(disk.read(0, BLOCK) == (1).to_bytes(8, "little") * (BLOCK // 8), "a revert")
        contestants = {
            ENGINE: Contestant(lambda _: disk.revert("clean"), change),
            "copy of the image put back (cp, fsync)": Contestant(lambda: peers.full_copy(base, copy)),
        }
        samples = interleave(contestants, rounds)
    copy.unlink()
    info: dict[str, object] = {"bytes": changed, "cache": "hot"}
    return Comparison("revert", f"revert of {changed >> 20} MiB of changes", samples, info)


def _merge(work: Path, base: Path, rounds: int) -> Comparison:
    size, names = base.stat().st_size, count()
    offsets = [int(c) * EXTENT for c in _scattered(size // EXTENT // 4, size // EXTENT)]
    top = work / "top.qcow2"

    def fresh(suffix: str) -> Path:
        copy = work / f"base-{suffix}.raw"
        peers.full_copy(base, copy)
        return copy

    def changed_volume() -> tuple[Store, Volume]:
        store = Store(work / f"merge-{next(names)}")
        disk = store.create("disk", base=fresh("merge"))
        for offset in offsets:
            disk.write(offset, b"\x5a" * EXTENT)
        disk.flush()
        return store, disk

    def done(made: tuple[Store, Volume]) -> None:
        made[1].close()
        made[0].close()
        with (work / "base-merge.raw").open("rb") as file:
            file.seek(offsets[-1])
            _check(file.read(EXTENT) == b"\x5a" * EXTENT, "a merge into the base")
        shutil.rmtree(made[0].path)

    def changed_qcow2() -> Path:
        peers.create_qcow2(top, backing=fresh("commit"))
        peers.qemu_io_write(top, offsets, EXTENT, 0x5A)
        return top

    contestants = {ENGINE: Contestant(lambda made: made[1].merge_into_base(), changed_volume, done)}
    reason = peers.missing("qemu-img", "qemu-io")
    if reason is None:
        contestants["qemu-img commit"] = Contestant(
            lambda path: peers.run("qemu-img", "commit", "-q", "-d", path), changed_qcow2
        )
    samples = interleave(contestants, rounds, warm_up=False)
    info: dict[str, object] = {"bytes": len(offsets) * EXTENT, "block_size": EXTENT, "cache": "hot"}
    title = f"merge of {len(offsets) * EXTENT >> 20} MiB in scattered 64 KiB extents into the base"
    return Comparison("merge", title, samples, info, {"qemu-img commit": reason} if reason else {})
