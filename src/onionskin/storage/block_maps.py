"""This module loads the block maps of layers from their files, as the catalog describes them.

What must hold: the map of a sealed layer is checked against the length, frame count and CRC in the catalog. The map of
a head is read as far as it is durable. A caller that reads several maps locks them first (operations/locked_maps.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.catalog import Catalog, LayerRow
from onionskin.errors import FormatError, StateError
from onionskin.kernels._maplog import LayerMap, ProvenanceMap
from onionskin.storage.chain import Chain
from onionskin.storage.open_store import OpenStore

# A head's log is read while its writer appends to it. Frames that arrive during the read can look like a gap.
_TRIES = 3

Found = TypeVar("Found")


def read_layers(catalog: Catalog, layer_id: bytes) -> Chain:
    """Read a chain without its segments, for its maps alone. Inside `reading`."""
    layers = catalog.chain(layer_id)
    if not layers:
        raise StateError("the layer is gone: another process changed the tree; try again")
    base = catalog.base_with_id(layers[0].base) if layers[0].base else None
    return Chain(tuple(layers), {}, base)


def empty_map(block_size: int) -> LayerMap:
    """Return a map that holds no block, and is large enough for any volume."""
    return LayerMap(block_size=block_size, block_count=VOLUME_BYTES_MAX // block_size)


def open_map(store: OpenStore, layer: LayerRow) -> LayerMap:
    """Load the map of a sealed layer, or of a head as it is durable now. The caller closes it."""
    if layer.sealed and layer.map_length == 0:
        return empty_map(layer.block_size)
    try:
        return _read_until_sound(layer, lambda: load_map(store, layer))
    except FileNotFoundError:
        if layer.sealed:
            raise
        return empty_map(layer.block_size)  # nothing was flushed to this head yet


def load_map(store: OpenStore, layer: LayerRow) -> LayerMap:
    """Read the file of a layer's map, which must exist. The caller closes the map."""
    return LayerMap.load(
        store.layout.map_path(layer.map_id),
        map_id=layer.map_id,
        block_size=layer.block_size,
        block_count=VOLUME_BYTES_MAX // layer.block_size,
        **_sealed(layer),
    )


def load_durable(store: OpenStore, layer: LayerRow, state: tuple[int, int, int] | None = None) -> LayerMap:
    """Load the part of a head's map that is known to be durable. The caller closes the map.

    The head's row says how long this part is, unless `state` does (length, frames, crc). In contrast, `open_map` may
    see frames that a crash of the machine would still undo.
    """
    length, frames, crc = state or (layer.map_length, layer.map_frames, layer.map_crc)
    if not frames:
        return empty_map(layer.block_size)
    return LayerMap.load(
        store.layout.map_path(layer.map_id),
        map_id=layer.map_id,
        block_size=layer.block_size,
        block_count=VOLUME_BYTES_MAX // layer.block_size,
        length=length,
        frames=frames,
        crc=crc,
    )


def _read_until_sound(layer: LayerRow, read: Callable[[], Found]) -> Found:
    """Read a map. If a head's map seems damaged, read it again: a writer may just have appended to it."""
    for _ in range(0 if layer.sealed else _TRIES - 1):
        try:
            return read()
        except FormatError:
            pass
    return read()


def _sealed(layer: LayerRow) -> dict[str, int]:
    """Return what the catalog says about the map file of a sealed layer. For a head, return an empty dictionary."""
    return {"length": layer.map_length, "frames": layer.map_frames, "crc": layer.map_crc} if layer.sealed else {}


def lay_map(store: OpenStore, layer: LayerRow, provenance: ProvenanceMap) -> int | None:
    """Lay a layer over those below it. For a head, return the size of the disk that its map gives.

    The map is read in the same way as by `open_map`.
    """
    try:
        size_bytes = _read_until_sound(
            layer,
            lambda: provenance.lay_file(store.layout.map_path(layer.map_id), map_id=layer.map_id, **_sealed(layer)),
        )
    except FileNotFoundError:
        if layer.sealed:
            raise
        provenance.lay(empty_map(layer.block_size))  # nothing was flushed to this head yet
        return None
    return None if layer.sealed else size_bytes


class SlotsOfLayers:
    """The slots that sealed layers name, by segment. Consecutive calls about one layer load its map once.

    The answers may be out of date, which does no harm: the set of live slots of a sealed layer only ever shrinks.
    """

    def __init__(self, store: OpenStore) -> None:
        self._store = store
        self._layer: LayerRow | None = None
        self._slots: dict[bytes, bytes] = {}

    def of(self, layer: LayerRow, segment: bytes) -> bytes:
        """Return the live slots of a segment of a layer, sorted and joined, as the bytes of an array of dtypes.SLOTS."""
        if self._layer != layer:
            with load_layer(self._store, layer) as layer_map:
                self._slots = layer_map.slots_by_segment()
            self._layer = layer
        return self._slots.get(segment, b"")


@contextmanager
def load_layer(store: OpenStore, layer: LayerRow) -> Iterator[LayerMap]:
    """Load a layer's block map, and close it at the end of the with block."""
    layer_map = open_map(store, layer)
    try:
        yield layer_map
    finally:
        layer_map.close()


def map_is_used(store: OpenStore, layer: LayerRow) -> bool:
    """Whether a layer holds any block, and so changes the disk below it."""
    with load_layer(store, layer) as layer_map:
        return layer_map.count() != (0, 0)
