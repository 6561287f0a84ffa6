"""Which layer each block comes from, against a plain model of a store: dictionaries of blocks, one over the other.

The model never folds layers. A layer without a name may be folded into its child at any time, so both sides are compared
with such layers counted as part of the next one above that is a head or has a name.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.listing import found_in

import onionskin
from onionskin.errors import ChainError, FormatError, StateError
from onionskin.operations.layering import Layering

BLOCK = 4096
BLOCKS = 24
BASE_DATA = (range(0, 6), range(10, 12))  # blocks; the base has holes elsewhere, and ends at block 16
BASE_BLOCKS = 16

HOLE, DATA, ZERO = 0, 1, 2
Owned = list[tuple[int, str | None]]  # by block: state, and the name of its layer; None below all layers


@dataclass
class LayerModel:
    parent: "LayerModel | None"
    name: str = ""
    blocks: dict[int, int] = field(default_factory=dict)


class VolumeModel:
    """One volume, its snapshots, and what each block of a disk comes from."""

    def __init__(self, over_base: bool) -> None:
        self.over_base = over_base
        self.head = LayerModel(None, "web")
        self.snapshots: dict[str, LayerModel] = {}

    def put(self, first: int, count: int, state: int) -> None:
        """What reads zero already because a layer says so is not zeroed once more."""
        for block in range(first, first + count):
            if state == DATA or self._owner(self.head, block)[0] != ZERO:
                self.head.blocks[block] = state

    def snapshot(self, name: str) -> None:
        self.head.name = f"web@{name}"
        self.snapshots[name] = self.head
        self.head = LayerModel(self.head, "web")

    def revert(self, name: str) -> None:
        self.head = LayerModel(self.snapshots[name], "web")

    def merge(self, name: str) -> None:
        self.snapshots.pop(name).name = ""

    def descendants(self, name: str) -> set[str]:
        return {other for other in self.snapshots if other != name and self._stands_on(self.snapshots[other], name)}

    def _stands_on(self, layer: LayerModel, name: str) -> bool:
        below = layer.parent
        while below is not None and below is not self.snapshots[name]:
            below = below.parent
        return below is not None

    def discard(self, name: str) -> None:
        if self._stands_on(self.head, name):
            self.head = LayerModel(self.snapshots[name], "web")
        self.snapshots.pop(name).name = ""

    def owned(self, snapshot: str | None) -> Owned:
        top = self.head if snapshot is None else self.snapshots[snapshot]
        return [self._owner(top, block) for block in range(BLOCKS)]

    def _owner(self, top: LayerModel, block: int) -> tuple[int, str | None]:
        layer: LayerModel | None = top
        name = top.name
        while layer is not None:
            name = layer.name or name
            if block in layer.blocks:
                return self._over_nothing(layer.blocks[block], name)
            layer = layer.parent
        is_data = self.over_base and any(block in part for part in BASE_DATA)
        return (DATA if is_data else HOLE), None

    def _over_nothing(self, state: int, name: str) -> tuple[int, str | None]:
        """Where there is no base, ZERO and HOLE are one thing to a layer at the bottom, and any may become that."""
        return (HOLE, None) if state == ZERO and not self.over_base else (state, name)


def owned(layering: Layering, over_base: bool) -> Owned:
    names: list[str | None] = []
    for member in layering.chain:
        if member.kind != "base":
            names.append(names[-1] if member.kind == "layer" else member.name)
    out: Owned = []
    for offset, length, state, depth in layering.extents.tolist():
        assert offset == len(out) * BLOCK  # no gap, no overlap
        assert length % BLOCK == 0
        name = names[depth] if depth < len(names) else None
        forgotten = state == ZERO and not over_base
        out += [(HOLE, None) if forgotten else (state, name)] * (length // BLOCK)
    return out


def make_base(path: Path) -> Path:
    with path.open("wb") as base:
        base.truncate(BASE_BLOCKS * BLOCK)
        for part in BASE_DATA:
            base.seek(part.start * BLOCK)
            base.write(os.urandom(len(part) * BLOCK))
    return path


def create(store: onionskin.Store, directory: Path, over_base: bool) -> onionskin.Volume:
    base = make_base(directory / "base.raw") if over_base else None
    return store.create("web", base=base, size=BLOCKS * BLOCK)


NAMES = st.sampled_from("abcd")
RANGES = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 8)).map(lambda r: (r[0], min(r[1], BLOCKS - r[0])))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "zero", "trim"]), RANGES),
        st.tuples(st.sampled_from(["snapshot", "revert", "merge", "discard"]), NAMES),
        st.tuples(st.just("open again"), st.none()),
    ),
    max_size=25,
)


def step(volume: onionskin.Volume, model: VolumeModel, verb: str, argument: object) -> None:
    """Do one thing to both, where the rules allow it."""
    if isinstance(argument, tuple):
        first, count = argument
        if verb == "write":
            volume.write(first * BLOCK, os.urandom(count * BLOCK))
        else:
            getattr(volume, verb)(first * BLOCK, count * BLOCK)
        model.put(first, count, DATA if verb == "write" else ZERO)
        return
    name = str(argument)
    is_there = name in model.snapshots
    if is_there == (verb == "snapshot") or (verb == "discard" and model.descendants(name)):
        return
    getattr(volume, verb)(name)
    getattr(model, verb)(name)


@settings(max_examples=examples(40), deadline=None)
@given(st.booleans(), STEPS)
def test_every_block_is_of_the_layer_that_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, over_base: bool, steps: list[tuple[str, object]]
) -> None:
    directory = tmp_path_factory.mktemp("vms")
    model = VolumeModel(over_base)
    with onionskin.Store(directory / "vms") as store:
        volume = create(store, directory, over_base)
        for verb, argument in steps:
            if verb == "open again":
                volume.close()
                volume = store.open("web")
            else:
                step(volume, model, verb, argument)
        assert owned(volume.layering(), over_base) == model.owned(None)
        for name in model.snapshots:
            assert owned(store.layering("web", name), over_base) == model.owned(name)
            with store.open("web", snapshot=name) as view:
                assert owned(view.layering(), over_base) == model.owned(name)


def plain(layering: Layering) -> list[tuple[int, int, int, int]]:
    return [tuple(extent) for extent in layering.extents.tolist()]


def test_a_chain_is_listed_from_the_head_down_to_the_base(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, True) as web:
        web.snapshot("a")
        web.snapshot("b")
        kinds = [(member.kind, member.name) for member in web.layering().chain]
        base = str(tmp_path / "base.raw")
        assert kinds == [("head", "web"), ("snapshot", "web@b"), ("snapshot", "web@a"), ("base", base)]
        assert [member.name for member in store.layering("web", "a").chain] == ["web@a", base]


def test_a_clone_shows_the_snapshots_of_the_volume_that_it_came_from(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        with create(store, tmp_path, False) as web:
            web.write(0, b"x" * BLOCK)
            web.snapshot("a")
        store.clone("web", "a", "web-2")
        with store.open("web-2") as clone:
            clone.write(BLOCK, b"y" * BLOCK)
            layering = clone.layering()
        assert [member.name for member in layering.chain] == ["web-2", "web@a"]
        assert plain(layering) == [(0, BLOCK, 1, 1), (BLOCK, BLOCK, 1, 0), (2 * BLOCK, 22 * BLOCK, 0, 2)]


def test_what_was_written_and_not_flushed_is_the_heads(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, False) as web:
        web.write(0, b"x" * BLOCK)
        assert plain(web.layering())[0] == (0, BLOCK, 1, 0)


def test_an_empty_disk_is_one_hole_and_an_odd_end_is_kept(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("odd", size=10_000) as odd:
        assert plain(odd.layering()) == [(0, 10_000, 0, 1)]
        odd.write(9_999, b"x")
        assert plain(odd.layering()) == [(0, 8192, 0, 1), (8192, 1808, 1, 0)]


def test_sizes_of_before_and_after_a_resize_are_those_of_the_disk_then(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, True) as web:
        web.snapshot("small")
        web.resize(2 * BLOCKS * BLOCK)
        web.snapshot("large")
        web.resize(BLOCK, force=True)
        for layering, blocks in (
            (store.layering("web", "small"), BLOCKS),
            (store.layering("web", "large"), 2 * BLOCKS),
            (web.layering(), 1),
        ):
            assert int(layering.extents["length"].sum()) == blocks * BLOCK
        assert plain(store.layering("web", "large"))[-1] == (BLOCKS * BLOCK, BLOCKS * BLOCK, ZERO, 0)


def test_looking_neither_makes_nor_changes_a_file(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, True) as web:
        web.write(0, b"x" * BLOCK)
        web.snapshot("a")

    def files() -> dict[Path, tuple[int, int]]:
        found = (path for path in (tmp_path / "vms").rglob("*") if path.is_file() and "catalog" not in path.name)
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    before = files()
    with onionskin.Store(tmp_path / "vms", create=False) as store:
        store.layering("web")
        store.layering("web", "a")
    assert files() == before


def test_a_volume_that_is_open_elsewhere_can_be_looked_at(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, False) as web:
        web.write(0, b"x" * BLOCK)
        web.flush()
        with onionskin.Store(tmp_path / "vms", create=False) as other:
            assert plain(other.layering("web"))[0] == (0, BLOCK, 1, 0)


def test_extents_are_structured_by_documented_names(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, create(store, tmp_path, True) as web:
        extents = web.layering().extents
        assert extents.dtype.names == ("offset", "length", "state", "depth")
        assert extents.ndim == 1
        assert np.diff(extents["offset"]).min() > 0


def test_closed_volumes_and_views_raise(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        web = create(store, tmp_path, False)
        web.snapshot("a")
        view = store.open("web", snapshot="a")
        for one in (web, view):
            one.close()
            with pytest.raises(StateError, match="closed"):
                one.layering()


def test_a_changed_base_and_a_damaged_map_are_said(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        with create(store, tmp_path, True) as web:
            web.write(0, b"x" * BLOCK)
            web.snapshot("a")
        (path,) = (path for path, status in found_in(tmp_path / "vms" / "layers") if status.st_size > BLOCK)
        data = path.read_bytes()
        path.write_bytes(data[:4100])
        with pytest.raises(FormatError, match="bytes long, but the catalog says"):
            store.layering("web")
        path.write_bytes(data)
        store.layering("web")
        (tmp_path / "base.raw").touch()
        with pytest.raises(ChainError, match="has changed"):
            store.layering("web", "a")
