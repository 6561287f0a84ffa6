"""Random 4 KiB first writes over a full base, with the flush, against a flat file, qcow2 and nbdkit."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

import numpy as np
import pytest
from rig.disks import BLOCK, blocks_of, make_flat
from rig.flat import FlatFile
from rig.nbdkit import cow_server, nbd_bench
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

QCOW2 = {"qcow2, default clusters (qemu-img bench)": "", "qcow2, extended_l2 (qemu-img bench)": "extended_l2=on"}
MEMBERS = (ENGINE, "pwrite loop in C + fdatasync", *QCOW2, "nbdkit cow (qemu-img bench)")
WRITES = 8192


@pytest.fixture(scope="module")
def race(setting: Setting) -> Race:
    work, size, names = setting.directory, setting.size_bytes, count()
    base = make_flat(work / "base.raw", size)
    flat = FlatFile(make_flat(work / "flat.raw", size))
    step = size // 1000 * 618 // BLOCK * BLOCK + BLOCK
    wanted = (np.arange(WRITES, dtype=np.uint64) * np.uint64(step) % np.uint64(size)) // np.uint64(BLOCK)
    data = blocks_of(wanted, generation=1)

    def plain() -> None:
        flat.write_blocks(wanted, data)
        flat.flush()

    with ExitStack() as stack:
        store = stack.enter_context(onionskin.Store(work / "store"))
        stack.callback(flat.close)

        def engine(volume: onionskin.Volume) -> None:
            volume.write_blocks(wanted, data)
            volume.flush()

        def gone(volume: onionskin.Volume) -> None:
            name = volume.name
            volume.close()
            store.delete(name)
            store._opened.finish_work()

        checked = store.create("checked", base=base)
        engine(checked)
        assert np.array_equal(checked.read_blocks(wanted).reshape(-1), data)
        gone(checked)
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(engine, lambda: store.create(f"v{next(names)}", base=base), gone),
            "pwrite loop in C + fdatasync": Contestant(plain),
        }
        for name, options in QCOW2.items():
            contestants[name] = peers.missing("qemu-img") or _qcow2(setting, name, options, step)
        contestants["nbdkit cow (qemu-img bench)"] = peers.missing("nbdkit", "qemu-img") or Contestant(
            lambda uri: nbd_bench(uri[1], count=WRITES, step=step, write=True),
            lambda: _served(base),
            lambda served: served[0].close(),
        )
        return run_race(contestants, setting.rounds, bytes=WRITES * BLOCK, block_size=BLOCK, depth=1, cache="hot")


def _qcow2(setting: Setting, name: str, options: str, step: int) -> Contestant:
    image, base = setting.directory / f"{name}.qcow2", setting.directory / "base.raw"
    return Contestant(
        lambda _: peers.qemu_bench(image, count=WRITES, step=step, write=True, depth=16),
        lambda: peers.create_qcow2(image, backing=base, options=options),
        lambda _: image.unlink(),
    )


def _served(base: "object") -> tuple[ExitStack, str]:
    stack = ExitStack()
    return stack, stack.enter_context(cow_server(base))  # type: ignore[arg-type]


@pytest.mark.benchmark(group="write, hot, with flush", timer=CLOCK)
@pytest.mark.parametrize("member", MEMBERS)
def test_first_writes(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)
