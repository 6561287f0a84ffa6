"""Pending work: freeing files and slots, now or after a crash.

What must hold: nothing is freed but under the exclusive lock of its byte, and where another handle has the byte the
work stays pending. With policy `zero` a file is overwritten before it is unlinked and slots before they are punched.
All of it may be done twice.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from onionskin._wipe import wipe
from onionskin.catalog import LayerRow, PendingRow, SegmentRow
from onionskin.errors import OnionskinError
from onionskin.layermaps import SlotsOfLayers
from onionskin.locks import STORE_BYTE

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from onionskin.store import Store
else:
    from onionskin.later import numpy

HEADER_BYTES = 4096
SETTLED_AT_ONCE = 64
_FILE_KINDS = ("map", "segment")


def do_pending(store: "Store", *, policy: str | None = None) -> int:
    """Do what can be done of the pending work, of one wipe policy or of all; returns how much is left."""
    left, done, slots = 0, [], SlotsOfLayers(store)
    condition, values = ("", ()) if policy is None else ("AND wipe = ? ", (policy,))
    unlinked = policy != "zero"
    try:
        for row in store.catalog.rows(PendingRow, f"kind != 'base-merge' {condition}ORDER BY id", *values):
            with _alone(store, row) as alone:
                if alone and _do(store, row, slots, unlink=unlinked):
                    done.append(row)
                else:
                    left += 1
            if len(done) == SETTLED_AT_ONCE:
                _settle(store, done, unlinked=unlinked)
                done = []
    finally:
        _settle(store, done, unlinked=unlinked)
    return left


def _settle(store: "Store", rows: list[PendingRow], *, unlinked: bool) -> None:
    """Forget what is done. A file that was only wiped is as one of policy `release` from now on: it can go any time.

    A crash before that only has it done once more; so do two who do it at the same time.
    """
    if not rows:
        return
    with store.catalog.transaction():
        for row in rows:
            if row.kind in _FILE_KINDS and not unlinked:
                store.catalog.update(PendingRow, row.id, wipe="release")
            else:
                store.catalog.delete(PendingRow, "id = ?", row.id)


@contextmanager
def _alone(store: "Store", row: PendingRow) -> Iterator[bool]:
    """Hold the byte of a file exclusively, through the store's own locks.

    A scrub may borrow the lock of the one volume that has the file open for writing here: that never reads a slot which
    the owner's map does not name. A view does, where the layers were folded after it was opened; and whoever has
    a lock on a file that goes as a whole still reads it.
    """
    locks = store.locks
    if row.kind == "scrub":
        for volume in store.open_volumes():
            if volume.writable and row.lock_byte in volume.locks.shared:
                locks = volume.locks
    with locks.exclusive(row.lock_byte) as held:
        yield held


def _do(store: "Store", row: PendingRow, slots: SlotsOfLayers, *, unlink: bool) -> bool:
    """Do one piece of work; False where it has to wait for its volume to be open here."""
    if row.kind in _FILE_KINDS:
        _free_file(store, row, unlink=unlink)
        return True
    return _scrub(store, row, slots)


def _free_file(store: "Store", row: PendingRow, *, unlink: bool) -> None:
    """Wipe a file (policy `zero`) and unlink it: freeing its pages and blocks takes as long as writing the zeros did."""
    path = store.layout.map_file(row.target) if row.kind == "map" else store.layout.segment_file(row.target)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if row.wipe == "zero":
            result = wipe(descriptor, [(0, os.fstat(descriptor).st_size)], zero=True, punch=False)
            store.note_unreachable(result.bytes_unreachable)
        if unlink:
            path.unlink()
    finally:
        os.close(descriptor)


def _scrub(store: "Store", row: PendingRow, slots: SlotsOfLayers) -> bool:
    """Free what the owner's map does not name. The owner may change meanwhile; what is live never grows."""
    with store.catalog.reading():
        segment = store.catalog.row(SegmentRow, "id = ?", row.target)
        owner = store.catalog.row(LayerRow, "id = ?", segment.layer) if segment else None
    if segment is None or owner is None:  # freed as a whole meanwhile
        return True
    live = _live_slots(store, segment, owner, slots)
    if live is None:
        return False
    for volume in store.open_volumes():
        volume.wait_for_readers()  # one may still be copying from a slot that it found before it was freed
    path = store.layout.segment_file(segment.id)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        ranges = _gaps(live, owner.block_size, os.fstat(descriptor).st_size)
        if len(ranges):
            result = wipe(descriptor, ranges, zero=row.wipe == "zero", punch=True)
            store.note_unreachable(result.bytes_unreachable)
    finally:
        os.close(descriptor)
    return True


def _live_slots(
    store: "Store", segment: SegmentRow, owner: LayerRow, slots: SlotsOfLayers
) -> "numpy.typing.NDArray[numpy.void] | None":
    """Return the slots that are needed, or None where only the volume that has the owner as its head knows."""
    if not owner.sealed:
        path = store.path_of_head(owner.id)
        return None if path is None else path.live_slots(segment.id)
    return slots.of(owner, segment.id)


def _gaps(
    live: "numpy.typing.NDArray[numpy.void]", block_size: int, file_bytes: int
) -> "numpy.typing.NDArray[numpy.uint64]":
    """Return (offset, length) of what lies between the live slots, to the end of the file."""
    names = live.dtype.names
    assert names is not None
    first, count = (live[name].astype(numpy.int64) for name in names[:2])
    starts = numpy.concatenate(([0], first + count)) * block_size + HEADER_BYTES
    ends = numpy.concatenate((first * block_size + HEADER_BYTES, [max(file_bytes, HEADER_BYTES)]))
    keep = ends > starts
    return numpy.column_stack((starts[keep], (ends - starts)[keep])).astype(numpy.uint64)


def sweep_orphans(store: "Store") -> list[str]:
    """Remove files that no row names: what a crash left. Only while nobody else has the store open."""
    with store.unnamed_files, store.locks.exclusive(STORE_BYTE) as held:
        if not held:
            return []
        swept = orphans(store)
        for path in swept:
            _sweep(path)
        return [str(path) for path in swept]


def orphans(store: "Store") -> list[Path]:
    """Return the files of maps and segments that no row names."""
    named = {store.layout.map_file(row.map_id) for row in store.catalog.rows(LayerRow)}
    named |= {store.layout.segment_file(row.id) for row in store.catalog.rows(SegmentRow)}
    # A spare's id is that of the next head's map too.
    named |= {store.layout.map_file(row.id) for row in store.catalog.rows(SegmentRow, "role = 'spare'")}
    for row in store.catalog.rows(PendingRow):
        named |= {store.layout.map_file(row.target), store.layout.segment_file(row.target)}
    directories = (store.layout.layers, store.layout.segments)
    return sorted(path for directory in directories for path in directory.iterdir() if path not in named)


def drop_drafts(store: "Store", *paths: Path) -> None:
    """Remove files whose transaction failed; not those that it names after all, when an interrupt came behind its commit.

    What cannot be decided or removed now is left to a sweep.
    """
    with suppress(OSError, OnionskinError):
        for path in set(orphans(store)).intersection(paths):
            _sweep(path)


def _sweep(path: Path) -> None:
    """Wipe and unlink; a file without a row may have belonged to a volume with policy `zero`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        wipe(descriptor, [(0, os.fstat(descriptor).st_size)], zero=True, punch=False)
        path.unlink()
    finally:
        os.close(descriptor)
