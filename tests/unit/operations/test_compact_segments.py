"""A layer that merges left with many segments gets few, while its volume is open or when it is opened for writing."""

import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import LayerRow, SegmentRow
from onionskin.operations import compact_segments
from onionskin.operations.compact_segments import SEGMENTS_MAX
from onionskin.storage.open_head import OpenHead

BLOCK = 4096
COUNT = 100

Crowd = Callable[[], None]


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    """Have no segments compacted any more, as an older version did while a volume was open; called again, have them."""
    limits = [SEGMENTS_MAX, 10_000]

    def switch() -> None:
        monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", limits[-1])
        limits.reverse()

    return switch


@pytest.mark.parametrize("wipe", ["release", pytest.param("zero", marks=pytest.mark.slow)])
@pytest.mark.parametrize("into_head", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_many_segments_become_few_at_an_opening_and_read_the_same(
    tmp_path: Path, crowd: Crowd, wipe: str, into_head: bool
) -> None:
    crowd()
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=COUNT * BLOCK, wipe=wipe) as web:
            for number in range(COUNT):
                web.write(number * BLOCK, bytes([number]) * BLOCK * min(3, COUNT - number))
                web.snapshot(f"s{number}")
            for number in range(COUNT if into_head else COUNT - 1):
                web.merge(f"s{number}")
            before = web.read(0, web.size_bytes)
        assert len(store._opened.catalog.rows(SegmentRow)) > SEGMENTS_MAX
        crowd()
        with store.open("web") as web:
            assert len(store._opened.catalog.rows(SegmentRow)) <= SEGMENTS_MAX
            assert web.read(0, web.size_bytes) == before
            web.write(5 * BLOCK, b"new" * 1000)
            before = web.read(0, web.size_bytes)
        assert store.check() == []
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == before
        assert len(list(store._opened.layout.segments.iterdir())) <= SEGMENTS_MAX


@pytest.mark.parametrize("wipe", ["release", "zero"])
@pytest.mark.parametrize("kept", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_disk_whose_snapshots_come_and_go_while_it_is_open_keeps_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: str, kept: int
) -> None:
    monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", 6)
    monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 2)
    draw, names = random.Random(kept), []
    disk = bytearray(COUNT * BLOCK)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=len(disk), wipe=wipe) as web:
        for number in range(60):
            for _ in range(3):
                first, letter = draw.randrange(COUNT) * BLOCK, bytes([1 + number])
                web.write(first, letter * BLOCK)
                disk[first : first + BLOCK] = letter * BLOCK
            web.trim(first := draw.randrange(COUNT) * BLOCK, BLOCK)
            disk[first : first + BLOCK] = bytes(BLOCK)
            web.snapshot(f"s{number}")
            names.append(f"s{number}")
            if len(names) > kept:
                web.merge(names.pop(draw.randrange(kept)))
            assert web.read(0, len(disk)) == disk
            # Of each layer: what makes it be compacted; and of the head its own and its spare.
            assert len(store._opened.catalog.rows(SegmentRow)) <= (len(names) + 1) * (6 + 2)
        store.finish_work()
        assert {path.stem for path in store._opened.layout.segments.iterdir()} <= {
            row.id.hex() for row in store._opened.catalog.rows(SegmentRow)
        }
    with onionskin.Store(tmp_path / "store") as store:
        assert store.check() == []
        with store.open("web") as web:
            assert web.read(0, len(disk)) == disk


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_compacting_while_a_snapshot_and_a_clone_read_the_layer_leaves_them_what_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: str
) -> None:
    monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", 4)
    monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 1)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=COUNT * BLOCK, wipe=wipe) as web:
        for number in range(4):
            web.write(number * BLOCK, bytes([1 + number]) * BLOCK)
            web.snapshot(f"s{number}")
        expected = bytes(web.read(0, web.size_bytes))
        store.clone("web", "s3", "twin")
        with store.open("twin") as twin, store.open("web", snapshot="s3") as view:
            for name in ("s0", "s1", "s2"):
                web.merge(name)
            web.write(9 * BLOCK, b"x" * BLOCK)
            twin.write(8 * BLOCK, b"y" * BLOCK)
            assert view.read(0, view.size_bytes) == expected
            assert twin.read(0, 8 * BLOCK) == expected[: 8 * BLOCK]
            assert web.read(0, 8 * BLOCK) == expected[: 8 * BLOCK]
        store.finish_work()
        assert [problem for problem in store.check() if problem.severity == "error"] == []


def test_a_compaction_that_fails_leaves_the_fold_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "the medium failed")

    monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", 1)
    monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 0)
    monkeypatch.setattr(compact_segments, "_copy_slots", fail)
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=COUNT * BLOCK) as web:
        for number in range(4):
            web.write(number * BLOCK, bytes([1 + number]) * BLOCK)
            web.snapshot(f"s{number}")
        for number in range(4):
            web.merge(f"s{number}")
        assert "could not be compacted" in caplog.text and "could not be joined" not in caplog.text
        assert len(store._opened.catalog.rows(LayerRow)) == 1
        assert web.read(0, 4 * BLOCK) == b"".join(bytes([1 + number]) * BLOCK for number in range(4))
        assert store.check() == []


@pytest.mark.parametrize("wipe", ["release", "zero"])
@pytest.mark.parametrize("step", ["_copy_slots", "load_layer"])
def test_two_who_open_clones_and_compact_one_layer_at_once_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: str, step: str
) -> None:
    monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", 1000)
    monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 1)
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
    monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", 2)
    work = getattr(compact_segments, step)
    opened: list[bytes] = []

    def work_behind_another(*arguments: object) -> object:
        monkeypatch.setattr(compact_segments, step, work)
        with onionskin.Store(tmp_path / "store") as other, other.open("two") as two:
            opened.append(two.read(0, two.size_bytes))
            two.write(0, opened[0][:BLOCK])  # a clone that nothing was written to compacts nothing
            other.finish_work()
        return work(*arguments)

    monkeypatch.setattr(compact_segments, step, work_behind_another)
    with onionskin.Store(tmp_path / "store") as store, store.open("one") as one:
        one.write(0, expected[:BLOCK])
        assert one.read(0, one.size_bytes) == expected
        assert opened == [expected]
        store.finish_work()
        assert [problem for problem in store.check() if problem.severity == "error"] == []


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have layers compacted that have more than so many segments."""

    def switch(segments: int) -> None:
        monkeypatch.setattr(compact_segments, "SEGMENTS_MAX", segments)
        monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 1)

    switch(1000)
    return switch


def fill(volume: onionskin.Volume, numbers: range) -> None:
    """Take a snapshot of each of some blocks, and merge all but the last one."""
    for number in numbers:
        volume.write(number * BLOCK, bytes([1 + number]) * BLOCK)
        volume.snapshot(f"s{number}")
    for number in numbers[:-1]:
        volume.merge(f"s{number}")


def read_all(volume: onionskin.Volume) -> bytes:
    return bytes(volume.read(0, volume.size_bytes))


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_what_somebody_else_compacted_of_an_open_volume_is_not_reclaimed_when_more_is_merged_into_it(
    tmp_path: Path, few: Callable[[int], None], wipe: str
) -> None:
    with onionskin.Store(tmp_path / "store") as store, onionskin.Store(tmp_path / "store") as other:
        web = store.create("web", size=COUNT * BLOCK, wipe=wipe)
        fill(web, range(6))
        other.clone("web", "s5", "twin")
        few(3)
        other.open("twin").close()
        other.delete("twin")
        few(1000)
        fill(web, range(6, 10))
        few(3)
        web.merge("s5")
        assert {id for _, id, _, _ in web._path.segments()}.isdisjoint(
            {row.id for row in store._opened.catalog.rows(SegmentRow)} - {*web._opened._byte_of_segment}
        )
        few(1000)
        web.merge("s9")
        web.flush()
        store.finish_work()
        expected = read_all(web)
        assert expected[: 10 * BLOCK] == b"".join(bytes([1 + number]) * BLOCK for number in range(10))
        web.close()
        with store.open("web") as web:
            assert read_all(web) == expected
        assert store.check() == []


@pytest.mark.parametrize("wipe", ["release", "zero"])
def test_what_somebody_else_compacts_right_behind_the_commit_stays_as_long_as_the_volume_reads_it(
    tmp_path: Path, few: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, wipe: str
) -> None:
    with onionskin.Store(tmp_path / "store") as store, onionskin.Store(tmp_path / "store") as other:
        web = store.create("web", size=COUNT * BLOCK, wipe=wipe)
        fill(web, range(8))
        other.clone("web", "s7", "twin")
        web.write(8 * BLOCK, b"x" * BLOCK)
        web.snapshot("s8")
        web.write(9 * BLOCK, b"y" * BLOCK)
        web.snapshot("s9")
        expected = read_all(web)
        goes_on = OpenHead._goes_on_below

        def commit_behind_another(head: OpenHead) -> bool:
            few(0)
            monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 0)
            other.open("twin").close()
            few(1000)
            return goes_on(head)

        monkeypatch.setattr(OpenHead, "_goes_on_below", commit_behind_another)
        layer = store._opened.catalog.rows(LayerRow, "parent IS NULL")[0]
        few(7)
        monkeypatch.setattr(compact_segments, "SEGMENTS_KEPT", 5)
        compact_segments.compact_below(web._opened, layer.id)
        other.finish_work()
        store.finish_work()
        open_files = {id for _, id, _, _ in web._path.segments()}
        assert open_files == {*web._opened._byte_of_segment}
        assert read_all(web) == expected
        with store.open("web", snapshot="s9") as view:
            assert read_all(view) == expected
        web.close()
        with store.open("web") as web:
            assert read_all(web) == expected


def test_an_interrupt_behind_the_switch_of_the_data_path_leaves_a_volume_that_goes_on(
    tmp_path: Path, few: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: OpenHead) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=COUNT * BLOCK) as web:
        fill(web, range(4))
        expected = read_all(web)
        few(2)
        monkeypatch.setattr(OpenHead, "give_up_unread", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compact_segments.compact_below(web._opened, store._opened.catalog.rows(LayerRow, "sealed = 1")[0].id)
        web.snapshot("later")
        assert read_all(web) == expected
        store.finish_work()
        files = {path.stem for path in store._opened.layout.segments.iterdir()}
        assert files <= {row.id.hex() for row in store._opened.catalog.rows(SegmentRow)}


def test_a_catalog_that_cannot_be_read_behind_the_switch_keeps_the_old_files_and_the_volume(
    tmp_path: Path, few: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: OpenHead) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=COUNT * BLOCK) as web:
        fill(web, range(4))
        expected = read_all(web)
        few(2)
        with monkeypatch.context() as patch:
            patch.setattr(OpenHead, "give_up_unread", fail)
            compact_segments.compact_below(web._opened, store._opened.catalog.rows(LayerRow, "sealed = 1")[0].id)
        assert not web._path.poisoned
        web.snapshot("later")
        assert read_all(web) == expected
        web.revert("later")
        store.finish_work()
        files = {path.stem for path in store._opened.layout.segments.iterdir()}
        assert files <= {row.id.hex() for row in store._opened.catalog.rows(SegmentRow)}


@pytest.mark.parametrize("wipe", ["release", "zero"])
@pytest.mark.parametrize("at_an_opening", [True, False])
def test_a_pipe_in_the_place_of_a_segment_is_not_waited_for(
    tmp_path: Path, few: Callable[[int], None], wipe: str, at_an_opening: bool
) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        web = store.create("web", size=COUNT * BLOCK, wipe=wipe)
        fill(web, range(4))
        layer = store._opened.catalog.rows(LayerRow, "sealed = 1")[0]
        for row in store._opened.catalog.rows(SegmentRow, "layer = ?", layer.id):
            path = store._opened.layout.segment_file(row.id)
            path.unlink()
            os.mkfifo(path)
        few(2)
        if at_an_opening:
            web.close()
            compact_segments.compact_chain(store._opened, layer.id)
        else:
            compact_segments.compact_below(web._opened, layer.id)
            web.close()
        assert store._opened.catalog.rows(LayerRow, "id = ?", layer.id) == [layer]


def test_an_opening_copies_no_more_than_its_bound_and_the_next_one_goes_on(
    tmp_path: Path, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = 10
    crowd()
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=COUNT * BLOCK) as web:
            for number in range(COUNT):
                web.write(number * BLOCK, bytes([number + 1]) * BLOCK)
                web.snapshot(f"s{number}")
            for number in range(COUNT - 1):
                web.merge(f"s{number}")
            before = web.read(0, web.size_bytes)
        crowd()
        monkeypatch.setattr(compact_segments, "COMPACT_BYTES_MAX", at_once * BLOCK)
        counts = [len(store._opened.catalog.rows(SegmentRow, "role = 'sealed'"))]
        while counts[-1] > SEGMENTS_MAX and len(counts) < COUNT:
            with store.open("web") as web:
                assert web.read(0, web.size_bytes) == before
            counts.append(len(store._opened.catalog.rows(SegmentRow, "role = 'sealed'")))
        copied = [earlier - later for earlier, later in itertools.pairwise(counts)]
        assert copied == [at_once - 1] * len(copied) and len(copied) > 1, "so many segments became one each time"
        assert store.check() == []
