"""The usage of snapshots: how much data each of them holds. It is read from the maps alone.

What must hold: the answer comes from one state of the catalog, whose map files are locked while they are read. Each map
is loaded once, and no more than two are in memory at a time.
"""

from collections.abc import Sequence

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.records import record
from onionskin.catalog import LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.kernels._maplog import LayerMap
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore


@record
class Usage:
    """The space that one snapshot takes.

    Attributes
    ----------
    snapshot : str or None
        The name of the snapshot. None stands for the head.
    bytes_held : int
        The data that was written between the previous snapshot and this one.
    bytes_freed_by_discard : int
        The data that a discard of the snapshot and of everything that descends from it would free.
    bytes_freed_by_merge : int
        The data that a merge of the snapshot would free: blocks that were written again after it.
    """

    snapshot: str | None
    bytes_held: int
    bytes_freed_by_discard: int
    bytes_freed_by_merge: int


class SnapshotSpace(NamedTuple):
    """What one snapshot takes, as `onionskin snapshots` shows it.

    Attributes
    ----------
    snapshot : str
    used_bytes : int
        Data that nothing else reads: what comes back if this name alone goes, and all data that others read stays.
    written_bytes : int
        Data written between the snapshot that it was taken after, of whatever volume, and this one.
    """

    snapshot: str
    used_bytes: int
    written_bytes: int


# ---- the data of each snapshot ----

# Maps of so many bytes and files are read in a quarter of a second.
_MAP_BYTES_QUICK = 4 << 20
_MAPS_QUICK = 1024


class _VolumeTree(NamedTuple):
    """The layers that a volume's snapshots and its head stand on. In `layers`, parents come first."""

    volume: VolumeRow
    snapshots: list[SnapshotRow]
    layers: list[LayerRow]
    only_children: frozenset[bytes]  # layers whose parent has no other child in the whole store


def usage(store: OpenStore, name: str, *, id: bytes | None = None) -> list[Usage]:
    """Return the usage of each snapshot of a volume, and of its head, which comes last.

    `id`: the volume with this id is meant, whatever it is called by now.
    """
    with locked_maps(store, lambda: _read_tree(store, name, id), lambda tree: tree.layers) as tree:
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


def is_quick(store: OpenStore, name: str) -> bool:
    """Whether a volume has so few snapshots, and so little in them, that nobody minds reading all maps."""
    layers = store.catalog.layers_of_volume(store.catalog.volume(name).id)
    return len(layers) <= _MAPS_QUICK and sum(layer.map_length for layer in layers) <= _MAP_BYTES_QUICK


def snapshot_space(store: OpenStore, name: str) -> list[SnapshotSpace]:
    """Return what each snapshot of a volume takes, in the order of taking. The head counts as far as it is durable."""

    def find() -> tuple[_VolumeTree, set[bytes], set[bytes]]:
        tree = _own_part(store, _read_tree(store, name))
        names = {row.layer for row in store.catalog.snapshots_of_layers(layer.id for layer in tree.layers)}
        return tree, names, set(store.catalog.parents_among(layer.id for layer in tree.layers))

    with locked_maps(store, find, lambda found: found[0].layers) as (tree, names, parents):
        held, shadowed = _measure(store, tree)
    by_id = {layer.id: layer for layer in tree.layers}

    def below(layer: bytes, *, also_alone: bool) -> int:
        """Add up what layers without a name hold under a layer; `also_alone`: as long as only it stands on them."""
        total = 0
        while (not also_alone or layer in tree.only_children) and (under := by_id[layer].parent) in by_id:
            if under is None or under in names:
                break
            total += held[under]
            layer = under
        return total

    def space(row: SnapshotRow) -> SnapshotSpace:
        layer = row.layer
        if layer in parents:
            used = shadowed.get(layer, 0)
        else:  # nothing stands on it, so all of it goes with its name
            used = held[layer] + below(layer, also_alone=True)
        return SnapshotSpace(row.name, used, held[layer] + below(layer, also_alone=False))

    return [space(row) for row in tree.snapshots]


def _own_part(store: OpenStore, tree: _VolumeTree) -> _VolumeTree:
    """Leave out what a clone stands on: the snapshot of another volume, and all below it. Inside `reading`."""
    by_id = {layer.id: layer for layer in tree.layers}
    of_others = {row.layer for row in store.catalog.snapshots_of_layers(by_id, besides=tree.volume.id)}
    own: set[bytes] = set()
    for top in (tree.volume.head, *(row.layer for row in tree.snapshots)):
        at: bytes | None = top
        while at is not None and at not in own and at not in of_others:
            own.add(at)
            at = by_id[at].parent
    layers = [layer for layer in tree.layers if layer.id in own]
    return _VolumeTree(tree.volume, tree.snapshots, layers, tree.only_children)


def _read_tree(store: OpenStore, name: str, id: bytes | None = None) -> _VolumeTree:
    """Read the tree of a volume. Inside `reading`."""
    catalog = store.catalog
    volume = catalog.volume(name) if id is None else catalog.volume_that_is(id)
    snapshots = catalog.snapshots_of(volume.id)
    ordered = parents_first(catalog.layers_of_volume(volume.id))
    missing = {volume.head, *(row.layer for row in snapshots)} - {layer.id for layer in ordered}
    if missing:
        raise damaged(
            catalog.path,
            f"layer {min(missing).hex()} is missing, or one below it, or they stand on each other in a circle",
        )
    only_children = frozenset(catalog.only_children_over_volume(volume.id))
    return _VolumeTree(volume, snapshots, ordered, only_children)


def parents_first(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Sort layers so that each comes after its parent, and an only child comes directly after it."""
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
    """Return the bytes that each layer holds, and how many of them its only child has written again."""
    held: dict[bytes, int] = {}
    shadowed: dict[bytes, int] = {}
    loaded: list[tuple[bytes, LayerMap]] = []  # the map of the previous layer, and then that of this layer
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
