"""Loading the block map of one layer from its file, as the catalog describes it.

What must hold: a sealed layer's map is checked against the length, frame count and CRC that the catalog has; a head's
is read as far as it is durable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from onionskin._maplog import LayerMap, OwnerMap
from onionskin.catalog import SIZE_BYTES_MAX, LayerRow

if TYPE_CHECKING:
    from onionskin.store import Store


def empty_map(block_size: int) -> LayerMap:
    """Return a map without a block, with room for any."""
    return LayerMap(block_size=block_size, block_count=SIZE_BYTES_MAX // block_size)


def open_map(store: "Store", layer: LayerRow) -> LayerMap:
    """Load the map of a sealed layer, or of a head as it is durable now. The caller closes it."""
    if layer.sealed and layer.map_length == 0:
        return empty_map(layer.block_size)
    try:
        return LayerMap.load(
            str(store.layout.map_file(layer.map_id)),
            map_id=layer.map_id,
            block_size=layer.block_size,
            block_count=SIZE_BYTES_MAX // layer.block_size,
            **_sealed(layer),
        )
    except FileNotFoundError:
        if layer.sealed:
            raise
        return empty_map(layer.block_size)  # nothing was flushed to this head yet


def _sealed(layer: LayerRow) -> dict[str, int]:
    """Return what the catalog says of a sealed layer's map file; nothing for a head."""
    return {"length": layer.map_length, "frames": layer.map_frames, "crc": layer.map_crc} if layer.sealed else {}


def lay_map(store: "Store", layer: LayerRow, owners: OwnerMap) -> int | None:
    """Lay a layer over those below it, as `open_map` loads one; return the size that a head's map gives the disk."""
    try:
        size_bytes = owners.lay_file(str(store.layout.map_file(layer.map_id)), map_id=layer.map_id, **_sealed(layer))
    except FileNotFoundError:
        if layer.sealed:
            raise
        owners.lay(empty_map(layer.block_size))  # nothing was flushed to this head yet
        return None
    return None if layer.sealed else size_bytes


@contextmanager
def load_layer(store: "Store", layer: LayerRow) -> Iterator[LayerMap]:
    """Load a layer's block map for the time of a with block."""
    layer_map = open_map(store, layer)
    try:
        yield layer_map
    finally:
        layer_map.close()


def map_is_used(store: "Store", layer: LayerRow) -> bool:
    """Whether a layer changes anything over what is below it."""
    with load_layer(store, layer) as layer_map:
        return layer_map.count() != (0, 0)
