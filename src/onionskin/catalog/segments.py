"""The queries about segments, which are the files that hold the data of layers."""

from collections.abc import Collection, Iterable

from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import LayerRow, SegmentRow
from onionskin.catalog.sqlite_errors import damaged


class Segments(Connection):
    """The queries about segments. Each raises FormatError where a row that it returns breaks a condition."""

    def segments_of(self, layers: list[LayerRow]) -> dict[bytes, list[SegmentRow]]:
        """Return the segments of each layer, spare ones included."""
        found: dict[bytes, list[SegmentRow]] = {layer.id: [] for layer in layers}
        for row in self.rows_in(SegmentRow, "layer", found):
            found[row.layer].append(row)
        return found

    def segments_of_layer(self, layer: bytes) -> list[SegmentRow]:
        """Return the segments of a layer, spare ones included, in no order."""
        return self.rows(SegmentRow, "layer = ?", layer)

    def segment_count(self, layer: bytes) -> int:
        """Return how many segments a layer has, spare ones and those with unsound rows included."""
        return self.count(SegmentRow, "layer = ?", layer)

    def sealed_segments_of(self, layer: bytes) -> list[SegmentRow]:
        """Return the segments of a layer that are only read, in no order."""
        return self.rows(SegmentRow, "layer = ? AND role = 'sealed'", layer)

    def spares_of(self, head: bytes) -> list[SegmentRow]:
        """Return the segments that are kept for the next head: one, or none if the layer is not a head."""
        return self.rows(SegmentRow, "layer = ? AND role = 'spare'", head)

    def spares_of_all(self, heads: Iterable[bytes]) -> list[SegmentRow]:
        """Return the segments that are kept for the next head of each of these layers, in no order."""
        return self.rows_in(SegmentRow, "layer", heads, "role = 'spare'")

    def spare_of(self, head: bytes) -> SegmentRow:
        """Return the segment that is kept for the next head."""
        found = self.spares_of(head)
        if len(found) != 1:
            raise damaged(self.path, f"the head {head.hex()} has {len(found)} spare segments, where one should be")
        return found[0]

    def segment_with_id(self, id: bytes) -> SegmentRow | None:
        """Return a segment by id, or None if it is gone."""
        return self.row(SegmentRow, "id = ?", id)

    def has_segment(self, id: bytes) -> bool:
        """Whether there is a segment with this id; its row may be unsound."""
        return self.has(SegmentRow, "id = ?", id)

    def segments_with_ids(self, ids: Iterable[bytes]) -> list[SegmentRow]:
        """Return those of these segments that exist, in no order."""
        return self.rows_in(SegmentRow, "id", ids)

    def layers_of_segments(self, ids: Collection[bytes]) -> list[tuple[bytes, bytes]]:
        """Return (segment, layer) of those of these segments that exist, in no order; unsound rows are left out."""
        return self.values_in(SegmentRow, "id, layer", "id", ids)

    def move_segments(self, layer: bytes, new_layer: bytes) -> None:
        """Give all segments of a layer to another one. Inside a transaction."""
        self._execute("UPDATE segments SET layer = ? WHERE layer = ?", new_layer, layer)

    def remove_segment(self, id: bytes) -> None:
        """Remove the row of a segment. Inside a transaction."""
        self.delete(SegmentRow, "id = ?", id)

    def remove_segments_of(self, *layers: bytes) -> None:
        """Remove the rows of all segments of layers. Inside a transaction."""
        self.delete_all(SegmentRow, "layer", layers)
