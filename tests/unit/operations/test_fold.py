"""Which layers are folded when: what is read stays, what is freed goes, and many merges write little more than one."""

import os
import random
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.examples import examples

import onionskin
from onionskin.base import dtypes
from onionskin.catalog import LayerRow, SegmentRow, WorkRow
from onionskin.operations import fold, fold_policy, reclaim
from onionskin.operations.fold_policy import grown_parts
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore

BLOCK = 4096


def is_worth_it(part: list[int]) -> bool:
    return sum(part) <= fold_policy.SMALL_BYTES or 2 * sum(part) >= 3 * max(part)


@given(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, 40_000), st.integers(0, 1 << 24)), min_size=1, max_size=12)
)
@example([0, 0, 0, 0, 67, 80, 22135, 10491])
def test_parts_that_are_folded_have_grown_and_none_that_has_is_left(weights: list[int]) -> None:
    parts = grown_parts(weights)
    assert all(is_worth_it(weights[first : last + 1]) for first, last in parts)
    assert all(before[1] < after[0] for before, after in pairwise(parts))
    for first in range(len(weights)):
        for last in range(first + 1, len(weights)):
            if is_worth_it(weights[first : last + 1]):
                assert any(a <= last and first <= b for a, b in parts)


@pytest.mark.parametrize("order", ["oldest first", "newest first", "at random"])
def test_merges_write_each_record_a_few_times(order: str) -> None:
    """4,096 layers of 64 records: done at once each would be 8 million units in all, or 200 million records."""
    layers = [(unit, 64 * 24) for unit in range(4096)]
    named = set(range(4096))
    names = list(range(4095))
    {"oldest first": lambda: None, "newest first": names.reverse, "at random": lambda: random.Random(1).shuffle(names)}[
        order
    ]()
    position = {unit: unit for unit in range(4096)}  # the layer that has a unit's data: the uppermost unit in it
    weights = dict(layers)
    below = {unit: unit - 1 for unit in range(4096)}
    above = {unit: unit + 1 for unit in range(4095)}
    written, longest = 0, 0
    for name in names:
        named.discard(name)
        run = [position[name]]
        while below.get(run[0], -1) >= 0 and below[run[0]] not in named:
            run.insert(0, below[run[0]])
        while run[-1] not in named:
            run.append(above[run[-1]])
        for first, last in grown_parts([weights[layer] for layer in run]):
            group = run[first : last + 1]
            weights[group[-1]] = sum(weights[layer] for layer in group)
            written += weights[group[-1]]
            lowest = below[group[0]]
            below[group[-1]] = lowest
            if lowest >= 0:
                above[lowest] = group[-1]
        longest = max(longest, len(run))
    total = 4096 * 64 * 24
    assert written < 25 * total
    assert longest < 40


STEPS = st.lists(
    st.tuples(st.integers(0, 31), st.integers(1, 6), st.sampled_from(["write", "write", "trim", "zero"])),
    min_size=3,
    max_size=9,
)


def write(volume: onionskin.Volume, disk: bytearray, step: tuple[int, int, str]) -> None:
    offset, length = step[0] * BLOCK, step[1] * BLOCK
    data = os.urandom(length) if step[2] == "write" else bytes(length)
    if step[2] == "write":
        volume.write(offset, data)
    else:
        getattr(volume, step[2])(offset, length)
    disk[offset : offset + length] = data


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folding")


@given(STEPS, st.randoms(use_true_random=False), st.sampled_from(["release", "zero"]), st.booleans())
@settings(max_examples=examples(15), deadline=None)
def test_whatever_is_merged_in_whatever_order_all_reads_the_same(
    room: Path, steps: list[tuple[int, int, str]], order: random.Random, wipe: str, small: bool
) -> None:
    """Maps of some records count as large, so that some merges are put off."""
    shutil.rmtree(room / "store", ignore_errors=True)
    disk, states = bytearray(40 * BLOCK), {}
    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr(fold_policy, "SMALL_BYTES", 0)
            patch.setattr(fold_policy, "FREED_BYTES_MIN", 1 << 20)
        with onionskin.Store(room / "store") as store:
            with store.create("v", size=len(disk), wipe=wipe) as volume:
                for number, step in enumerate(steps):
                    write(volume, disk, step)
                    volume.snapshot(f"s{number}")
                    states[f"s{number}"] = bytes(disk)
                for name in order.sample(sorted(states), len(states) - 1):
                    volume.merge(name)
                    del states[name]
                    assert volume.read(0, len(disk)) == disk
                    for left, expected in states.items():
                        with store.open("v", snapshot=left) as view:
                            assert view.read(0, len(disk)) == expected
                if wipe == "zero":
                    assert_nothing_is_left(store)
            with store.open("v") as volume:
                assert volume.read(0, len(disk)) == disk
            store.finish_work()
            assert [problem for problem in store.check() if problem.severity == "error"] == []


def assert_nothing_is_left(store: onionskin.Store) -> None:
    """No sealed segment has data in a slot that its layer's map, or the map of a layer over it, hides."""
    store.finish_work()  # which may be under way in the background
    assert not [row for row in store._opened.catalog.rows(WorkRow) if row.wipe == "zero"]
    for layer in store._opened.catalog.rows(LayerRow, "sealed"):
        layer_map = open_map(store._opened, layer)
        for segment in store._opened.catalog.rows(SegmentRow, "layer = ?", layer.id):
            live = {
                int(slot)
                for row in np.frombuffer(layer_map.live_slots(segment.id), dtypes.SLOTS)
                for slot in range(row["slot"], row["slot"] + row["count"])
            }
            data = store._opened.layout.segment_file(segment.id).read_bytes()[BLOCK:]
            assert all(
                slot in live or not any(data[slot * BLOCK : (slot + 1) * BLOCK]) for slot in range(len(data) // BLOCK)
            )
        layer_map.close()


def test_what_is_put_off_with_policy_zero_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_policy, "SMALL_BYTES", 0)
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="8M", wipe="zero") as volume:
        scattered(volume, 0, 200)
        volume.snapshot("large")
        volume.write(1 << 22, b"x" * BLOCK)
        volume.snapshot("small")
        volume.write(0, b"y" * BLOCK)
        volume.snapshot("last")
        volume.merge("large")
        assert layers_without_name(store) == 1  # nothing to free: put off
        volume.merge("small")
        assert layers_without_name(store) == 0
        assert_nothing_is_left(store)


def test_a_run_that_frees_much_is_folded_though_it_has_not_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_policy, "SMALL_BYTES", 0)
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="8M") as volume:
        scattered(volume, 0, 200)
        volume.snapshot("large")
        volume.trim(0, 1 << 20)
        volume.snapshot("trim")
        volume.merge("large")
        assert layers_without_name(store) == 0


def scattered(volume: onionskin.Volume, first: int, count: int) -> None:
    for block in range(first, first + 2 * count, 2):
        volume.write(block * BLOCK, b"s" * BLOCK)


def layers_without_name(store: onionskin.Store) -> int:
    named = "id IN (SELECT layer FROM snapshots)"
    return len(store._opened.catalog.rows(LayerRow, f"sealed AND NOT {named}"))


def test_only_segments_that_lost_blocks_have_slots_reclaimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reclaimed: list[int] = []
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="8M") as volume:
        for number in range(12):
            volume.write(number * BLOCK, b"x" * BLOCK)
            volume.snapshot(f"s{number}")
        volume.write(3 * BLOCK, b"y" * BLOCK)
        volume.snapshot("last")
        add = reclaim.add_slot_work

        def count(store: OpenStore, ids: Iterable[bytes], wipe: str) -> None:
            reclaimed.append(len(list(ids)))
            add(store, ids, wipe)

        monkeypatch.setattr(reclaim, "add_slot_work", count)
        for number in range(12):
            volume.merge(f"s{number}")
    assert sum(reclaimed[:12]) == 1


def test_a_merge_beside_many_snapshots_asks_for_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it read, or lock, the whole chain anew."""
    counts = []
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="8M") as volume:
        for total in (10, 60):
            for number in range(total):
                volume.write(number * BLOCK, b"x" * BLOCK)
                volume.snapshot(f"s{total}-{number}")
            store.finish_work()
            rows = 0
            read = type(store._opened.catalog).rows

            def counted(self, *args, read=read):  # type: ignore[no-untyped-def]
                nonlocal rows
                found = read(self, *args)
                rows += len(found)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(type(store._opened.catalog), "rows", counted)
                volume.merge(f"s{total}-5")
            counts.append(rows)
    assert abs(counts[1] - counts[0]) < 20


def test_layers_that_changed_meanwhile_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody changes the middle one of three that are folded at once."""
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="8M") as volume:
        for name in ("a", "b", "c"):
            volume.write(0, name.encode() * BLOCK)
            volume.snapshot(name)
        monkeypatch.setattr(fold_policy, "groups_to_fold", lambda store, run: [])
        volume.merge("a")
        volume.merge("b")
        monkeypatch.undo()
        run = fold_policy.run_around(store._opened.catalog, volume._opened.head, layer_ids(store)[0])
        assert len(run) == 3
        lay = fold_policy.lay

        def change_first(*args):  # type: ignore[no-untyped-def]
            monkeypatch.undo()
            with store._opened.catalog.transaction():
                store._opened.catalog.update(LayerRow, run[1].id, size_bytes=run[1].size_bytes + BLOCK)
            return lay(*args)

        monkeypatch.setattr(fold_policy, "lay", change_first)
        assert not fold.fold(volume._opened, run[0].id)
        assert len(layer_ids(store)) == 4
        assert fold.fold(volume._opened, run[0].id)
        assert len(layer_ids(store)) == 2


def layer_ids(store: onionskin.Store) -> list[bytes]:
    return [row.id for row in store._opened.catalog.rows(LayerRow, "1 ORDER BY created_ns")]
