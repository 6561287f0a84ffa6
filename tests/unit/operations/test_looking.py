"""What snapshots hold and differ in, what there is, whether it is sound: against slow references, and what is read for it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

import onionskin
from onionskin.base.limits import HEADER_BYTES
from onionskin.catalog import LayerRow, SegmentRow, SnapshotRow
from onionskin.operations import locked_maps, usage
from onionskin.storage import block_maps
from onionskin.storage.block_maps import empty_map, open_map
from onionskin.storage.chain import read_chain
from onionskin.storage.locks import STORE_BYTE, ByteLocks
from onionskin.storage.open_store import OpenStore

BLOCK = 4096
BLOCKS = 24


# ---- slow references ----


def usage_by_walking(store: onionskin.Store, name: str) -> list[usage.Usage]:
    """For each snapshot by itself, walk the tree and load every map that it asks for."""
    catalog = store._opened.catalog
    volume = catalog.volume(name)
    layers = {row.id: row for row in catalog.rows(LayerRow)}
    rows = catalog.rows(SnapshotRow, "volume = ? ORDER BY created_ns", volume.id)
    names = {row.layer for row in rows}
    ours = set()
    for top in [*names, volume.head]:
        ours |= {layer.id for layer in catalog.chain(top)}

    def held(id: bytes) -> int:
        if id not in ours:
            return 0
        layer_map = open_map(store._opened, layers[id])
        blocks = int(layer_map.count()[0])
        layer_map.close()
        return blocks * layers[id].block_size

    def above(id: bytes) -> Iterator[bytes]:
        for child in [layer.id for layer in layers.values() if layer.parent == id]:
            yield child
            yield from above(child)

    def freed_by_merge(id: bytes) -> int:
        children = [layer for layer in layers.values() if layer.parent == id]
        if len(children) != 1 or children[0].id not in ours:
            return 0
        lower, upper = open_map(store._opened, layers[id]), open_map(store._opened, children[0])
        blocks = int(lower.count_shadowed(upper))
        lower.close()
        upper.close()
        return blocks * layers[id].block_size

    def one(name: str | None, id: bytes) -> usage.Usage:
        own, below = held(id), layers[id].parent
        while below is not None and below not in names:
            own, below = own + held(below), layers[below].parent
        return usage.Usage(name, own, held(id) + sum(map(held, above(id))), freed_by_merge(id) if name else 0)

    return [*(one(row.name, row.layer) for row in rows), one(None, volume.head)]


def states_at(store: onionskin.Store, layer: bytes) -> np.ndarray[Any, Any]:
    """Return the state of each block as the whole chain of a layer has it: 0 where none of its layers says anything."""
    union = empty_map(BLOCK)
    for row in read_chain(store._opened.catalog, layer).layers:
        loaded = open_map(store._opened, row)
        union.fold(loaded)
        loaded.close()
    found = np.zeros(BLOCKS * 2, np.uint8)
    for run in union.runs():
        found[int(run["block_index"]) : int(run["block_index"] + run["block_count"])] = run["state"]
    union.close()
    return found


def touched_by(store: onionskin.Store, layers: set[bytes]) -> np.ndarray[Any, Any]:
    touched = np.zeros(BLOCKS * 2, bool)
    for row in store._opened.catalog.rows(LayerRow):
        if row.id in layers:
            loaded = open_map(store._opened, row)
            for run in loaded.runs():
                touched[int(run["block_index"]) : int(run["block_index"] + run["block_count"])] = True
            loaded.close()
    return touched


def diff_by_blocks(store: onionskin.Store, a: bytes, b: bytes, size_bytes: int) -> dict[int, int]:
    """Return {block: state} of what may differ: what the layers that are not in both chains touch."""
    chains = [{layer.id for layer in read_chain(store._opened.catalog, one).layers} for one in (a, b)]
    touched = touched_by(store, chains[0] ^ chains[1])
    states = states_at(store, b)
    return {block: int(states[block]) for block in range(-(-size_bytes // BLOCK)) if touched[block]}


# ---- stores ----

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(1, 6)),
        st.tuples(st.just("trim"), st.integers(0, BLOCKS - 1), st.integers(1, 6)),
        st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
        st.tuples(st.sampled_from(["revert", "merge", "discard", "clone"]), st.integers(0, 99), st.just(0)),
        st.tuples(st.just("resize"), st.integers(BLOCKS // 2, BLOCKS + 8), st.just(0)),
    ),
    max_size=25,
)


def run(store: onionskin.Store, volume: onionskin.Volume, steps: list[tuple[str, int, int]]) -> None:
    for number, (verb, a, b) in enumerate(steps):
        length = max(min(b * BLOCK, volume.size_bytes - a * BLOCK), 0)
        if verb == "write":
            volume.write(a * BLOCK if length else 0, os.urandom(length))
        elif verb == "trim" and length:
            volume.trim(a * BLOCK, length)
        elif verb == "resize":
            volume.resize(a * BLOCK, force=True)
        elif verb == "snapshot":
            volume.snapshot(f"s{number}")
        elif volume.snapshots and verb in ("revert", "merge", "discard", "clone"):
            name = volume.snapshots[a % len(volume.snapshots)].name
            with suppress(onionskin.StateError):  # a clone needs it
                change(store, volume, verb, name, number)
    volume.flush()


def change(store: onionskin.Store, volume: onionskin.Volume, verb: str, name: str, number: int) -> None:
    if verb == "clone":
        store.clone("v", name, f"c{number}")
    elif verb == "discard":
        volume.discard(name, recursive=True)
    else:
        getattr(volume, verb)(name)


@contextmanager
def store_of(tmp_path: Path, steps: list[tuple[str, int, int]]) -> Iterator[tuple[onionskin.Store, onionskin.Volume]]:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size=BLOCKS * BLOCK) as volume:
        run(store, volume, steps)
        store.finish_work()  # what a merge hides is given back behind it, and would be so between two looks
        yield store, volume


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("looking")


@given(STEPS)
@settings(max_examples=examples(60), deadline=None)
def test_usage_says_what_walking_the_tree_for_each_snapshot_says(room: Path, steps: list[tuple[str, int, int]]) -> None:
    with store_of(room, steps) as (store, _):
        for volume in store.volumes():
            assert store.usage(volume.name) == usage_by_walking(store, volume.name)


@given(STEPS, st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=examples(60), deadline=None)
def test_a_diff_is_what_the_layers_of_only_one_side_touch(
    room: Path, steps: list[tuple[str, int, int]], a: int, b: int
) -> None:
    with store_of(room, steps) as (store, volume):
        tops = {
            row.name: row.layer for row in store._opened.catalog.rows(SnapshotRow, "volume = ?", volume._opened.row.id)
        }
        if not tops:
            return
        first, second = sorted(tops)[a % len(tops)], [None, *sorted(tops)][b % (len(tops) + 1)]
        layer = volume._opened.head if second is None else tops[second]
        size_bytes = store._opened.catalog.layer(layer).size_bytes
        found = {
            block: int(extent["state"])
            for extent in store.diff("v", first, second)
            for block in range(int(extent["offset"]) // BLOCK, -(-int(extent["offset"] + extent["length"]) // BLOCK))
        }
        assert found == diff_by_blocks(store, tops[first], layer, size_bytes)


@given(STEPS)
@settings(max_examples=examples(40), deadline=None)
def test_all_volumes_together_are_what_each_is_by_itself(room: Path, steps: list[tuple[str, int, int]]) -> None:
    with store_of(room, steps) as (store, volume):
        infos = store.volumes()
        assert [store.info(info.name) for info in infos] == infos
        assert [info.holder for info in infos if info.name == "v"] == [os.getpid()]
        assert [info.snapshots for info in infos if info.name == "v"] == [len(volume.snapshots)]


# ---- what is read, and locked ----


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The layers whose maps are loaded."""
    loaded: list[bytes] = []
    load = block_maps.load_map

    def counted(store: OpenStore, layer: LayerRow) -> Any:
        loaded.append(layer.id)
        return load(store, layer)

    monkeypatch.setattr(block_maps, "load_map", counted)
    return loaded


def chain_of(store: onionskin.Store, name: str, count: int) -> None:
    with store.create(name, size="1M") as volume:
        for number in range(count):
            volume.write(number * BLOCK, bytes([number + 1]) * BLOCK)
            volume.snapshot(f"s{number}")


@pytest.mark.parametrize("verb", ["usage", "check"])
def test_each_map_is_loaded_once(tmp_path: Path, loads: list[bytes], verb: str) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        chain_of(store, "v", 12)
        loads.clear()
        assert store.usage("v") if verb == "usage" else store.check() == []
        assert len(loads) == len(set(loads)) >= 12


def test_a_diff_with_a_descendant_loads_only_what_is_between(tmp_path: Path, loads: list[bytes]) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        chain_of(store, "v", 12)
        loads.clear()
        assert store.diff("v", "s8", "s11")["length"].sum() == 3 * BLOCK
        assert len(loads) == 3


@pytest.mark.parametrize("verb", ["usage", "diff", "layering"])
def test_files_of_other_volumes_are_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """Nor is the store: whoever frees something elsewhere need not wait."""
    with onionskin.Store(tmp_path / "store") as store:
        chain_of(store, "v", 3)
        chain_of(store, "w", 3)
        others = layers_below(store, "w") - layers_below(store, "v")
        taken: set[int] = set()
        take = ByteLocks.take_shared
        monkeypatch.setattr(
            ByteLocks, "take_shared", lambda self, numbers: taken.update(numbers) or take(self, numbers)
        )
        {"usage": store.usage, "diff": lambda name: store.diff(name, "s0"), "layering": store.layering}[verb]("v")
        assert taken
        assert not taken & {layer.map_lock_byte for layer in others}
        assert STORE_BYTE not in taken


def layers_below(store: onionskin.Store, name: str) -> set[LayerRow]:
    return set(store._opened.catalog.chain(store._opened.catalog.volume(name).head))


def test_many_stretches_of_bytes_are_locked_as_few() -> None:
    numbers = set(range(0, 4000, 2)) | {9000}
    filled = locked_maps.in_few_stretches(numbers)
    assert numbers <= filled <= set(range(9001))
    assert len(filled) < 4300  # the widest gaps stay
    assert 9000 - 1 not in filled
    assert locked_maps.in_few_stretches({1, 5, 9}) == {1, 5, 9}


def test_few_numbers_are_added_where_all_lie_far_apart() -> None:
    numbers = set(range(0, 300 << 12, 1 << 12)) | {3}
    filled = locked_maps.in_few_stretches(numbers)
    assert numbers <= filled
    assert len(filled) <= len(numbers) + locked_maps.FILLED_MAX


def test_a_byte_that_somebody_has_alone_is_in_nobodys_way_but_that_of_its_own_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a flatten of another volume took, and has for as long as it copies."""
    monkeypatch.setattr(locked_maps, "STRETCHES_MAX", 1)
    monkeypatch.setattr(locked_maps, "LOCK_WAIT_SECONDS", 0.0)
    with onionskin.Store(tmp_path / "store") as store:
        volume = store.create("v", size="1M")
        volume.snapshot("a")
        between = store._opened.change(store._opened.catalog.take_lock_byte)
        volume.snapshot("b")
        volume.close()
        with store._opened.locks.exclusive(between) as held:
            assert held
            assert [usage.snapshot for usage in store.usage("v")] == ["a", "b", None]


def test_a_diff_of_an_open_head_is_what_is_durable(tmp_path: Path) -> None:
    """It never mixes what is being written with what was flushed."""
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M") as volume:
        volume.snapshot("a")
        volume.write(0, b"x" * BLOCK)
        volume.flush()
        volume.write(8 * BLOCK, b"y" * BLOCK)
        assert [(int(e["offset"]), int(e["length"])) for e in store.diff("v", "a")] == [(0, BLOCK)]
        assert [int(e["offset"]) for e in volume.diff("a")] == [0, 8 * BLOCK]


def test_a_name_that_moves_while_maps_are_locked_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is answered is the state in which the name was found."""
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M") as volume:
        chain_of(store, "w", 4)
        volume.write(0, b"x" * BLOCK)
        volume.snapshot("a")
        expected = store.usage("v")
        stretches = locked_maps.in_few_stretches
        moves = iter([("v", "x"), ("w", "v")])

        def move(numbers: set[int]) -> set[int]:
            for old, new in moves:
                store.rename(old, new)
            return stretches(numbers)

        monkeypatch.setattr(locked_maps, "in_few_stretches", move)
        assert store.usage("v") == expected
        assert len(store.usage("v")) == 5


def test_a_layer_that_was_freed_before_it_was_locked_is_read_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M", wipe="zero") as volume:
        for name in ("a", "b", "c"):
            volume.write(0, name.encode() * BLOCK)
            volume.snapshot(name)
        take = ByteLocks.take_shared
        merged: list[str] = []

        def merge_first(self: ByteLocks, numbers: Any) -> bool:
            if not merged:
                merged.append("a")
                volume.merge("a")
            return take(self, numbers)

        monkeypatch.setattr(ByteLocks, "take_shared", merge_first)
        assert [one.snapshot for one in store.usage("v")] == ["b", "c", None]


# ---- check ----


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    with onionskin.Store(tmp_path / "store") as store, store.create("v", size="1M") as volume:
        for name in ("a", "b"):
            volume.write(0, name.encode() * (4 * BLOCK))
            volume.snapshot(name)
        volume.write(0, b"c" * (2 * BLOCK))
    return tmp_path / "store"


def problems(path: Path) -> list[tuple[str, str]]:
    with onionskin.Store(path) as store:
        return [(problem.severity, problem.where) for problem in store.check()]


def layer_files(path: Path, snapshot: str) -> tuple[Path, Path]:
    with onionskin.Store(path) as store:
        volume = store._opened.catalog.volume("v")
        layer = store._opened.catalog.rows(SnapshotRow, "volume = ? AND name = ?", volume.id, snapshot)[0].layer
        (segment,) = store._opened.catalog.rows(SegmentRow, "layer = ?", layer)
        return store._opened.layout.map_file(
            store._opened.catalog.layer(layer).map_id
        ), store._opened.layout.segment_file(segment.id)


def contents(path: Path) -> dict[str, Any]:
    """Return what is below a directory, but for what SQLite itself makes to read."""
    return {
        str(file): (file.lstat().st_ino, file.lstat().st_size, file.lstat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if not file.name.startswith("catalog.db") and file != path
    }


def test_a_sound_store_has_no_problem(sound: Path) -> None:
    assert problems(sound) == []


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "link"])
def test_a_file_that_is_not_as_it_was_is_an_error(sound: Path, which: int, harm: str) -> None:
    file = layer_files(sound, "a")[which]
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        os.truncate(file, HEADER_BYTES + 10)
    elif harm == "flipped":
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    else:
        file.rename(sound.parent / "elsewhere")
        file.symlink_to(sound.parent / "elsewhere")
    assert ("error", str(file)) in problems(sound)


def test_what_is_no_file_of_the_store_is_named_and_left(sound: Path) -> None:
    (sound / "segments" / "lost+found").mkdir()
    (sound / "layers" / "README").write_text("mine")
    (sound / "layers" / f"{'a' * 32}.map").symlink_to(sound.parent)
    (sound / "segments" / f"{'b' * 32}.seg").write_bytes(b"left")
    os.link(layer_files(sound, "b")[1], sound.parent / "other name")
    before = contents(sound)
    assert set(problems(sound)) == {
        ("notice", str(sound / "segments" / "lost+found")),
        ("notice", str(sound / "layers" / "README")),
        ("notice", str(sound / "layers" / f"{'a' * 32}.map")),
        ("notice", str(sound / "segments" / f"{'b' * 32}.seg")),
        ("notice", str(layer_files(sound, "b")[1])),
    }
    assert contents(sound) == before


def test_data_that_no_map_names_is_reported_before_anything_frees_it(sound: Path) -> None:
    with onionskin.Store(sound) as store:
        head = store._opened.catalog.layer(store._opened.catalog.volume("v").head)
        own = store._opened.catalog.rows(SegmentRow, "layer = ? AND role = 'own'", head.id)[0]
        store._opened.layout.map_file(head.map_id).rename(sound.parent / "map")
        before = contents(sound)
        (problem,) = [one for one in store.check() if one.where == str(store._opened.layout.segment_file(own.id))]
        assert "no map names" in problem.what
        assert contents(sound) == before
        (sound.parent / "map").rename(store._opened.layout.map_file(head.map_id))
        assert store.check() == []


def test_what_a_writer_has_not_flushed_yet_is_no_problem(sound: Path) -> None:
    with onionskin.Store(sound) as store, store.open("v") as volume:
        volume.write(0, os.urandom(16 * BLOCK))
        assert store.check() == []


def test_a_segment_of_another_layer_is_an_error(sound: Path) -> None:
    with onionskin.Store(sound) as store:
        rows = store._opened.catalog.rows(SegmentRow, "role = 'sealed'")
        with store._opened.catalog.transaction():
            store._opened.catalog.update(SegmentRow, rows[0].id, layer=rows[1].layer)
    assert ("error", str(store._opened.layout.segment_file(rows[0].id))) in problems(sound)


def test_layers_that_do_not_fit_each_other_are_errors(sound: Path) -> None:
    with onionskin.Store(sound) as store:
        (b,) = store._opened.catalog.rows(SnapshotRow, "name = 'b'")
        with store._opened.catalog.transaction():
            store._opened.catalog.update(LayerRow, b.layer, sealed=0)
        assert "a layer that is not sealed" in " ".join(problem.what for problem in store.check())
