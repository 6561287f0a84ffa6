"""Reverting many changes, against a snapshot."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from rig.disks import GIB, write_extents

import onionskin
from onionskin.measure.timing import Contestant, interleave
from targets.report import Figure, within

MIB = 1 << 20


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
