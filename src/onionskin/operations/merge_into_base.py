"""Merging into the base: what layers hold is copied into the base file itself, which the disk stands on afterwards.

What must hold: what is written into a base is hidden by the layers that it comes from until the transaction that drops
them; what is noted as copied into a base is durable in it; the file that is written is the base, at its path, from the
beginning to that transaction. Reads do not change, whatever step a crash comes after.
"""

import os
import time
from dataclasses import replace
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

from onionskin.base.fsync import sync_file
from onionskin.base.naming import some_of
from onionskin.catalog import BaseRow, Catalog, LayerRow, SnapshotRow, WorkRow, new_id
from onionskin.catalog.tree import descendants, find_snapshot, remove_unreachable_layers
from onionskin.errors import ChainError, StateError
from onionskin.operations import copy, reclaim
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.seal import seal
from onionskin.operations.staging import TreeChangedError
from onionskin.storage.chain import Chain, is_same_file, read_chain, unfinished_base_merges
from onionskin.storage.locks import BaseLock, is_file_at
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.progress import Progress

# What is copied between two notes of how far it is.
STRETCH_SECONDS = 5
FIRST_STRETCH_BYTES = 64 << 20
STRETCH_BYTES_MIN = 1 << 20


def merge_into_base(
    volume: OpenHead, upto: str | None, *, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    """Fold the layers up to a snapshot (or all) into the base. See `Volume.merge_into_base`.

    What is written is hidden by the layers that it comes from, until the transaction at the end. So reads, writes and
    snapshots, which only add layers on top, go on during the copy; all else on the tree has to wait. A merge that was
    interrupted before is ended first.
    """
    resumes = True
    while resumes:
        with volume.operation(may_resume=True):
            interrupted = unfinished_base_merges(volume.store.catalog, volume.head)
            resumes = bool(interrupted)
            target = interrupted[0] if interrupted else _target_of(volume, upto)
            folded = _begin_base_merge(volume, target, is_new=not interrupted)
            volume.is_merging = True
        _run_base_merge(volume, folded, progress, threads, bytes_per_second)
    reclaim.work_soon(volume.store)


def _target_of(volume: OpenHead, upto: str | None) -> bytes:
    """Return the uppermost layer to fold: that of a snapshot, or what is sealed now."""
    store, catalog = volume.store, volume.store.catalog
    chain = read_chain(catalog, volume.head)
    if chain.base is None:
        raise StateError(f"volume {volume.name!r} has no base to merge into: 'onionskin export' writes an image")
    if upto is None:
        refuse_older(store, volume, chain, None)
        return seal(volume).id
    target = find_snapshot(catalog, volume.row, upto).layer
    if target not in {layer.id for layer in chain.layers}:
        raise StateError(f"the disk does not descend from {upto!r}; revert to it (or to a newer one) first")
    refuse_older(store, volume, chain, target)
    return target


def _begin_base_merge(volume: OpenHead, target: bytes, *, is_new: bool) -> Chain:
    """Check that there is room, take the base alone, and write down what is begun. Returns what is folded."""
    store, catalog = volume.store, volume.store.catalog
    folded = read_chain(catalog, target)
    assert folded.base is not None and volume.base_lock is not None
    copy.check_room(store, folded, volume.base_lock)
    volume.base_lock.write_alone()
    try:
        check_is_base(folded.base, volume.base_lock, half_merged=not is_new)

        def begin() -> None:
            # Asked again where nobody can change the answer: somebody may have made a clone since.
            refuse_older(store, volume, read_chain(catalog, volume.head), target)
            if not catalog.base_merge_of(target):
                catalog.add_work("base-merge", target, 0, volume.wipe)

        store.change(begin)
    except BaseException:
        volume.base_lock.share()
        raise
    return folded


def check_is_base(base: BaseRow, lock: BaseLock, *, half_merged: bool) -> None:
    """Refuse to write a file that is not the base: not the one that was opened, or not at the base's path any more.

    Raises
    ------
    ChainError
        Nothing is dropped: the layers have all data.
    """
    found = os.fstat(lock.descriptor)
    same = found.st_ino == base.inode
    if not half_merged:
        same = same and (found.st_size, found.st_mtime_ns) == (base.size_bytes, base.mtime_ns)
    if not (same and is_file_at(lock.descriptor, Path(base.path))):
        raise ChainError(
            f"the base {base.path} is not the file that the volume stands on any more: it was exchanged or changed. Put "
            "it back, or name the right one with 'onionskin relocate'; nothing was dropped"
        )


def _run_base_merge(
    volume: OpenHead, folded: Chain, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    store, lock = volume.store, volume.base_lock
    assert folded.base is not None and lock is not None
    try:
        _copy_into_base(
            store,
            folded,
            lock,
            progress=_stoppable(volume, progress),
            threads=threads,
            bytes_per_second=bytes_per_second,
        )
        with volume.guard:
            _switch_to_base(volume, folded, lock)
            fold_where_unnamed(volume, [folded.top.id])
    finally:
        with volume.guard:
            try:
                lock.share()
            finally:
                volume.merge_ended()


def _switch_to_base(volume: OpenHead, folded: Chain, lock: BaseLock) -> None:
    """Let the catalog and the open volume read from the base what they read from segments that are dropped.

    All that can fail is done before the commit.
    """
    catalog = volume.store.catalog
    dropped = [segment.id for rows in folded.segments.values() for segment in rows]

    with volume.changing_below(lambda: catalog.base_merge_of(folded.top.id) is None):
        volume.path.prepare_below(lock.descriptor, folded.top.size_bytes, dropped=dropped)
        _finish(volume, folded, lock)
    lock.share()


def _stoppable(volume: OpenHead, progress: "Progress | None") -> "Progress":
    """Pass progress on, and end the copy when the volume is being closed."""

    def report(done: int, total: int) -> None:
        if volume.merge_stop:
            raise StateError(
                f"volume {volume.name!r} was closed during the merge into its base; merge into the base again to end it"
            )
        if progress:
            progress(done, total)

    return report


def refuse_older(store: OpenStore, volume: OpenHead, chain: Chain, target: bytes | None) -> None:
    """Raise where somebody needs the base, or a layer below the target, as it is now."""
    catalog = store.catalog
    ids = [layer.id for layer in chain.layers]
    folded = ids[: ids.index(target) + 1] if target in ids else ids
    assert chain.base is not None
    with catalog.reading():
        needed = [
            name
            for row in catalog.snapshots_of_layers(folded)
            if row.layer != target
            for name in _shown_names(catalog, row)
        ]
        children = catalog.children_of_layers(folded[:-1] if target else folded)
        needed += [f"a branch on layer {child.id.hex()[:8]}" for child in children if child.id not in ids]
        path = Path(chain.base.path)
        same_file = [base.id for base in catalog.all_sound(BaseRow) if is_same_file(Path(base.path), path)]
        for bottom in catalog.layers_standing_on(same_file):
            if bottom.id != ids[0]:
                needed += _volumes_above(catalog, bottom.id) or ["a branch on the same base"]
    if needed:
        raise StateError(
            f"the base {chain.base.path} is needed as it is by {some_of(sorted(set(needed)))}; merge or discard those "
            "snapshots, flatten or delete those volumes first"
        )


def _shown_names(catalog: Catalog, row: SnapshotRow) -> list[str]:
    volume = catalog.volume_with_id(row.volume)
    return [f"{volume.name}@{row.name}"] if volume else []


def _volumes_above(catalog: Catalog, layer: bytes) -> list[str]:
    """Return the names of the volumes whose heads stand on a layer."""
    above = {layer, *descendants(catalog, layer)}
    return [row.name for row in catalog.volumes_with_heads(above)]


def _copy_into_base(
    store: OpenStore,
    folded: Chain,
    lock: BaseLock,
    *,
    progress: "Progress | None",
    threads: int,
    bytes_per_second: int = 0,
) -> None:
    """Write what the layers hold into the base, and make it durable. May be done again, and goes on where it was.

    It is copied in stretches of the disk. The end of one goes to the catalog once its bytes are durable in the base, so a
    crash costs seconds of copying, and a slow merge, cancelled each night, ends one day. The file is only made shorter at
    the end: until then others map all of it.
    """
    assert folded.base is not None
    size_bytes, descriptor = folded.top.size_bytes, lock.descriptor
    start = _done_before(store, folded, descriptor)
    if os.fstat(descriptor).st_size < size_bytes:
        os.ftruncate(descriptor, size_bytes)
    reflink = all(layer.wipe == "release" for layer in folded.layers)
    # Without the base: nothing is read from it, and it may be shorter now than it was.
    with copy.chain_path(store, replace(folded, base=None)) as path:
        copying = copy.StretchCopy(
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
            start = copying.run(start, stretch_bytes)
            sync_file(descriptor)  # BARRIER: merged base
            check_is_base(folded.base, lock, half_merged=True)
            if start < size_bytes:
                _note_done(store, folded, descriptor, start)
            stretch_bytes = _next_stretch_bytes(stretch_bytes, time.monotonic() - begun)
    if os.fstat(descriptor).st_size > size_bytes:
        os.ftruncate(descriptor, size_bytes)
        sync_file(descriptor)  # BARRIER: shortened base


def first_stretch_bytes(bytes_per_second: int) -> int:
    """Return how much is copied before progress is noted for the first time: nobody knows yet how long that takes."""
    if not bytes_per_second:
        return FIRST_STRETCH_BYTES
    return min(FIRST_STRETCH_BYTES, max(STRETCH_BYTES_MIN, bytes_per_second * STRETCH_SECONDS))


def _next_stretch_bytes(stretch_bytes: int, seconds: float) -> int:
    """Return what takes STRETCH_SECONDS at the pace of the last stretch; never much more than that had."""
    paced = int(stretch_bytes * STRETCH_SECONDS / max(seconds, 1e-6))
    return max(STRETCH_BYTES_MIN, min(paced, 8 * stretch_bytes))


def _done_before(store: OpenStore, folded: Chain, descriptor: int) -> int:
    """Return up to where the base holds the data already: 0 where it is not the file that it was when that was noted."""
    work = store.catalog.base_merge_of(folded.top.id)
    if not work or not work.done_bytes:
        return 0
    base = store.catalog.base_of(folded.layers[0])
    found = os.fstat(descriptor)
    is_same = base and (found.st_ino, found.st_size, found.st_mtime_ns) == (base.inode, base.size_bytes, base.mtime_ns)
    return work.done_bytes if is_same else 0


def _looks(descriptor: int) -> dict[str, int]:
    """Return how a base looks now, as its row has it. A sync of our own came just before."""
    found = os.fstat(descriptor)
    return {"inode": found.st_ino, "size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _same_row(store: OpenStore, folded: Chain) -> BaseRow:
    """Return the row of the base that is merged into, unless somebody relocated it. Inside a transaction."""
    base = store.catalog.base_of(store.catalog.layer(folded.layers[0].id))
    if base is None or folded.base is None or (base.id, base.path) != (folded.base.id, folded.base.path):
        raise TreeChangedError("the base was relocated while it was merged into; merge again: nothing was dropped")
    return base


def _note_done(store: OpenStore, folded: Chain, descriptor: int, done_bytes: int) -> None:
    """Write down how far a merge is; a disk that has no room even for that does not end it."""
    catalog = store.catalog
    try:
        with catalog.transaction():
            work = catalog.base_merge_of(folded.top.id)
            if work:
                catalog.update(WorkRow, work.id, done_bytes=done_bytes)
                catalog.update(BaseRow, _same_row(store, folded).id, **_looks(descriptor))
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise


def _finish(volume: OpenHead, folded: Chain, lock: BaseLock) -> None:
    """Let what stood on the folded layers stand on the base."""
    store, catalog, top = volume.store, volume.store.catalog, folded.top

    def switch() -> None:
        base = _same_row(store, folded)
        check_is_base(base, lock, half_merged=True)
        if catalog.layer(top.id) != top:
            raise TreeChangedError("the layers changed while they were merged into the base; merge again")
        catalog.update(BaseRow, base.id, **_looks(lock.descriptor), digest=None)
        for segment in catalog.segments_of_layer(top.id):
            catalog.add_work("segment", segment.id, segment.lock_byte, top.wipe)
        catalog.remove_segments_of(top.id)
        catalog.add_work("map", top.map_id, top.map_lock_byte, top.wipe)
        map_byte = catalog.take_lock_byte()
        volume.locks.must_share({map_byte})
        catalog.update(
            LayerRow,
            top.id,
            parent=None,
            base=base.id,
            map_id=new_id(),
            map_lock_byte=map_byte,
            map_length=0,
            map_frames=0,
            map_crc=0,
        )
        if top.parent:
            remove_unreachable_layers(catalog, [top.parent])
        catalog.remove_base_merge_of(top.id)

    store.change(switch)
