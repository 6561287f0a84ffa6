"""Opening a chain of 64 layers with many scattered extents, and what its index takes in memory."""

from collections.abc import Callable, Iterator

import pytest
from rig.disks import BLOCK, GIB, scattered, write_layers
from rig.race import CLOCK, ENGINE, Race, Setting, run_race

import onionskin
from onionskin.kernels._blockmap import BlockMap
from onionskin.measure import peers
from onionskin.measure.timing import Contestant

OPEN = (ENGINE, "a view of the snapshot", "a second view of it", "qemu-io of the qcow2 chain")
LAYERS, DISK = 64, 64 * GIB
MEMORY = {"64 GiB at random": 64 * GIB, "1 TiB at random": 1024 * GIB}
SEGMENT = 1 << 32


@pytest.fixture(scope="module")
def race(setting: Setting) -> Iterator[Race]:
    extents = setting.size_bytes // BLOCK
    with onionskin.Store(setting.directory / "store") as store:
        with store.create("web", size=DISK) as web:
            write_layers(web, scattered(extents, DISK // BLOCK), LAYERS)
        top = f"layer-{LAYERS - 1}"

        def close(volume: onionskin.Volume) -> None:
            volume.close()

        opened: list[onionskin.Volume] = []
        contestants: dict[str, Contestant | str] = {
            ENGINE: Contestant(lambda: opened.append(store.open("web")), finish=lambda: opened.pop().close()),
            "a view of the snapshot": Contestant(
                lambda: opened.append(store.open("web", snapshot=top)), finish=lambda: opened.pop().close()
            ),
            "a second view of it": Contestant(
                lambda _: opened.append(store.open("web", snapshot=top)),
                lambda: store.open("web", snapshot=top),
                lambda first: (opened.pop().close(), close(first)),
            ),
            "qemu-io of the qcow2 chain": peers.missing("qemu-img", "qemu-io") or _chain(setting, extents),
        }
        info = {"extents": extents, "bytes": extents * BLOCK, "block_size": BLOCK, "depth": LAYERS, "cache": "hot"}
        yield run_race(contestants, setting.rounds, **info)


def _chain(setting: Setting, extents: int) -> Contestant:
    """A qcow2 chain as deep, with one cluster written a layer: what qemu needs for opening it is depth, not extents."""
    top = None
    for number in range(LAYERS):
        path = setting.directory / f"chain-{number}.qcow2"
        top = peers.create_qcow2(path, size=None if top else DISK, backing=top)
        peers.qemu_io_write(top, [number << 16], 1 << 16, 90)
    return Contestant(lambda: peers.run("qemu-io", "-r", "-f", "qcow2", top, stdin="quit\n"))


@pytest.fixture(scope="module")
def memory(setting: Setting) -> Race:
    """Building an index of scattered blocks, and of a sequence: the time is by the way, the bytes are recorded."""
    count = setting.size_bytes // BLOCK
    built: dict[str, BlockMap] = {}

    def scatter(name: str, disk: int) -> Callable[[], None]:
        blocks = scattered(count, disk // BLOCK).tolist()

        def build() -> None:
            index = built[name] = BlockMap(disk // BLOCK)
            for slot, block in enumerate(blocks):
                index.set(block, 1, SEGMENT + slot)

        return build

    def sequence() -> None:
        index = built["1 TiB in sequence"] = BlockMap(1024 * GIB // BLOCK)
        for start in range(0, 1024 * GIB // BLOCK, 512):
            index.set(start, 512, SEGMENT + start)

    contestants: dict[str, Contestant | str] = {n: Contestant(scatter(n, disk)) for n, disk in MEMORY.items()}
    contestants["1 TiB in sequence"] = Contestant(sequence)
    race = run_race(contestants, 2, engine="64 GiB at random", warm_up=False, block_size=BLOCK, depth=1, cache="hot")
    for name, index in built.items():
        blocks = count if name in MEMORY else 1024 * GIB // BLOCK
        race.own[name] = {"index_bytes": index.memory_bytes, "bytes_a_block": index.memory_bytes / blocks}
        race.own[name]["bytes"] = blocks * BLOCK
        index.close()
    return race


@pytest.mark.benchmark(group="open, hot", timer=CLOCK)
@pytest.mark.parametrize("member", OPEN)
def test_open(member: str, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, member)


@pytest.mark.benchmark(group="memory", timer=CLOCK)
@pytest.mark.parametrize("member", [*MEMORY, "1 TiB in sequence"])
def test_memory_of_an_index(member: str, memory: Race, show: Callable[[Race, str], None]) -> None:
    show(memory, member)
