"""Opening a disk of many layers and extents, once and again; and the memory of its index."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rig.disks import BLOCK, GIB, scattered, write_layers
from rig.waits import Stopwatch

import onionskin
from onionskin.kernels._blockmap import BlockMap
from onionskin.measure.timing import Samples, duration
from targets.report import Figure

MIB = 1 << 20


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
                memory = web._path.memory_bytes
                web.close()
            what = f"open of 64 layers and 1,000,000 scattered extents, {title} disk"
            took = samples.median
            yield Figure(what, f"<= {duration(most_open)}", str(samples), took <= most_open, value=took, unit="s")
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
                memories.append((between - before, resident_bytes() - between, view._path.memory_bytes))
    # Memory that an earlier open gave back and a later one takes again would hide what is new: the index says itself.
    resident, index_bytes = memories[0][1], memories[0][2]
    share = resident / max(index_bytes, memories[0][0])
    text = f"{second} (first {first}), {share:.0%} of the memory ({resident / MIB:.1f} MiB of {index_bytes / MIB:.1f})"
    passed = second.median <= 0.01 and share <= 0.1
    what = "a second open of the same snapshot, 1,000,000 extents"
    yield Figure(what, "<= 10 ms, <= 10% of the memory", text, passed, {"memory": memories}, second.median, "s")


def memory_of_a_sequence(directory: Path) -> Iterator[Figure]:
    blocks = (1 << 40) // BLOCK
    index = BlockMap(blocks)
    for start in range(0, blocks, 256):
        index.set(start, 256, (1 << 32) + start)
    found = index.memory_bytes
    index.close()
    yield Figure("index memory, 1 TiB written in sequence", "<= 16 MiB", f"{found / MIB:.1f} MiB", found <= 16 * MIB)
