"""Wiping freed blocks, against dd and shred."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from rig.disks import GIB, write_extents

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, interleave
from targets.report import Figure, versus

MIB = 1 << 20


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
