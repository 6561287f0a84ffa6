"""Random 4 KiB reads in a batch, hot and cold apart, against a flat file (the physical limit), qcow2 and nbdkit."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from rig.disks import BLOCK, blocks_of, drop_cache, make_flat, scattered, stepped, write_blocks
from rig.flat import FlatFile
from rig.nbdkit import cow_server, nbd_bench
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

HOT = (ENGINE, "one readinto each", "pread loop in C", "memcpy loop in C (mmap)", "os.preadv", "qcow2 (qemu-img bench)")
HOT += ("nbdkit cow (qemu-img bench)",)
COLD = (ENGINE, "pread loop in C")
READS = 16384
COLD_READS = 2048


@pytest.fixture(scope="module")
def disks(setting: Setting) -> Iterator[tuple[onionskin.Store, FlatFile]]:
    """A store with the volume `web`, all of whose blocks lie in one layer, and the same disk as a flat file."""
    with onionskin.Store(setting.directory / "store") as store:
        with store.create("web", size=setting.size_bytes) as web:
            write_blocks(web, scattered(setting.size_bytes // BLOCK, setting.size_bytes // BLOCK))
            web.snapshot("all")
        flat = FlatFile(make_flat(setting.directory / "flat.raw", setting.size_bytes))
        yield store, flat
        flat.close()


@pytest.fixture(scope="module")
def hot(setting: Setting, disks: tuple[onionskin.Store, FlatFile]) -> Race:
    (store, flat), work, size = disks, setting.directory, setting.size_bytes
    step, wanted = stepped(READS, size)
    out, expected = np.empty((READS, BLOCK), np.uint8), blocks_of(wanted).reshape(-1, BLOCK)
    offsets, row = [int(index) * BLOCK for index in wanted], bytearray(BLOCK)
    with ExitStack() as stack:
        view = stack.enter_context(store.open("web", snapshot="all"))
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(lambda: view.read_blocks(wanted, out) is None),
            "pread loop in C": Contestant(lambda: flat.read_blocks(wanted, out)),
            "memcpy loop in C (mmap)": Contestant(lambda: flat.copy_blocks(wanted, out)),
        }
        for name, contestant in contestants.items():
            out.fill(0)
            assert isinstance(contestant, Contestant)
            contestant.run()
            assert np.array_equal(out, expected), name
        contestants |= {
            "one readinto each": Contestant(lambda: [view.readinto(offset, row) for offset in offsets]),
            "os.preadv": Contestant(lambda: [os.preadv(flat.descriptor, [row], offset) for offset in offsets]),
        }
        contestants["qcow2 (qemu-img bench)"] = no_qemu = peers.missing("qemu-img") or ""
        if not no_qemu:
            image = work / "disk.qcow2"
            peers.run("qemu-img", "convert", "-O", "qcow2", work / "flat.raw", image)
            contestants["qcow2 (qemu-img bench)"] = Contestant(
                lambda: peers.qemu_bench(image, count=READS, step=step, depth=16)
            )
        contestants["nbdkit cow (qemu-img bench)"] = no_nbd = peers.missing("nbdkit", "qemu-img") or ""
        if not no_nbd:
            uri = stack.enter_context(cow_server(work / "flat.raw"))
            contestants["nbdkit cow (qemu-img bench)"] = Contestant(lambda: nbd_bench(uri, count=READS, step=step))
        return run_race(contestants, setting.rounds, bytes=READS * BLOCK, block_size=BLOCK, depth=1, cache="hot")


@pytest.fixture(scope="module")
def cold(setting: Setting, disks: tuple[onionskin.Store, FlatFile]) -> Race:
    store, flat = disks
    flat.unmap()
    wanted = scattered(COLD_READS, setting.size_bytes // BLOCK, seed=3)
    out = np.empty((COLD_READS, BLOCK), np.uint8)
    segments = list(store._opened.layout.segments.iterdir())

    def dropped() -> onionskin.Volume:
        drop_cache(*segments)
        return store.open("web", snapshot="all")

    contestants = {
        ENGINE: Contestant(lambda view: view.read_blocks(wanted, out) is None, dropped, lambda view: view.close()),
        "pread loop in C": Contestant(
            lambda _: flat.read_blocks(wanted, out), lambda: drop_cache(setting.directory / "flat.raw")
        ),
    }
    return run_race(contestants, setting.rounds, bytes=COLD_READS * BLOCK, block_size=BLOCK, depth=1, cache="cold")


@pytest.mark.benchmark(group="read, hot", timer=CLOCK)
@pytest.mark.parametrize("member", HOT)
def test_read_hot(member: str, hot: Race, show: Callable[[Race, str], None]) -> None:
    show(hot, member)


@pytest.mark.benchmark(group="read, cold", timer=CLOCK)
@pytest.mark.parametrize("member", COLD)
def test_read_cold(member: str, cold: Race, show: Callable[[Race, str], None]) -> None:
    show(cold, member)
