"""Tables of extents against arrays that have, for each byte of a small disk, what it shows."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onionskin.base.states import DATA, HOLE, ZERO
from onionskin.kernels._extents import Extents

DISK_BYTES = 200
NOTHING = -1

Row = tuple[int, int, int, int, int]


@st.composite
def tables(draw: st.DrawFn) -> Extents:
    rows: list[Row] = []
    at = draw(st.integers(0, 20))
    for _ in range(draw(st.integers(0, 10))):
        at += draw(st.sampled_from([0, 0, 1, 7]))
        length = min(draw(st.integers(1, 20)), DISK_BYTES - at)
        if length <= 0:
            break
        state = draw(st.sampled_from([HOLE, DATA, ZERO]))
        place = draw(st.sampled_from([at, 50])) if state == DATA else 0
        rows.append((at, length, state, draw(st.integers(0, 2)), place))
        at += length
    return Extents.of(rows)


def shown(extents: Extents) -> np.ndarray:
    """Return state, source and place of each byte."""
    found = np.full((3, DISK_BYTES), NOTHING)
    for offset, length, state, source, place in extents:
        part = slice(offset, offset + length)
        assert length > 0 and (found[0, offset:] == NOTHING).all(), "extents are in order, and do not overlap"
        found[0, part], found[1, part] = state, source
        found[2, part] = np.arange(place, place + length) if state == DATA else 0
    return found


def covered(extents: Extents) -> np.ndarray:
    mask: np.ndarray = shown(extents)[0] != NOTHING
    return mask


@given(tables(), tables())
def test_over_others_extents_show_themselves_and_in_their_gaps_the_others(upper: Extents, lower: Extents) -> None:
    expected = np.where(covered(upper), shown(upper), shown(lower))
    assert (shown(upper.over(lower)) == expected).all()


@given(tables(), tables())
def test_within_others_extents_show_what_both_cover(extents: Extents, ranges: Extents) -> None:
    expected = np.where(covered(ranges), shown(extents), NOTHING)
    assert (shown(extents.within(ranges)) == expected).all()


@given(tables(), st.integers(0, 2))
def test_extents_are_chosen_by_state_and_by_source(extents: Extents, chosen: int) -> None:
    state, source, _ = shown(extents)
    assert (shown(extents.only(chosen)) == np.where(state == chosen, shown(extents), NOTHING)).all()
    assert (shown(extents.from_source(chosen)) == np.where(source == chosen, shown(extents), NOTHING)).all()
    assert extents.sources() == set(source[source != NOTHING].tolist())


@given(tables())
def test_what_is_joined_shows_the_same_in_as_few_extents_as_can_be(extents: Extents) -> None:
    joined = extents.joined()
    state, source, place = shown(extents)
    goes_on = (state[1:] == state[:-1]) & (source[1:] == source[:-1])
    goes_on &= (state[1:] != DATA) | (place[1:] == place[:-1] + 1)
    begins = (state != NOTHING) & ~np.concatenate(([False], goes_on))
    assert (shown(joined) == shown(extents)).all()
    assert [row[0] for row in joined] == np.flatnonzero(begins).tolist()


@given(tables())
def test_the_ranges_of_extents_cover_the_same_bytes_and_do_not_touch(extents: Extents) -> None:
    ranges = extents.ranges()
    assert (covered(ranges) == covered(extents)).all()
    edges = np.diff(np.concatenate(([False], covered(extents), [False])).astype(int))
    assert [row[:3] for row in ranges] == [
        (first, end - first, HOLE)
        for first, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
    ]


@given(tables(), st.integers(0, 2 * DISK_BYTES))
def test_bytes_before_an_offset_are_counted_and_found_again(extents: Extents, offset: int) -> None:
    mask = covered(extents)
    assert extents.total_bytes == mask.sum() and extents.bytes_before(offset) == mask[:offset].sum()
    assert extents.end == max((row[0] + row[1] for row in extents), default=0)
    for count, at in enumerate(np.flatnonzero(mask).tolist(), 1):
        assert extents.offset_after(count) == at + 1
    for count in (0, extents.total_bytes + 1):
        with pytest.raises(ValueError, match="give 1 at least"):
            extents.offset_after(count)


@given(tables(), st.integers(0, 4))
def test_the_bytes_of_each_source_are_counted(extents: Extents, count: int) -> None:
    _, source, _ = shown(extents)
    assert extents.bytes_of_sources(count) == [int((source == number).sum()) for number in range(count)]


@given(tables(), st.integers(1, DISK_BYTES))
def test_a_cell_shows_the_source_that_has_most_bytes_of_its_best_state(extents: Extents, count: int) -> None:
    if count > extents.end:
        with pytest.raises(ValueError, match="no more than there are bytes"):
            extents.cells(count)
        return
    edges, states, sources, most = extents.cells(count)
    assert edges == [number * extents.end // count for number in range(count + 1)]
    state, source, _ = shown(extents)
    for cell, (first, end) in enumerate(pairwise(edges)):
        part = [
            (s, n) for s, n in zip(state[first:end].tolist(), source[first:end].tolist(), strict=True) if s != NOTHING
        ]
        best = min((s for s, _ in part), key=[DATA, ZERO, HOLE].index, default=HOLE)
        counts = Counter(n for s, n in part if s == best) or Counter({0: 0})
        chosen = min(counts, key=lambda n: (-counts[n], n))
        assert (states[cell], sources[cell], most[cell]) == (best, chosen, counts[chosen])


def test_cells_are_one_at_least() -> None:
    for extents in (Extents(), Extents([(0, 4096)])):
        with pytest.raises(ValueError, match="give 1 at least"):
            extents.cells(0)


@given(tables(), st.sampled_from([1, 8]))
def test_packed_extents_begin_at_whole_units(extents: Extents, unit: int) -> None:
    at = 4096
    for row, packed in zip(extents, extents.packed(4096, unit), strict=True):
        assert packed == (at, *row[1:])
        at += -(-row[1] // unit) * unit
    with pytest.raises(ValueError, match="units of 0 bytes"):
        extents.packed(0, 0)


@given(tables())
def test_a_copy_has_the_extents_whose_source_has_a_descriptor(extents: Extents) -> None:
    fields = [("source", "<i4"), ("to", "<i4"), ("place", "<u8"), ("offset", "<u8"), ("length", "<u8")]
    copies = np.frombuffer(extents.copies(9, {0: -1, 2: 7}), fields).tolist()
    descriptors = {0: -1, 2: 7}
    assert copies == [
        (descriptors[source], 9, place, offset, length)
        for offset, length, _, source, place in extents
        if source in descriptors
    ]
    with pytest.raises(ValueError, match="no number of a segment"):
        extents.copies(9, {1 << 16: 3})


@given(tables())
def test_an_array_has_the_fields_that_are_asked_for(extents: Extents) -> None:
    assert extents.array().tolist() == [row[:3] for row in extents]
    with_source = extents.array(np.dtype([("offset", "<u8"), ("source", "<u2")]))
    assert with_source.tolist() == [(row[0], row[3]) for row in extents]
    with_source["offset"] = 1  # it is the caller's own


@given(st.lists(st.tuples(st.integers(0, DISK_BYTES), st.integers(0, 30)), max_size=10))
def test_ranges_that_overlap_or_touch_become_one_extent(pairs: list[tuple[int, int]]) -> None:
    ranges = [(first, min(first + length, DISK_BYTES)) for first, length in sorted(pairs)]
    expected = np.zeros(DISK_BYTES, bool)
    for first, end in ranges:
        expected[first:end] = True
    made = Extents(ranges, state=DATA, source=5)
    assert (covered(made) == expected).all() and len(made) == len(made.ranges())
    assert all(place == offset and (state, source) == (DATA, 5) for offset, _, state, source, place in made)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="not in order"):
        Extents([(10, 20), (5, 30)])
    with pytest.raises(ValueError, match="too far"):
        Extents([(0, (1 << 63) + 1)])
    for rows in (
        [(0, 0, DATA, 0, 0)],
        [(0, 8, DATA, 0, 0), (7, 1, DATA, 0, 0)],
        [((1 << 63) - 1, 2, DATA, 0, 0)],
        [(1 << 63, (1 << 63) + 5, DATA, 0, 0)],
        [(0, (1 << 64) - 1, DATA, 0, 0)],
    ):
        with pytest.raises(ValueError, match="empty, out of order, or too far"):
            Extents.of(rows)
    with pytest.raises(TypeError):
        Extents().over(None)  # type: ignore[arg-type]
