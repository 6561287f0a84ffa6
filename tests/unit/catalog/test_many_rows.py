"""Many rows are looked at by column before they are written: what is refused alone is refused among others too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onionskin.catalog import Catalog, references
from onionskin.catalog.connection import check_rows
from onionskin.catalog.rows import COLUMNS, LayerRow, LineageRow, SegmentRow, VolumeRow, new_ids
from onionskin.catalog.schema import VALUES

COUNTS = (1, 9, 10, 99, 100, 111, 321)
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


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db", create=True)
    yield opened
    opened.close()


def _copies(count: int) -> list[LineageRow]:
    return [
        LineageRow(id, None, f"job-{number}", "clean", id[::-1], number, None if number % 2 else number)
        for number, id in enumerate(new_ids(count))
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_many_rows_are_written_as_they_are(catalog: Catalog, count: int) -> None:
    rows = _copies(count)
    with catalog.transaction():
        catalog.insert_all(rows)
    assert sorted(catalog.all_sound(LineageRow)) == sorted(rows)


@pytest.mark.parametrize("count", COUNTS)
def test_copies_have_what_is_common_to_them_and_their_own(catalog: Catalog, count: int) -> None:
    rows = [row._replace(guid=bytes(16), dropped_ns=None) for row in _copies(count)]
    common = rows[0]._replace(name="of none", created_ns=77)
    with catalog.transaction():
        catalog.insert_copies(
            common,
            volume=[row.volume for row in rows],
            name=[row.name for row in rows],
            created_ns=range(count),
        )
    assert sorted(catalog.all_sound(LineageRow)) == sorted(rows)


@pytest.mark.parametrize("bad", [{"name": "a\0b"}, {"guid": bytes(15)}, {"dropped_ns": 1.0}])
def test_a_bad_value_that_copies_have_in_common_is_refused(catalog: Catalog, bad: dict[str, Any]) -> None:
    (row,) = _copies(1)
    with catalog.transaction(), pytest.raises(ValueError, match=f"{next(iter(bad))} of lineage cannot be"):
        catalog.insert_copies(row._replace(**bad), volume=new_ids(100))
    assert not catalog.all_sound(LineageRow)


def test_a_bad_value_of_one_of_the_copies_is_refused(catalog: Catalog) -> None:
    (row,) = _copies(1)
    names = [f"job-{number}" for number in range(100)]
    names[50] = ""
    with catalog.transaction(), pytest.raises(ValueError, match="name of lineage cannot be ''"):
        catalog.insert_copies(row, volume=new_ids(100), name=names)
    assert not catalog.all_sound(LineageRow)


def test_columns_of_copies_have_one_length(catalog: Catalog) -> None:
    (row,) = _copies(1)
    with catalog.transaction(), pytest.raises(ValueError, match="zip"):
        catalog.insert_copies(row, volume=new_ids(100), name=["job-1"])
    assert not catalog.all_sound(LineageRow)


def test_the_look_at_references_reads_indexes_and_no_row_of_a_snapshot_that_is_sound(catalog: Catalog) -> None:
    """It is one of a hundred thousand snapshots: with the row of each it takes four times as long."""
    for query in (references._SNAPSHOTS, references._LAYERS, references._BASES):
        plan = [step for *_, step in catalog._connection.execute(f"EXPLAIN QUERY PLAN {query}")]
        through_all = [step for step in plan if step.startswith("SCAN") or "(parent>" in step or "(base>" in step]
        assert through_all and all("COVERING INDEX" in step for step in through_all), plan
