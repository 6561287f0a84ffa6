"""This module makes a disk independent of everything below it, by copying all that it reads into one layer of its own.

What must hold: the copy is durable before the transaction that puts the head on it. The head that takes the writes
meanwhile stays, with everything that was written to it. Snapshots keep the layers that they stand on.
"""

import os
from typing import TYPE_CHECKING

from onionskin.base.files import write_all
from onionskin.base.fsync import sync_directory, sync_file
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.modes import make_file
from onionskin.base.paths import FilePath
from onionskin.catalog import Catalog, LayerRow, SegmentRow, new_id
from onionskin.catalog.tree import remove_unreachable_layers
from onionskin.errors import StateError
from onionskin.kernels._extents import Extents
from onionskin.kernels._maplog import MAGIC_SEGMENT, LayerMap, encode_header
from onionskin.operations import copy, reclaim
from onionskin.operations.seal import seal
from onionskin.operations.staging import StagedFiles, staged_files
from onionskin.storage.block_maps import empty_map
from onionskin.storage.chain import Chain, read_chain
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, refuse_changed_base

if TYPE_CHECKING:
    from onionskin.base.progress import Progress


def flatten(volume: OpenHead, *, progress: "Progress | None") -> None:
    """Copy all that the disk reads into one new layer without a parent, and put the head on that layer.

    The head is sealed first, so that what is copied does not change. A new head takes the writes meanwhile. It stays,
    with everything that was written to it, and only stands on another layer afterwards.
    """
    with volume.operation():
        _flatten(volume, progress)


def _flatten(volume: OpenHead, progress: "Progress | None") -> None:
    store, catalog = volume.store, volume.store.catalog
    if _stands_alone(catalog, volume.head):
        return
    before = OpenChain(read_chain(catalog, volume.head), volume.path, volume.locks, volume.base_lock)
    copy.check_room_for_copy(store, before, store.layout.segments)
    old = seal(volume)
    chain = read_chain(catalog, old.id)
    wipe = "zero" if reclaim.has_to_be_wiped(store, chain) else "release"
    with staged_files(store, ["segment", "map"], wipe) as files:
        segment_file, map_file = files.rows
        slots, written = _write_flat(volume, chain, segment_file.target, map_file.target, wipe == "zero", progress)
        flat = old._replace(
            id=new_id(),
            parent=None,
            base=None,
            wipe=wipe,
            map_id=map_file.target,
            map_lock_byte=map_file.lock_byte,
            map_length=written[0],
            map_frames=written[1],
            map_crc=written[2],
        )
        segments = [SegmentRow(segment_file.target, flat.id, "sealed", slots, segment_file.lock_byte)] if slots else []
        _stand_on(volume, old, flat, segments, files)


def _stand_on(volume: OpenHead, old: LayerRow, flat: LayerRow, segments: list[SegmentRow], files: StagedFiles) -> None:
    """Put the head on the flat layer instead of the layer that was copied, in the catalog and in the data path."""
    store, catalog = volume.store, volume.store.catalog

    def switch() -> None:
        head = catalog.layer(volume.head)
        if head.parent != old.id:
            raise StateError("another process changed the tree while the disk was flattened; flatten it again")
        files.keep(volume.locks)
        catalog.insert(flat)
        for row in segments:
            catalog.insert(row)
        catalog.update(LayerRow, volume.head, parent=flat.id)
        remove_unreachable_layers(catalog, old.id)

    source = (
        str(store.layout.map_file(flat.map_id)), flat.map_id, flat.map_length, flat.map_frames, flat.map_crc,
        [(row.id, row.slots) for row in segments],
    )  # fmt: skip
    below = [row.id for rows in read_chain(catalog, old.id).segments.values() for row in rows]
    with volume.changing_below(lambda: catalog.layer(volume.head).parent == flat.id):
        volume.path.prepare_below(base_fd=None, base_bytes=0, layer=source, dropped=below)
        store.change(switch)


def _stands_alone(catalog: Catalog, head: bytes) -> bool:
    """Whether nothing below a head has a name, belongs to another volume, or is a base."""
    layers = catalog.chain(head)
    return layers[0].base is None and not any(
        catalog.snapshot_of_layer(layer.id) or catalog.child_count(layer.id) > 1 for layer in layers
    )


def _write_flat(
    volume: OpenHead, chain: Chain, segment: bytes, map_id: bytes, wipe_zero: bool, progress: "Progress | None"
) -> tuple[int, tuple[int, int, int]]:
    """Write a segment with the blocks in the order of the disk, and its map. Both are durable on return.

    Returns the number of slots, and the map file's length, frames and crc.
    """
    store, block_size = volume.store, chain.top.block_size
    with copy.chain_path(store, chain, volume.base_lock) as path:
        opened = OpenChain(chain, path, volume.locks, volume.base_lock)
        refuse_changed_base(opened)
        data = copy.data_of(opened)
        packed = data.packed(HEADER_BYTES, block_size)
        slots = -(-(packed.end - HEADER_BYTES) // block_size) if len(data) else 0
        # A disk that reads as zeros gets no segment: no row would name its file.
        if slots:
            _write_flat_segment(store, opened, packed, slots, segment, wipe_zero, progress)
        refuse_changed_base(opened)
    flat_map = empty_map(block_size)
    try:
        if slots:
            _set_slots(flat_map, flat_map.add_segment(segment), data)
        written = flat_map.write(
            str(store.layout.map_file(map_id)), map_id=map_id, wipe_zero=wipe_zero, size_bytes=chain.top.size_bytes
        )
    finally:
        flat_map.close()
    sync_directory(store.layout.segments)  # BARRIER: flat segment name
    sync_directory(store.layout.layers)  # BARRIER: flat map name
    return slots, written


def _write_flat_segment(
    store: OpenStore,
    opened: OpenChain,
    packed: Extents,
    slots: int,
    segment: bytes,
    wipe_zero: bool,
    progress: "Progress | None",
) -> None:
    """Copy data into a new segment: `packed` says from where to where."""
    block_size, path = opened.chain.top.block_size, opened.path
    target = store.layout.segment_file(segment)
    sources: dict[int, FilePath | int] = {number: store.layout.segment_file(id) for number, id, _, _ in path.segments()}
    if opened.base_lock:
        sources[copy.BASE] = opened.base_lock.descriptor
    descriptor = make_file(target)
    try:
        write_all(descriptor, encode_header(MAGIC_SEGMENT, uuid=segment, block_size=block_size, wipe_zero=wipe_zero))
        reflink = copy.may_reflink(store, opened.chain)
        copy.copy_extents(packed, descriptor, sources, reflink=reflink, punch=True, solid=False, progress=progress)
        os.ftruncate(descriptor, HEADER_BYTES + slots * block_size)  # a base may end within a block
        sync_file(descriptor)  # BARRIER: flat segment
    finally:
        os.close(descriptor)


def _set_slots(flat_map: LayerMap, number: int, data: Extents) -> None:
    """Map extents of data to the slots of a segment, one after the other, as `Extents.packed` lays them."""
    slot = 0
    for offset, length, *_ in data:
        count = -(-length // flat_map.block_size)
        flat_map.set(offset // flat_map.block_size, count, number << 32 | slot)
        slot += count
