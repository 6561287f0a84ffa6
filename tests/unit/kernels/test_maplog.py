"""LayerMap against a plain dict: block index -> None is HOLE, "zero", or (segment id, slot)."""

import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from format import reference_encoder as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin.base import dtypes
from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.errors import FormatError, StateError
from onionskin.kernels import _maplog
from onionskin.kernels._maplog import LOCATION_ZERO, LayerMap

BLOCKS = 3000  # more than five ranges of 2 MiB
MAP_ID = b"m" * 16
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16

Model = dict[int, str | tuple[bytes, int]]
Change = tuple[int, int, bytes | str | None, int]


def empty(block_count: int = BLOCKS) -> LayerMap:
    return LayerMap(block_size=4096, block_count=block_count)


def apply(layer: LayerMap, model: Model, change: Change) -> None:
    block_index, block_count, target, slot = change
    if isinstance(target, bytes):
        layer.set(block_index, block_count, layer.add_segment(target) << 32 | slot)
    else:
        layer.set(block_index, block_count, LOCATION_ZERO if target else 0)
    for i in range(block_count):
        model.pop(block_index + i, None)
        if isinstance(target, bytes):
            model[block_index + i] = (target, slot + i)
        elif target:
            model[block_index + i] = target


def build(changes: list[Change]) -> tuple[LayerMap, Model]:
    layer, model = empty(), Model()
    for change in changes:
        apply(layer, model, change)
    return layer, model


def contents(layer: LayerMap) -> Model:
    found: Model = {}
    for block_index, block_count, state, segment, slot in layer.runs().tolist():
        for i in range(block_count):
            data = (layer.segments[segment - 1], slot + i) if state == 1 else "zero"
            found[block_index + i] = data
    return found


def live(layer: LayerMap, segment: bytes) -> np.ndarray:
    return np.frombuffer(layer.live_slots(segment), dtypes.SLOTS)


def blocks(stretches: np.ndarray) -> list[int]:
    return [first + i for first, count in stretches.tolist() for i in range(count)]


def in_blocks(extents: Iterable[tuple[int, int, int, int, int]]) -> dict[int, int]:
    return {offset // 4096 + i: state for offset, length, state, _, _ in extents for i in range(length // 4096)}


changes = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1),
        st.integers(1, 900),
        st.sampled_from([A, B, "zero", None]),
        st.integers(0, 5000),
    ).map(lambda change: (change[0], min(change[1], BLOCKS - change[0]), change[2], change[3])),
    max_size=12,
)


@given(changes)
def test_runs_and_lookups_say_what_was_set(steps: list[Change]) -> None:
    layer, model = build(steps)
    assert contents(layer) == model
    for block_index in range(0, BLOCKS, 7):
        location, expected = layer.lookup(block_index), model.get(block_index)
        if isinstance(expected, tuple):
            assert (layer.segments[(location >> 32) - 1], location & 0xFFFFFFFF) == expected
        else:
            assert location == (LOCATION_ZERO if expected else 0)


@given(changes)
def test_runs_are_sorted_and_joined(steps: list[Change]) -> None:
    runs = build(steps)[0].runs()
    ends = runs["block_index"] + runs["block_count"]
    assert (ends[:-1] <= runs["block_index"][1:]).all()
    for before, after, end in zip(runs, runs[1:], ends, strict=False):
        continues = before["segment"] == after["segment"] and before["state"] == after["state"]
        follows = before["state"] == 2 or before["slot"] + before["block_count"] == after["slot"]
        assert not (continues and follows and end == after["block_index"])


@given(changes)
def test_count_counts_data_and_zero(steps: list[Change]) -> None:
    layer, model = build(steps)
    zeros = sum(value == "zero" for value in model.values())
    assert layer.count() == (len(model) - zeros, zeros)


@given(changes, changes)
def test_fold_lays_the_upper_layer_over_the_lower(low: list[Change], high: list[Change]) -> None:
    (lower, model), (upper, upper_model) = build(low), build(high)
    lower.fold(upper)
    assert contents(lower) == model | upper_model
    assert contents(upper) == upper_model
    assert set(upper.segments) <= set(lower.segments)


def test_fold_of_a_grown_layer_grows_the_lower_one() -> None:
    lower, upper = empty(10), empty(5000)
    upper.set(4990, 10, LOCATION_ZERO)
    lower.fold(upper)
    assert lower.block_count == 5000
    assert lower.runs()["block_index"].tolist() == [4990]


def test_fold_of_a_longer_lower_layer_keeps_its_tail() -> None:
    lower, upper = empty(5000), empty(10)
    lower.set(4990, 10, LOCATION_ZERO)
    lower.fold(upper)
    assert (lower.block_count, lower.count()) == (5000, (0, 10))


def test_fold_refuses_itself_and_other_block_sizes() -> None:
    layer = empty()
    with pytest.raises(ValueError, match="itself"):
        layer.fold(layer)
    with pytest.raises(ValueError, match="8192"):
        layer.fold(LayerMap(block_size=8192, block_count=5))


@given(changes, changes)
def test_count_shadowed_counts_data_that_a_merge_frees(low: list[Change], high: list[Change]) -> None:
    (lower, model), (upper, upper_model) = build(low), build(high)
    expected = sum(isinstance(value, tuple) and block in upper_model for block, value in model.items())
    assert lower.count_shadowed(upper) == expected


@given(changes)
def test_drop_zero_leaves_data_alone(steps: list[Change]) -> None:
    layer, model = build(steps)
    layer.drop_zero()
    assert contents(layer) == {block: value for block, value in model.items() if value != "zero"}


@given(changes, changes)
def test_the_ranges_of_one_layer_over_another_are_those_of_both(low: list[Change], high: list[Change]) -> None:
    (one, model), (other, other_model) = build(low), build(high)
    ranges = list(one.extents().over(other.extents()).ranges())
    assert in_blocks(ranges) == dict.fromkeys(sorted(model | other_model), HOLE)
    assert all(offset + length < behind for (offset, length, *_), (behind, *_) in pairwise(ranges))


@given(changes)
def test_the_extents_of_a_layer_say_what_is_data_and_what_is_zero(steps: list[Change]) -> None:
    layer, model = build(steps)
    extents = list(layer.extents())
    assert in_blocks(extents) == {block: ZERO if value == "zero" else DATA for block, value in model.items()}
    for (offset, length, state, *_), (behind, _, next_state, *_) in pairwise(extents):
        assert offset + length < behind or state != next_state


@given(changes)
def test_live_slots_are_sorted_joined_and_complete(steps: list[Change]) -> None:
    layer, model = build(steps)
    slots = live(layer, A)
    assert blocks(slots) == sorted({v[1] for v in model.values() if isinstance(v, tuple) and v[0] == A})
    assert (slots["slot"][1:] > (slots["slot"] + slots["count"])[:-1]).all()
    assert len(layer.live_slots(C)) == 0


@given(changes)
def test_the_slots_of_all_segments_are_those_of_each(steps: list[Change]) -> None:
    layer, _ = build(steps)
    each = {segment: layer.live_slots(segment) for segment in layer.segments}
    assert layer.slots_by_segment() == {segment: slots for segment, slots in each.items() if slots}


@given(changes)
def test_replace_of_all_live_slots_compacts_a_segment(steps: list[Change]) -> None:
    layer, model = build([*steps, (0, 1, A, 0)])
    slots = live(layer, A)
    ends = np.cumsum(slots["count"])
    moved = layer.replace(A, slots.tobytes(), C, (ends - slots["count"] + 17).tolist())
    copied = {old: new for new, old in enumerate(blocks(slots), 17)}
    expected = {
        block: (C, copied[value[1]]) if isinstance(value, tuple) and value[0] == A else value
        for block, value in model.items()
    }
    assert contents(layer) == expected
    assert moved == sum(isinstance(value, tuple) and value[0] == A for value in model.values())
    assert len(layer.live_slots(A)) == 0


def test_replace_moves_only_the_slots_it_is_given() -> None:
    layer, model = build([(0, 100, A, 50), (200, 10, A, 10), (300, 100, B, 50)])
    slots = np.array([(12, 2), (60, 5), (145, 900)], dtypes.SLOTS)
    assert layer.replace(A, slots.tobytes(), B, [1000, 2000, 3000]) == 2 + 5 + 5
    for block in list(model):
        segment, slot = model[block]
        for (first, count), new in zip(slots.tolist(), (1000, 2000, 3000), strict=True):
            if segment == A and first <= slot < first + count:
                model[block] = (B, new + slot - first)
    assert contents(layer) == model


@pytest.mark.parametrize(
    ("slots", "new_slots"),
    [
        ([(5, 1), (3, 1)], [0, 1]),
        ([(3, 3), (5, 1)], [0, 3]),
        ([(3, 1)], [0, 1]),
        ([(3, 1)], [0xFFFFFFFF]),
        ([(0xFFFFFFFE, 2)], [0]),
        ([(1 << 63, 1 << 63)], [0]),
        ([(3, 1)], []),
    ],
)
def test_replace_refuses_impossible_slots(slots: list[tuple[int, int]], new_slots: list[int]) -> None:
    layer, model = build([(0, 9, A, 0)])
    with pytest.raises(ValueError, match="slot"):
        layer.replace(A, np.array(slots, dtypes.SLOTS).tobytes(), B, new_slots)
    with pytest.raises(ValueError, match="new slots for 15 bytes"):
        layer.replace(A, bytes(15), B, [0])
    assert contents(layer) == model


def test_replace_refuses_an_unknown_segment_and_the_same_one() -> None:
    layer, _ = build([(0, 9, A, 0)])
    slots = layer.live_slots(A)
    with pytest.raises(ValueError, match="not in this map"):
        layer.replace(C, slots, B, [0])
    with pytest.raises(ValueError, match="itself"):
        layer.replace(A, slots, A, [0])


@settings(max_examples=examples(50))
@given(changes, st.booleans())
def test_a_written_map_loads_again(tmp_path_factory: pytest.TempPathFactory, steps: list[Change], wipe: bool) -> None:
    layer, model = build(steps)
    path = tmp_path_factory.mktemp("map") / "m"
    length, frames, crc = layer.write(str(path), map_id=MAP_ID, wipe_zero=wipe, size_bytes=BLOCKS * 4096 - 5)
    again = LayerMap.load(
        str(path), map_id=MAP_ID, block_size=4096, block_count=10, length=length, frames=frames, crc=crc
    )
    assert contents(again) == model
    assert (again.size_bytes, again.block_count) == (BLOCKS * 4096 - 5, BLOCKS)
    assert (again.map_length, again.map_frames, again.map_crc, again.torn) == (length, frames, crc, False)
    assert path.stat().st_size == length
    assert _maplog.decode_header(path.read_bytes(), b"ONIONMAP").compatible == wipe
    assert sum(map(len, reference.decode_log(path.read_bytes()))) == len(layer.runs()) + len(again.segments) + 1


def test_a_written_map_names_only_segments_that_are_used(tmp_path: Path) -> None:
    layer, _ = build([(0, 9, A, 0), (0, 9, B, 0)])
    layer.write(str(tmp_path / "m"), map_id=MAP_ID, wipe_zero=False, size_bytes=None)
    again = LayerMap.load(str(tmp_path / "m"), map_id=MAP_ID, block_size=4096, block_count=BLOCKS)
    assert again.segments == [B]
    assert again.size_bytes is None


def test_a_map_of_many_frames_loads_again(tmp_path: Path) -> None:
    layer = empty(400_000)
    for block in range(0, 400_000, 3):
        layer.set(block, 1, layer.add_segment(A if block % 2 else B) << 32 | block)
    length, frames, crc = layer.write(str(tmp_path / "m"), map_id=MAP_ID, wipe_zero=False, size_bytes=7)
    assert frames == 3
    again = LayerMap.load(
        str(tmp_path / "m"),
        map_id=MAP_ID,
        block_size=4096,
        block_count=400_000,
        length=length,
        frames=3,
        crc=crc,
    )
    assert contents(again) == contents(layer)


def test_a_run_longer_than_a_record_can_say_is_split(tmp_path: Path) -> None:
    layer = empty(1 << 33)
    layer.set(5, (1 << 32) + 9, LOCATION_ZERO)
    layer.write(str(tmp_path / "m"), map_id=MAP_ID, wipe_zero=False, size_bytes=None)
    again = LayerMap.load(str(tmp_path / "m"), map_id=MAP_ID, block_size=4096, block_count=1 << 33)
    assert again.runs().tolist() == [(5, (1 << 32) + 9, 2, 0, 0)]


def test_write_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        empty().write(str(path), map_id=MAP_ID, wipe_zero=True, size_bytes=None)
    assert path.read_bytes() == b"kept"


@pytest.mark.parametrize("wipe", [False, True])
def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: bool) -> None:
    left: list[bytes] = []

    def refuse(descriptor: int) -> None:
        left.append((tmp_path / "m").read_bytes())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_maplog.os, "fsync", refuse)
    layer, _ = build([(0, 9, A, 0)])
    with pytest.raises(OSError, match="No space") as caught:
        layer.write(str(tmp_path / "m"), map_id=MAP_ID, wipe_zero=wipe, size_bytes=None)
    assert caught.value.filename == str(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    assert [any(contents) for contents in left] == ([True, False] if wipe else [True])


def test_a_missing_map_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LayerMap.load(str(tmp_path / "m"), map_id=MAP_ID, block_size=4096, block_count=1)


def test_a_map_that_is_too_short_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(FormatError, match=r"m: 0 bytes long.*4096.*Restore the file"):
        LayerMap.load(str(tmp_path / "m"), map_id=MAP_ID, block_size=4096, block_count=1, length=4096)


@pytest.mark.parametrize("location", [1, 3 << 32, 1 << 32 | 0xFFFFFFFF, -1, 1 << 60])
def test_set_refuses_locations_in_no_segment(location: int) -> None:
    layer, _ = build([(0, 9, A, 0)])
    with pytest.raises(ValueError, match="add_segment"):
        layer.set(0, 2, location)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (BLOCKS, 1), (0, BLOCKS + 1), (1, -1)])
def test_set_refuses_blocks_outside_the_map(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        empty().set(first, count, LOCATION_ZERO)


@pytest.mark.parametrize("block_index", [-1, BLOCKS])
def test_lookup_refuses_blocks_outside_the_map(block_index: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        empty().lookup(block_index)


def test_a_closed_map_raises_and_may_be_closed_again() -> None:
    layer = empty()
    layer.close()
    layer.close()
    for call in (layer.runs, layer.count, layer.memory_bytes, layer.drop_zero):
        with pytest.raises(StateError, match="closed"):
            call()
    with pytest.raises(StateError):
        layer.lookup(0)
    with pytest.raises(StateError):
        empty().fold(layer)


def test_a_layer_has_no_more_than_65534_segments() -> None:
    layer = empty()
    for number in range(1, 0xFFFF):
        assert layer.add_segment(number.to_bytes(16, "big")) == number
    with pytest.raises(StateError, match="65534"):
        layer.add_segment(A)


def test_memory_follows_fragmentation() -> None:
    layer = empty(1 << 20)
    layer.set(0, 1 << 20, LOCATION_ZERO)
    whole = layer.memory_bytes()
    order = list(range(0, 1 << 20, 64))
    random.Random(1).shuffle(order)
    for block in order:
        layer.set(block, 1, 0)
    assert layer.memory_bytes() > whole
