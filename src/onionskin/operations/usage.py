"""What snapshots hold and what they differ in: all read from the maps, and no block data.

What must hold: a question is answered from one state of the catalog, whose map files are locked while they are read. Each
of them is loaded once, and no more than two are in memory at a time.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onionskin.base.lazy import dtypes
from onionskin.catalog import LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import find_snapshot, nearest_name
from onionskin.errors import ChainError
from onionskin.kernels._maplog import LayerMap
from onionskin.operations.check import Problem, check
from onionskin.operations.copy import covered
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import empty_map, open_map, read_layers
from onionskin.storage.chain import Chain
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy


@dataclass(frozen=True, slots=True)
class Usage:
    """What one snapshot costs.

    Attributes
    ----------
    snapshot : str or None
        Its name; None stands for the head.
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


# ---- what each snapshot holds ----


@dataclass(frozen=True, slots=True)
class _VolumeTree:
    """What a volume's snapshots and its head stand on: `layers` with parents first."""

    volume: VolumeRow
    snapshots: list[SnapshotRow]
    layers: list[LayerRow]
    only_children: frozenset[bytes]  # layers whose parent has no other child in the whole store


def usage(store: OpenStore, name: str) -> list[Usage]:
    """Return what each snapshot of a volume, and its head (last), hold."""
    with locked_maps(store, lambda: _read_tree(store, name), lambda tree: tree.layers) as tree:
        held, shadowed = _measure(store, tree)
    names = {row.layer for row in tree.snapshots}
    since_name, subtree = dict(held), dict(held)
    for layer in tree.layers:
        if layer.parent is not None and layer.parent not in names:
            since_name[layer.id] += since_name[layer.parent]
    for layer in reversed(tree.layers):
        if layer.parent is not None:
            subtree[layer.parent] += subtree[layer.id]
    found = [
        Usage(row.name, since_name[row.layer], subtree[row.layer], shadowed.get(row.layer, 0)) for row in tree.snapshots
    ]
    head = tree.volume.head
    return [*found, Usage(None, since_name[head], subtree[head], 0)]


def _read_tree(store: OpenStore, name: str) -> _VolumeTree:
    """Read the tree of a volume. Inside `reading`."""
    catalog = store.catalog
    volume = catalog.volume(name)
    snapshots = catalog.snapshots_of(volume.id)
    ordered = _parents_first(catalog.layers_of_volume(volume.id))
    missing = {volume.head, *(row.layer for row in snapshots)} - {layer.id for layer in ordered}
    if missing:
        raise damaged(
            catalog.path,
            f"layer {min(missing).hex()} is missing, or one below it, or they stand on each other in a circle",
        )
    only_children = frozenset(layer.id for layer in catalog.only_children_over_volume(volume.id))
    return _VolumeTree(volume, snapshots, ordered, only_children)


def _parents_first(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Sort layers so that each stands behind its parent, and an only child directly behind it."""
    children: dict[bytes | None, list[LayerRow]] = {}
    for layer in layers:
        children.setdefault(layer.parent, []).append(layer)
    ordered: list[LayerRow] = []
    todo = children.get(None, [])
    while todo:
        ordered.append(todo.pop())
        todo += children.get(ordered[-1].id, [])
    return ordered


def _measure(store: OpenStore, tree: _VolumeTree) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Return the bytes that each layer holds, and those of it that its only child has anew."""
    held: dict[bytes, int] = {}
    shadowed: dict[bytes, int] = {}
    loaded: list[tuple[bytes, LayerMap]] = []  # this layer's, and the one's before it
    try:
        for layer in tree.layers:
            layer_map = open_map(store, layer)
            loaded.append((layer.id, layer_map))
            held[layer.id] = int(layer_map.count()[0]) * layer.block_size
            below, below_map = loaded[0]
            if below == layer.parent and layer.id in tree.only_children:
                shadowed[below] = int(below_map.count_shadowed(layer_map)) * layer.block_size
            if len(loaded) == 2:
                loaded.pop(0)[1].close()
    finally:
        for _, layer_map in loaded:
            layer_map.close()
    return held, shadowed


# ---- what two of them differ in ----


def diff(store: OpenStore, name: str, a: str, b: str | None) -> "Array":
    """Return the extents that may differ between two snapshots (b None: the head, as it is durable)."""

    def find() -> tuple[Chain, Chain]:
        volume = store.catalog.volume(name)
        tops = [
            volume.head if snapshot is None else find_snapshot(store.catalog, volume, snapshot).layer
            for snapshot in (a, b)
        ]
        return read_layers(store.catalog, tops[0]), read_layers(store.catalog, tops[1])

    with locked_maps(store, find, lambda chains: {*chains[0].layers, *chains[1].layers}) as chains:
        return diff_of_chains(store, a, b, *chains)


def diff_of_chains(store: OpenStore, a: str, b: str | None, chain_a: Chain, chain_b: Chain) -> "Array":
    """Return the extents that may differ between two chains whose files are locked; a and b are what they are called."""
    shared = {layer.id for layer in chain_a.layers} & {layer.id for layer in chain_b.layers}
    if not shared and (chain_a.base or chain_b.base) and chain_a.base != chain_b.base:
        raise ChainError(f"{a!r} and {b or 'the head'!r} have no base in common; compare exported images instead")
    block_size, common = chain_b.top.block_size, [layer for layer in chain_b.layers if layer.id in shared]
    size_bytes = chain_b.top.size_bytes
    with (
        closing(_laid(store, [layer for layer in chain_a.layers if layer.id not in shared], block_size)) as own_a,
        closing(_laid(store, [layer for layer in chain_b.layers if layer.id not in shared], block_size)) as own_b,
    ):
        if not chain_b.top.sealed and own_b.size_bytes is not None:
            size_bytes = int(own_b.size_bytes)  # what a resize left that is not in the catalog yet
        stretches, runs = own_a.touched(own_b), own_b.runs()
        if own_a.count() != (0, 0):
            # What only a's layers have reads at b as the layers below both say.
            with closing(_laid(store, common, block_size)) as whole_b:
                whole_b.fold(own_b)
                runs = whole_b.runs()
    return _clip(_split(stretches, _extents_of(runs, block_size), block_size), size_bytes)


def _laid(store: OpenStore, layers: Sequence[LayerRow], block_size: int) -> LayerMap:
    """Load layers, bottom first, and lay them over each other."""
    union = empty_map(block_size)
    try:
        for layer in layers:
            with closing(open_map(store, layer)) as loaded:
                union.fold(loaded)
    except BaseException:
        union.close()
        raise
    return union


def _extents_of(runs: "Array", block_size: int) -> "Array":
    """Return runs of blocks as extents of bytes; what is in none of them is the base's."""
    out = numpy.empty(len(runs), dtype=dtypes.EXTENT)
    out["offset"] = runs["block_index"] * block_size
    out["length"] = runs["block_count"] * block_size
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


__all__ = ["Problem", "Usage", "check", "diff", "diff_of_chains", "nearest_name", "usage"]
