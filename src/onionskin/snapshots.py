"""Snapshots and the tree of layers under them: what descends from what, and what nothing needs any more.

What must hold: a layer is needed if it is a head, has a name, or has a needed child. `free_unneeded` is the one place
that removes layers, and it only ever removes leaves that are neither.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from onionskin.catalog import (
    BaseRow,
    Catalog,
    LayerRow,
    PendingRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
)
from onionskin.errors import SnapshotNotFoundError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of a volume.

    Attributes
    ----------
    name : str
    guid : str
        32 hex digits that a delta stream keeps: the same snapshot in two stores.
    created : datetime.datetime
        In UTC.
    parent : str or None
        The snapshot that it was taken after.
    note : str
    size_bytes : int
        Size of the disk then.
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
    row = catalog.row(SnapshotRow, "volume = ? AND name = ?", volume.id, name)
    if row is None:
        raise SnapshotNotFoundError(
            f"volume {volume.name!r} has no snapshot {name!r}; 'onionskin tree' lists those it has"
        )
    return row


def list_snapshots(catalog: Catalog, volume: VolumeRow) -> list[Snapshot]:
    """Return a volume's snapshots in the order in which they were taken."""
    with catalog.reading():
        rows = catalog.snapshots_of(volume.id)
        layers = {layer.id: layer for layer in catalog.rows(LayerRow)}
    names = {row.layer: row.name for row in rows}
    return [
        Snapshot(
            name=row.name,
            guid=row.guid.hex(),
            created=when(row.created_ns),
            parent=nearest_name(layers, names, layers[row.layer].parent),
            note=row.note,
            size_bytes=layers[row.layer].size_bytes,
        )
        for row in rows
    ]


def nearest_snapshot(catalog: Catalog, volume: VolumeRow, layer: bytes | None) -> SnapshotRow | None:
    """Return the volume's snapshot of a layer, or of the nearest one below it that has one."""
    while layer is not None:
        row = catalog.row(SnapshotRow, "layer = ? AND volume = ?", layer, volume.id)
        if row:
            return row
        layer = catalog.layer(layer).parent
    return None


def describe_snapshot(catalog: Catalog, volume: VolumeRow, row: SnapshotRow, layer: LayerRow) -> Snapshot:
    """Make the public description of one snapshot."""
    parent = nearest_snapshot(catalog, volume, layer.parent)
    return Snapshot(
        row.name, row.guid.hex(), when(row.created_ns), parent.name if parent else None, row.note, layer.size_bytes
    )


def nearest_name(layers: dict[bytes, LayerRow], names: dict[bytes, str], layer: bytes | None) -> str | None:
    """Return the name on a layer, or on the nearest one below it that has one."""
    while layer is not None:
        if layer in names:
            return names[layer]
        layer = layers[layer].parent
    return None


def descendants(catalog: Catalog, layer: bytes) -> set[bytes]:
    """Return all layers that stand on this one, at any height; not the layer itself."""
    found: set[bytes] = set()
    todo = [layer]
    while todo:
        for child in catalog.rows(LayerRow, "parent = ?", todo.pop()):
            found.add(child.id)
            todo.append(child.id)
    return found


def users_of(catalog: Catalog, layers: set[bytes], *, besides: bytes) -> list[str]:
    """Return what other volumes than `besides` have on these layers: `web-2` (its head) or `web-2@clean`."""
    names = {volume.id: volume.name for volume in catalog.rows(VolumeRow)}
    heads = [volume.name for volume in catalog.rows(VolumeRow) if volume.head in layers and volume.id != besides]
    named = [
        f"{names[row.volume]}@{row.name}"
        for row in catalog.rows(SnapshotRow)
        if row.layer in layers and row.volume != besides
    ]
    return sorted(heads + named)


def free_unneeded(catalog: Catalog, layer_id: bytes | None) -> bytes | None:
    """Remove a layer, and what is below it, as far up to the first that is needed; inside a transaction.

    Their files become pending work. Returns the needed layer that it came to, or None. A layer that is already gone
    is passed over.
    """
    while layer_id is not None:
        layer = catalog.row(LayerRow, "id = ?", layer_id)
        if layer is None:
            break
        if catalog.is_needed(layer_id):
            return layer_id
        drop_layer(catalog, layer)
        layer_id = layer.parent
        if layer.base and not catalog.has(LayerRow, "base = ?", layer.base):
            catalog.delete(BaseRow, "id = ?", layer.base)
    return None


def drop_layer(catalog: Catalog, layer: LayerRow) -> None:
    """Remove one layer's rows; its files become pending work. Inside a transaction."""
    for segment in catalog.rows(SegmentRow, "layer = ?", layer.id):
        catalog.add_pending("segment", segment.id, segment.lock_byte, layer.wipe)
        if segment.role == "spare":  # the map of the head that it was for
            catalog.add_pending("map", segment.id, segment.lock_byte, layer.wipe)
    catalog.add_pending("map", layer.map_id, layer.map_lock_byte, layer.wipe)
    catalog.delete(SegmentRow, "layer = ?", layer.id)
    catalog.delete(LayerRow, "id = ?", layer.id)
    # A merge of it into the base that was cancelled: nobody is left who needs it finished.
    catalog.delete(PendingRow, "kind = 'base-merge' AND target = ?", layer.id)
