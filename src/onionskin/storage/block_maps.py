"""Loading the block maps of layers from their files, as the catalog describes them; keeping those files where they are.

What must hold: a sealed layer's map is checked against the length, frame count and CRC that the catalog has; a head's
is read as far as it is durable. Who reads several maps locks them first, and knows that the catalog named them after
the locks were taken: then nobody has freed one, and nobody will.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from onionskin.base.lazy import dtypes
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.catalog import BaseRow, Catalog, LayerRow
from onionskin.errors import FormatError, StateError
from onionskin.kernels._maplog import STATE_DATA, LayerMap, OwnerMap
from onionskin.storage.chain import LOCK_WAIT_SECONDS, Chain
from onionskin.storage.locks import ByteLocks

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from onionskin.store import Store

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy

_IDS_MAX = 500  # in one statement; SQLite allows 999 and more
# A head's log is read beside its writer: two frames that come in the midst of it look as if one was missing.
_TRIES = 3
STRETCHES_MAX = 256
FILLED_MAX = 1 << 16

Found = TypeVar("Found")


@contextmanager
def locked_maps(
    store: "Store", find: Callable[[], Found], layers_of: Callable[[Found], Collection[LayerRow]]
) -> Iterator[Found]:
    """Give what `find` read in one state of the catalog, its layers' map files locked against whoever frees them.

    The layers are those of a state that was. What is named, written or dropped since then changes nothing in their
    files: sealed ones never change, and of a head's log the frames that are added later may be seen too.

    Raises
    ------
    StateError
        The tree is being changed all the time.
    """
    locks = ByteLocks(store.layout.lock)
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    try:
        while True:
            with store.catalog.reading():
                found = find()
            layers = layers_of(found)
            wanted = {layer.map_lock_byte for layer in layers}
            # Between them may be a byte that somebody has alone for hours: of a file that is being made, or wiped.
            is_held = locks.take_shared(in_few_stretches(wanted)) or locks.take_shared(wanted)
            if is_held and _are_named(store.catalog, layers):
                break
            locks.keep_shared(())
            if time.monotonic() > deadline:
                raise StateError(f"the tree of {store.path} is being changed all the time; try again when that is done")
            time.sleep(0.01)  # somebody frees one of the files; nothing tells us when it is done
        yield found
    finally:
        locks.close()
        if any(volume.writable for volume in store.open_volumes()):
            store.work_soon()  # what had to wait for these locks


def in_few_stretches(numbers: set[int]) -> set[int]:
    """Add numbers that lie between those given, until they are no more than STRETCHES_MAX stretches.

    The time for a lock grows with the locks that a file has. A byte that is locked for nothing only keeps what belongs to it
    from being freed until these locks are given up. Gaps that have more than FILLED_MAX numbers together stay: each
    number is kept in memory, and the bytes of a volume's layers lie as far apart as the other volumes are busy.
    """
    ordered = sorted(numbers)
    gaps = sorted(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    filled = set(numbers)
    room = FILLED_MAX
    for before, after in gaps[: max(len(gaps) + 1 - STRETCHES_MAX, 0)]:
        room -= after - before - 1
        if room < 0:
            break
        filled.update(range(before + 1, after))
    return filled


def read_layers(catalog: Catalog, layer_id: bytes) -> Chain:
    """Read a chain for its maps alone: without its segments. Inside `reading`."""
    layers = catalog.chain(layer_id)
    if not layers:
        raise StateError("the layer is gone: another process changed the tree; try again")
    base = catalog.row(BaseRow, "id = ?", layers[0].base) if layers[0].base else None
    return Chain(tuple(layers), {}, base)


def _are_named(catalog: Catalog, layers: Collection[LayerRow]) -> bool:
    """Whether the catalog still names the map files of all these layers: then none was freed before it was locked."""
    files = {layer.id: (layer.map_id, layer.map_lock_byte) for layer in layers}
    ids, named = list(files), 0
    with catalog.reading():
        for first in range(0, len(ids), _IDS_MAX):
            part = ids[first : first + _IDS_MAX]
            for row in catalog.rows(LayerRow, f"id IN ({', '.join('?' * len(part))})", *part):
                named += files[row.id] == (row.map_id, row.map_lock_byte)
    return named == len(files)


def empty_map(block_size: int) -> LayerMap:
    """Return a map without a block, with room for any."""
    return LayerMap(block_size=block_size, block_count=VOLUME_BYTES_MAX // block_size)


def open_map(store: "Store", layer: LayerRow) -> LayerMap:
    """Load the map of a sealed layer, or of a head as it is durable now. The caller closes it."""
    if layer.sealed and layer.map_length == 0:
        return empty_map(layer.block_size)
    try:
        return _settled(layer, lambda: load_map(store, layer))
    except FileNotFoundError:
        if layer.sealed:
            raise
        return empty_map(layer.block_size)  # nothing was flushed to this head yet


def load_map(store: "Store", layer: LayerRow) -> LayerMap:
    """Read the file of a layer's map, which must be there. The caller closes what is returned."""
    return LayerMap.load(
        str(store.layout.map_file(layer.map_id)),
        map_id=layer.map_id,
        block_size=layer.block_size,
        block_count=VOLUME_BYTES_MAX // layer.block_size,
        **_sealed(layer),
    )


def load_durable(store: "Store", layer: LayerRow, state: tuple[int, int, int] | None = None) -> LayerMap:
    """Load what of a head's map is known to be durable: as its row says, or as `state` does (length, frames, crc).

    `open_map` may see frames that a crash of the machine would still undo. The caller closes it.
    """
    length, frames, crc = state or (layer.map_length, layer.map_frames, layer.map_crc)
    if not frames:
        return empty_map(layer.block_size)
    return LayerMap.load(
        str(store.layout.map_file(layer.map_id)),
        map_id=layer.map_id,
        block_size=layer.block_size,
        block_count=VOLUME_BYTES_MAX // layer.block_size,
        length=length,
        frames=frames,
        crc=crc,
    )


def _settled(layer: LayerRow, read: Callable[[], Found]) -> Found:
    """Read a map; that of a head again where it seems damaged, for a writer may have been at it."""
    for _ in range(0 if layer.sealed else _TRIES - 1):
        try:
            return read()
        except FormatError:
            pass
    return read()


def _sealed(layer: LayerRow) -> dict[str, int]:
    """Return what the catalog says of a sealed layer's map file; nothing for a head."""
    return {"length": layer.map_length, "frames": layer.map_frames, "crc": layer.map_crc} if layer.sealed else {}


def lay_map(store: "Store", layer: LayerRow, owners: OwnerMap) -> int | None:
    """Lay a layer over those below it, as `open_map` loads one; return the size that a head's map gives the disk."""
    try:
        size_bytes = _settled(
            layer,
            lambda: owners.lay_file(str(store.layout.map_file(layer.map_id)), map_id=layer.map_id, **_sealed(layer)),
        )
    except FileNotFoundError:
        if layer.sealed:
            raise
        owners.lay(empty_map(layer.block_size))  # nothing was flushed to this head yet
        return None
    return None if layer.sealed else size_bytes


class SlotsOfLayers:
    """The slots that sealed layers name, by segment: a layer's map is loaded once for all segments that are asked for.

    Only for as long as the layers cannot get another map with fewer slots whose loss would matter: what is live never grows.
    """

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._layer: LayerRow | None = None
        self._runs: dict[bytes, Array] = {}

    def of(self, layer: LayerRow, segment: bytes) -> "Array":
        """Return the live slots of a segment of a layer, sorted: an array of dtypes.SLOTS."""
        if self._layer != layer:
            with load_layer(self._store, layer) as layer_map:
                self._runs = _slots_by_segment(layer_map)
            self._layer = layer
        found = self._runs.get(segment)
        return numpy.empty(0, dtypes.SLOTS) if found is None else found


def _slots_by_segment(layer_map: LayerMap) -> "dict[bytes, Array]":
    runs = layer_map.runs()
    runs = runs[runs["state"] == STATE_DATA]
    runs = runs[numpy.lexsort((runs["slot"], runs["segment"]))]
    slots = numpy.empty(len(runs), dtypes.SLOTS)
    slots["slot"], slots["count"] = runs["slot"], runs["block_count"]
    numbers, first = numpy.unique(runs["segment"], return_index=True)
    ids = layer_map.segments
    return {ids[number - 1]: part for number, part in zip(numbers.tolist(), numpy.split(slots, first)[1:], strict=True)}


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
