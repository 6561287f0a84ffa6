"""The queries about layers, about the layers below and above them, and about bases.

What must hold: a condition on the ids of layers names each layer once, so that it is linear in its result.
"""

from collections.abc import Iterable

from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import COLUMNS, BaseRow, LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.schema import VALUES
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import FormatError

# A layer and all below it. It is UNION and not UNION ALL, so that a circle ends.
_CHAIN_IDS = (
    "WITH RECURSIVE up(id) AS (SELECT ? UNION "
    "SELECT layers.parent FROM up JOIN layers ON layers.id = up.id WHERE layers.parent IS NOT NULL)"
)
_LAYERS_OF_VOLUME = (  # the layers that a volume's head and its snapshots stand on, given its id twice
    "WITH RECURSIVE below(id) AS (SELECT head FROM volumes WHERE id = ? UNION SELECT layer FROM snapshots "
    "WHERE volume = ? UNION SELECT layers.parent FROM below JOIN layers ON layers.id = below.id "
    "WHERE layers.parent IS NOT NULL) SELECT id FROM below"
)
_LAYERS_OF_FORKS = (  # the same of the volumes that were forked from one, or from one snapshot of it, given that twice
    "WITH RECURSIVE forks(id) AS (SELECT volume FROM lineage WHERE parent = ? AND (? IS NULL OR guid = ?)), "
    "below(id) AS (SELECT head FROM volumes WHERE id IN forks UNION SELECT layer FROM snapshots WHERE volume IN forks "
    "UNION SELECT layers.parent FROM below JOIN layers ON layers.id = below.id WHERE layers.parent IS NOT NULL) "
    "SELECT id FROM below"
)
_LAYERS_ABOVE = (  # the layers that stand on a layer
    "WITH RECURSIVE above(id) AS (SELECT id FROM layers WHERE parent = ? UNION ALL SELECT layers.id FROM above "
    "JOIN layers ON layers.parent = above.id) SELECT id FROM above"
)
LAYERS_BELOW = (  # a layer and all below it
    "WITH RECURSIVE below(id) AS (SELECT ? UNION ALL SELECT layers.parent FROM below JOIN layers ON layers.id = below.id "
    "WHERE layers.parent IS NOT NULL) SELECT id FROM below"
)
_UNNAMED = "NOT EXISTS (SELECT 1 FROM snapshots WHERE layer = layers.id)"

_SOUND_LAYER = " AND ".join(value.sql.format(f"layers.{column}") for column, value in VALUES[LayerRow].items())
_SOUND_LAYER += " AND (layers.parent IS NULL OR layers.base IS NULL)"


class Layers(Connection):
    """The queries about layers and bases. Each raises FormatError if a row that it returns breaks a condition."""

    # ---- layers by their ids ----

    def layer(self, id: bytes) -> LayerRow:
        """Return a layer by its id, which a row names. A sound catalog has every layer that a row names."""
        found = self.row(LayerRow, "id = ?", id)
        if found is None:
            raise FormatError(f"{self.path}: layer {id.hex()} is named but missing; restore the catalog from a copy")
        return found

    def layer_with_id(self, id: bytes | None) -> LayerRow | None:
        """Return a layer by its id, or None if the layer is gone or the id is None."""
        return self.row(LayerRow, "id = ?", id)

    def has_layer(self, id: bytes) -> bool:
        """Whether there is a layer with this id. Its row may be unsound."""
        return self.has(LayerRow, "id = ?", id)

    def layers_with_ids(self, ids: Iterable[bytes]) -> list[LayerRow]:
        """Return the layers that have one of these ids, in no order."""
        return self.rows_in(LayerRow, "id", ids)

    def has_map(self, map_id: bytes) -> bool:
        """Whether a layer has this map. The row of the layer may be unsound."""
        return self.has(LayerRow, "map_id = ?", map_id)

    def layers_with_maps(self) -> list[bytes]:
        """Return the layers that may have a map file, in no order; unsound rows are left out."""
        return [id for (id,) in self.values(LayerRow, "id", "map_length > 0 OR NOT sealed")]

    def maps_among(self, map_ids: Iterable[bytes]) -> list[bytes]:
        """Return those of these maps that a layer has, in no order; unsound rows are left out."""
        return [id for (id,) in self.values_in(LayerRow, "map_id", "map_id", map_ids)]

    def remove_layers(self, ids: Iterable[bytes]) -> None:
        """Remove the rows of layers, which have no segment any more, and on which none stands. Inside a transaction."""
        self.delete_all(LayerRow, "id", ids)

    def remove_layer(self, id: bytes) -> None:
        """Remove the row of a layer that has no segment any more. Inside a transaction."""
        self.delete(LayerRow, "id = ?", id)

    # ---- the layers above a layer ----

    def children_of(self, layer: bytes, *, at_most: int | None = None) -> list[LayerRow]:
        """Return the layers that stand directly on a layer, in no order, and no more than `at_most` of them."""
        if at_most is None:
            return self.rows(LayerRow, "parent = ?", layer)
        return self.rows(LayerRow, "parent = ? LIMIT ?", layer, at_most)

    def children_of_layers(self, layers: Iterable[bytes]) -> list[LayerRow]:
        """Return the layers that stand directly on one of these layers, in no order."""
        return self.rows_in(LayerRow, "parent", layers)

    def only_child_of(self, layer: bytes) -> LayerRow | None:
        """Return the one layer that stands directly on a layer, or None if none does or several do."""
        children = self.children_of(layer, at_most=2)
        return children[0] if len(children) == 1 else None

    def child_count(self, layer: bytes) -> int:
        """Return how many layers stand directly on a layer, including those with unsound rows."""
        return self.count(LayerRow, "parent = ?", layer)

    def has_unwritten_head_on(self, layer: bytes, map_bytes: int, *, besides: bytes) -> bool:
        """Whether a head other than `besides` stands directly on a layer and has a map of at most `map_bytes`."""
        return self.has(
            LayerRow, "parent = ? AND sealed = 0 AND map_length <= ? AND id != ?", layer, map_bytes, besides
        )

    def layers_above(self, layer: bytes) -> list[LayerRow]:
        """Return all layers that stand on this one, at any height, in no order. The layer itself is not among them."""
        return self.rows(LayerRow, f"id IN ({_LAYERS_ABOVE})", layer)

    def parents(self) -> dict[bytes, tuple[bytes | None, bytes | None]]:
        """Return (parent, base) of each layer that has a child, by the layer's id. Unsound rows are left out."""
        found = self.values(LayerRow, "id, parent, base", "id IN (SELECT parent FROM layers WHERE parent IS NOT NULL)")
        return {id: (parent, base) for id, parent, base in found}

    def parents_among(self, layers: Iterable[bytes]) -> list[bytes]:
        """Return those of these layers that another one stands on, in no order."""
        return [parent for (parent,) in self.values_in(LayerRow, "DISTINCT parent", "parent", layers)]

    def needed_layers(self, layers: Iterable[bytes]) -> set[bytes]:
        """Return those of these layers that have a name, are a head, or have a child; the rows may be unsound."""
        asked = list(layers)
        return (
            self.values_found(LayerRow, "parent", asked)
            | self.values_found(SnapshotRow, "layer", asked)
            | self.values_found(VolumeRow, "head", asked)
        )

    # ---- the layers below a layer ----

    def chain(self, layer_id: bytes) -> list[LayerRow]:
        """Return a layer and all layers below it, bottom first. The list is empty if the layer is gone."""
        columns = ", ".join(f"layers.{column}" for column in COLUMNS[LayerRow])
        text = f"{_CHAIN_IDS} SELECT {columns}, coalesce({_SOUND_LAYER}, 0) FROM up JOIN layers ON layers.id = up.id"
        with self._guard, self._errors():
            found = self._connection.execute(text, (layer_id,)).fetchall()
        for *row, sound in found:
            if not sound:
                raise self._unsound(LayerRow, row[0])
        by_id = {row[0]: LayerRow(*row[:-1]) for row in found}
        return self._in_order(by_id, layer_id)

    def _in_order(self, by_id: dict[bytes, LayerRow], top: bytes) -> list[LayerRow]:
        layers: list[LayerRow] = []
        at: bytes | None = top if by_id else None
        while at is not None:
            layer = by_id.pop(at, None)
            if layer is None:
                raise damaged(self.path, f"layers stand on each other in a circle, or layer {at.hex()} is missing")
            if layers and layer.block_size != layers[-1].block_size:
                raise damaged(
                    self.path, f"layer {at.hex()} has blocks of another size than the layer that stands on it"
                )
            if layers and not layer.sealed:
                raise damaged(self.path, f"layer {at.hex()} has layers above it and is not sealed")
            layers.append(layer)
            at = layer.parent
        return layers[::-1]

    def crowded_in_chain(self, layer_id: bytes, segments: int) -> list[bytes]:
        """Return the layers that have more than `segments` sealed segments, among this layer and all below it."""
        text = (
            f"{_CHAIN_IDS} SELECT up.id FROM up JOIN segments ON segments.layer = up.id WHERE segments.role = 'sealed' "
            "GROUP BY up.id HAVING count(*) > ?"
        )
        with self._guard, self._errors():
            return [id for (id,) in self._connection.execute(text, (layer_id, segments)).fetchall()]

    def unnamed_in_chain(self, layer: bytes) -> list[LayerRow]:
        """Return the layers without a name among this one and all below it, in no order. The chain must have an end."""
        return self.rows(LayerRow, f"id IN ({LAYERS_BELOW}) AND {_UNNAMED}", layer)

    def layers_of_volume(self, volume: bytes) -> list[LayerRow]:
        """Return a volume's head, the layers of its snapshots, and all layers below these, in no order."""
        return self.rows(LayerRow, f"id IN ({_LAYERS_OF_VOLUME})", volume, volume)

    def layers_of_forks(self, volume: bytes, guid: bytes | None) -> list[LayerRow]:
        """Return the `layers_of_volume` of all volumes that were forked from one, or from its snapshot with this GUID."""
        return self.rows(LayerRow, f"id IN ({_LAYERS_OF_FORKS})", volume, guid, guid)

    def forks_of_volume(self, volume: bytes) -> list[bytes]:
        """Return those `layers_of_volume` without a name on which a layer of another volume stands, in no order."""
        child = (
            f"SELECT 1 FROM layers AS child WHERE child.parent = layers.id AND child.id NOT IN ({_LAYERS_OF_VOLUME})"
        )
        found = self.values(
            LayerRow, "id", f"id IN ({_LAYERS_OF_VOLUME}) AND {_UNNAMED} AND EXISTS ({child})", *(volume,) * 4
        )
        return [id for (id,) in found]

    def unnamed_of_volume(self, volume: bytes) -> list[LayerRow]:
        """Return the sealed layers without a name among the `layers_of_volume`, in no order."""
        return self.rows(LayerRow, f"id IN ({_LAYERS_OF_VOLUME}) AND sealed = 1 AND {_UNNAMED}", volume, volume)

    def only_children_over_volume(self, volume: bytes) -> list[bytes]:
        """Return the layers of any volume that are the only child of one of `layers_of_volume`, in no order.

        Their rows may be unsound.
        """
        alone = f"SELECT min(id) FROM layers WHERE parent IN ({_LAYERS_OF_VOLUME}) GROUP BY parent HAVING count(*) = 1"
        with self._guard, self._errors():
            return [id for (id,) in self._connection.execute(alone, (volume, volume))]

    # ---- bases ----

    def base_of(self, layer: LayerRow) -> BaseRow | None:
        """Return the base that a layer stands on directly, or None."""
        if layer.base is None:
            return None
        found = self.row(BaseRow, "id = ?", layer.base)
        if found is None:
            raise damaged(self.path, f"the base {layer.base.hex()} is named but missing")
        return found

    def base_with_id(self, id: bytes) -> BaseRow | None:
        """Return a base by its id, or None if it is gone."""
        return self.row(BaseRow, "id = ?", id)

    def bases(self) -> list[BaseRow]:
        """Return all bases, in no order."""
        return self.rows(BaseRow)

    def bases_at(self, path: str) -> list[BaseRow]:
        """Return the bases whose file is at this path, in no order. Each volume that was made on the file has one."""
        return self.rows(BaseRow, "path = ?", path)

    def bases_by_path(self) -> list[BaseRow]:
        """Return all bases, in the order of their paths. Unsound rows are left out."""
        return self.sound_rows(BaseRow, "1 ORDER BY path")

    def base_paths(self) -> dict[bytes, str]:
        """Return the path of each base, by its id. Unsound rows are left out."""
        return dict(self.values(BaseRow, "id, path"))

    def layers_standing_on(self, bases: Iterable[bytes]) -> list[LayerRow]:
        """Return the layers that stand directly on one of these bases, in no order."""
        return self.rows_in(LayerRow, "base", bases)

    def is_base_needed(self, base: bytes) -> bool:
        """Whether a layer stands directly on a base. The row of the layer may be unsound."""
        return self.has(LayerRow, "base = ?", base)

    def remove_base(self, id: bytes) -> None:
        """Remove the row of a base. Inside a transaction."""
        self.delete(BaseRow, "id = ?", id)
