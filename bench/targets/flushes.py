"""How many flushes of its cache a disk is told by each durable operation: what each costs on a disk without tricks."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from rig.file_system import flushes
from rig.forks import FORKS, store_to_fork

from targets.report import Figure, skipped

TIMES = 10
BLOCKS = 65536


def device_flushes(directory: Path) -> Iterator[Figure]:
    """Count them in the call alone; what the background does behind it is waited for and not counted."""
    if flushes(directory) is None:
        yield skipped("flushes of the device", "", "the file system is not on one device")
        return
    numbers = count()
    with store_to_fork(directory) as store, store.create("disk", size="1G") as disk:
        offsets = count(1 << 20, BLOCKS)
        disk.write(0, b"x" * BLOCKS)
        disk.flush()
        disk.snapshot("first")

        def dirty() -> None:
            disk.write(0, b"x" * BLOCKS)

        def flushed() -> None:
            dirty()
            disk.flush()

        def one(prepare: Callable[[], object], run: Callable[[], object]) -> float:
            seen = []
            for _ in range(TIMES):
                prepare()
                store._opened.finish_work()
                before = flushes(directory)
                run()
                after = flushes(directory)
                assert before is not None and after is not None
                seen.append(after - before)
            store._opened.finish_work()
            return sum(seen) / TIMES

        descriptor = os.open(directory / "grows", os.O_CREAT | os.O_WRONLY)

        def grow() -> None:
            os.write(descriptor, b"x" * BLOCKS)

        def nothing() -> None:
            pass

        names: list[str] = []

        def fork() -> None:
            names[:] = store.fork("web@clean", count=FORKS, pattern=f"round-{next(numbers)}-{{n}}")

        rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("fdatasync of a file that grew by 64 KiB, by itself", grow, lambda: os.fdatasync(descriptor)),
            ("flush of 64 KiB, overwrites", dirty, disk.flush),
            ("flush of 64 KiB, new blocks", lambda: disk.write(next(offsets), b"y" * BLOCKS), disk.flush),
            ("snapshot, 64 KiB dirty", dirty, lambda: disk.snapshot(f"d{next(numbers)}")),
            ("snapshot, flushed before", flushed, lambda: disk.snapshot(f"f{next(numbers)}")),
            ("revert", flushed, lambda: disk.revert("first")),
            ("100 forks in one call", nothing, fork),
            ("drop of 100 forks", fork, lambda: store.delete(*names)),
        ]
        for what, prepare, run in rows:
            found = one(prepare, run)
            yield Figure(f"flushes of the device: {what}", "", f"{found:g}", True, value=found, unit="")
        os.close(descriptor)
