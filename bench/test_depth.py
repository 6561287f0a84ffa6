"""The same blocks spread over more and more layers: the speed of a read must not follow the depth."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from rig.disks import BLOCK, blocks_of, scattered, write_layers
from rig.race import CLOCK, Race, Setting, run_race

import onionskin
from onionskin.measure.timing import Contestant

DEPTHS = (1, 16, 64, 256)
READS = 16384


@pytest.fixture(scope="module")
def race(setting: Setting) -> Race:
    blocks = setting.size_bytes // BLOCK
    order, wanted = scattered(blocks, blocks), scattered(READS, blocks, seed=2)
    out, expected = np.empty((READS, BLOCK), np.uint8), blocks_of(wanted).reshape(-1, BLOCK)
    contestants: dict[str, Contestant | str] = {}
    with ExitStack() as stack:
        store = stack.enter_context(onionskin.Store(setting.directory / "store"))
        for depth in DEPTHS:
            with store.create(f"depth-{depth}", size=setting.size_bytes) as web:
                write_layers(web, order, depth)
            view = stack.enter_context(store.open(f"depth-{depth}", snapshot=f"layer-{depth - 1}"))
            assert np.array_equal(view.read_blocks(wanted), expected)
            contestants[f"depth {depth}"] = Contestant(lambda view=view: view.read_blocks(wanted, out) is None)
        race = run_race(contestants, setting.rounds * 2, engine="depth 1", bytes=READS * BLOCK, block_size=BLOCK)
    race.info["cache"] = "hot"
    race.own = {f"depth {depth}": {"depth": depth} for depth in DEPTHS}
    return race


@pytest.mark.benchmark(group="depth, hot", timer=CLOCK)
@pytest.mark.parametrize("depth", DEPTHS)
def test_read_at_depth(depth: int, race: Race, show: Callable[[Race, str], None]) -> None:
    show(race, f"depth {depth}")
