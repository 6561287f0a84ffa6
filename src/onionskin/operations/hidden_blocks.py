"""This module frees blocks of a layer without a name that nobody reads, because all layers above hide them.

It does so only with policy `zero`.

A fold frees the blocks that the only child of a layer hides. But nothing can be folded if several layers stand on a
layer, as clones do. A fold also frees nothing if the child hides nothing and the layers above the child do.

What must hold: no block is freed that is read by a name, by a head, or by a layer that is being sealed to be read. The
layers that hide a block are durable. A fork of a disk whose head is empty may be put on a layer without a name
(forks.py), and it hides nothing. So the layers above are read again inside the transaction that frees blocks, and the
work is put off if somebody has come. The fork compares, inside its own transaction, the layers that its disk stood on when
its head was found empty. Whichever commits first, the other one sees it. No layer comes between two others, so the blocks
that a layer hides of those below it stay hidden.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from onionskin.base.lazy import logger
from onionskin.base.records import record
from onionskin.base.states import DATA
from onionskin.catalog import Catalog, CommitUnknownError, LayerRow
from onionskin.errors import OnionskinError
from onionskin.kernels._extents import Extents
from onionskin.kernels._maplog import HEADER_BYTES, LOCATION_HOLE, LayerMap
from onionskin.operations import reclaim
from onionskin.operations.locked_maps import locked_maps
from onionskin.operations.new_map import give_up_maps, switch_map, write_map
from onionskin.operations.reclaim import any_wants_zeros
from onionskin.operations.staging import TreeChangedError, put_off, staged_files
from onionskin.storage.block_maps import load_durable, load_layer
from onionskin.storage.chain import is_in_base_merge
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

_log = logger(__name__)

# The bound for the layers above a layer, counted up to the named ones. More are not examined, because openings would
# wait.
LAYERS_MAX = 1000


@record
class Above:
    """A layer without a name, and the layers above it, up to the ones that have a name or are heads."""

    layer: LayerRow
    children: dict[bytes, tuple[LayerRow, ...]]  # the children of the layer, and of each layer without a name above it

    def layers(self) -> list[LayerRow]:
        """Return the layer and all layers above it that were read."""
        return [self.layer, *(child for children in self.children.values() for child in children)]

    def is_as(self, other: "Above | None") -> bool:
        """Whether the layers of `other` are the same, and so hide at least as much.

        A head may have grown, or its map may have been written anew.
        """
        return other is not None and self._shape() == other._shape()

    def _shape(self) -> dict[bytes, object]:
        of_heads = {row.id: (row.parent, row.sealed) for row in self.layers() if not row.sealed}
        return {row.id: row for row in self.layers()} | of_heads | {id: len(rows) for id, rows in self._counts()}

    def _counts(self) -> Iterable[tuple[bytes, tuple[LayerRow, ...]]]:
        return ((b"children of " + id, rows) for id, rows in self.children.items())


def read_above(catalog: Catalog, layer_id: bytes, own_head: bytes) -> Above | None:
    """Read the layers above a layer.

    Returns None if the layer is gone, if it is a head or has a name, if there are too many layers above it, or if a
    layer above it is known to hide nothing. `own_head` is the head of the volume that the caller holds. If only the
    head of another volume stands on a layer, that head does not count, because the layer may be about to be opened or
    named.
    """
    layer = catalog.layer_with_id(layer_id)
    if layer is None or not layer.sealed or catalog.is_named(layer_id):
        return None
    if catalog.has_unwritten_head_on(layer_id, HEADER_BYTES, besides=own_head):  # a new clone, which hides nothing
        return None
    children: dict[bytes, tuple[LayerRow, ...]] = {}
    todo, count = [layer], 0
    while todo:
        lower = todo.pop()
        rows = catalog.children_of(lower.id, at_most=LAYERS_MAX + 1 - count)
        count += len(rows)
        if count > LAYERS_MAX:
            return None
        if not rows or (len(rows) == 1 and not rows[0].sealed and rows[0].id != own_head):
            continue
        children[lower.id] = tuple(rows)
        todo += [row for row in rows if row.sealed and not catalog.is_named(row.id)]
    return Above(layer, children) if children.get(layer_id) else None


def wants_wiping(store: OpenStore, above: Above) -> bool:
    """Whether hidden blocks have to be wiped, because of the policy of a layer or of a segment from another volume."""
    if any(row.wipe == "zero" for row in (above.layer, *above.children[above.layer.id])):
        return True
    return any_wants_zeros(store, (segment.id for segment in store.catalog.segments_of_layer(above.layer.id)))


def without_hidden(
    store: OpenStore, path: "DataPath", head: bytes, above: Above, layer_map: LayerMap
) -> dict[bytes, int]:
    """Remove the blocks from a layer's map that all layers above hide. Returns the number of blocks by segment.

    The maps are locked. `path` is the data path of `head`, whose volume the caller holds.
    """
    hidden = _Hidden(store, path, head, above)
    wanted = layer_map.extents().only(DATA).within(hidden.by_all(above.layer))
    if not len(wanted):
        return {}
    before = layer_map.segment_use()
    for offset, length, *_ in wanted:
        layer_map.set(offset // layer_map.block_size, length // layer_map.block_size, LOCATION_HOLE)
    left = layer_map.segment_use()
    freed = {id: blocks - left.get(id, (0, 0))[0] for id, (blocks, _) in before.items()}
    return {id: blocks for id, blocks in freed.items() if blocks}


@record
class _Hidden:
    """The blocks that layers hide. `path` is the data path of `head`, whose volume the caller holds."""

    store: OpenStore
    path: "DataPath"
    head: bytes
    above: Above

    def by_all(self, lower: LayerRow) -> Extents:
        """Return the bytes that every child of a layer hides."""
        found: Extents | None = None
        for child in self.above.children[lower.id]:
            hidden = self.by(child)
            found = hidden if found is None else found.within(hidden)
            if not len(found):
                break
        assert found is not None
        return found

    def by(self, layer: LayerRow) -> Extents:
        """Return the bytes that a layer hides from every reader of the layer or of a layer above it."""
        state = self.path.log_state() if layer.id == self.head else None
        with ExitStack() as stack:
            if layer.sealed:
                layer_map = stack.enter_context(load_layer(self.store, layer))
            else:
                layer_map = load_durable(self.store, layer, state)
                stack.callback(layer_map.close)
            own = layer_map.extents()
        return (own.over(self.by_all(layer)) if layer.id in self.above.children else own).ranges()


def locked_above(store: OpenStore, layer_id: bytes, own_head: bytes) -> Any:
    """Return the context of `locked_maps` for what `read_above` returns: the maps are locked in the with block."""
    return locked_maps(
        store,
        lambda: read_above(store.catalog, layer_id, own_head),
        lambda above: above.layers() if above else [],
    )


def free_hidden(volume: OpenHead, layers: Iterable[bytes]) -> None:
    """Free the blocks of these layers that nobody reads any more, if the layers have no name and policy `zero` applies.

    The operation that the caller was asked for is already done. So a failure is logged, and the work is left to the
    next opening.
    """
    for id in layers:
        try:
            put_off(partial(_free_hidden, volume, id))
        except CommitUnknownError:
            raise
        except (OSError, OnionskinError) as error:
            if volume.path.poisoned:
                raise
            _log.warning("%s: what is hidden of layer %s could not be freed: %s", volume.store.path, id.hex(), error)


def _free_hidden(volume: OpenHead, layer_id: bytes) -> None:
    store, catalog = volume.store, volume.store.catalog
    with catalog.reading():
        seen = read_above(catalog, layer_id, volume.head)
    if not seen or not wants_wiping(store, seen):
        return
    catalog.refuse_dangling()
    if any(row.id == volume.head for row in seen.layers()):
        volume.path.flush()  # a write that is not durable hides nothing
    with locked_above(store, layer_id, volume.head) as above:
        if not above:
            return
        layer = above.layer
        with load_layer(store, layer) as layer_map:
            freed = without_hidden(store, volume.path, volume.head, above, layer_map)
            if not freed:
                return
            with staged_files(store, ["map"], "zero") as files:
                (map_file,) = files.rows
                written = write_map(store, map_file, layer_map, "zero", layer.size_bytes)

                def switch() -> None:
                    now = read_above(catalog, layer_id, volume.head)
                    if not above.is_as(now) or is_in_base_merge(catalog, [layer]):
                        raise TreeChangedError("the layers changed while it was seen what they hide")
                    switch_map(volume, [], layer, files, written)
                    reclaim.add_slot_work(store, list(freed), "zero")

                store.change(switch)
    give_up_maps(volume, [layer])
    reclaim.work_soon(store)
