"""Many rows are looked at by column before they are written: what is refused alone is refused among others too."""

from typing import Any

import pytest

from onionskin.catalog.connection import check_rows
from onionskin.catalog.rows import COLUMNS, LayerRow, SegmentRow, VolumeRow, new_ids
from onionskin.catalog.schema import VALUES

CANDIDATES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1 << 62, 1 << 63, 4096, 5000, 1.0, "", "web", "a\0b", "\ud800", "ä", "own", "zero"),
    *("scrub", "live", b"", bytes(15), bytes(16), bytes(17), bytearray(16)),
)


@pytest.mark.parametrize("kind", VALUES)
def test_many_values_hold_if_each_of_them_does(kind: type) -> None:
    for column, condition in VALUES[kind].items():
        sound = [value for value in CANDIDATES if condition.holds(value)]
        assert sound and condition.all_hold(sound * 3)
        for value in CANDIDATES:
            assert condition.all_hold([*sound, value]) == condition.holds(value), (column, value)


def test_a_bad_value_among_a_hundred_rows_is_named(tmp_path: object) -> None:
    ids = new_ids(100)
    rows = [VolumeRow(id, f"job-{number}", id, 1) for number, id in enumerate(ids)]
    check_rows(VolumeRow, COLUMNS[VolumeRow], rows)
    rows[50] = rows[50]._replace(name="a\0b")
    with pytest.raises(ValueError, match="name of volumes cannot be"):
        check_rows(VolumeRow, COLUMNS[VolumeRow], rows)


def test_a_bad_value_that_all_rows_share_is_found() -> None:
    rows = [SegmentRow(id, id, "other", 0, 1) for id in new_ids(3)]
    with pytest.raises(ValueError, match="role of segments"):
        check_rows(SegmentRow, COLUMNS[SegmentRow], rows)


def test_ids_that_are_drawn_together_differ_in_what_their_locks_go_by() -> None:
    ids = new_ids(10_000)
    assert {len(id) for id in ids} == {16}
    assert len({id[:7] for id in ids}) == len(ids) and len({id[7:] for id in ids}) == len(ids)
    assert not {id[:7] for id in ids} & {id[:7] for id in new_ids(10_000)}


def test_the_rows_are_tuples_in_the_order_of_their_columns() -> None:
    assert all(kind._fields == COLUMNS[kind] for kind in (LayerRow, SegmentRow, VolumeRow))
