"""Merging into the base: the data of layers is copied into the base file itself, and the layers are dropped.

What must hold: the layers that data comes from hide it in the base until the transaction that drops these layers. Data
that the catalog notes as copied is durable in the base. From the beginning to that transaction, the file that is
written is the base, and its path leads to it. Reads do not change, whatever step a crash comes after.
"""

import operator
import os
import time
from collections.abc import Callable, Iterator
from errno import EDQUOT, ENOSPC
from typing import TYPE_CHECKING

from onionskin.base.fsync import sync_file
from onionskin.base.held import held
from onionskin.base.naming import some_of
from onionskin.base.paths import FilePath
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import BaseRow, Catalog, LayerRow, SnapshotRow, WorkRow, new_id
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import descendants, find_snapshot, remove_unreachable_layers
from onionskin.errors import ChainError, StateError
from onionskin.operations import copy, reclaim
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.seal import seal
from onionskin.operations.staging import TreeChangedError
from onionskin.storage.base_looks import is_device, looks_in, looks_of
from onionskin.storage.chain import Chain, lead_to_same_bytes, read_chain, unfinished_base_merges
from onionskin.storage.locks import BaseLock, is_file_at
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.progress import Progress

# The bounds of a stretch, which is the part that is copied before the catalog notes the progress again.
THREADS_MAX = 64  # of one copy: see kernels/_copy.pyx
STRETCH_SECONDS = 5
FIRST_STRETCH_BYTES = 64 << 20
STRETCH_BYTES_MIN = 1 << 20


def merge_into_base(
    volume: OpenHead, upto: str | None, *, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    """Fold the layers up to a snapshot (or all) into the base. See `Volume.merge_into_base`.

    Until the transaction at the end, the layers hide everything that is written to the base. So reads and writes go on
    during the copy, and so do snapshots, which only add layers on top. All other operations on the tree are refused. If
    an earlier merge was interrupted, it is finished first.
    """
    _check_pace(threads, bytes_per_second)  # before it begins: the base is of no use by itself until it has ended
    resumes = True
    while resumes:
        with _let_go_at_the_end(volume) as begins:
            with volume.operation(may_resume=True):
                interrupted = unfinished_base_merges(volume.store.catalog, volume.head)
                resumes = bool(interrupted)
                target = interrupted[0] if interrupted else _target_of(volume, upto)
                begins()
                folded = _begin_base_merge(volume, target, is_new=not interrupted)
            _run_base_merge(volume, folded, progress, threads, bytes_per_second)
    reclaim.work_soon(volume.store)


def _check_pace(threads: int, bytes_per_second: int) -> None:
    """Raise ValueError or TypeError where the copy would."""
    if not 0 <= operator.index(threads) <= THREADS_MAX:
        raise ValueError(f"threads is {threads}: give 1 to {THREADS_MAX}, or 0 for the default")
    if not 0 <= operator.index(bytes_per_second) < 1 << 63:
        raise ValueError(f"{bytes_per_second} bytes a second is no rate: give one of 63 bits, or 0 for none")


@held
def _let_go_at_the_end(volume: OpenHead) -> Iterator[Callable[[], None]]:
    """Let others have the base, and end the volume, when a merge ends that the block begins by what this gives it.

    An interrupt may come anywhere. If it left the volume merging, a `close` would wait for ever.
    """
    begun: list[bool] = []

    def begin() -> None:
        begun.append(True)
        volume.is_merging = True

    try:
        yield begin
    finally:
        try:
            _let_go(volume, begun)
        except BaseException:  # an interrupt, before it was held back
            _let_go(volume, begun)
            raise


def _let_go(volume: OpenHead, begun: list[bool]) -> None:
    with DeferredInterrupt(), volume.guard:
        if not begun:
            return
        begun.clear()
        try:
            if volume.base_lock is not None:
                volume.base_lock.share()
        finally:
            volume.merge_ended()


def _target_of(volume: OpenHead, upto: str | None) -> bytes:
    """Return the uppermost layer to fold: the layer of a snapshot, or the head, which is sealed for it."""
    store, catalog = volume.store, volume.store.catalog
    chain = read_chain(catalog, volume.head)
    if chain.base is None:
        raise StateError(f"volume {volume.name!r} has no base to merge into: 'onionskin export' writes an image")
    if is_device(chain.base):
        raise StateError(
            f"the base {chain.base.path} is a block device, and a merge writes only to a file; 'onionskin export' writes the "
            "disk to an image or to another device, and 'onionskin flatten' makes the volume independent of its base"
        )
    if upto is None:
        refuse_older(store, chain, None)
        return seal(volume).id
    target = find_snapshot(catalog, volume.row, upto).layer
    if target not in {layer.id for layer in chain.layers}:
        raise StateError(f"the disk does not descend from {upto!r}; revert to it (or to a newer one) first")
    refuse_older(store, chain, target)
    return target


def _begin_base_merge(volume: OpenHead, target: bytes, *, is_new: bool) -> Chain:
    """Check that there is room, lock the base exclusively, and note in the catalog that the merge has begun.

    Returns the chain of the layers to fold.
    """
    store, catalog = volume.store, volume.store.catalog
    folded = read_chain(catalog, target)
    if folded.base is None or volume.base_lock is None:
        raise damaged(catalog.path, f"a merge of volume {volume.name!r} into its base was begun, but it has no base")
    copy.check_room(store, folded, volume.base_lock)
    volume.base_lock.write_alone()
    try:
        check_is_base(folded.base, volume.base_lock, half_merged=not is_new)

        def begin() -> None:
            # This is checked again inside the transaction, because somebody may have made a clone since the first
            # check.
            refuse_older(store, read_chain(catalog, volume.head), target)
            if not catalog.base_merge_of(target):
                catalog.add_work("base-merge", target, 0, volume.wipe)

        store.change(begin)
    except BaseException:
        volume.base_lock.share()
        raise
    return folded


def check_is_base(base: BaseRow, lock: BaseLock, *, half_merged: bool) -> None:
    """Refuse to write to a file that is not the base, or to which the path of the base does not lead any more.

    Raises
    ------
    ChainError
        The file is another one, or has changed. Nothing is dropped: the layers still have all data.
    """
    looks = looks_of(lock.descriptor)
    same = looks == looks_in(base) or (half_merged and looks[0] == base.inode)
    if not (same and is_file_at(lock.descriptor, FilePath(base.path))):
        raise ChainError(
            f"the base {base.path} is not the file that the volume stands on any more: it was exchanged or changed. Put "
            "it back, or name the right one with 'onionskin relocate'; nothing was dropped"
        )


def _run_base_merge(
    volume: OpenHead, folded: Chain, progress: "Progress | None", threads: int, bytes_per_second: int
) -> None:
    store, lock = volume.store, volume.base_lock
    assert folded.base is not None and lock is not None
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


def _switch_to_base(volume: OpenHead, folded: Chain, lock: BaseLock) -> None:
    """Make the catalog and the open volume use the base in place of the segments that are dropped.

    Everything that can fail is done before the commit.
    """
    catalog = volume.store.catalog
    dropped = [segment.id for rows in folded.segments.values() for segment in rows]

    with volume.changing_below(lambda: catalog.base_merge_of(folded.top.id) is None):
        volume.path.prepare_below(lock.descriptor, folded.top.size_bytes, dropped=dropped)
        _finish(volume, folded, lock)
    lock.share()


def _stoppable(volume: OpenHead, progress: "Progress | None") -> "Progress":
    """Return a progress function that ends the copy when the volume is being closed, and else calls `progress`."""

    def report(done: int, total: int) -> None:
        if volume.merge_stop:
            raise StateError(
                f"volume {volume.name!r} was closed during the merge into its base; merge into the base again to end it"
            )
        if progress:
            progress(done, total)

    return report


def refuse_older(store: OpenStore, chain: Chain, target: bytes | None) -> None:
    """Raise StateError if anything else needs the base, or a layer below the target, as it is now."""
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
        for child in children:
            if child.id not in ids:
                needed += _names_above(catalog, child.id) or [f"a branch on layer {child.id.hex()[:8]}"]
        path = FilePath(chain.base.path)
        bases = catalog.all_sound(BaseRow)
        paths = {one for one in {base.path for base in bases} if lead_to_same_bytes(FilePath(one), path)}
        same_bytes = [base.id for base in bases if base.path in paths]
        for bottom in catalog.layers_standing_on(same_bytes):
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


def _names_above(catalog: Catalog, layer: bytes) -> list[str]:
    """Return the names of the volumes and of the snapshots that are made of a layer and what stands on it."""
    above = catalog.snapshots_of_layers({layer, *descendants(catalog, layer)})
    return _volumes_above(catalog, layer) + [name for row in above for name in _shown_names(catalog, row)]


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
    """Copy the data of the layers into the base, and make it durable. After an interruption, it goes on where it was.

    The disk is copied in stretches. When the bytes of a stretch are durable in the base, the catalog notes its end. So
    a crash costs only seconds of copying, and a slow merge that is cancelled each night still ends one day. If the file
    has to become shorter, it does so only at the end, because others map all of it until then.
    """
    assert folded.base is not None
    size_bytes, descriptor = folded.top.size_bytes, lock.descriptor
    start = _done_before(store, folded, descriptor)
    if os.fstat(descriptor).st_size < size_bytes:
        os.ftruncate(descriptor, size_bytes)
    reflink = copy.may_reflink(store, folded)
    # The chain is opened without the base: nothing is read from it, and it may be shorter than its row says.
    with copy.chain_path(store, folded._replace(base=None)) as path:
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
    """Return the length of the first stretch, which is copied before the pace is known."""
    if not bytes_per_second:
        return FIRST_STRETCH_BYTES
    return min(FIRST_STRETCH_BYTES, max(STRETCH_BYTES_MIN, bytes_per_second * STRETCH_SECONDS))


def _next_stretch_bytes(stretch_bytes: int, seconds: float) -> int:
    """Return the length that takes STRETCH_SECONDS at the last stretch's pace, but at most eight times that stretch."""
    paced = int(stretch_bytes * STRETCH_SECONDS / max(seconds, 1e-6))
    return max(STRETCH_BYTES_MIN, min(paced, 8 * stretch_bytes))


def _done_before(store: OpenStore, folded: Chain, descriptor: int) -> int:
    """Return the offset up to which the base has the data already, or 0 if the file changed since that was noted."""
    work = store.catalog.base_merge_of(folded.top.id)
    if not work or not work.done_bytes:
        return 0
    base = store.catalog.base_of(folded.layers[0])
    is_same = base and looks_of(descriptor) == looks_in(base)
    return work.done_bytes if is_same else 0


def _looks(descriptor: int) -> dict[str, int]:
    """Return the values that the row of a base has for its file as it is now. The caller has just synced the file."""
    return dict(zip(("inode", "size_bytes", "mtime_ns"), looks_of(descriptor), strict=True))


def _same_row(store: OpenStore, folded: Chain) -> BaseRow:
    """Return the row of the base that is merged into, unless somebody relocated it. Inside a transaction."""
    base = store.catalog.base_of(store.catalog.layer(folded.layers[0].id))
    if base is None or folded.base is None or (base.id, base.path) != (folded.base.id, folded.base.path):
        raise TreeChangedError("the base was relocated while it was merged into; merge again: nothing was dropped")
    return base


def _note_done(store: OpenStore, folded: Chain, descriptor: int, done_bytes: int) -> None:
    """Note in the catalog how far a merge is. If the disk has no room for the note, the merge goes on without it."""
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
    """Put the layers above the folded ones on the base, in one transaction."""
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
            remove_unreachable_layers(catalog, top.parent)
        catalog.remove_base_merge_of(top.id)

    store.change(switch)
