"""What snapshots hold, what they differ in, and whether the store is sound: all read from the maps, no block data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin._maplog import MAGIC_SEGMENT, LayerMap, decode_header
from onionskin.catalog import BaseRow, LayerRow, PendingRow, SegmentRow, SnapshotRow, VolumeRow
from onionskin.chain import LOCK_WAIT_SECONDS, Chain, check_base, lock_base, open_chain
from onionskin.errors import ChainError, FormatError, OnionskinError, StateError
from onionskin.later import dtypes
from onionskin.layermaps import empty_map, open_map
from onionskin.locks import ByteLocks
from onionskin.pending import orphans
from onionskin.snapshots import find_snapshot, nearest_name
from onionskin.transfer import covered

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from onionskin.store import Store

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.later import numpy


@dataclass(frozen=True, slots=True)
class Usage:
    """What one snapshot costs; snapshot None stands for the head.

    Attributes
    ----------
    bytes_held : int
        Data written between the snapshot before it and this one.
    bytes_freed_by_discard : int
        Data that goes when it is discarded with all that descends from it.
    bytes_freed_by_merge : int
        Data that goes when it is merged: blocks that were written again after it.
    """

    snapshot: str | None
    bytes_held: int
    bytes_freed_by_discard: int
    bytes_freed_by_merge: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `check` found. severity is `error` (data is at risk) or `notice` (work that is left)."""

    severity: str
    what: str
    where: str
    advice: str


def usage(store: "Store", name: str) -> list[Usage]:
    """Return what each snapshot of a volume, and its head (last), hold."""
    with _tree(store) as tree:
        return _usage(store, tree, store.catalog.volume(name).id)


def _usage(store: "Store", tree: "_Tree", volume_id: bytes) -> list[Usage]:
    (volume,) = (row for row in tree.volumes if row.id == volume_id)
    layers = {layer.id: layer for layer in tree.layers}
    rows = [row for row in tree.snapshots if row.volume == volume.id]
    names = {row.layer: row.name for row in rows}
    maps = {id: open_map(store, layer) for id, layer in layers.items() if _belongs(layers, id, volume, names)}
    held = {id: layer_map.count()[0] * layers[id].block_size for id, layer_map in maps.items()}
    children: dict[bytes, list[bytes]] = {}
    for layer in layers.values():
        if layer.parent:
            children.setdefault(layer.parent, []).append(layer.id)

    def freed_by_merge(id: bytes) -> int:
        (only,) = children.get(id, []) if len(children.get(id, [])) == 1 else (None,)
        shadowed = maps[id].count_shadowed(maps[only]) if only in maps else 0
        return int(shadowed * layers[id].block_size)

    def one(name: str | None, id: bytes) -> Usage:
        own, layer = held[id], layers[id].parent
        while layer in maps and layer not in names:
            own, layer = own + held[layer], layers[layer].parent
        gone = held[id] + sum(held.get(above, 0) for above in _above(children, id))
        return Usage(name, own, gone, freed_by_merge(id) if name else 0)

    try:
        return [one(row.name, row.layer) for row in rows] + [one(None, volume.head)]
    finally:
        for layer_map in maps.values():
            layer_map.close()


def _above(children: dict[bytes, list[bytes]], layer: bytes) -> Iterator[bytes]:
    todo = [layer]
    while todo:
        above = children.get(todo.pop(), [])
        yield from above
        todo += above


@dataclass(frozen=True, slots=True)
class _Tree:
    """The rows of a store in one state of it."""

    layers: list[LayerRow]
    segments: list[SegmentRow]
    volumes: list[VolumeRow]
    snapshots: list[SnapshotRow]
    bases: list[BaseRow]

    def chain(self, layer_id: bytes) -> Chain:
        """Return a layer and all below it."""
        by_id = {layer.id: layer for layer in self.layers}
        layers = [by_id[layer_id]]
        while layers[-1].parent is not None:
            layers.append(by_id[layers[-1].parent])
        segments: dict[bytes, list[SegmentRow]] = {layer.id: [] for layer in layers}
        for row in self.segments:
            if row.layer in segments:
                segments[row.layer].append(row)
        base = [row for row in self.bases if row.id == layers[-1].base]
        return Chain(tuple(reversed(layers)), segments, base[0] if base else None)

    def layer_of(self, store: "Store", volume: VolumeRow, snapshot: str | None) -> bytes:
        """Return the layer of a snapshot, or of the head (None)."""
        if snapshot is None:
            return next(row.head for row in self.volumes if row.id == volume.id)
        for row in self.snapshots:
            if row.volume == volume.id and row.name == snapshot:
                return row.layer
        return find_snapshot(store.catalog, volume, snapshot).layer


def _read_tree(store: "Store") -> _Tree:
    catalog = store.catalog
    with catalog.reading():
        return _Tree(
            catalog.rows(LayerRow),
            catalog.rows(SegmentRow),
            catalog.rows(VolumeRow),
            catalog.rows(SnapshotRow, "1 ORDER BY created_ns"),
            catalog.rows(BaseRow),
        )


@contextmanager
def _tree(store: "Store") -> Iterator[_Tree]:
    """Read the tree and keep its files where they are, as an open volume does: others merge and discard meanwhile."""
    locks = ByteLocks(store.layout.lock)
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    try:
        while True:
            tree = _read_tree(store)
            wanted = {row.map_lock_byte for row in tree.layers} | {row.lock_byte for row in tree.segments}
            if locks.take_shared(wanted) and _names_same_files(_read_tree(store), tree):
                break
            locks.keep_shared(())
            if time.monotonic() > deadline:
                raise StateError(f"the tree of {store.path} is being changed all the time; try again when that is done")
            time.sleep(0.01)
        yield tree
    finally:
        locks.close()
        if any(volume.writable for volume in store.open_volumes()):
            store.work_soon()  # what had to wait for these locks


def _names_same_files(a: _Tree, b: _Tree) -> bool:
    """Whether what was locked is what the catalog still names; sizes of heads may differ."""
    return {row.map_lock_byte for row in a.layers} | {row.lock_byte for row in a.segments} == (
        {row.map_lock_byte for row in b.layers} | {row.lock_byte for row in b.segments}
    )


def _belongs(layers: dict[bytes, LayerRow], id: bytes, volume: VolumeRow, names: dict[bytes, str]) -> bool:
    """Whether a layer is on the way to one of the volume's snapshots or to its head."""
    tops = [*names, volume.head]
    return any(id in _below(layers, top) for top in tops)


def _below(layers: dict[bytes, LayerRow], top: bytes | None) -> set[bytes]:
    found = set()
    while top is not None:
        found.add(top)
        top = layers[top].parent
    return found


def diff(store: "Store", name: str, a: str, b: str | None) -> "Array":
    """Return the extents that may differ between two snapshots (b None: the head, as it is durable)."""
    volume = store.catalog.volume(name)
    with _tree(store) as tree:
        chains = [tree.chain(tree.layer_of(store, volume, one)) for one in (a, b)]
        return diff_of_chains(store, a, b, *chains)


def diff_of_chains(store: "Store", a: str, b: str | None, chain_a: Chain, chain_b: Chain) -> "Array":
    """Return the extents that may differ between two chains whose files are locked; a and b are what they are called."""
    shared = {layer.id for layer in chain_a.layers} & {layer.id for layer in chain_b.layers}
    if not shared and (chain_a.base or chain_b.base) and chain_a.base != chain_b.base:
        raise ChainError(f"{a!r} and {b or 'the head'!r} have no base in common; compare exported images instead")
    touched_a = _touched(store, [layer for layer in chain_a.layers if layer.id not in shared], chain_a.top.block_size)
    touched_b = _touched(store, [layer for layer in chain_b.layers if layer.id not in shared], chain_b.top.block_size)
    try:
        stretches = touched_a.touched(touched_b)
        state = _states(store, chain_b, b is None)
        return _clip(_split(stretches, state, chain_b.top.block_size), _size(store, chain_b, b is None))
    finally:
        touched_a.close()
        touched_b.close()


def _touched(store: "Store", layers: list[LayerRow], block_size: int) -> LayerMap:
    union = empty_map(block_size)
    for layer in layers:
        loaded = open_map(store, layer)
        union.fold(loaded)
        loaded.close()
    return union


def _size(store: "Store", chain: Any, head: bool) -> int:
    if head:
        path = store.path_of_head(chain.top.id)
        if path is not None:
            return int(path.size_bytes)
    return int(chain.top.size_bytes)


def _states(store: "Store", chain: Any, head: bool) -> "Array":
    """Return the runs of what `b` reads: DATA, ZERO; what is in none of them is the base's."""
    path = store.path_of_head(chain.top.id) if head else None
    if path is not None:
        head_runs: Array = path.runs()
        return head_runs
    union = _touched(store, list(chain.layers), chain.top.block_size)
    try:
        runs = union.runs()
    finally:
        union.close()
    out = numpy.empty(len(runs), dtype=dtypes.EXTENT)
    out["offset"] = runs["block_index"] * chain.top.block_size
    out["length"] = runs["block_count"] * chain.top.block_size
    out["state"] = runs["state"]
    return out


def _split(stretches: "Array", runs: "Array", block_size: int) -> "Array":
    """Cut stretches of blocks at the borders of runs, so that each piece has one state (0: the base's)."""
    names = stretches.dtype.names
    assert names is not None
    starts = stretches[names[0]].astype(numpy.int64) * block_size
    ends = starts + stretches[names[1]].astype(numpy.int64) * block_size
    run_starts = runs["offset"].astype(numpy.int64)
    run_ends = run_starts + runs["length"].astype(numpy.int64)
    cuts = numpy.unique(numpy.concatenate((starts, ends, run_starts, run_ends)))
    if len(cuts) < 2:
        return numpy.empty(0, dtype=dtypes.EXTENT)
    left, right = cuts[:-1], cuts[1:]
    inside = covered(left, starts, ends) >= 0
    run = covered(left, run_starts, run_ends)
    out = numpy.empty(int(inside.sum()), dtype=dtypes.EXTENT)
    out["offset"], out["length"] = left[inside], (right - left)[inside]
    states = runs["state"] if len(runs) else numpy.zeros(1, dtype=numpy.uint8)
    out["state"] = numpy.where(run >= 0, states[numpy.maximum(run, 0)], 0)[inside]
    return out


def _clip(extents: "Array", size_bytes: int) -> "Array":
    extents = extents[extents["offset"] < size_bytes]
    extents["length"] = numpy.minimum(extents["length"], size_bytes - extents["offset"])
    return extents


def check(store: "Store") -> list[Problem]:
    """Look at every file that the catalog names. Reads headers and maps, and no block data."""
    with _tree(store) as tree:
        problems = [*_check_layers(store, tree), *_check_bases(store), *_check_chains(store, tree)]
    catalog = store.catalog
    problems += [
        Problem("notice", f"pending work: {row.kind}", row.target.hex(), "it is done when the store is next written")
        for row in catalog.rows(PendingRow)
    ]
    problems += [
        Problem("notice", "a file that no row names", str(path), "'check --repair' removes it")
        for path in orphans(store)
    ]
    return problems


def _check_layers(store: "Store", tree: _Tree) -> list[Problem]:
    problems = []
    advice = "restore the file from a copy of the store"
    for layer in tree.layers:
        try:
            layer_map = open_map(store, layer)
        except (OnionskinError, OSError) as error:
            problems.append(Problem("error", str(error), str(store.layout.map_file(layer.map_id)), advice))
            continue
        segments = {row.id for row in tree.segments if row.layer == layer.id}
        for id in layer_map.segments:
            slots = layer_map.live_slots(id)
            if not len(slots):
                continue
            path = store.layout.segment_file(id)
            named = int(slots[-1][0]) + int(slots[-1][1])
            fault = (
                "a map names a segment of another layer"
                if id not in segments
                else _segment_fault(path, id, layer, named)
            )
            if fault:
                problems.append(Problem("error", fault, str(path), advice))
        layer_map.close()
    return problems


def _segment_fault(path: Path, id: bytes, layer: LayerRow, slots: int) -> str | None:
    try:
        with path.open("rb") as file:
            header = decode_header(file.read(4096), MAGIC_SEGMENT, path=str(path))
        size = path.stat().st_size
    except (OSError, FormatError) as error:
        return str(error)
    if header.uuid != id or header.block_size != layer.block_size:
        return "it is not the segment that the catalog names"
    if size < 4096 + slots * layer.block_size:
        return f"it is truncated: {size} bytes, and slot {slots - 1} is named"
    return None


def _check_bases(store: "Store") -> list[Problem]:
    problems = []
    for base in store.catalog.rows(BaseRow):
        try:
            check_base(store.catalog, base)
        except (OnionskinError, OSError) as error:
            problems.append(Problem("error", str(error), base.path, "see 'onionskin relocate --help'"))
    return problems


def _check_chains(store: "Store", tree: _Tree) -> list[Problem]:
    """Open every snapshot as a reader would."""
    problems = []
    for row in tree.snapshots:
        try:
            chain = tree.chain(row.layer)
            base_lock = lock_base(store.catalog, chain)
            try:
                open_chain(store.layout, chain, writable=False, base_lock=base_lock).close()
            finally:
                if base_lock:
                    base_lock.close()
        except (OnionskinError, OSError) as error:
            problems.append(Problem("error", str(error), f"snapshot {row.name}", "see the errors above"))
    return problems


__all__ = ["Problem", "Usage", "check", "diff", "nearest_name", "usage"]
