"""What forks hold alone, share, and hold together: against a plain model that deletes them and measures what comes back."""

import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.examples import examples

import onionskin
from onionskin.catalog import LayerRow
from onionskin.operations import fork_usage
from onionskin.storage.block_maps import open_map

BLOCK = 4096
BLOCKS = 12


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            web.write(0, b"a" * 8 * BLOCK)
            web.snapshot("clean")
        yield store


def write(store: onionskin.Store, name: str, first: int, count: int) -> None:
    with store.open(name) as volume:
        volume.write(first * BLOCK, b"x" * count * BLOCK)


def in_blocks(found: list[onionskin.ForkUsage]) -> dict[str | None, tuple[int, int]]:
    return {one.fork: (one.private_bytes // BLOCK, one.shared_bytes // BLOCK) for one in found}


# ---- a plain model ----


def held(store: onionskin.Store, layers: list[LayerRow]) -> int:
    total = 0
    for layer in layers:
        with closing(open_map(store._opened, layer)) as loaded:
            total += int(loaded.count()[0]) * layer.block_size
    return total


def settle(store: onionskin.Store) -> int:
    """Fold all that a deletion left to the next opening; returns the data that the store holds."""
    for name in store:
        store.open(name).close()
    return held(store, store._opened.catalog.rows(LayerRow))


def reached(store: onionskin.Store, names: list[str]) -> int:
    """Return the data of the layers that volumes stand on."""
    catalog = store._opened.catalog
    found = {row.id: row for name in names for row in catalog.layers_of_volume(catalog.volume(name).id)}
    return held(store, list(found.values()))


def by_deleting(path: Path, names: list[str]) -> tuple[int, int] | None:
    """Delete volumes in a copy of the store; returns what comes back and what stays, None where that is refused."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    try:
        with onionskin.Store(copy) as store:
            before, stood_on = held(store, store._opened.catalog.rows(LayerRow)), reached(store, names)
            try:
                store.delete(*names, recursive=True)
            except onionskin.StateError:
                return None
            freed = before - settle(store)
            return freed, stood_on - freed
    finally:
        shutil.rmtree(copy)


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "cut", "cut", "snapshot", "fork", "merge", "delete"]),
        st.sampled_from([0, -1, -1, 1]),  # web, which comes last, and the first forks
        st.integers(0, BLOCKS - 1),
        st.integers(1, 4),
    ),
    min_size=8,
    max_size=16,
)


def take_step(store: onionskin.Store, verb: str, which: int, first: int, count: int) -> None:
    names = sorted(store)
    name = names[which % len(names)]
    snapshots = [one.name for one in store.snapshots(name)]
    if verb == "write":
        write(store, name, first, count)
    elif verb == "snapshot":
        with store.open(name) as volume:
            volume.snapshot(f"s{len(snapshots)}-{which}-{first}-{count}")
    elif verb == "fork" and snapshots:
        store.fork(name, snapshots[first % len(snapshots)], count=count, pattern="f{n}")
    elif verb == "cut":
        store.fork(name, count=count, pattern="f{n}")
    elif verb == "merge" and snapshots:
        with store.open(name) as volume:
            volume.merge(snapshots[first % len(snapshots)])
    elif verb == "delete" and name != "web":
        store.delete(name, recursive=True)


@pytest.mark.slow
@settings(max_examples=examples(24), deadline=None, phases=[Phase.explicit, Phase.generate])  # to shrink takes minutes
@given(steps)
def test_what_is_private_is_what_comes_back_and_what_is_shared_is_what_stays(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]]
) -> None:
    room = tmp_path_factory.mktemp("forks")
    try:
        with onionskin.Store(room / "store") as store:
            store.create("web", size=BLOCKS * 2 * BLOCK).close()
            write(store, "web", 0, BLOCKS)
            for step in steps:
                with suppress(onionskin.StateError, onionskin.OnionskinError):
                    take_step(store, *step)
            settle(store)
            asked = [(name, one.name) for name in store for one in store.snapshots(name)] + [
                (name, None) for name in store
            ]
            found = {(name, snapshot): store.usage_of_forks(name, snapshot) for name, snapshot in asked}
            forks = {source: store.forks_of(*source) for source in asked}
        measured: dict[tuple[str, ...], tuple[int, int] | None] = {(): (0, 0)}
        for source, usages in found.items():
            assert [one.fork for one in usages] == [*forks[source], None]
            for one in usages:
                names = tuple(forks[source] if one.fork is None else [one.fork])
                if names not in measured:
                    measured[names] = by_deleting(room / "store", list(names))
                assert measured[names] in (None, (one.private_bytes, one.shared_bytes)), (source, one)
    finally:
        shutil.rmtree(room)


# ---- cases ----


def test_forks_of_a_snapshot_share_it_and_hold_what_they_wrote(store: onionskin.Store) -> None:
    store.fork("web@clean", names=["a", "b", "c"])
    write(store, "a", 0, 3)
    write(store, "b", 4, 2)
    expected = {"a": (3, 8), "b": (2, 8), "c": (0, 8), None: (5, 8)}
    assert in_blocks(store.usage_of_forks("web@clean")) == expected
    assert in_blocks(store.usage_of_forks("web")) == expected


def test_what_only_forks_read_of_a_cut_is_theirs_together_and_of_the_last_alone(store: onionskin.Store) -> None:
    with store.open("web") as web:
        web.write(0, b"b" * 4 * BLOCK)
        store.fork("web", names=["a", "b"])
        web.write(0, b"c" * 3 * BLOCK)
    assert in_blocks(store.usage_of_forks("web")) == {"a": (0, 12), "b": (0, 12), None: (3, 9)}
    store.delete("a")
    assert in_blocks(store.usage_of_forks("web")) == {"b": (3, 9), None: (3, 9)}


def test_a_clone_of_a_forks_snapshot_keeps_that_from_being_private(store: onionskin.Store) -> None:
    store.fork("web@clean", names=["a"])
    with store.open("a") as a:
        a.write(0, b"b" * 2 * BLOCK)
        a.snapshot("s")
        a.write(0, b"c" * BLOCK)
    store.clone("a@s", "other")
    assert in_blocks(store.usage_of_forks("web@clean")) == {"a": (1, 10), None: (1, 10)}


def test_a_snapshot_without_forks_has_nothing_of_theirs(store: onionskin.Store) -> None:
    assert in_blocks(store.usage_of_forks("web@clean")) == {None: (0, 0)}
    with pytest.raises(onionskin.SnapshotNotFoundError):
        store.usage_of_forks("web@gone")


def test_a_thousand_forks_are_each_read_once(store: onionskin.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    names = store.fork("web@clean", count=1000)
    write(store, names[500], 0, 1)
    read: list[bytes] = []
    real = fork_usage.open_map
    monkeypatch.setattr(fork_usage, "open_map", lambda opened, layer: read.append(layer.id) or real(opened, layer))
    statements: list[str] = []
    store._opened.catalog._connection.set_trace_callback(statements.append)
    found = in_blocks(store.usage_of_forks("web@clean"))
    assert found[names[500]] == (1, 8) and found[None] == (1, 8) and found[names[0]] == (0, 8)
    assert len(read) == len(set(read)) == 2  # a fork that nothing was written to has no file
    assert len(statements) < 100
