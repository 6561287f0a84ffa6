"""Reverting, and wiping what is freed by it."""

import os
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from rig.disks import make_flat, write_extents
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

MIB = 1 << 20
REVERT = (ENGINE, "copy put back (cp + fsync)", "fresh qcow2 overlay (qemu-img create + fsync)")
WIPE = (ENGINE, "dd of zeros + fdatasync", "shred -n0 -z")


@pytest.fixture(scope="module")
def revert(setting: Setting) -> Iterator[Race]:
    work, size = setting.directory, setting.size_bytes
    base, copy, overlay = make_flat(work / "base.raw", size), work / "copy.raw", work / "overlay.qcow2"
    with onionskin.Store(work / "store") as store, store.create("web", base=base) as web:
        before = web.read(0, MIB)
        web.snapshot("clean")

        def changed() -> None:
            store._opened.finish_work()
            write_extents(web, range(0, size, MIB), MIB, 90)

        changed()
        web.revert("clean")
        assert web.read(0, MIB) == before
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(lambda _: web.revert("clean"), changed),
            REVERT[1]: Contestant(lambda: peers.full_copy(base, copy)),
            REVERT[2]: peers.missing("qemu-img")
            or Contestant(lambda: peers.sync_file(peers.create_qcow2(overlay, backing=base))),
        }
        yield run_race(contestants, setting.rounds, bytes=size, block_size=4096, depth=1, cache="hot")


@pytest.fixture(scope="module")
def wipe(setting: Setting) -> Iterator[Race]:
    plain, size, names = setting.directory / "plain", setting.size_bytes, count()
    with onionskin.Store(setting.directory / "wiped") as store, store.create("web", size=size, wipe="zero") as web:

        def changed() -> str:
            name = f"s{next(names)}"
            web.snapshot(name)
            write_extents(web, range(0, size, MIB), MIB, 90)
            return name

        def remade() -> None:
            with plain.open("wb") as file:
                for _ in range(size // MIB):
                    file.write(b"\x5a" * MIB)
                os.fsync(file.fileno())

        name = changed()
        web.revert(name)
        assert web.read(0, MIB) == bytes(MIB)
        dd = ("dd", "if=/dev/zero", f"of={plain}", "bs=1M", f"count={size // MIB}", "conv=notrunc,fdatasync")
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(lambda name: web.revert(name), changed),
            WIPE[1]: peers.missing("dd") or Contestant(lambda _: peers.run(*dd), remade),
            WIPE[2]: peers.missing("shred") or Contestant(lambda _: peers.run("shred", "-n0", "-z", plain), remade),
        }
        yield run_race(contestants, setting.rounds, bytes=size, block_size=4096, depth=1, cache="hot")


@pytest.mark.benchmark(group="revert", timer=CLOCK)
@pytest.mark.parametrize("member", REVERT)
def test_revert(member: str, revert: Race, show: Callable[[Race, str], None]) -> None:
    show(revert, member)


@pytest.mark.benchmark(group="wipe", timer=CLOCK)
@pytest.mark.parametrize("member", WIPE)
def test_wipe(member: str, wipe: Race, show: Callable[[Race, str], None]) -> None:
    show(wipe, member)
