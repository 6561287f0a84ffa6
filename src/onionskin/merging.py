"""Joining layers: folding a layer into its only child, compacting a head's map, merging into the base.

What must hold: a new map file is durable before the one transaction that switches to it; that transaction also moves
the segments and notes what has to be freed; reads do not change, whatever step a crash comes after; what is noted as
copied into a base is durable in it.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from errno import EDQUOT, EINVAL, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

from onionskin import folding, pending, transfer
from onionskin.barriers import sync_directory, sync_file
from onionskin.catalog import (
    BaseRow,
    LayerRow,
    PendingRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.chain import Chain, pending_base_merges, read_chain
from onionskin.errors import StateError
from onionskin.locks import BaseLock
from onionskin.snapshots import find_snapshot, free_unneeded, unnamed_below

if TYPE_CHECKING:
    from onionskin._volume import LowerLayer
    from onionskin.store import Store
    from onionskin.volume import Progress, Volume

# Of a merge into the base, what is copied between two notes of how far it is.
STRETCH_SECONDS = 5
FIRST_STRETCH_BYTES = 64 << 20
STRETCH_BYTES_MIN = 1 << 20


# ---- folding a layer into its only child ----


def fold_where_unnamed(volume: "Volume", layers: Iterable[bytes | None]) -> None:
    """Fold each of these layers into its child, where it has no name and only one, and that one is in reach."""
    for id in layers:
        if id is not None:
            fold(volume, id)


def fold(volume: "Volume", layer_id: bytes) -> bool:
    """Fold what is worth it of the layers without a name around one (folding.py); returns whether any was."""
    store = volume.store
    try:
        run = folding.run_around(volume, layer_id)
        groups = folding.groups_to_fold(store, run)
    except FileNotFoundError:
        _check_run_is_gone(store, run)
        return False
    folded = [_fold_group(volume, group) for group in groups]
    if not any(folded):
        return False
    store.work_soon()
    return True


def _fold_group(volume: "Volume", group: folding.Group) -> bool:
    """Fold layers into the last of them, if that can be done now."""
    *lowers, upper = group
    if not upper.sealed and len(lowers) > 1:
        if not _fold_group(volume, lowers):
            return False
        lowers = [volume.store.catalog.layer(lowers[-1].id)]

    def change() -> None:
        try:
            if upper.sealed:
                _fold_sealed(volume, lowers, upper)
            else:
                _fold_into_head(volume, lowers[0], upper)
        except FileNotFoundError:
            _check_unchanged(volume.store, lowers, upper)  # a map that another process folded meanwhile is no damage
            raise

    return put_off(volume.store, change)


def _check_run_is_gone(store: "Store", run: Sequence[LayerRow]) -> None:
    """While a FileNotFoundError is handled: raise it on, unless another process folded the layers meanwhile."""
    try:
        _check_unchanged(store, run[:-1], run[-1])
    except TreeChangedError:
        return
    raise


def put_off(store: "Store", change: Callable[[], None]) -> bool:
    """Do work that can wait for the next open: it is left where the tree changed meanwhile, or the disk is full."""
    try:
        with store.unnamed_files:
            store.with_reserve(change)
    except TreeChangedError:
        return False
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        return False
    return True


def _nothing_below(layer: LayerRow) -> bool:
    return layer.parent is None and layer.base is None


def _fold_sealed(volume: "Volume", lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    store = volume.store
    map_id = new_id()
    path = store.layout.map_file(map_id)

    def switch() -> None:
        _check_unchanged(store, lowers, upper)
        _switch_map(store, lowers, upper, map_id, written, scrubs=list(laid.freed))

    try:
        with closing(folding.lay(store, [*lowers, upper])) as laid:
            if _nothing_below(lowers[0]):
                laid.map.drop_zero()
            written = laid.map.write(
                str(path), map_id=map_id, wipe_zero=upper.wipe == "zero", size_bytes=upper.size_bytes
            )
        sync_directory(store.layout.layers)  # BARRIER: folded map name
        store.with_reserve(lambda: store.in_transaction(switch))
    except BaseException:
        pending.drop_drafts(store, path)
        raise
    _lock_new_map(volume, [*lowers, upper])


def _lock_new_map(volume: "Volume", folded: Sequence[LayerRow]) -> None:
    """Lock the map that took the place of others, where the volume reads it: not all of its chain anew.

    Segments have changed their owners, and not their bytes.
    """
    bytes_before = {layer.map_lock_byte for layer in folded}
    if bytes_before & volume.locks.shared:
        volume.locks.take_shared({volume.store.catalog.layer(folded[-1].id).map_lock_byte})
        volume.locks.drop_shared(bytes_before)


def _fold_into_head(volume: "Volume", lower: LayerRow, upper: LayerRow) -> None:
    store = volume.store
    segments = store.catalog.rows(SegmentRow, "layer = ?", lower.id)
    source = (
        str(store.layout.map_file(lower.map_id)),
        lower.map_id,
        lower.map_length,
        lower.map_frames,
        lower.map_crc,
        [(segment.id, segment.slots) for segment in segments],
    )
    _rewrite(volume, upper, lower, source)


def _rewrite(volume: "Volume", head: LayerRow, lower: LayerRow | None, source: "LowerLayer | None") -> None:
    store, map_id = volume.store, new_id()

    def switch() -> None:
        if lower:
            _check_unchanged(store, [lower], head)
        _switch_map(store, [lower] if lower else [], head, map_id, (0, 0, 0))

    with volume.settling(lambda: _settle_rewrite(volume, [lower, head] if lower else [head], map_id)):
        volume.path.rewrite_map(
            new_path=str(store.layout.map_file(map_id)),
            new_id=map_id,
            lower=source,
            drop_zero=_nothing_below(lower or head),
        )
        store.with_reserve(lambda: store.in_transaction(switch))


def _settle_rewrite(volume: "Volume", folded: Sequence[LayerRow], map_id: bytes) -> None:
    """Append to the new map file if the catalog names it. Where nobody knows, both files stay; the volume is poisoned."""
    if not volume.path.poisoned and volume.store.catalog.layer(folded[-1].id).map_id != map_id:
        if_begun(volume.path.rewrite_abort)
        return
    if_begun(volume.path.rewrite_commit)
    if not volume.path.poisoned:
        _lock_new_map(volume, folded)


def if_begun(tell: Callable[[], None]) -> None:
    """Tell the data path how a seal or a rewrite ended; one that was not begun, or was told already, needs nothing."""
    try:
        tell()
    except OSError as error:
        if error.errno != EINVAL:
            raise


def compact(volume: "Volume") -> None:
    """Write the head's map log anew, without what is dead in it."""
    put_off(volume.store, lambda: _rewrite(volume, volume.store.catalog.layer(volume.head), None, None))


class TreeChangedError(StateError):
    """Another process changed the layers that were about to be joined."""


def _check_unchanged(store: "Store", lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    """Another process may have folded the same layers, or cloned or named one of them, since they were read."""
    catalog = store.catalog
    above = [*lowers[1:], upper]
    unchanged = all(catalog.row(LayerRow, "id = ?", layer.id) == layer for layer in (*lowers, upper)) and all(
        [row.id for row in catalog.rows(LayerRow, "parent = ? LIMIT 2", lower.id)] == [child.id]
        and not catalog.row(SnapshotRow, "layer = ?", lower.id)
        for lower, child in zip(lowers, above, strict=True)
    )
    if not unchanged:
        raise TreeChangedError(
            "the layers changed while they were merged: another process works on the tree; try again"
        )


def _switch_map(
    store: "Store",
    lowers: Sequence[LayerRow],
    upper: LayerRow,
    map_id: bytes,
    written: tuple[int, int, int],
    *,
    scrubs: Sequence[bytes] | None = None,
) -> None:
    """Give `upper` its new map, and all that `lowers`, bottom first, had. Inside a transaction.

    `scrubs`: the segments that have slots which the new map no longer names; None where nobody counted.
    """
    catalog = store.catalog
    catalog.add_pending("map", upper.map_id, upper.map_lock_byte, upper.wipe)
    length, frames, crc = written
    catalog.update(
        LayerRow,
        upper.id,
        map_id=map_id,
        map_lock_byte=catalog.take_lock_byte(),
        map_length=length,
        map_frames=frames,
        map_crc=crc,
    )
    if not lowers:
        return
    wipe = "zero" if "zero" in {layer.wipe for layer in (*lowers, upper)} else upper.wipe
    if scrubs is None:
        scrubs = [row.id for lower in lowers for row in catalog.rows(SegmentRow, "layer = ?", lower.id)]
    store.add_scrubs(scrubs, wipe)
    catalog.update(LayerRow, upper.id, parent=lowers[0].parent, base=lowers[0].base)
    for lower in reversed(lowers):
        catalog.move_segments(lower.id, upper.id)
        catalog.add_pending("map", lower.map_id, lower.map_lock_byte, lower.wipe)
        catalog.delete(LayerRow, "id = ?", lower.id)


def fold_unnamed_below(volume: "Volume") -> None:
    """Fold what has no name in the volume's own chain: work that an earlier operation left. At open."""
    catalog = volume.store.catalog
    with catalog.reading():
        unnamed = unnamed_below(catalog, volume.head)
    seen: set[bytes] = set()
    for layer in unnamed:
        if layer not in seen:
            seen |= {one.id for one in folding.run_around(volume, layer)}
            fold(volume, layer)


# ---- merging into the base ----


def merge_into_base(
    volume: "Volume", upto: str | None, *, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    """Fold the layers up to a snapshot (or all) into the base. See `Volume.merge_into_base`.

    What is written is hidden by the layers that it comes from, until the transaction at the end. So reads, writes and
    snapshots, which only add layers on top, go on during the copy; all else on the tree has to wait. A merge that was
    interrupted before is ended first.
    """
    resumes = True
    while resumes:
        with volume.operation(may_resume=True):
            interrupted = pending_base_merges(volume.store.catalog, volume.head)
            resumes = bool(interrupted)
            folded, lock = _begin_base_merge(volume, interrupted[0] if interrupted else _target_of(volume, upto))
            volume.is_merging = True
        _run_base_merge(volume, folded, lock, progress, threads, bytes_per_second)
    volume.store.work_soon()


def _target_of(volume: "Volume", upto: str | None) -> bytes:
    """Return the uppermost layer to fold: that of a snapshot, or what is sealed now."""
    store, catalog = volume.store, volume.store.catalog
    chain = read_chain(catalog, volume.head)
    if chain.base is None:
        raise StateError(f"volume {volume.name!r} has no base to merge into: 'onionskin export' writes an image")
    if upto is None:
        refuse_older(store, volume, chain, None)
        return volume.seal(lambda: None, lambda layer, created_ns: None).id
    target = find_snapshot(catalog, volume.row, upto).layer
    if target not in {layer.id for layer in chain.layers}:
        raise StateError(f"the disk does not descend from {upto!r}; revert to it (or to a newer one) first")
    refuse_older(store, volume, chain, target)
    return target


def _begin_base_merge(volume: "Volume", target: bytes) -> tuple[Chain, BaseLock]:
    """Check that there is room, take the base alone, and write down what is begun. Returns what is folded, and the lock."""
    catalog = volume.store.catalog
    folded = read_chain(catalog, target)
    assert folded.base is not None
    transfer.check_room(volume.store, folded)
    lock = _lock_base_alone(volume, folded.base)
    try:
        if not catalog.row(PendingRow, "kind = 'base-merge' AND target = ?", target):
            with catalog.transaction():
                catalog.add_pending("base-merge", target, 0, volume.wipe)
    except BaseException:
        lock.close()
        volume.base_lock = BaseLock(Path(folded.base.path))
        raise
    return folded, lock


def _run_base_merge(
    volume: "Volume",
    folded: Chain,
    lock: BaseLock,
    progress: "Progress | None",
    threads: int,
    bytes_per_second: int,
) -> None:
    store = volume.store
    assert folded.base is not None
    try:
        _copy_into_base(
            store,
            folded,
            lock.descriptor,
            progress=_stoppable(volume, progress),
            threads=threads,
            bytes_per_second=bytes_per_second,
        )
        with volume.guard:
            dropped = _finish(store, folded)
            below = read_chain(store.catalog, volume.head).base
            assert below is not None
            volume.path.rebase(path=below.path, size_bytes=below.size_bytes, dropped=dropped)
            volume.lock_what_is_read()
            fold_where_unnamed(volume, [folded.top.id])
    finally:
        lock.close()
        with volume.guard:
            try:
                volume.base_lock = BaseLock(Path(folded.base.path))
            finally:
                volume.merge_ended()


def _stoppable(volume: "Volume", progress: "Progress | None") -> "Progress":
    """Pass progress on, and end the copy when the volume is being closed."""

    def report(done: int, total: int) -> None:
        if volume.merge_stop:
            raise StateError(
                f"volume {volume.name!r} was closed during the merge into its base; it goes on when it is opened again"
            )
        if progress:
            progress(done, total)

    return report


def _lock_base_alone(volume: "Volume", base: BaseRow) -> BaseLock:
    if volume.base_lock:
        volume.base_lock.close()
    try:
        return BaseLock(Path(base.path), exclusive=True)
    except StateError:
        volume.base_lock = BaseLock(Path(base.path))
        raise


def refuse_older(store: "Store", volume: "Volume", chain: Chain, target: bytes | None) -> None:
    """Raise where somebody needs the base, or a layer below the target, as it is now."""
    catalog = store.catalog
    ids = [layer.id for layer in chain.layers]
    folded = ids[: ids.index(target) + 1] if target else ids
    names = {row.id: row.name for row in catalog.rows(VolumeRow)}
    needed = [
        f"{names[row.volume]}@{row.name}"
        for row in catalog.rows(SnapshotRow)
        if row.layer in folded and row.layer != target
    ]
    for below in folded[:-1] if target else folded:
        needed += [
            f"a branch on layer {child.id.hex()[:8]}"
            for child in catalog.rows(LayerRow, "parent = ?", below)
            if child.id not in ids
        ]
    assert chain.base is not None
    paths = {base.id for base in catalog.rows(BaseRow) if base.path == chain.base.path}
    for bottom in catalog.rows(LayerRow, "base IS NOT NULL AND id != ?", ids[0]):
        if bottom.base in paths:
            needed += [
                names[row.id]
                for row in catalog.rows(VolumeRow)
                if bottom.id in {layer.id for layer in catalog.chain(row.head)}
            ] or ["a branch on the same base"]
    if needed:
        raise StateError(
            f"the base {chain.base.path} is needed as it is by {', '.join(sorted(set(needed)))}; merge or discard those "
            "snapshots, flatten or delete those volumes first"
        )


def _copy_into_base(
    store: "Store",
    folded: Chain,
    descriptor: int,
    *,
    progress: "Progress | None",
    threads: int,
    bytes_per_second: int = 0,
) -> None:
    """Write what the layers hold into the base, and make it durable. May be done again, and goes on where it was.

    It is copied in stretches of the disk. The end of one goes to the catalog once its bytes are durable in the base, so a
    crash costs seconds of copying, and a slow merge, cancelled each night, ends one day.
    """
    size_bytes = folded.top.size_bytes
    start = _done_before(store, folded, descriptor)
    if os.fstat(descriptor).st_size != size_bytes:
        os.ftruncate(descriptor, size_bytes)
    reflink = all(layer.wipe == "release" for layer in folded.layers)
    # Without the base: nothing is read from it, and it may be shorter now than it was.
    with transfer.chain_path(store, replace(folded, base=None)) as path:
        copy = transfer.StretchCopy(
            store,
            path,
            descriptor,
            size_bytes,
            reflink=reflink,
            punch=reflink,
            progress=progress,
            threads=threads,
            bytes_per_second=bytes_per_second,
        )
        stretch_bytes = first_stretch_bytes(bytes_per_second)
        while start < size_bytes:
            begun = time.monotonic()
            start = copy.run(start, stretch_bytes)
            sync_file(descriptor)  # BARRIER: merged base
            if start < size_bytes:
                _note_done(store, folded, start)
            stretch_bytes = _next_stretch_bytes(stretch_bytes, time.monotonic() - begun)


def first_stretch_bytes(bytes_per_second: int) -> int:
    """Return how much is copied before progress is noted for the first time: nobody knows yet how long that takes."""
    if not bytes_per_second:
        return FIRST_STRETCH_BYTES
    return min(FIRST_STRETCH_BYTES, max(STRETCH_BYTES_MIN, bytes_per_second * STRETCH_SECONDS))


def _next_stretch_bytes(stretch_bytes: int, seconds: float) -> int:
    """Return what takes STRETCH_SECONDS at the pace of the last stretch; never much more than that had."""
    paced = int(stretch_bytes * STRETCH_SECONDS / max(seconds, 1e-6))
    return max(STRETCH_BYTES_MIN, min(paced, 8 * stretch_bytes))


def _done_before(store: "Store", folded: Chain, descriptor: int) -> int:
    """Return up to where the base holds the data already: 0 where it is not the file that it was."""
    work = store.catalog.row(PendingRow, "kind = 'base-merge' AND target = ?", folded.top.id)
    found = os.fstat(descriptor)
    assert folded.base is not None
    is_same = (found.st_ino, found.st_size) == (folded.base.inode, folded.top.size_bytes)
    return work.done_bytes if work and is_same else 0


def _note_done(store: "Store", folded: Chain, done_bytes: int) -> None:
    """Write down how far a merge is; a disk that has no room even for that does not end it."""
    catalog = store.catalog
    try:
        with catalog.transaction():
            work = catalog.row(PendingRow, "kind = 'base-merge' AND target = ?", folded.top.id)
            if work:
                catalog.update(PendingRow, work.id, done_bytes=done_bytes)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise


def _finish(store: "Store", folded: Chain) -> list[bytes]:
    """Let what stood on the folded layers stand on the base. Returns the segments that are no longer read."""
    catalog = store.catalog
    assert folded.base is not None
    dropped = [segment.id for rows in folded.segments.values() for segment in rows]
    top = folded.top

    def switch() -> None:
        found = Path(folded.base.path).stat() if folded.base else None
        assert found is not None and folded.base is not None
        base = replace(
            folded.base, inode=found.st_ino, size_bytes=found.st_size, mtime_ns=found.st_mtime_ns, digest=None
        )
        catalog.update(
            BaseRow,
            base.id,
            inode=base.inode,
            size_bytes=base.size_bytes,
            mtime_ns=base.mtime_ns,
            digest=None,
        )
        for segment in catalog.rows(SegmentRow, "layer = ?", top.id):
            catalog.add_pending("segment", segment.id, segment.lock_byte, top.wipe)
        catalog.delete(SegmentRow, "layer = ?", top.id)
        catalog.add_pending("map", top.map_id, top.map_lock_byte, top.wipe)
        catalog.update(
            LayerRow,
            top.id,
            parent=None,
            base=base.id,
            map_id=new_id(),
            map_lock_byte=catalog.take_lock_byte(),
            map_length=0,
            map_frames=0,
            map_crc=0,
        )
        if top.parent:
            free_unneeded(catalog, top.parent)
        catalog.delete(PendingRow, "kind = 'base-merge' AND target = ?", top.id)

    store.in_transaction(switch)
    return dropped


def resume_base_merge(store: "Store", target: bytes) -> None:
    """Take a merge into the base that was interrupted to its end. Nobody may have the base open."""
    folded = read_chain(store.catalog, target)
    assert folded.base is not None
    lock = BaseLock(Path(folded.base.path), exclusive=True)
    try:
        _copy_into_base(store, folded, lock.descriptor, progress=None, threads=0)
        _finish(store, folded)
    finally:
        lock.close()
