"""This module decides which layers without a name are folded now.

It is made so that many merges together cost little more than one merge that does everything. Folding a large map with a
small one costs as much as the large map alone. So N merges into the same layer would take quadratic time if each of
them was done at once.

A run consists of layers without a name that stand on each other, and of the layer above them. Each is the only child of
the one below.

What must hold: a run is folded as a whole if that frees enough, or if data has to be wiped (policy `zero`). Otherwise
only those parts of the run are folded that have grown. So each record of a map is written a logarithmic number of
times, in whatever order snapshots are merged. The layers that are left are few, and they hide little.
"""

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass

from onionskin.catalog import Catalog, LayerRow
from onionskin.kernels._maplog import HEADER_BYTES, LayerMap
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore

# Maps that together have no more bytes than this are folded whenever they can be. That takes about a millisecond.
SMALL_BYTES = 32 << 10
# A run is folded as a whole if it frees at least this many bytes of data for each byte of map that is written.
FREED_BYTES_MIN = 8

Group = Sequence[LayerRow]


def run_around(
    catalog: Catalog,
    head: bytes | None,
    layer_id: bytes,
    *,
    dropped: Collection[bytes] = (),
    gone: Collection[bytes] = (),
) -> list[LayerRow]:
    """Return the run that a layer is in, bottom first, or an empty list if there is none.

    The last layer of the run is the one above the layers without a name. `head` is the head of the volume that the
    caller holds; None: the run is wanted with whatever head is above it. The run is the one that would be there if the
    names of the layers `dropped` were dropped, and if the layers `gone` were removed.
    """

    def only_child(layer: LayerRow) -> LayerRow | None:
        """Return the only child of a layer if the layer can be folded into it, or None.

        It cannot if the layer is a head, has a name, or is the target of a merge into the base.
        """
        if not layer.sealed:
            return None
        children = [row for row in catalog.children_of(layer.id, at_most=len(gone) + 2) if row.id not in gone]
        if len(children) != 1 or catalog.base_merge_of(layer.id):
            return None
        is_kept = layer.id not in dropped and catalog.snapshot_of_layer(layer.id)
        return None if is_kept else children[0]

    with catalog.reading():
        layer = catalog.layer_with_id(layer_id)
        if layer is None or (above := only_child(layer)) is None:
            return []
        run = [layer]
        while (parent := catalog.layer_with_id(run[0].parent)) and only_child(parent):
            run.insert(0, parent)
        over: LayerRow | None = above
        while over:
            run.append(over)
            over = only_child(over)
    # The head of another volume is left to the next opening of that volume.
    return run if run[-1].sealed or head in (None, run[-1].id) else run[:-1]


def groups_to_fold(store: OpenStore, run: Sequence[LayerRow]) -> list[Group]:
    """Return the parts of a run that are folded now, each into its last layer: the whole run, some parts, or none."""
    if len(run) < 2:
        return []
    weights = [_weight(store, layer) for layer in run]
    parts = [run[first : last + 1] for first, last in grown_parts(weights)]
    if [len(part) for part in parts] == [len(run)] or _frees_enough(store, run, sum(weights)):
        return [run]
    return parts


def _weight(store: OpenStore, layer: LayerRow) -> int:
    """Return the size of a layer's map in bytes, without its header."""
    if layer.sealed:
        return max(layer.map_length - HEADER_BYTES, 0)
    try:
        return max(store.layout.map_file(layer.map_id).stat().st_size - HEADER_BYTES, 0)
    except FileNotFoundError:
        return 0


def grown_parts(weights: Sequence[int]) -> list[tuple[int, int]]:
    """Return the stretches (first, last) of layers that are worth folding.

    A stretch is worth folding if it is small, or if all of it has at least 1.5 times the weight of its heaviest layer.
    In the second case, a record moves to a map that is at least 1.5 times as large as the one that it was in, which
    happens to a record a logarithmic number of times. If neither is true, no part of the stretch that contains the
    heaviest layer can have grown enough. So that layer is left out, and the layers on its two sides are looked at. A
    part that contains the heaviest layer may still be small, though. `_small_parts` adds such parts.
    """
    found: list[tuple[int, int]] = []
    todo = [(0, len(weights) - 1)]
    while todo:
        first, last = todo.pop()
        if last <= first:
            continue
        part = weights[first : last + 1]
        total, heaviest = sum(part), max(part)
        if total <= SMALL_BYTES or 2 * total >= 3 * heaviest:
            found.append((first, last))
            continue
        at = first + part.index(heaviest)
        todo += [(first, at - 1), (at + 1, last)]
    return sorted(found + _small_parts(weights, found))


def _small_parts(weights: Sequence[int], found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the small stretches between those found. They may contain layers that `grown_parts` left out."""
    taken = {at for first, last in found for at in range(first, last + 1)}
    small: list[tuple[int, int]] = []
    first, total = 0, 0
    for at, weight in enumerate([*weights, SMALL_BYTES + 1]):
        total += weight
        if at in taken or total > SMALL_BYTES:
            if at - first > 1:
                small.append((first, at - 1))
            is_start = at not in taken
            first, total = (at, weight) if is_start else (at + 1, 0)
    return small


def _frees_enough(store: OpenStore, run: Sequence[LayerRow], weight: int) -> bool:
    """Whether folding a whole run frees enough for its cost. With policy `zero`, anything at all is enough."""
    zero = any(layer.wipe == "zero" for layer in run)
    if zero and not run[-1].sealed:
        return True  # writes that are not flushed yet may hide something too
    with closing(lay(store, run)) as laid:
        freed = sum(laid.freed.values()) * run[-1].block_size
    return freed > 0 if zero else freed >= FREED_BYTES_MIN * weight


@dataclass(slots=True)
class Laid:
    """The result of laying layers over each other: one map, and how many blocks of each segment it no longer names."""

    map: LayerMap
    freed: dict[bytes, int]

    def close(self) -> None:
        """Free the map."""
        self.map.close()


def lay(store: OpenStore, layers: Sequence[LayerRow]) -> Laid:
    """Load layers, bottom first, and lay them over each other. The caller closes the result."""
    union = open_map(store, layers[0])
    try:
        use = union.segment_use()
        for layer in layers[1:]:
            with closing(open_map(store, layer)) as upper:
                use |= upper.segment_use()
                union.fold(upper)
        left = union.segment_use()
    except BaseException:
        union.close()
        raise
    freed = {id: blocks - left.get(id, (0, 0))[0] for id, (blocks, _) in use.items()}
    return Laid(union, {id: blocks for id, blocks in freed.items() if blocks})
