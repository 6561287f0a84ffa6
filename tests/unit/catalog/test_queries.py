"""What the queries of a catalog return, where its tables leave room for a mistake."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from onionskin.catalog import BaseRow, Catalog, LayerRow, SegmentRow, SnapshotRow, VolumeRow

MANY = 1201  # more than one statement takes


def an_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.db", create=True)
    yield catalog
    catalog.close()


def a_layer(
    number: int, parent: int | None = None, *, base: int | None = None, sealed: int = 1, map_length: int = 0
) -> LayerRow:
    return LayerRow(
        an_id(number),
        None if parent is None else an_id(parent),
        None if base is None else an_id(base),
        4096,
        "release",
        1 << 20,
        sealed,
        an_id(number),
        number,
        map_length,
        0,
        0,
        1000 - number % 1000,
    )


def insert(catalog: Catalog, *rows: BaseRow | LayerRow | SegmentRow | VolumeRow | SnapshotRow) -> None:
    with catalog.transaction():
        for row in rows:
            catalog.insert(row)


def ids(rows: list[LayerRow]) -> set[int]:
    return {int.from_bytes(row.id, "big") for row in rows}


def a_volume(number: int, name: str, head: int) -> VolumeRow:
    return VolumeRow(an_id(number), name, an_id(head), 0)


def a_snapshot(volume: int, name: str, layer: int, number: int) -> SnapshotRow:
    return SnapshotRow(an_id(volume), name, an_id(layer), an_id(layer), 1000 - number, "", number)


def test_an_only_child_is_found_only_where_nothing_else_stands_on_the_layer(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2, 1), a_layer(3, 2), a_layer(4, 2))
    assert catalog.only_child_of(an_id(1)) == a_layer(2, 1)
    assert catalog.only_child_of(an_id(2)) is None
    assert catalog.only_child_of(an_id(3)) is None
    assert len(catalog.children_of(an_id(2), at_most=1)) == 1
    assert ids(catalog.children_of(an_id(2))) == {3, 4}
    assert catalog.child_count(an_id(2)) == 2


def test_layers_above_are_all_that_stand_on_a_layer_and_not_itself(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2, 1), a_layer(3, 2), a_layer(4, 2), a_layer(5))
    assert ids(catalog.layers_above(an_id(1))) == {2, 3, 4}
    assert catalog.parents() == {an_id(1): (None, None), an_id(2): (an_id(1), None)}


def test_an_unwritten_head_is_one_of_another_volume_and_short(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2, 1, sealed=0, map_length=64), a_layer(3, 1, sealed=0, map_length=65))
    insert(catalog, a_layer(4, 1, sealed=1))
    assert catalog.has_unwritten_head_on(an_id(1), 64, besides=an_id(3))
    assert not catalog.has_unwritten_head_on(an_id(1), 64, besides=an_id(2))
    assert not catalog.has_unwritten_head_on(an_id(2), 64, besides=an_id(3))


def test_the_layers_of_a_volume_are_those_under_its_head_and_its_snapshots(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2, 1), a_layer(3, 1, sealed=0), a_layer(4, 2, sealed=0), a_layer(5, 2))
    insert(catalog, a_volume(1, "web", 3), a_volume(2, "db", 4), a_snapshot(1, "b", 2, 1))
    assert ids(catalog.layers_of_volume(an_id(1))) == {1, 2, 3}
    assert ids(catalog.unnamed_of_volume(an_id(1))) == {1}
    assert ids(catalog.unnamed_in_chain(an_id(4))) == {1, 4}
    assert catalog.only_children_over_volume(an_id(2)) == []
    insert(catalog, a_layer(6, 5))
    assert catalog.only_children_over_volume(an_id(1)) == []
    with catalog.transaction():
        catalog.remove_layer(an_id(6))
        catalog.remove_layer(an_id(5))
    assert catalog.only_children_over_volume(an_id(1)) == [an_id(4)]


def test_names_of_layers_are_found_for_more_layers_than_one_statement_takes(catalog: Catalog) -> None:
    insert(catalog, *(a_layer(number) for number in range(1, MANY + 1)), a_volume(1, "web", MANY))
    insert(catalog, *(a_snapshot(1, f"s{number}", number, number) for number in range(1, MANY)))
    layers = [an_id(number) for number in range(1, MANY + 1)]
    assert len(catalog.snapshots_of_layers(layers)) == MANY - 1
    assert catalog.snapshots_of_layers(layers, besides=an_id(1)) == []
    assert catalog.volumes_with_heads(layers) == [a_volume(1, "web", MANY)]
    assert catalog.volumes_with_heads(layers, besides=an_id(1)) == []


def test_snapshots_come_in_the_order_of_taking_whatever_the_clock_and_the_names_say(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2), a_layer(3), a_layer(4, sealed=0), a_volume(1, "web", 4))
    insert(catalog, a_snapshot(1, "c", 1, 1), a_snapshot(1, "a", 2, 2), a_snapshot(1, "b", 3, 3))
    assert [row.name for row in catalog.snapshots_of(an_id(1))] == ["c", "a", "b"]
    assert [row.name for row in catalog.snapshots_named_after(an_id(1), "", at_most=2)] == ["a", "b"]
    assert [row.name for row in catalog.snapshots_named_after(an_id(1), "b", at_most=2)] == ["c"]
    assert (catalog.snapshot_count(an_id(1)), catalog.snapshot_counts()) == (3, {an_id(1): 3})
    with catalog.transaction():
        catalog.remove_snapshot(an_id(1), "a")
        catalog.remove_snapshot_of_layer(an_id(3))
    assert [row.name for row in catalog.snapshots_of(an_id(1))] == ["c"]
    assert (catalog.is_named(an_id(1)), catalog.is_named(an_id(3))) == (True, False)


def test_only_the_nearest_snapshot_of_the_volume_itself_is_named(catalog: Catalog) -> None:
    insert(catalog, a_layer(1), a_layer(2, 1), a_layer(3, 2), a_layer(4, 3, sealed=0), a_layer(5, 3, sealed=0))
    insert(catalog, a_volume(1, "web", 4), a_volume(2, "db", 5), a_snapshot(1, "a", 1, 1), a_snapshot(2, "b", 2, 2))
    assert catalog.nearest_snapshot_of(an_id(1), an_id(3)) == a_snapshot(1, "a", 1, 1)
    assert catalog.nearest_snapshot_of(an_id(2), an_id(3)) == a_snapshot(2, "b", 2, 2)
    assert {row.name for row in catalog.snapshots_in_chain(an_id(3))} == {"a", "b"}


def test_a_merge_into_the_base_is_never_reclaimed(catalog: Catalog) -> None:
    with catalog.transaction():
        merge = catalog.add_work("base-merge", an_id(1), 0, "zero")
    assert catalog.reclaims() == catalog.reclaims("zero") == []
    assert not catalog.has_reclaims()
    assert not catalog.has_reclaims("zero")
    assert catalog.base_merges() == [merge]
    assert catalog.base_merge_of(an_id(1)) == merge
    with catalog.transaction():
        catalog.remove_base_merge_of(an_id(1))
    assert catalog.base_merges() == []


def test_what_is_to_be_reclaimed_comes_in_the_order_in_which_it_was_noted(catalog: Catalog) -> None:
    with catalog.transaction():
        noted = [catalog.add_work("map", an_id(3), 1, "release"), catalog.add_work("scrub", an_id(2), 2, "zero")]
        noted.append(catalog.add_work("segment", an_id(1), 3, "zero"))
    assert catalog.reclaims() == noted
    assert catalog.reclaims("zero") == noted[1:]
    assert catalog.has_reclaims("release")
    assert catalog.slot_work_of([an_id(1), an_id(2), an_id(3)]) == [noted[1]]
    with catalog.transaction():
        catalog.remove_work(noted[0].id)
    assert not catalog.has_reclaims("release")
    assert catalog.work_with_ids(row.id for row in noted) == noted[1:]


def test_segments_are_told_apart_by_their_roles(catalog: Catalog) -> None:
    own, spare, sealed = (
        SegmentRow(an_id(n), an_id(1), role, 0, n) for n, role in enumerate(["own", "spare", "sealed"], 1)
    )
    insert(catalog, a_layer(1, sealed=0), a_layer(2), own, spare, sealed)
    assert catalog.sealed_segments_of(an_id(1)) == [sealed]
    assert catalog.spares_of(an_id(1)) == [spare]
    assert catalog.spare_of(an_id(1)) == spare
    assert catalog.segment_count(an_id(1)) == 3
    with catalog.transaction():
        catalog.move_segments(an_id(1), an_id(2))
        catalog.remove_segment(own.id)
    assert {row.id for row in catalog.segments_of_layer(an_id(2))} == {spare.id, sealed.id}
    assert (catalog.has_segment(own.id), catalog.segment_with_id(own.id)) == (False, None)


def test_a_base_is_needed_as_long_as_a_layer_stands_on_it(catalog: Catalog) -> None:
    insert(catalog, *(BaseRow(an_id(n), path, 1, 1, 1, None) for n, path in ((1, "/b"), (2, "/a"), (3, "/b"))))
    insert(catalog, a_layer(1, base=1), a_layer(2, base=2))
    assert {row.id for row in catalog.bases_at("/b")} == {an_id(1), an_id(3)}
    assert [row.path for row in catalog.bases_by_path()] == ["/a", "/b", "/b"]
    assert ids(catalog.layers_standing_on([an_id(1), an_id(3)])) == {1}
    assert (catalog.is_base_needed(an_id(1)), catalog.is_base_needed(an_id(3))) == (True, False)


def test_a_staged_volume_is_found_by_its_name_only_where_those_are_asked_for(catalog: Catalog) -> None:
    insert(catalog, *(a_layer(n, sealed=0) for n in (1, 2, 3)))
    insert(catalog, a_volume(1, "web", 1), a_volume(2, "@staged", 2), a_volume(3, "db", 3))
    assert [row.name for row in catalog.staged_volumes()] == ["@staged"]
    assert [row[1] for row in catalog.listed_heads()] == ["db", "web"]
    assert [row.name for row in catalog.volumes_by_name()] == ["@staged", "db", "web"]
    with pytest.raises(LookupError, match="no volume '@staged'"):
        catalog.volume("@staged")


def test_forks_of_a_volume_are_its_layers_without_a_name_that_something_else_stands_on(catalog: Catalog) -> None:
    insert(catalog, *(a_layer(1), a_layer(2, 1), a_layer(3, 2, sealed=0), a_layer(4, 1, sealed=0)))
    insert(catalog, a_volume(1, "web", 3), a_volume(2, "db", 4))
    assert catalog.forks_of_volume(an_id(1)) == catalog.forks_of_volume(an_id(2)) == [an_id(1)]
    insert(catalog, a_snapshot(1, "a", 1, 1))
    assert catalog.forks_of_volume(an_id(1)) == []
    assert catalog.volumes_over_layers() == [(an_id(1), an_id(2), an_id(2)), (an_id(2), an_id(1), an_id(1))]
    assert catalog.volumes_of_names() == {an_id(1): an_id(1)}


def test_parents_and_layers_are_found_of_more_than_one_statement_takes(catalog: Catalog) -> None:
    insert(catalog, *(a_layer(n, n - 1 if n > 1 else None) for n in range(1, MANY + 1)))
    insert(catalog, *(SegmentRow(an_id(n), an_id(n), "sealed", 0, MANY + n) for n in range(1, MANY + 1)))
    every = [an_id(n) for n in range(1, MANY + 1)]
    assert sorted(catalog.parents_among(every)) == every[:-1]
    assert sorted(catalog.layers_of_segments(every)) == [(id, id) for id in every]
