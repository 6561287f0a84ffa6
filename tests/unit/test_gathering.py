"""A layer that merges left with many segments gets few when its volume is opened for writing."""

from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import SegmentRow
from onionskin.gathering import SEGMENTS_MAX

BLOCK = 4096
COUNT = 100


@pytest.mark.parametrize("wipe", ["release", "zero"])
@pytest.mark.parametrize("into_head", [True, False])
def test_many_segments_become_few_and_read_the_same(tmp_path: Path, wipe: str, into_head: bool) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=COUNT * BLOCK, wipe=wipe) as web:
            for number in range(COUNT):
                web.write(number * BLOCK, bytes([number]) * BLOCK * min(3, COUNT - number))
                web.snapshot(f"s{number}")
            for number in range(COUNT if into_head else COUNT - 1):
                web.merge(f"s{number}")
            before = web.read(0, web.size_bytes)
        assert len(store.catalog.rows(SegmentRow)) > SEGMENTS_MAX
        with store.open("web") as web:
            assert len(store.catalog.rows(SegmentRow)) <= SEGMENTS_MAX
            assert web.read(0, web.size_bytes) == before
            web.write(5 * BLOCK, b"new" * 1000)
            before = web.read(0, web.size_bytes)
        assert store.check() == []
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == before
        assert len(list(store.layout.segments.iterdir())) <= SEGMENTS_MAX
