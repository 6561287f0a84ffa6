"""Joining layers: folding a layer into its only child, compacting a head's map, merging into the base.

What must hold: a new map file is durable before the one transaction that switches to it; that transaction also moves
the segments and notes what has to be freed; reads do not change, whatever step a crash comes after; what is noted as
copied into a base is durable in it.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from errno import EDQUOT, EINVAL, ENOSPC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onionskin.base.fsync import sync_directory, sync_file
from onionskin.base.naming import some_of
from onionskin.catalog import (
    BaseRow,
    Catalog,
    CommitUnknownError,
    LayerRow,
    PendingRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.tree import descendants, find_snapshot, free_unneeded, unnamed_below, unnamed_of
from onionskin.errors import ChainError, OnionskinError, StateError
from onionskin.operations import compact_segments, copy, hidden_blocks, reclaim
from onionskin.operations import fold as folding
from onionskin.operations.fold import TreeChangedError, put_off
from onionskin.operations.staging import StagedFiles, staged_files
from onionskin.storage.block_maps import load_layer
from onionskin.storage.chain import Chain, is_same_file, pending_base_merges, read_chain
from onionskin.storage.locks import BaseLock, ByteLocks, is_file_at
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.progress import Progress
    from onionskin.kernels._maplog import LayerMap
    from onionskin.kernels._volume import LowerLayer
    from onionskin.volume import Volume

_log = logging.getLogger(__name__)

# Of a merge into the base, what is copied between two notes of how far it is.
STRETCH_SECONDS = 5
FIRST_STRETCH_BYTES = 64 << 20
STRETCH_BYTES_MIN = 1 << 20
SEGMENTS_OPEN = 64  # of an open volume: with more, those without a block are looked for after a fold


# ---- folding a layer into its only child ----


def fold_where_unnamed(volume: "Volume", layers: Iterable[bytes | None]) -> None:
    """Fold each of these layers into its child, where it has no name and only one, and that one is in reach.

    What the caller was asked for is done already: a fold that fails is left to the next opening, and logged.
    """
    for id in layers:
        if id is None:
            continue
        try:
            fold(volume, id)
        except CommitUnknownError:
            raise
        except (OSError, OnionskinError) as error:
            if volume.path.poisoned:
                raise
            _log.warning(
                "%s: layer %s could not be joined with the next one: %s", volume.opened_store.path, id.hex(), error
            )


def fold(volume: "Volume", layer_id: bytes) -> bool:
    """Fold what is worth it of the layers without a name around one (fold.py); returns whether any was."""
    store = volume.opened_store
    run = folding.run_around(store.catalog, volume.head, layer_id)
    if _is_being_merged(store.catalog, run):
        return False
    try:
        groups = folding.groups_to_fold(store, run)
    except FileNotFoundError:
        _check_run_is_gone(store, run)
        return False
    folded = [_fold_group(volume, group) for group in groups]
    if not any(folded):
        return False
    reclaim.work_soon(store)
    return True


def _fold_group(volume: "Volume", group: folding.Group) -> bool:
    """Fold layers into the last of them, if that can be done now."""
    *lowers, upper = group
    if not upper.sealed:
        if len(lowers) > 1 and not _fold_group(volume, lowers):
            return False
        # Below the head, where nobody changes it: what a head has adopted is in its log, and no longer ours to move.
        compact_segments.gather_below(volume, lowers[-1].id)
        lowers = [volume.opened_store.catalog.layer(lowers[-1].id)]

    def change() -> None:
        try:
            if upper.sealed:
                _fold_sealed(volume, lowers, upper)
            else:
                _fold_into_head(volume, lowers[0], upper)
        except FileNotFoundError:
            _check_unchanged(
                volume.opened_store, lowers, upper
            )  # a map that another process folded meanwhile is no damage
            raise

    folded = put_off(change)
    if folded and upper.sealed:
        compact_segments.gather_below(volume, upper.id)
    return folded


def _check_run_is_gone(store: OpenStore, run: Sequence[LayerRow]) -> None:
    """While a FileNotFoundError is handled: raise it on, unless another process folded the layers meanwhile."""
    try:
        _check_unchanged(store, run[:-1], run[-1])
    except TreeChangedError:
        return
    raise


def _is_being_merged(catalog: Catalog, layers: Sequence[LayerRow]) -> bool:
    """Whether a merge into the base that began and did not end reads a layer: it has to find it as it was."""
    ids = {layer.id for layer in layers}
    return any(below.id in ids for work in catalog.base_merges() for below in catalog.chain(work.target))


def _nothing_below(layer: LayerRow) -> bool:
    return layer.parent is None and layer.base is None


def _fold_sealed(volume: "Volume", lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    store = volume.opened_store
    locks = ByteLocks(store.layout.lock)
    wipe = _stricter(upper, *lowers)
    try:
        # They need not be in the volume's own chain.
        locks.must_share({layer.map_lock_byte for layer in (*lowers, upper)})
        _check_unchanged(store, lowers, upper)
        with staged_files(store, ["map"], wipe) as files, closing(folding.lay(store, [*lowers, upper])) as laid:
            (map_file,) = files.rows
            if _nothing_below(lowers[0]):
                laid.map.drop_zero()
            written = _write_map(store, map_file, laid.map, wipe, upper.size_bytes)

            def switch() -> None:
                _check_unchanged(store, lowers, upper)
                _switch_map(volume, lowers, upper, files, written, scrubs=list(laid.freed))

            store.change(switch)
    finally:
        locks.close()
    _give_up_maps(volume, [*lowers, upper])


def _write_map(
    store: OpenStore, file: PendingRow, layer_map: "LayerMap", wipe: str, size_bytes: int
) -> tuple[int, int, int]:
    """Write the new map of a sealed layer to a file that is named in the catalog: (length, frames, crc), durable."""
    written = layer_map.write(
        str(store.layout.map_file(file.target)), map_id=file.target, wipe_zero=wipe == "zero", size_bytes=size_bytes
    )
    sync_directory(store.layout.layers)  # BARRIER: folded map name
    return written


def _give_up_maps(volume: "Volume", folded: Sequence[LayerRow]) -> None:
    """Give up the maps that another took the place of: an open data path has read them, and needs them no more.

    Not all of the chain is looked at: segments have changed their owners, and not their bytes.
    """
    volume.locks.drop_shared({layer.map_lock_byte for layer in folded})


def _fold_into_head(volume: "Volume", lower: LayerRow, upper: LayerRow) -> None:
    store = volume.opened_store
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
    if len(volume.path.segments()) > SEGMENTS_OPEN:
        _drop_unused(volume)


def _drop_unused(volume: "Volume") -> None:
    """Give back the segments of the head that no block is in any more, with their numbers and their mappings.

    A disk whose snapshots come and go while it is open would else collect them, until it has no number left.
    """
    store, catalog = volume.opened_store, volume.opened_store.catalog
    owned = {row.id for row in catalog.rows(SegmentRow, "layer = ? AND role = 'sealed'", volume.head)}
    dropped = [id for id in volume.path.unused_segments() if id in owned]
    if not dropped:
        return

    def drop() -> None:
        wipe = catalog.layer(volume.head).wipe
        for row in catalog.rows_in(SegmentRow, "id", dropped):
            catalog.add_pending("segment", row.id, row.lock_byte, wipe)
            catalog.delete(SegmentRow, "id = ?", row.id)

    def settle() -> None:
        if volume.path.poisoned or catalog.has(SegmentRow, "id = ?", dropped[0]):
            volume.path.abort_below()
        elif volume.path.commit_below():
            volume.give_up_unread()

    with volume.settling(settle):
        volume.path.prepare_below(dropped=dropped, keep_base=True)
        store.change(drop)


def _rewrite(volume: "Volume", head: LayerRow, lower: LayerRow | None, source: "LowerLayer | None") -> None:
    store = volume.opened_store
    with staged_files(store, ["map"], _stricter(head, *([lower] if lower else []))) as files:
        (map_file,) = files.rows

        def switch() -> None:
            if lower:
                _check_unchanged(store, [lower], head)
            written_as = (written.map_length, written.map_frames, written.map_crc)
            _switch_map(volume, [lower] if lower else [], head, files, written_as)

        with volume.settling(lambda: _settle_rewrite(volume, [lower, head] if lower else [head], map_file.target)):
            written = volume.path.rewrite_map(
                new_path=str(store.layout.map_file(map_file.target)),
                new_id=map_file.target,
                lower=source,
                drop_zero=_nothing_below(lower or head),
            )
            store.change(switch)


def _settle_rewrite(volume: "Volume", folded: Sequence[LayerRow], map_id: bytes) -> None:
    """Append to the new map file if the catalog names it. Where nobody knows, both files stay; the volume is poisoned."""
    if not volume.path.poisoned and volume.opened_store.catalog.layer(folded[-1].id).map_id != map_id:
        if_begun(volume.path.rewrite_abort)
        return
    if_begun(volume.path.rewrite_commit)
    if not volume.path.poisoned:
        _give_up_maps(volume, folded)


def if_begun(tell: Callable[[], None]) -> None:
    """Tell the data path how a seal or a rewrite ended; one that was not begun, or was told already, needs nothing."""
    try:
        tell()
    except OSError as error:
        if error.errno != EINVAL:
            raise


def compact(volume: "Volume") -> None:
    """Write the head's map log anew, without what is dead in it."""
    put_off(lambda: _rewrite(volume, volume.opened_store.catalog.layer(volume.head), None, None))


def _check_unchanged(store: OpenStore, lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    """Another process may have folded the same layers, or cloned or named one of them, since they were read."""
    catalog = store.catalog
    above = [*lowers[1:], upper]
    unchanged = all(catalog.row(LayerRow, "id = ?", layer.id) == layer for layer in (*lowers, upper)) and all(
        [row.id for row in catalog.rows(LayerRow, "parent = ? LIMIT 2", lower.id)] == [child.id]
        and not catalog.snapshot_of_layer(lower.id)
        and not catalog.base_merge_of(lower.id)
        for lower, child in zip(lowers, above, strict=True)
    )
    if not unchanged:
        raise TreeChangedError(
            "the layers changed while they were merged: another process works on the tree; try again"
        )


def _stricter(*layers: LayerRow) -> str:
    """Return the policy of what comes of layers."""
    return "zero" if any(layer.wipe == "zero" for layer in layers) else "release"


def _switch_map(
    volume: "Volume",
    lowers: Sequence[LayerRow],
    upper: LayerRow,
    files: StagedFiles,
    written: tuple[int, int, int],
    *,
    scrubs: Sequence[bytes] | None = None,
) -> None:
    """Give `upper` its new map, and all that `lowers`, bottom first, had. Inside a transaction.

    `scrubs`: the segments that have slots which the new map no longer names; None where nobody counted.
    """
    store, catalog = volume.opened_store, volume.opened_store.catalog
    (map_file,) = files.rows
    catalog.add_pending("map", upper.map_id, upper.map_lock_byte, upper.wipe)
    files.keep(volume.locks if upper.map_lock_byte in volume.locks.shared else None)
    length, frames, crc = written
    catalog.update(
        LayerRow,
        upper.id,
        map_id=map_file.target,
        map_lock_byte=map_file.lock_byte,
        map_length=length,
        map_frames=frames,
        map_crc=crc,
    )
    if not lowers:
        return
    if scrubs is None:
        scrubs = [row.id for lower in lowers for row in catalog.rows(SegmentRow, "layer = ?", lower.id)]
    reclaim.add_scrubs(store, scrubs, _stricter(upper, *lowers))
    catalog.update(LayerRow, upper.id, parent=lowers[0].parent, base=lowers[0].base)
    for lower in reversed(lowers):
        catalog.move_segments(lower.id, upper.id)
        catalog.add_pending("map", lower.map_id, lower.map_lock_byte, lower.wipe)
        catalog.delete(LayerRow, "id = ?", lower.id)


def fold_unnamed_below(volume: "Volume") -> None:
    """Fold what has no name in the volume's own chain: work that an earlier operation left. At open."""
    catalog = volume.opened_store.catalog
    with catalog.reading():
        unnamed = unnamed_below(catalog, volume.head)
    seen: set[bytes] = set()
    for layer in unnamed:
        if layer not in seen:
            seen |= {one.id for one in folding.run_around(catalog, volume.head, layer)}
            fold_where_unnamed(volume, [layer])
    free_hidden(volume, unnamed_of(catalog, volume.row.id))


# ---- merging into the base ----


def free_hidden(volume: "Volume", layers: Iterable[bytes]) -> None:
    """Free what nobody reads any more of these layers, where they have no name, and with policy `zero` alone (hidden.py).

    What the caller was asked for is done already: what fails is left to the next opening, and logged.
    """
    for id in layers:
        try:
            put_off(partial(_free_hidden, volume, id))
        except CommitUnknownError:
            raise
        except (OSError, OnionskinError) as error:
            if volume.path.poisoned:
                raise
            _log.warning(
                "%s: what is hidden of layer %s could not be freed: %s", volume.opened_store.path, id.hex(), error
            )


def _free_hidden(volume: "Volume", layer_id: bytes) -> None:
    store, catalog = volume.opened_store, volume.opened_store.catalog
    with catalog.reading():
        seen = hidden_blocks.read_above(catalog, layer_id, volume.head)
    if not seen or not hidden_blocks.wants_wiping(store, seen):
        return
    if any(row.id == volume.head for row in seen.layers()):
        volume.path.flush()  # what is not durable hides nothing
    with hidden_blocks.locked_above(store, layer_id, volume.head) as above:
        if not above:
            return
        layer = above.layer
        with load_layer(store, layer) as layer_map:
            freed = hidden_blocks.without_hidden(store, volume.path, volume.head, above, layer_map)
            if not freed:
                return
            with staged_files(store, ["map"], "zero") as files:
                (map_file,) = files.rows
                written = _write_map(store, map_file, layer_map, "zero", layer.size_bytes)

                def switch() -> None:
                    now = hidden_blocks.read_above(catalog, layer_id, volume.head)
                    if not above.is_as(now) or _is_being_merged(catalog, [layer]):
                        raise TreeChangedError("the layers changed while it was seen what they hide")
                    _switch_map(volume, [], layer, files, written)
                    reclaim.add_scrubs(store, list(freed), "zero")

                store.change(switch)
    _give_up_maps(volume, [layer])
    reclaim.work_soon(store)


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
            interrupted = pending_base_merges(volume.opened_store.catalog, volume.head)
            resumes = bool(interrupted)
            target = interrupted[0] if interrupted else _target_of(volume, upto)
            folded = _begin_base_merge(volume, target, is_new=not interrupted)
            volume.is_merging = True
        _run_base_merge(volume, folded, progress, threads, bytes_per_second)
    reclaim.work_soon(volume.opened_store)


def _target_of(volume: "Volume", upto: str | None) -> bytes:
    """Return the uppermost layer to fold: that of a snapshot, or what is sealed now."""
    store, catalog = volume.opened_store, volume.opened_store.catalog
    chain = read_chain(catalog, volume.head)
    if chain.base is None:
        raise StateError(f"volume {volume.name!r} has no base to merge into: 'onionskin export' writes an image")
    if upto is None:
        refuse_older(store, volume, chain, None)
        return volume.seal(lambda: None, lambda sealed, head: None).id
    target = find_snapshot(catalog, volume.row, upto).layer
    if target not in {layer.id for layer in chain.layers}:
        raise StateError(f"the disk does not descend from {upto!r}; revert to it (or to a newer one) first")
    refuse_older(store, volume, chain, target)
    return target


def _begin_base_merge(volume: "Volume", target: bytes, *, is_new: bool) -> Chain:
    """Check that there is room, take the base alone, and write down what is begun. Returns what is folded."""
    store, catalog = volume.opened_store, volume.opened_store.catalog
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
                catalog.add_pending("base-merge", target, 0, volume.wipe)

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
    volume: "Volume", folded: Chain, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    store, lock = volume.opened_store, volume.base_lock
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


def _switch_to_base(volume: "Volume", folded: Chain, lock: BaseLock) -> None:
    """Let the catalog and the open volume read from the base what they read from segments that are dropped.

    All that can fail is done before the commit. Where memory is missing behind it, the volume reads the same bytes from the
    old files, which its locks keep from being freed as long as it is open.
    """
    catalog = volume.opened_store.catalog
    dropped = [segment.id for rows in folded.segments.values() for segment in rows]

    def settle() -> None:
        if volume.path.poisoned or catalog.base_merge_of(folded.top.id):
            volume.path.abort_below()
        elif volume.path.commit_below():
            volume.give_up_unread()

    with volume.settling(settle):
        volume.path.prepare_below(lock.descriptor, folded.top.size_bytes, dropped=dropped)
        _finish(volume, folded, lock)
    lock.share()


def _stoppable(volume: "Volume", progress: "Progress | None") -> "Progress":
    """Pass progress on, and end the copy when the volume is being closed."""

    def report(done: int, total: int) -> None:
        if volume.merge_stop:
            raise StateError(
                f"volume {volume.name!r} was closed during the merge into its base; merge into the base again to end it"
            )
        if progress:
            progress(done, total)

    return report


def refuse_older(store: OpenStore, volume: "Volume", chain: Chain, target: bytes | None) -> None:
    """Raise where somebody needs the base, or a layer below the target, as it is now."""
    catalog = store.catalog
    ids = [layer.id for layer in chain.layers]
    folded = ids[: ids.index(target) + 1] if target in ids else ids
    assert chain.base is not None
    with catalog.reading():
        needed = [
            name
            for row in catalog.rows_in(SnapshotRow, "layer", folded)
            if row.layer != target
            for name in _shown_names(catalog, row)
        ]
        children = catalog.rows_in(LayerRow, "parent", folded[:-1] if target else folded)
        needed += [f"a branch on layer {child.id.hex()[:8]}" for child in children if child.id not in ids]
        path = Path(chain.base.path)
        same_file = [base.id for base in catalog.sound_rows(BaseRow) if is_same_file(Path(base.path), path)]
        for bottom in catalog.rows_in(LayerRow, "base", same_file):
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
    return [row.name for row in catalog.rows_in(VolumeRow, "head", above)]


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
                catalog.update(PendingRow, work.id, done_bytes=done_bytes)
                catalog.update(BaseRow, _same_row(store, folded).id, **_looks(descriptor))
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise


def _finish(volume: "Volume", folded: Chain, lock: BaseLock) -> None:
    """Let what stood on the folded layers stand on the base."""
    store, catalog, top = volume.opened_store, volume.opened_store.catalog, folded.top

    def switch() -> None:
        base = _same_row(store, folded)
        check_is_base(base, lock, half_merged=True)
        if catalog.layer(top.id) != top:
            raise TreeChangedError("the layers changed while they were merged into the base; merge again")
        catalog.update(BaseRow, base.id, **_looks(lock.descriptor), digest=None)
        for segment in catalog.rows(SegmentRow, "layer = ?", top.id):
            catalog.add_pending("segment", segment.id, segment.lock_byte, top.wipe)
        catalog.delete(SegmentRow, "layer = ?", top.id)
        catalog.add_pending("map", top.map_id, top.map_lock_byte, top.wipe)
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
            free_unneeded(catalog, top.parent)
        catalog.delete(PendingRow, "kind = 'base-merge' AND target = ?", top.id)

    store.change(switch)
