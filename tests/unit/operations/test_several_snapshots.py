"""Several snapshots that are dropped together: one transaction, and what it frees is what was said before."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.operations.snapshots import branches_of

BLOCK = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        yield store


@pytest.fixture
def web(store: onionskin.Store) -> onionskin.Volume:
    """A trunk a, b, c and the head; on a also x and y. Each has a block of its own, and block 0."""
    web = store.create("web", size="1M")
    for number, name in enumerate("axybc", 1):
        if name == "b":
            web.revert("a")
        web.write(number * BLOCK, name.encode() * BLOCK)
        web.write(0, name.encode() * BLOCK)
        web.snapshot(name)
    return web


def held(store: onionskin.Store) -> int:
    store.finish_work()
    return store.info("web").used_bytes or 0


def test_the_names_go_in_one_transaction(store: onionskin.Store, web: onionskin.Volume) -> None:
    changes: list[None] = []
    change = store._opened.change
    store._opened.change = lambda of: (changes.append(None), change(of))[1]  # type: ignore[method-assign]
    web.merge(["c", "a"])
    names_seen = [one.name for one in web.snapshots]
    assert names_seen == ["x", "y", "b"]
    first = len(changes)
    web.discard(["x", "y"])
    assert [one.name for one in web.snapshots] == ["b"]
    assert first >= 1 and web.read(0, 1) == b"c"


def test_a_failure_leaves_all_names(store: onionskin.Store, web: onionskin.Volume) -> None:
    store.hold("web", "y", "backup")
    for drop in (web.merge, web.discard):
        with pytest.raises(onionskin.StateError, match="web@y by 'backup'"):
            drop(["x", "y"])
        with pytest.raises(onionskin.SnapshotNotFoundError):
            drop(["x", "none"])
        with pytest.raises(ValueError, match="no snapshot is named"):
            drop([])
    assert [one.name for one in web.snapshots] == ["a", "x", "y", "b", "c"]


def test_several_branches_are_discarded_and_the_head_goes_to_the_root_of_its_own(
    store: onionskin.Store, web: onionskin.Volume
) -> None:
    web.write(7 * BLOCK, b"head")
    web.discard(["x", "b"], recursive=True)
    assert [one.name for one in web.snapshots] == ["a"]
    assert (web.read(0, 1), web.read(7 * BLOCK, 4)) == (b"b", bytes(4))
    assert store.check() == []


@pytest.mark.parametrize(
    "names", [["a"], ["b"], ["c"], ["y"], ["x", "y"], ["a", "b"], ["a", "b", "c"], ["a", "x", "y"], [*"axybc"]]
)
def test_a_merge_frees_what_was_said(store: onionskin.Store, web: onionskin.Volume, names: list[str]) -> None:
    web.flush()
    said = store.bytes_freed_by_merge("web", names)
    before = held(store)
    web.merge(names)
    assert before - held(store) == said
    assert web.read(0, 1) == b"c"


def test_what_a_merge_frees_is_unknown_where_a_map_is_damaged(store: onionskin.Store, web: onionskin.Volume) -> None:
    web.close()
    for path in (store.path / "layers").iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    assert store.bytes_freed_by_merge("web", ["a", "b"]) is None
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.bytes_freed_by_merge("web", "none")


def test_a_branch_is_found_also_where_the_numbers_of_its_snapshots_are_the_wrong_way_round(
    store: onionskin.Store, web: onionskin.Volume
) -> None:
    catalog = store._opened.catalog
    rows = {row.name: row for row in catalog.snapshots_of(catalog.volume("web").id)}
    with catalog.transaction():
        catalog.update_snapshot(rows["y"].layer, number=0)
    again = catalog.snapshots_of(catalog.volume("web").id)
    assert list(branches_of(catalog, [row for row in again if row.name in "xy"])) == [rows["x"].layer]


def test_several_are_held_and_let_go_or_none_is(store: onionskin.Store, web: onionskin.Volume) -> None:
    store.hold("web", ["a", "b"], "backup")
    with pytest.raises(onionskin.StateError, match="web@b is held"):
        store.hold("web", ["c", "b"], "backup")
    with pytest.raises(onionskin.StateError, match="web@c is not held"):
        store.unhold("web", ["a", "c"], "backup")
    assert [one.snapshot for one in store.holds("web")] == ["a", "b"]
    store.unhold("web", ("b", "a", "b"), "backup")
    assert store.holds("web") == []


@pytest.mark.parametrize("names", [None, 3, b"a", [None], [b"a"]])
def test_what_is_no_name_is_refused_by_its_type(web: onionskin.Volume, names: object) -> None:
    for verb in (web.discard, web.merge):
        with pytest.raises(TypeError, match="the name of a snapshot is a str"):
            verb(names)  # type: ignore[arg-type]
    assert len(web.snapshots) == 5
