"""Gathering: a layer that merges have left with many small segments gets one instead of them.

What must hold: the new segment and the new map are durable before the one transaction that switches to them; blocks
keep their contents; the old files become pending work, which waits for whoever still reads them. Bounded: at most
`GATHER_BYTES_MAX` are copied for a layer each time a volume is opened for writing.
"""

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from onionskin import merging, pending
from onionskin._copy import CopyJob
from onionskin._maplog import MAGIC_SEGMENT, LayerMap, encode_header
from onionskin.barriers import sync_directory, sync_file
from onionskin.catalog import LayerRow, SegmentRow, new_id
from onionskin.files import write_all
from onionskin.layermaps import load_layer

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from onionskin.store import Store

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.later import numpy

SEGMENTS_MAX = 64
SEGMENTS_KEPT = 16
GATHER_BYTES_MAX = 256 << 20
HEADER_BYTES = 4096


def gather_chain(store: "Store", head: bytes) -> None:
    """Gather in each layer of a chain that has too many segments. The volume's lock is held, its path not yet open."""
    layers = store.catalog.chain(head)
    for layer in layers:
        sealed = [row for row in store.catalog.rows(SegmentRow, "layer = ?", layer.id) if row.role == "sealed"]
        if len(sealed) > SEGMENTS_MAX:
            merging.put_off(store, partial(_gather, store, layer, sealed))


def _gather(store: "Store", layer: LayerRow, sealed: list[SegmentRow]) -> None:
    segment, map_id = new_id(), new_id()
    segment_path, map_path = store.layout.segment_file(segment), store.layout.map_file(map_id)
    try:
        with load_layer(store, layer) as layer_map:
            small = _smallest(layer_map, sealed, layer.block_size)
            slots = _copy_slots(store, layer, layer_map, small, segment)
            size_bytes = layer_map.size_bytes if layer_map.size_bytes is not None else layer.size_bytes
            written = layer_map.write(
                str(map_path), map_id=map_id, wipe_zero=layer.wipe == "zero", size_bytes=size_bytes
            )
        sync_directory(store.layout.segments)  # BARRIER: gathered segment name
        sync_directory(store.layout.layers)  # BARRIER: gathered map name
        store.with_reserve(
            lambda: store.in_transaction(lambda: _switch(store, layer, small, segment, slots, map_id, written))
        )
    except BaseException:
        pending.drop_drafts(store, segment_path, map_path)
        raise


def _smallest(layer_map: LayerMap, sealed: list[SegmentRow], block_size: int) -> list[SegmentRow]:
    """Return the segments to gather: the smallest by what is live in them, as many as the bound allows."""
    live = {row.id: int(layer_map.live_slots(row.id)["count"].sum()) * block_size for row in sealed}
    chosen: list[SegmentRow] = []
    total = 0
    for row in sorted(sealed, key=lambda row: live[row.id])[: len(sealed) - SEGMENTS_KEPT]:
        total += live[row.id]
        if total > GATHER_BYTES_MAX:
            break
        chosen.append(row)
    return chosen


def _copy_slots(store: "Store", layer: LayerRow, layer_map: LayerMap, small: list[SegmentRow], segment: bytes) -> int:
    """Copy the live slots of segments behind each other into a new one, and point the map there. Returns the slots."""
    block_size, next_slot = layer.block_size, 0
    target = os.open(store.layout.segment_file(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        header = encode_header(MAGIC_SEGMENT, uuid=segment, block_size=block_size, wipe_zero=layer.wipe == "zero")
        write_all(target, header)
        for row in small:
            live = layer_map.live_slots(row.id)
            if not len(live):
                continue
            first = next_slot + numpy.concatenate(([0], numpy.cumsum(live["count"])[:-1])).astype(numpy.uint64)
            _copy_runs(store, row, live, first, target, block_size)
            layer_map.replace(row.id, live, segment, first)
            next_slot += int(live["count"].sum())
        sync_file(target)  # BARRIER: gathered segment
    finally:
        os.close(target)
    return next_slot


def _copy_runs(store: "Store", row: SegmentRow, live: "Array", first: "Array", target: int, block_size: int) -> None:
    source = os.open(store.layout.segment_file(row.id), os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = [
            (source, target, HEADER_BYTES + int(slot) * block_size, HEADER_BYTES + int(to) * block_size,
             int(count) * block_size)
            for (slot, count), to in zip(live.tolist(), first.tolist(), strict=True)
        ]  # fmt: skip
        CopyJob(table).run()
    finally:
        os.close(source)


def _switch(
    store: "Store",
    layer: LayerRow,
    small: list[SegmentRow],
    segment: bytes,
    slots: int,
    map_id: bytes,
    written: tuple[int, int, int],
) -> None:
    """Switch to the new files. Inside a transaction."""
    catalog = store.catalog
    if catalog.row(LayerRow, "id = ?", layer.id) != layer:
        raise merging.TreeChangedError("a layer changed while its segments were gathered; open the volume again")
    for row in small:
        catalog.add_pending("segment", row.id, row.lock_byte, layer.wipe)
        catalog.delete(SegmentRow, "id = ?", row.id)
    catalog.insert(SegmentRow(segment, layer.id, "sealed", slots, catalog.take_lock_byte()))
    catalog.add_pending("map", layer.map_id, layer.map_lock_byte, layer.wipe)
    length, frames, crc = written if layer.sealed else (0, 0, 0)
    catalog.update(
        LayerRow, layer.id, map_id=map_id, map_lock_byte=catalog.take_lock_byte(), map_length=length,
        map_frames=frames, map_crc=crc,
    )  # fmt: skip
