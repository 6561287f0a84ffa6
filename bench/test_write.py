"""Random 4 KiB first writes over a full base, with the flush, against a flat file, qcow2 and nbdkit."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from rig.disks import BLOCK, blocks_of, make_flat, stepped
from rig.first_writes import into_new_volumes, into_qcow2
from rig.flat import FlatFile
from rig.nbdkit import cow_server, nbd_bench
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.measure import peers
from onionskin.measure.timing import Contestant, one_round

QCOW2 = {"qcow2, default clusters (qemu-img bench)": "", "qcow2, extended_l2 (qemu-img bench)": "extended_l2=on"}
MEMBERS = (ENGINE, "pwrite loop in C + fdatasync", *QCOW2, "nbdkit cow (qemu-img bench)")
WRITES = 8192


@pytest.fixture(scope="module")
def race(setting: Setting) -> Race:
    work, size = setting.directory, setting.size_bytes
    base = make_flat(work / "base.raw", size)
    flat = FlatFile(make_flat(work / "flat.raw", size))
    step, wanted = stepped(WRITES, size)
    data = blocks_of(wanted, generation=1)

    def plain() -> None:
        flat.write_blocks(wanted, data)
        flat.flush()

    with ExitStack() as stack:
        store = stack.enter_context(onionskin.Store(work / "store"))
        stack.callback(flat.close)

        one_round(into_new_volumes(store, base, wanted, data, verify=True))
        contestants: dict[str, Contestant | str] = {
            ENGINE: into_new_volumes(store, base, wanted, data),
            "pwrite loop in C + fdatasync": Contestant(plain),
        }
        for name, options in QCOW2.items():
            contestants[name] = peers.missing("qemu-img") or into_qcow2(
                work / f"{name}.qcow2", base, options=options, writes=WRITES, step=step, depth=16
            )
        contestants["nbdkit cow (qemu-img bench)"] = peers.missing("nbdkit", "qemu-img") or Contestant(
            lambda uri: nbd_bench(uri[1], count=WRITES, step=step, write=True),
            lambda: _served(base),
            lambda served: served[0].close(),
        )
        return run_race(contestants, setting.rounds, bytes=WRITES * BLOCK, block_size=BLOCK, depth=1, cache="hot")


def _served(base: "object") -> tuple[ExitStack, str]:
    stack = ExitStack()
    return stack, stack.enter_context(cow_server(base))  # type: ignore[arg-type]


@pytest.mark.benchmark(group="write, hot, with flush", timer=CLOCK)
@pytest.mark.parametrize("member", MEMBERS)
def test_first_writes(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)
