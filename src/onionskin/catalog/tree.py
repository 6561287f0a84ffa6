"""Snapshots and the tree of layers under them: ancestors, descendants, and layers that are not needed any more.

What must hold: a layer is needed if it is a head, has a name, or has a needed child. Only `remove_unreachable_layers`
removes layers, and it only ever removes leaves that are not needed.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime

from onionskin.base.paths import FilePath
from onionskin.base.records import record
from onionskin.catalog import Catalog, LayerRow, SegmentRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import SnapshotNotFoundError


@record
class Snapshot:
    """A snapshot of a volume.

    Attributes
    ----------
    name : str
        Its name.
    guid : str
        32 hex digits. A delta stream keeps them, so the same snapshot has the same GUID in two stores.
    created : datetime.datetime
        The time at which it was taken, in UTC.
    parent : str or None
        The name of the snapshot after which it was taken.
    note : str
        Its note; an empty string if it has none.
    size_bytes : int
        The size of the disk at that time, in bytes.
    """

    name: str
    guid: str
    created: datetime
    parent: str | None
    note: str
    size_bytes: int


def when(created_ns: int) -> datetime:
    """Turn nanoseconds since 1970 into a time in UTC."""
    return datetime.fromtimestamp(created_ns / 1e9, UTC)


def find_snapshot(catalog: Catalog, volume: VolumeRow, name: str) -> SnapshotRow:
    """Return the row of a snapshot, or raise SnapshotNotFoundError."""
    row = catalog.snapshot_named(volume.id, name)
    if row is None:
        raise SnapshotNotFoundError(
            f"volume {volume.name!r} has no snapshot {name!r}; 'onionskin tree' lists those it has"
        )
    return row


def list_snapshots(catalog: Catalog, volume: VolumeRow) -> list[Snapshot]:
    """Return a volume's snapshots in the order in which they were taken."""
    with catalog.reading():
        rows = catalog.snapshots_of(volume.id)
        layers = {layer.id: layer for layer in catalog.layers_of_volume(volume.id)}
    names = {row.layer: row.name for row in rows}
    for row in rows:
        if row.layer not in layers:
            raise damaged(catalog.path, f"layer {row.layer.hex()}, which snapshot {row.name!r} names, is missing")
    nearest: dict[bytes | None, str | None] = {None: None}
    return [
        Snapshot(
            name=row.name,
            guid=row.guid.hex(),
            created=when(row.created_ns),
            parent=nearest_name(catalog.path, layers, names, layers[row.layer].parent, nearest),
            note=row.note,
            size_bytes=layers[row.layer].size_bytes,
        )
        for row in rows
    ]


def nearest_snapshot(catalog: Catalog, volume: VolumeRow, layer: bytes | None) -> SnapshotRow | None:
    """Return the volume's snapshot of a layer, or of the nearest one below it that has one."""
    return None if layer is None else catalog.nearest_snapshot_of(volume.id, layer)


def describe_snapshot(catalog: Catalog, volume: VolumeRow, row: SnapshotRow, layer: LayerRow) -> Snapshot:
    """Make the public description of one snapshot."""
    return _described(row, layer, nearest_snapshot(catalog, volume, layer.parent))


def describe_snapshots(catalog: Catalog, found: Sequence[tuple[VolumeRow, SnapshotRow, LayerRow]]) -> list[Snapshot]:
    """Describe snapshots of several volumes, each with its volume and its layer.

    Nearly each stands on a layer that has a name: these are asked for at once.
    """
    below = catalog.snapshots_of_layers({layer.parent for _, _, layer in found if layer.parent is not None})
    parents = {(row.volume, row.layer): row for row in below}
    described = []
    for volume, row, layer in found:
        parent = parents.get((volume.id, layer.parent)) if layer.parent is not None else None
        if parent is None:
            parent = nearest_snapshot(catalog, volume, layer.parent)
        described.append(_described(row, layer, parent))
    return described


def _described(row: SnapshotRow, layer: LayerRow, parent: SnapshotRow | None) -> Snapshot:
    return Snapshot(
        row.name, row.guid.hex(), when(row.created_ns), parent.name if parent else None, row.note, layer.size_bytes
    )


def nearest_name(
    catalog: FilePath,
    layers: dict[bytes, LayerRow],
    names: dict[bytes, str],
    layer: bytes | None,
    known: dict[bytes | None, str | None] | None = None,
) -> str | None:
    """Return the name on a layer, or on the nearest one below it that has one.

    `known` keeps the result for each layer on the way, so a caller that asks for many layers walks over each of them
    once. If the layers do not end, the error names `catalog` as damaged.
    """
    found: dict[bytes | None, str | None] = {None: None} if known is None else known
    way: list[bytes] = []
    while layer is not None and layer not in found and layer not in names:
        if layer not in layers or len(way) == len(layers):
            raise damaged(catalog, f"layers stand on each other in a circle, or layer {layer.hex()} is missing")
        way.append(layer)
        layer = layers[layer].parent
    name = names[layer] if layer in names else found[layer]
    found.update(dict.fromkeys(way, name))
    return name


def descendants(catalog: Catalog, layer: bytes) -> set[bytes]:
    """Return all layers that stand on this one, at any height. The layer itself is not among them."""
    return {row.id for row in catalog.layers_above(layer)}


def unnamed_below(catalog: Catalog, layer: bytes) -> list[bytes]:
    """Return the layers below one that have no name, bottom first."""
    found = {row.id for row in catalog.unnamed_in_chain(layer)} - {layer}
    return [row.id for row in catalog.chain(layer) if row.id in found] if found else []


def unnamed_of(catalog: Catalog, volume: bytes) -> list[bytes]:
    """Return the sealed layers without a name that the head or a snapshot of a volume stands on."""
    return [row.id for row in catalog.unnamed_of_volume(volume)]


def unnamed_around(catalog: Catalog, layer: bytes | None) -> list[bytes]:
    """Return a layer, and the layers without a name that it stands on or that it may be folded into."""
    around: list[bytes] = []
    below = layer
    while below is not None and (row := _unnamed(catalog, below, besides=layer)):
        around.append(below)
        below = row.parent
    above = layer
    while above is not None and (child := catalog.only_child_of(above)):
        above = child.id if _unnamed(catalog, child.id) else None
        around += [above] if above else []
    return around


def _unnamed(catalog: Catalog, layer: bytes, *, besides: bytes | None = None) -> LayerRow | None:
    if layer != besides and catalog.is_named(layer):
        return None
    found = catalog.layer_with_id(layer)
    return found if found and found.sealed else None


def users_of(catalog: Catalog, layers: set[bytes], *, besides: Collection[bytes]) -> list[str]:
    """Return the heads (`web-2`) and names (`web-2@clean`) that volumes not among `besides` have on these layers."""
    with catalog.reading():
        users = [row.name for row in catalog.volumes_with_heads(layers) if row.id not in besides]
        named = [row for row in catalog.snapshots_of_layers(layers) if row.volume not in besides]
        of = {volume: catalog.volume_with_id(volume) for volume in {row.volume for row in named}}
    for row in named:
        volume = of[row.volume]  # None in a damaged catalog
        users.append(f"{volume.name if volume else row.volume.hex()}@{row.name}")
    return sorted(users)


def remove_unreachable_layers(catalog: Catalog, *layers: bytes | None) -> list[bytes]:
    """Remove layers and those below them, each down to the first that is needed. Inside a transaction.

    Their files become pending work. Returns the needed layers at which it stopped. A layer that is already gone is passed
    over. How many statements this takes goes by the depth, and not by how many layers are given.

    Raises
    ------
    FormatError
        A row names nothing, so a sealed layer may only seem not to be needed.
    """
    stopped: dict[bytes, None] = {}
    asked = dict.fromkeys(layers)
    while asked:
        found = {row.id: row for row in catalog.layers_with_ids(id for id in asked if id is not None)}
        needed = catalog.needed_layers(found)
        stopped |= {id: None for id in asked if id in needed}
        going = [found[id] for id in asked if id in found and id not in needed]
        if any(row.sealed for row in going):  # a head is named by its volume alone
            catalog.refuse_dangling()
        _drop_layers(catalog, going)
        for row in going:
            stopped.pop(row.id, None)  # it was needed by one that is gone now
        asked = dict.fromkeys(row.parent for row in going)
    return list(stopped)


def _drop_layers(catalog: Catalog, layers: Sequence[LayerRow]) -> None:
    """Remove the rows of layers that have no children, and of bases on which nothing stands afterwards.

    Their files become pending work. Inside a transaction.
    """
    ids = [layer.id for layer in layers]
    segments = catalog.segments_of(list(layers))
    catalog.add_all_work(work for layer in layers for work in _work_on(layer, segments[layer.id]))
    catalog.remove_segments_of(*ids)
    catalog.remove_layers(ids)
    # A merge of one into the base that was cancelled: no layer is left that needs it finished.
    catalog.remove_base_merge_of(*ids)
    for base in {layer.base for layer in layers if layer.base}:
        if not catalog.is_base_needed(base):
            catalog.remove_base(base)


def _work_on(layer: LayerRow, segments: Iterable[SegmentRow]) -> Iterator[tuple[str, bytes, int, str]]:
    """Yield the work that frees the files of a layer."""
    for segment in segments:
        yield "segment", segment.id, segment.lock_byte, layer.wipe
        if segment.role == "spare":  # the map of the head that it was for
            yield "map", segment.id, segment.lock_byte, layer.wipe
    yield "map", layer.map_id, layer.map_lock_byte, layer.wipe
