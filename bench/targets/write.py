"""First writes over a full base, against a flat file and qcow2; and how many syncs a flush is."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rig.disks import BLOCK, GIB, blocks_of, make_flat, scattered, stepped
from rig.first_writes import into_new_volumes, into_qcow2
from rig.flat import FlatFile

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, interleave
from targets.report import Figure, skipped, versus


def first_writes(directory: Path) -> Iterator[Figure]:
    size, writes = 2 * GIB, 50_000
    base = make_flat(directory / "base.raw", size)
    flat = FlatFile(make_flat(directory / "flat.raw", size))
    wanted = scattered(writes, size // BLOCK)
    data = blocks_of(wanted, generation=1)
    with onionskin.Store(directory / "store") as store:

        def one_by_one(volume: onionskin.Volume) -> None:
            view = memoryview(data)
            for number, block in enumerate(wanted.tolist()):
                volume.write(block * BLOCK, view[number * BLOCK : (number + 1) * BLOCK])

        def system() -> None:
            flat.write_blocks(wanted, data)
            flat.flush()

        samples = interleave(
            {
                "write_blocks + flush": into_new_volumes(store, base, wanted, data, verify=True),
                "write + flush": into_new_volumes(store, base, wanted, data, write=one_by_one, verify=True),
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
    step, wanted = stepped(writes, size)
    with onionskin.Store(directory / "store") as store:
        contestants = {"engine": into_new_volumes(store, base, wanted, blocks_of(wanted))}
        for options in whats:
            for depth in (1, 16):
                image = directory / f"top-{options}-{depth}.qcow2"
                contestants[f"qcow2 {options} depth {depth}"] = into_qcow2(
                    image, base, options=options, writes=writes, step=step, depth=depth
                )
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
