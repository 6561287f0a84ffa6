"""Reads: of many blocks and of one, deep, from two threads, and against qcow2."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rig.disks import BLOCK, GIB, blocks_of, make_flat, scattered, stepped, write_extents, write_layers
from rig.flat import FlatFile
from rig.waits import Stopwatch, undisturbed

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, duration, interleave
from targets.report import Figure, skipped, versus

READS = 65536


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
        readinto = view._path.readinto
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
        top, (step, wanted) = image, stepped(READS, size)
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
