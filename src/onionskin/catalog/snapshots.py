"""The queries about snapshots, which are the names of sealed layers, and about the holds on them."""

from collections.abc import Iterable
from typing import Any

from onionskin.base.naming import is_text
from onionskin.catalog.connection import Connection
from onionskin.catalog.layers import LAYERS_BELOW
from onionskin.catalog.rows import HoldRow, SnapshotRow

_LAYERS_TO_NEAREST = (  # a layer and those below it, down to the first that has a name in a volume
    "WITH RECURSIVE below(id) AS (SELECT ? UNION ALL SELECT layers.parent FROM below JOIN layers ON layers.id = below.id "
    "WHERE layers.parent IS NOT NULL AND NOT EXISTS (SELECT 1 FROM snapshots WHERE layer = below.id AND volume = ?)) "
    "SELECT id FROM below"
)


class Snapshots(Connection):
    """The queries about snapshots. Each raises FormatError where a row that it returns breaks a condition."""

    def snapshot_named(self, volume: bytes, name: str) -> SnapshotRow | None:
        """Return a volume's snapshot of that name, or None."""
        return self.row(SnapshotRow, "volume = ? AND name = ?", volume, name) if is_text(name) else None

    def has_snapshot_named(self, volume: bytes, name: str) -> bool:
        """Whether a volume has a snapshot of that name; its row may be unsound."""
        return is_text(name) and self.has(SnapshotRow, "volume = ? AND name = ?", volume, name)

    def snapshot_names_found(self, wanted: Iterable[tuple[bytes, str]]) -> set[bytes]:
        """Return the volumes of these (volume, name) that have a snapshot of that name; its row may be unsound."""
        asked = [pair for pair in wanted if is_text(pair[1])]
        return {volume for volume, _ in self.pairs_found(SnapshotRow, ("volume", "name"), asked)}

    def snapshots_of(self, volume: bytes) -> list[SnapshotRow]:
        """Return a volume's snapshots in the order of taking."""
        return self.rows(SnapshotRow, "volume = ? ORDER BY number, name", volume)

    def snapshots_of_volumes(self, volumes: Iterable[bytes]) -> dict[bytes, list[SnapshotRow]]:
        """Return the snapshots of each volume that has any, in the order of taking."""
        found: dict[bytes, list[SnapshotRow]] = {}
        for row in sorted(self.rows_in(SnapshotRow, "volume", volumes), key=lambda row: (row.number, row.name)):
            found.setdefault(row.volume, []).append(row)
        return found

    def snapshots_named_after(self, volume: bytes, name: str, at_most: int) -> list[SnapshotRow]:
        """Return a volume's snapshots whose names sort after this one, in the order of their names."""
        return self.rows(SnapshotRow, "volume = ? AND name > ? ORDER BY name LIMIT ?", volume, name, at_most)

    def snapshots(self) -> list[SnapshotRow]:
        """Return the snapshots of all volumes, in no order."""
        return self.rows(SnapshotRow)

    def snapshot_count(self, volume: bytes) -> int:
        """Return how many snapshots a volume has; unsound rows do not count."""
        ((count,),) = self.values(SnapshotRow, "count(*)", "volume = ?", volume)
        return int(count)

    def snapshot_counts(self) -> dict[bytes, int]:
        """Return how many snapshots each volume with snapshots has; unsound rows do not count."""
        return dict(self.values(SnapshotRow, "volume, count(*)", "1 GROUP BY volume"))

    def volumes_of_names(self) -> dict[bytes, bytes]:
        """Return the volume of each snapshot, by its layer; unsound rows are left out."""
        return dict(self.values(SnapshotRow, "layer, volume"))

    def snapshot_of_layer(self, layer: bytes) -> SnapshotRow | None:
        """Return the name of a layer, or None."""
        return self.row(SnapshotRow, "layer = ?", layer)

    def is_named(self, layer: bytes) -> bool:
        """Whether a layer has a name; its row may be unsound."""
        return self.has(SnapshotRow, "layer = ?", layer)

    def snapshots_of_layers(self, layers: Iterable[bytes], *, besides: bytes | None = None) -> list[SnapshotRow]:
        """Return the names of these layers, in no order; those of the volume `besides` are left out."""
        if besides is None:
            return self.rows_in(SnapshotRow, "layer", layers)
        return self.rows_in(SnapshotRow, "layer", layers, "volume != ?", besides)

    def snapshots_in_chain(self, layer: bytes) -> list[SnapshotRow]:
        """Return the names of a layer and of all below it, in no order. The caller has checked that the chain ends."""
        return self.rows(SnapshotRow, f"layer IN ({LAYERS_BELOW})", layer)

    def nearest_snapshot_of(self, volume: bytes, layer: bytes) -> SnapshotRow | None:
        """Return the volume's snapshot of a layer, or of the nearest one below it that has one, or None."""
        return self.row(SnapshotRow, f"volume = ? AND layer IN ({_LAYERS_TO_NEAREST})", volume, layer, volume)

    def remove_snapshot(self, volume: bytes, name: str) -> None:
        """Remove a volume's snapshot of that name; its layer stays. Inside a transaction."""
        self.delete(SnapshotRow, "volume = ? AND name = ?", volume, name)

    def remove_snapshot_of_layer(self, layer: bytes) -> None:
        """Remove the name of a layer, if it has one; the layer stays. Inside a transaction."""
        self.delete(SnapshotRow, "layer = ?", layer)

    def remove_snapshots_of(self, volumes: Iterable[bytes]) -> None:
        """Remove all snapshots of volumes; their layers stay. Inside a transaction."""
        self.delete_all(SnapshotRow, "volume", volumes)

    def update_snapshot(self, layer: bytes, **values: Any) -> None:
        """Change columns of the snapshot of this layer. Inside a transaction."""
        self.update(SnapshotRow, layer, **values)

    def holds_on(self, layers: Iterable[bytes]) -> list[HoldRow]:
        """Return the holds on the snapshots of these layers, oldest first."""
        return sorted(self.rows_in(HoldRow, "layer", layers), key=lambda row: (row.created_ns, row.holder))

    def holds(self) -> list[HoldRow]:
        """Return all holds, oldest first."""
        return sorted(self.rows(HoldRow), key=lambda row: (row.created_ns, row.holder))

    def drop_hold(self, layer: bytes, holder: str) -> None:
        """Remove a hold. Inside a transaction."""
        self.delete(HoldRow, "layer = ? AND holder = ?", layer, holder)
