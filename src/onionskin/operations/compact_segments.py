"""Compaction of segments: if merges have left a layer with many small segments, one segment replaces them.

What must hold: the new segment and the new map are durable before the one transaction that switches to them. Blocks
keep their contents. The old files become pending work, which waits until nobody reads them any more. The work is
bounded. Each time that a volume is opened for writing, at most `COMPACT_BYTES_MAX` are copied for a layer. While the
volume is open, at most `OPEN_BYTES_MAX` are copied each time that the layer is folded or others are folded into it.
Without the latter, a disk whose snapshots come and go for months in one opening would have a file for each of them.
"""

import os
from collections.abc import Iterator
from functools import partial

from onionskin.base.files import write_all
from onionskin.base.fsync import sync_directory, sync_file
from onionskin.base.lazy import logger
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.modes import make_file
from onionskin.catalog import Catalog, CommitUnknownError, LayerRow, SegmentRow, WorkRow
from onionskin.errors import OnionskinError
from onionskin.kernels._maplog import MAGIC_SEGMENT, LayerMap, encode_header
from onionskin.operations import reclaim
from onionskin.operations.staging import StagedFiles, TreeChangedError, put_off, staged_files
from onionskin.storage.block_maps import load_layer
from onionskin.storage.chain import read_chain, unfinished_base_merges
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)

SEGMENTS_MAX = 64
SEGMENTS_KEPT = 16
COMPACT_BYTES_MAX = 256 << 20
OPEN_BYTES_MAX = 64 << 20  # the bound while the volume is open, because a snapshot waits for the copy to end


def compact_chain(store: OpenStore, head: bytes, *, may_hold_unflushed: bool = False) -> None:
    """Compact segments in each layer of a chain that has too many segments.

    The caller holds the volume's lock, and has not opened the data path yet. If a layer cannot be compacted now, it is
    left as it is, which does no harm: it reads the same.
    """
    catalog = store.catalog
    if unfinished_base_merges(catalog, head):
        return  # an unfinished merge into the base needs its layers as they are
    for layer, segments in _crowded(catalog, head):
        if not layer.sealed and may_hold_unflushed:
            continue  # a process that died left unflushed records, which apply to the map that it had
        try:
            put_off(partial(_compact, store, layer, segments))
        except (OSError, OnionskinError) as error:
            _log.warning("%s: the segments of layer %s could not be compacted: %s", store.path, layer.id.hex(), error)


def _crowded(catalog: Catalog, head: bytes) -> list[tuple[LayerRow, list[SegmentRow]]]:
    """Return the layers of a chain that have too many segments, each with its sealed segments."""
    if not catalog.crowded_in_chain(head, SEGMENTS_MAX):
        return []  # as good as always, in one statement
    with catalog.reading():
        layers = [catalog.layer(id) for id in catalog.crowded_in_chain(head, SEGMENTS_MAX)]
        segments = catalog.segments_of(layers)
    return [(layer, [row for row in segments[layer.id] if row.role == "sealed"]) for layer in layers]


def compact_below(volume: OpenHead, layer_id: bytes) -> None:
    """Compact segments in a sealed layer if it has too many. The volume is open for writing.

    Reads and writes go on meanwhile. If the layer cannot be compacted now, it is left as it is, and the caller's
    operation goes on.
    """
    catalog = volume.store.catalog
    with catalog.reading():
        if catalog.segment_count(layer_id) <= SEGMENTS_MAX:
            return
        layer, sealed = catalog.layer(layer_id), catalog.segments_of_layer(layer_id)
        is_read = any(below.id == layer_id for below in read_chain(catalog, volume.head).layers)
    if is_read and not _is_open(volume, sealed):
        return
    try:
        put_off(partial(_compact, volume.store, layer, sealed, volume if is_read else None))
    except CommitUnknownError:
        raise
    except (OSError, OnionskinError) as error:
        if volume.path.poisoned:
            raise
        _log.warning(
            "%s: the segments of layer %s could not be compacted: %s", catalog.path.parent, layer_id.hex(), error
        )


def _is_open(volume: OpenHead, segments: list[SegmentRow]) -> bool:
    """Whether the data path of a volume has all of these segments open.

    If it has not, another process opened a clone meanwhile and compacted some of the layer's segments. The volume then
    still reads these blocks from the old files, which it keeps. It must not open the new segment in order to compact
    the others: its index would name no slot of the new segment, so a reclaim that asks the volume for the live slots
    would find none, and would free them all.
    """
    return {row.id for row in segments} <= {id for _, id, _, _ in volume.path.segments()}


def _compact(store: OpenStore, layer: LayerRow, sealed: list[SegmentRow], reader: OpenHead | None = None) -> None:
    """Compact the smallest of a layer's sealed segments.

    `reader` is the volume that has the layer open below its head, if there is one.
    """
    locks = ByteLocks(store.layout.lock)
    try:
        wanted = {layer.map_lock_byte, *(row.lock_byte for row in sealed)}
        # Nobody frees the files that the reader has locked. Work on slots borrows the reader's lock, but it frees no
        # slot that is copied here.
        if not locks.take_shared(wanted - reader.locks.shared if reader else wanted):
            return  # another process frees or wipes one of the files just now, so the next time will do
        _refuse_changed(store, layer)  # another process may have compacted the same layer, and freed its files
        with load_layer(store, layer) as layer_map:
            bytes_max = OPEN_BYTES_MAX if reader else COMPACT_BYTES_MAX
            small = _smallest(layer_map, sealed, layer.block_size, bytes_max, store.doubted_segments)
            if len(small) < 2:
                return
            if not reader:  # an opening
                _refuse_others(store, layer_map, small)
            # A segment may come from a volume whose freed space is wiped: then the space of its copy must be, too.
            has_to_be_wiped = layer.wipe == "zero" or reclaim.any_wants_zeros(store, [row.id for row in small])
            with staged_files(store, ["segment", "map"], "zero" if has_to_be_wiped else "release") as files:
                segment_file, map_file = files.rows
                slots = _copy_slots(store, layer, layer_map, small, segment_file)
                size_bytes = layer_map.size_bytes if layer_map.size_bytes is not None else layer.size_bytes
                written = layer_map.write(
                    str(store.layout.map_file(map_file.target)),
                    map_id=map_file.target,
                    wipe_zero=layer.wipe == "zero",
                    size_bytes=size_bytes,
                )
                sync_directory(store.layout.segments)  # BARRIER: compacted segment name
                sync_directory(store.layout.layers)  # BARRIER: compacted map name
                if reader:
                    _switch_beside_readers(reader, layer, small, files, slots, written)
                else:
                    store.change(lambda: _switch(store, layer, small, files, slots, written))
    finally:
        locks.close()
    if reader:
        reclaim.work_soon(store)


def _switch_beside_readers(
    volume: OpenHead,
    layer: LayerRow,
    small: list[SegmentRow],
    files: StagedFiles,
    slots: int,
    written: tuple[int, int, int],
) -> None:
    """Switch to the new files, in the catalog and in the data path that reads the old ones."""
    store, catalog = volume.store, volume.store.catalog
    segment_file, map_file = files.rows
    compacted = {row.id for row in small}
    kept = [row for row in catalog.segments_of_layer(layer.id) if row.id not in compacted]

    def happened() -> bool:
        now = catalog.layer_with_id(layer.id)
        return now is not None and now.map_id == map_file.target

    source = (
        str(store.layout.map_file(map_file.target)), map_file.target, *written,
        [(segment_file.target, slots), *((row.id, row.slots) for row in kept)],
    )  # fmt: skip
    with volume.changing_below(happened):
        volume.path.prepare_below(layer=source, dropped=list(compacted), keep_base=True)
        store.change(lambda: _switch(store, layer, small, files, slots, written, volume))


def _refuse_changed(store: OpenStore, layer: LayerRow) -> None:
    if store.catalog.layer_with_id(layer.id) != layer:
        raise TreeChangedError("a layer changed while its segments were compacted; open the volume again")


def _refuse_others(store: OpenStore, layer_map: LayerMap, small: list[SegmentRow]) -> None:
    """Raise FormatError where a segment that would be dropped, since no block of it is in the map, is another layer's."""
    use = layer_map.segment_use()
    for row in small:
        if row.id not in use:
            from onionskin.operations.segment_owners import refuse_of_another

            refuse_of_another(store, row)


def _smallest(
    layer_map: LayerMap, sealed: list[SegmentRow], block_size: int, bytes_max: int, doubted: set[bytes]
) -> list[SegmentRow]:
    """Return the segments to compact: those with the fewest live bytes, and as many as the bound allows."""
    use = layer_map.segment_use()  # one pass over the map gives the use of all segments
    sealed = [row for row in sealed if row.id not in doubted]
    live = {row.id: use.get(row.id, (0, 0))[0] * block_size for row in sealed}
    chosen: list[SegmentRow] = []
    total = 0
    for row in sorted(sealed, key=lambda row: live[row.id])[: len(sealed) - SEGMENTS_KEPT]:
        total += live[row.id]
        if total > bytes_max:
            break
        chosen.append(row)
    return chosen


def _copy_slots(store: OpenStore, layer: LayerRow, layer_map: LayerMap, small: list[SegmentRow], made: WorkRow) -> int:
    """Copy the live slots of segments into a new segment, one after the other, and make the map name them there.

    Returns the number of slots of the new segment.
    """
    block_size, next_slot, segment = layer.block_size, 0, made.target
    # A file object closes its descriptor even if an interrupt arrives before the descriptor is stored anywhere.
    with open(store.layout.segment_file(segment), "r+b", buffering=0, opener=_make) as file:
        target = file.fileno()
        header = encode_header(MAGIC_SEGMENT, uuid=segment, block_size=block_size, wipe_zero=made.wipe == "zero")
        write_all(target, header)
        for row in small:
            live = layer_map.live_slots(row.id)
            moves = list(_moves(live, next_slot))
            if not moves:
                continue
            _copy_runs(store, row, moves, target, block_size)
            layer_map.replace(row.id, live, segment, [to for _, _, to in moves])
            _, count, to = moves[-1]
            next_slot = to + count
        sync_file(target)  # BARRIER: compacted segment
    return next_slot


def _moves(live: bytes, next_slot: int) -> Iterator[tuple[int, int, int]]:
    """Yield (slot, count, new slot) of each run of live slots. The new ones follow each other from `next_slot` on."""
    from struct import iter_unpack  # each opening imports this module, and few copy

    for slot, count in iter_unpack("=QQ", live):
        yield slot, count, next_slot
        next_slot += count


def _copy_runs(
    store: OpenStore, row: SegmentRow, moves: list[tuple[int, int, int]], target: int, block_size: int
) -> None:
    # Imported late: each opening imports this module, and few copy.
    from onionskin.kernels._copy import CopyJob
    from onionskin.operations.copy import naming

    with open(store.layout.segment_file(row.id), "rb", buffering=0, opener=_open_to_copy) as file:
        source = file.fileno()
        rows = [
            (source, target, HEADER_BYTES + slot * block_size, HEADER_BYTES + to * block_size, count * block_size)
            for slot, count, to in moves
        ]
        job = CopyJob(rows)
        with naming(job):
            job.run()


def _make(path: str, flags: int) -> int:
    return make_file(path)


def _open_to_copy(path: str, flags: int) -> int:
    """Open a file, as the opener of `open`. If a pipe is in its place, this does not wait, and the copy fails later."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _switch(
    store: OpenStore,
    layer: LayerRow,
    small: list[SegmentRow],
    files: StagedFiles,
    slots: int,
    written: tuple[int, int, int],
    reader: OpenHead | None = None,
) -> None:
    """Switch to the new files, and let `reader` lock them. Inside a transaction."""
    catalog = store.catalog
    _refuse_changed(store, layer)
    segment_file, map_file = files.rows
    for row in small:
        catalog.add_work("segment", row.id, row.lock_byte, layer.wipe)
        catalog.remove_segment(row.id)
    files.keep(reader.locks if reader else None)
    if reader:
        # The reader records the segment's id with its lock byte: once the catalog names the segment, another process
        # may compact it, and the reader has to know then which segment it has locked.
        reader.share({segment_file.lock_byte: segment_file.target}, map_file.lock_byte)
    catalog.insert(SegmentRow(segment_file.target, layer.id, "sealed", slots, segment_file.lock_byte))
    catalog.add_work("map", layer.map_id, layer.map_lock_byte, layer.wipe)
    length, frames, crc = written
    catalog.update(
        LayerRow, layer.id, map_id=map_file.target, map_lock_byte=map_file.lock_byte, map_length=length,
        map_frames=frames, map_crc=crc,
    )  # fmt: skip
