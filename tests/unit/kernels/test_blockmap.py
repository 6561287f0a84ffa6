"""The block map against a plain list of locations: whatever is done to both, both must say the same."""

import errno
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin.base import dtypes
from onionskin.errors import StateError
from onionskin.kernels._blockmap import HOLE, SEGMENT_NUMBERS, ZERO, BlockMap

Change = tuple[int, int, int]  # block_index, block_count, location

RANGE_BLOCKS = 512  # with blocks of 4 KiB
ENTRIES_OF_A_TOUCHED_BIT = 512


def location_of(segment: int, slot: int) -> int:
    return segment << 32 | slot


def advance(location: int, blocks: int) -> int:
    return location if location in (HOLE, ZERO) else location + blocks


def is_data(location: int) -> bool:
    return location not in (HOLE, ZERO)


def apply(locations: list[int], changes: list[Change]) -> None:
    for block_index, block_count, location in changes:
        locations[block_index : block_index + block_count] = [advance(location, i) for i in range(block_count)]


def map_of(block_count: int, block_shift: int, changes: list[Change]) -> tuple[BlockMap, list[int]]:
    block_map, locations = BlockMap(block_count, block_shift), [HOLE] * block_count
    for change in changes:
        block_map.set(*change)
    apply(locations, changes)
    return block_map, locations


def runs_of(locations: list[int]) -> list[Change]:
    runs: list[Change] = []
    for block_index, location in enumerate(locations):
        if location == HOLE:
            continue
        if runs:
            start, count, first = runs[-1]
            if start + count == block_index and advance(first, count) == location:
                runs[-1] = (start, count + 1, first)
                continue
        runs.append((block_index, 1, location))
    return runs


def assert_same(block_map: BlockMap, locations: list[int]) -> None:
    assert len(block_map) == len(locations)
    assert [tuple(run) for run in block_map.runs().tolist()] == runs_of(locations)
    assert block_map.lookup_many(range(len(locations))).tolist() == locations


def one_change(block_count: int) -> st.SearchStrategy[Change]:
    """Few slots, so that runs often continue each other; the ends of segment and slot numbers among them."""
    starts = st.integers(0, block_count - 1)
    locations = st.one_of(
        st.sampled_from([HOLE, ZERO, location_of(1, 0), location_of(0xFFFE, 0xFFFFFFFE - block_count)]),
        st.builds(location_of, st.integers(1, 3), st.integers(0, 8)),
    )

    def change(start: int, length: int, location: int, in_step: bool) -> Change:
        count = min(length, block_count - start)
        if in_step and is_data(location):
            location = location_of(location >> 32, start)
        return start, count, location

    lengths = st.one_of(st.integers(0, 4), st.sampled_from([127, 128, 129, 512, 513]), st.integers(1, block_count))
    return st.builds(change, starts, lengths, locations, st.booleans())


def scattered(block_count: int) -> st.SearchStrategy[list[Change]]:
    """Lonely blocks at every n-th location, enough of them to make dense leaves."""

    def changes(start: int, step: int, location: int) -> list[Change]:
        return [(block, 1, location) for block in range(start, block_count, step)]

    return st.builds(changes, st.integers(0, 8), st.integers(2, 5), st.sampled_from([HOLE, ZERO, location_of(2, 7)]))


def history(block_count: int) -> st.SearchStrategy[list[Change]]:
    step = st.one_of(*[one_change(block_count).map(lambda change: [change])] * 4, scattered(block_count))
    return st.lists(step, max_size=12).map(lambda steps: [change for step in steps for change in step])


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, int, list[Change]]:
    block_shift = draw(st.integers(12, 21))
    range_blocks = 1 << (21 - block_shift)
    block_count = draw(st.integers(1, max(40, 3 * range_blocks)))
    return block_count, block_shift, draw(history(block_count))


@given(maps())
@settings(max_examples=examples(200), deadline=None)
def test_lookups_and_runs_say_what_was_set(made: tuple[int, int, list[Change]]) -> None:
    block_map, locations = map_of(*made)
    assert_same(block_map, locations)
    for block_index in range(0, len(locations), 7):
        assert block_map.lookup(block_index) == locations[block_index]


@given(maps(), st.data())
@settings(max_examples=examples(200), deadline=None)
def test_many_changes_at_once_are_the_changes_one_by_one(
    made: tuple[int, int, list[Change]], data: st.DataObject
) -> None:
    block_map, locations = map_of(*made)
    changes = data.draw(history(len(locations)))
    named = block_map.set_many(changes)
    apply(locations, changes)
    assert_same(block_map, locations)
    changed = {block // (1 << (21 - made[1])) for first, count, _ in changes for block in range(first, first + count)}
    ends: dict[int, int] = {}
    for block, location in enumerate(locations):
        if is_data(location) and block // (1 << (21 - made[1])) in changed:
            ends[location >> 32] = max(ends.get(location >> 32, 0), (location & 0xFFFFFFFF) + 1)
    assert named == ends


def test_many_changes_of_a_large_map_are_sorted_with_later_ones_last() -> None:
    blocks = 1 << 24
    block_map = BlockMap(blocks)
    changes = [(i * 7919 % 4096 * 4096 + i % 3, 1, location_of(1, i)) for i in range(20000)]
    block_map.set_many(changes)
    last = {block: location for block, _, location in changes}
    assert block_map.lookup_many(list(last)).tolist() == list(last.values())


def test_changes_past_the_end_of_a_map_are_left_out() -> None:
    block_map = BlockMap(700)
    block_map.set_many([(600, 200, ZERO), (700, 5, ZERO), (1 << 40, 1, ZERO)])
    assert block_map.runs().tolist() == [(600, 100, ZERO)]


@given(maps(), st.data())
@settings(deadline=None)
def test_run_at_is_a_true_run_of_at_most_the_limit(made: tuple[int, int, list[Change]], data: st.DataObject) -> None:
    block_map, locations = map_of(*made)
    for _ in range(20):
        block_index = data.draw(st.integers(0, len(locations) - 1))
        limit = data.draw(st.integers(1, len(locations) + 1))
        start, count, location = block_map.run_at(block_index, limit)
        assert start == block_index
        assert 1 <= count <= min(limit, len(locations) - block_index)
        assert locations[start : start + count] == [advance(location, i) for i in range(count)]


@given(maps(), st.data())
@settings(deadline=None)
def test_next_finds_the_first_whole_run_within_its_bounds(
    made: tuple[int, int, list[Change]], data: st.DataObject
) -> None:
    block_map, locations = map_of(*made)
    for _ in range(10):
        begin = data.draw(st.integers(0, len(locations)))
        end = data.draw(st.integers(0, len(locations) + 3))
        within = [HOLE] * begin + locations[begin:end]
        assert block_map.next(begin, end) == next(iter(runs_of(within)), None)


@given(maps(), st.data())
@settings(deadline=None)
def test_lookup_many_keeps_the_order_it_was_asked_in(made: tuple[int, int, list[Change]], data: st.DataObject) -> None:
    block_map, locations = map_of(*made)
    wanted = data.draw(st.lists(st.integers(0, len(locations) - 1), max_size=100))
    assert block_map.lookup_many(np.array(wanted, dtype=np.uint64)).tolist() == [locations[i] for i in wanted]


@given(maps(), st.data(), st.booleans())
@settings(deadline=None)
def test_fold_lays_upper_over_lower(made: tuple[int, int, list[Change]], data: st.DataObject, renumbered: bool) -> None:
    lower, lower_locations = map_of(*made)
    upper_count = data.draw(st.integers(1, 2 * len(lower_locations)))
    upper, upper_locations = map_of(upper_count, made[1], data.draw(history(upper_count)))
    numbers = np.arange(SEGMENT_NUMBERS, dtype=np.uint16)
    if renumbered:
        numbers[[1, 2, 3, 0xFFFE, ZERO >> 32]] = [7, 1, 0xFFFE, 2, 9]  # ZERO is no segment

    lower.fold(upper, numbers if renumbered else None)

    for block_index, location in enumerate(upper_locations[: len(lower_locations)]):
        if is_data(location):
            location = location_of(int(numbers[location >> 32]), location & 0xFFFFFFFF)
        if location != HOLE:
            lower_locations[block_index] = location
    assert_same(lower, lower_locations)
    assert_same(upper, upper_locations)


@given(maps(), st.data())
@settings(deadline=None)
def test_count_shadowed_counts_data_below_what_is_not_hole(
    made: tuple[int, int, list[Change]], data: st.DataObject
) -> None:
    lower, lower_locations = map_of(*made)
    upper_count = data.draw(st.integers(1, 2 * len(lower_locations)))
    upper, upper_locations = map_of(upper_count, made[1], data.draw(history(upper_count)))
    both = zip(lower_locations, upper_locations, strict=False)
    assert lower.count_shadowed(upper) == sum(is_data(below) and above != HOLE for below, above in both)


@given(maps(), st.data())
@settings(deadline=None)
def test_resize_keeps_what_is_left_and_adds_holes(made: tuple[int, int, list[Change]], data: st.DataObject) -> None:
    block_map, locations = map_of(*made)
    for _ in range(3):
        block_count = data.draw(st.integers(0, 2 * len(locations) + 2))
        if block_count < len(locations):
            block_map.set(block_count, len(locations) - block_count, HOLE)
        block_map.resize(block_count)
        locations = (locations + [HOLE] * block_count)[:block_count]
        assert_same(block_map, locations)
        if block_count == 0:
            return
        changes = data.draw(history(block_count))
        for change in changes:
            block_map.set(*change)
        apply(locations, changes)
    assert_same(block_map, locations)


@given(st.permutations(range(RANGE_BLOCKS)), st.booleans())
@settings(max_examples=examples(20), deadline=None)
def test_a_range_filled_in_any_order_ends_as_one_root_entry(order: list[int], trimmed: bool) -> None:
    block_map = BlockMap(4 * RANGE_BLOCKS)
    block_map.set(0, 1, ZERO)
    block_map.set(0, 1, HOLE)
    without_leaves = block_map.memory_bytes
    for block in order:
        block_map.set(RANGE_BLOCKS + block, 1, location_of(5, 100 + block))
    assert block_map.memory_bytes == without_leaves
    assert block_map.runs().tolist() == [(RANGE_BLOCKS, RANGE_BLOCKS, location_of(5, 100))]
    for block in order:
        block_map.set(RANGE_BLOCKS + block, 1, HOLE if trimmed else location_of(6, 9 * block))
    assert (block_map.memory_bytes == without_leaves) is trimmed


@pytest.mark.parametrize(
    "order",
    [range(300), range(299, -1, -1), [*range(100), *range(200, 300), *range(100, 200)]],
    ids=["forwards", "backwards", "gap closed last"],
)
def test_blocks_in_consecutive_slots_cost_one_small_leaf(order: list[int]) -> None:
    block_map = BlockMap(RANGE_BLOCKS)
    for block in order:
        block_map.set(block, 1, location_of(1, block))
    assert block_map.memory_bytes <= 4096 + 128


def test_a_dense_leaf_that_is_written_whole_is_given_back() -> None:
    block_map, _ = map_of(2 * RANGE_BLOCKS, 12, [(block, 1, location_of(1, 0)) for block in range(0, 512, 2)])
    assert block_map.memory_bytes > 4096 + 4096
    block_map.set(0, RANGE_BLOCKS, ZERO)
    assert block_map.memory_bytes < 4096 + 128


def test_a_dense_leaf_that_trims_leave_nearly_empty_becomes_small_again() -> None:
    block_map, locations = map_of(2 * RANGE_BLOCKS, 12, [(block, 1, location_of(1, 0)) for block in range(0, 512, 2)])
    block_map.set(20, 492, HOLE)
    locations[20:512] = [HOLE] * 492
    assert_same(block_map, locations)
    assert block_map.memory_bytes < 4096 + 512


def test_an_empty_map_of_the_largest_disk_costs_little_and_is_walked_at_once() -> None:
    block_map = BlockMap((64 << 40) >> 12)
    assert block_map.next(0, len(block_map)) is None
    assert block_map.memory_bytes < 64 << 10
    last = len(block_map) - 1
    block_map.set(last, 1, location_of(1, 1))
    assert block_map.runs().tolist() == [(last, 1, location_of(1, 1))]


def test_walks_cross_the_borders_of_what_was_never_touched() -> None:
    entries_of_a_word = 64 * ENTRIES_OF_A_TOUCHED_BIT
    last = 3 * entries_of_a_word + 700
    ranges = [0, 511, 512, 513, 1023, 1024, 5 * ENTRIES_OF_A_TOUCHED_BIT, entries_of_a_word - 1]
    ranges += [entries_of_a_word, 3 * entries_of_a_word, last]
    block_map = BlockMap((last + 100) * RANGE_BLOCKS)
    for number in ranges:
        block_map.set(number * RANGE_BLOCKS + 3, 2, location_of(1, number))
    expected = [(number * RANGE_BLOCKS + 3, 2, location_of(1, number)) for number in ranges]
    assert block_map.runs().tolist() == expected
    for (before, _, _), after in pairwise(expected):
        assert block_map.next(before + 2, len(block_map)) == after
    block_map.set(0, len(block_map), HOLE)
    assert block_map.runs().tolist() == []


def test_runs_join_across_ranges_to_one() -> None:
    block_map = BlockMap(1 << 20)
    block_map.set(5, 1 << 19, location_of(3, 11))
    runs = block_map.runs()
    assert runs.dtype == dtypes.LOCATION_RUN
    assert runs.tolist() == [(5, 1 << 19, location_of(3, 11))]


def test_scattered_blocks_cost_at_most_sixteen_bytes_each_at_thirty_in_a_range() -> None:
    block_count = (1 << 30) >> 12
    block_map = BlockMap(block_count)
    blocks = np.random.default_rng(1).choice(block_count, size=(block_count * 30) // RANGE_BLOCKS, replace=False)
    for slot, block in enumerate(blocks.tolist()):
        block_map.set(block, 1, location_of(1, slot))
    assert block_map.memory_bytes <= 16 * len(blocks)


@pytest.mark.parametrize(("block_count", "block_shift"), [(1, 11), (1, 22), (1 << 52, 12), (1 << 63, 21)])
def test_an_impossible_disk_is_refused(block_count: int, block_shift: int) -> None:
    with pytest.raises(OSError, match="Invalid argument") as refusal:
        BlockMap(block_count, block_shift)
    assert refusal.value.errno == errno.EINVAL


def test_a_resize_past_the_largest_disk_is_refused_and_changes_nothing() -> None:
    block_map, locations = map_of(10, 12, [(3, 4, ZERO)])
    with pytest.raises(OSError, match="Invalid argument"):
        block_map.resize(1 << 52)
    assert_same(block_map, locations)


def test_shrinking_over_mapped_blocks_is_refused() -> None:
    block_map, locations = map_of(10, 12, [(3, 4, ZERO)])
    with pytest.raises(ValueError, match="block 5 is past the new end"):
        block_map.resize(5)
    assert_same(block_map, locations)


@pytest.mark.parametrize(("block_index", "block_count"), [(10, 1), (9, 2), (2, (1 << 64) - 1)])
def test_blocks_past_the_end_are_refused(block_index: int, block_count: int) -> None:
    block_map = BlockMap(10)
    with pytest.raises(ValueError, match="pass the end of the map at 10"):
        block_map.set(block_index, block_count, ZERO)
    with pytest.raises(ValueError, match="pass the end"):
        block_map.lookup(10)
    with pytest.raises(ValueError, match="past the end"):
        block_map.lookup_many([1, 10])


@pytest.mark.parametrize("location", [1, ZERO + 1, 1 << 48, location_of(1, 0xFFFFFFFF)])
def test_what_is_not_a_location_is_refused(location: int) -> None:
    block_map = BlockMap(10)
    with pytest.raises(ValueError, match=r"not a location|pass the last slot"):
        block_map.set(0, 1, location)
    assert block_map.runs().tolist() == []


def test_a_closed_map_raises_and_closes_again() -> None:
    block_map = BlockMap(10)
    block_map.close()
    block_map.close()
    with pytest.raises(StateError, match="closed"):
        block_map.lookup(0)
    with pytest.raises(StateError, match="closed"):
        BlockMap(10).fold(block_map)
