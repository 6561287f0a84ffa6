"""A layer that merges left with many segments gets few when its volume is opened for writing."""

from pathlib import Path

import pytest

import onionskin
from onionskin import gathering
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


@pytest.mark.parametrize("wipe", ["release", "zero"])
@pytest.mark.parametrize("step", ["_copy_slots", "load_layer"])
def test_two_who_open_clones_and_gather_one_layer_at_once_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: str, step: str
) -> None:
    monkeypatch.setattr(gathering, "SEGMENTS_MAX", 2)
    monkeypatch.setattr(gathering, "SEGMENTS_KEPT", 1)
    count = 5
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=count * BLOCK, wipe=wipe) as web:
            for number in range(count):
                web.write(number * BLOCK, bytes([number]) * BLOCK)
                web.snapshot(f"s{number}")
            for number in range(count - 1):
                web.merge(f"s{number}")
            expected = web.read(0, web.size_bytes)
        for name in ("one", "two"):
            store.clone("web", f"s{count - 1}", name)
    work = getattr(gathering, step)
    opened: list[bytes] = []

    def work_behind_another(*arguments: object) -> object:
        monkeypatch.setattr(gathering, step, work)
        with onionskin.Store(tmp_path / "store") as other, other.open("two") as two:
            opened.append(two.read(0, two.size_bytes))
            other.finish_work()
        return work(*arguments)

    monkeypatch.setattr(gathering, step, work_behind_another)
    with onionskin.Store(tmp_path / "store") as store, store.open("one") as one:
        assert one.read(0, one.size_bytes) == expected
        assert opened == [expected]
        store.finish_work()
        assert [problem for problem in store.check() if problem.severity == "error"] == []
