"""Pending work: this module frees files and slots, now or after a crash.

What must hold: a file or slot is freed only under the exclusive lock of the file's byte. If another handle has the
byte, the work stays pending. With policy `zero`, a file is overwritten before it is unlinked, and slots are overwritten
before they are punched. Any work may be done twice without harm.
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from errno import ELOOP
from typing import TYPE_CHECKING

from onionskin.base.files import read_all
from onionskin.base.fsync import sync_directory
from onionskin.base.held import held
from onionskin.base.lazy import logger
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.paths import FilePath
from onionskin.catalog import Catalog, LayerRow, SegmentRow, WorkRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.kernels._maplog import MAGIC_MAP, MAGIC_SEGMENT
from onionskin.kernels._volume import LongTurns
from onionskin.kernels._wipe import unused_ranges, wipe
from onionskin.storage.block_maps import SlotsOfLayers
from onionskin.storage.locks import STORE_BYTE
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.storage.chain import Chain

_log = logger(__name__)

_WIPE_ZERO = 1  # the feature bit of a header
_ROWS_AT_ONCE = 64  # the number of rows that one transaction removes
_ID_NAME = re.compile("[0-9a-f]{32}")
_FILE_KINDS = ("map", "segment")


def reclaim_slots(store: OpenStore, segments: Iterable[bytes], wipe: str) -> None:
    """Free the slots of segments that their owners' maps do not name."""
    found = list(segments)
    store.change(lambda: add_slot_work(store, found, wipe))
    work_soon(store)


def add_slot_work(store: OpenStore, segments: Iterable[bytes], wipe: str) -> None:
    """Note that slots of these segments have to be freed. Inside a transaction."""
    catalog = store.catalog
    rows = catalog.segments_with_ids(set(segments))
    noted = catalog.slot_work_of([row.id for row in rows])
    # Work that is noted already may be done by now, with the old map, and its row only not be removed yet. So new rows
    # replace the old ones.
    for work in noted:
        catalog.remove_work(work.id)
    zero = {work.target for work in noted if work.wipe == "zero"}
    zero_layers = {id for id in {row.layer for row in rows} if catalog.layer(id).wipe == "zero"}
    for row in rows:
        is_zero = wipe == "zero" or row.id in zero or row.layer in zero_layers
        catalog.add_work("scrub", row.id, row.lock_byte, "zero" if is_zero else wipe)


def work_soon(store: OpenStore) -> None:
    """Do pending work: policy `zero` before this returns, `release` in the background."""
    if not store.read_only and store.catalog.has_reclaims():
        do_work(store, policy="zero")
        store.wake()


def work_in_background(store: OpenStore) -> None:
    """Do all pending work that can be done, and prepare the next heads and the next commits.

    Work that fails stays for the next opening.
    """
    with LongTurns():  # nobody waits for this, so no writer is to
        with suppress(OSError, OnionskinError):
            if store.catalog.has_reclaims("zero"):
                do_work(store, policy="zero")
            do_work(store, policy="release")
        store.reserve.make()  # the reserve may have been given up, and there may be room for it again
        for handle in store.open_handles():
            with suppress(OSError, OnionskinError):  # if this fails, the next head makes its files itself
                handle.prepare_if_wanted()
        with suppress(OSError, OnionskinError):  # if this fails, commits make the log longer
            while not store.closed and store.catalog.make_room_in_log():
                pass
        store.note_progress()


def do_work(store: OpenStore, *, policy: str | None = None) -> int:
    """Do the pending work of one wipe policy or of all, as far as possible. Returns how many rows are left.

    Work that fails is logged and stays pending, so that damage of one volume does not affect the others. The commit that
    noted the work is durable before anything is done, also where its process died in it: what it freed is needed again if
    the power fails and undoes it.
    """
    store.does_work = True
    store.catalog.sync_found()
    store.views.end_dropped()  # they keep files
    left, unlinked, slots = 0, policy != "zero", SlotsOfLayers(store)
    done: list[WorkRow] = []
    try:
        for row in store.catalog.reclaims(policy):
            try:
                is_done = _do_alone(store, row, slots, unlink=unlinked)
            except (OSError, OnionskinError) as error:
                is_done = False
                _report(store, row, error)
            if is_done:
                done.append(row)
            left += not is_done
            if len(done) == _ROWS_AT_ONCE:
                _forget(store, done, unlinked=unlinked)
                done = []
    finally:
        _forget(store, done, unlinked=unlinked)
    return left


def _forget(store: OpenStore, done: list[WorkRow], *, unlinked: bool) -> None:
    """Remove the rows of work that is done. A file that was wiped and not unlinked gets policy `release` instead.

    Work may be done twice, after a crash before this or by two processes at the same time. That does no harm.
    """
    if not done:
        return
    if unlinked:
        _sync_directories(store, {row.kind for row in done})

    def change() -> None:
        for row in done:
            if row.kind in _FILE_KINDS and not unlinked:
                store.catalog.update(WorkRow, row.id, wipe="release")
            else:
                store.catalog.remove_work(row.id)

    store.change(change)


def _sync_directories(store: OpenStore, kinds: set[str]) -> None:
    """Make the removal of files durable before their rows are removed, so that a crash leaves no file without a row."""
    if "map" in kinds:
        sync_directory(store.layout.layers)  # BARRIER: freed map name
    if "segment" in kinds:
        sync_directory(store.layout.segments)  # BARRIER: freed segment name
    if "volume" in kinds:
        sync_directory(store.layout.volumes)  # BARRIER: freed lock name


def _report(store: OpenStore, row: WorkRow, error: Exception) -> None:
    """Log once for each piece of work that it failed."""
    if row.id not in store.reported_work:
        store.reported_work.add(row.id)
        _log.warning("%s: pending work on %s %s failed: %s", store.path, row.kind, row.target.hex(), error)


def _do_alone(store: OpenStore, row: WorkRow, slots: SlotsOfLayers, *, unlink: bool) -> bool:
    """Do one piece of work under the lock of its file. Returns False if the lock is taken or the work has to wait."""
    with _alone(store, row) as alone:
        if not alone:
            return False
        now = store.catalog.work_with_id(row.id)
        if now != row:  # it was done or dropped since it was read, or it was done in part and is left for later
            return now is None
        return _do(store, row, slots, unlink=unlink)


@held
def _alone(store: OpenStore, row: WorkRow) -> Iterator[bool]:
    """Hold the byte of a file exclusively, through the store's own locks.

    Work on slots may borrow the lock of the one volume that has the file open for writing in this store. This is safe
    because such a volume never reads a slot that the owner's map does not name. A view may read such a slot, if layers
    were folded after the view was opened. If a whole file is to be freed, no lock is borrowed, because the holder of a
    lock still reads the file.
    """
    locks = store.locks
    if row.kind == "scrub":
        for volume in store.open_handles():
            if not volume.writable or volume.is_unwritten:
                continue
            with suppress(StateError):  # it was closed in between, and holds nothing
                if row.lock_byte in volume.locks.shared:
                    locks = volume.locks
    with locks.exclusive(row.lock_byte) as is_held:
        yield is_held


def _do(store: OpenStore, row: WorkRow, slots: SlotsOfLayers, *, unlink: bool) -> bool:
    """Do one piece of work. Returns False if it can only be done once its volume is open in this store."""
    if row.kind == "volume":
        unlink_files_of(store, [row.target])
        return True
    if row.kind in _FILE_KINDS:
        _refuse_named(store, row)
        _free_file(store, row, unlink=unlink)
        return True
    return _reclaim_slots(store, row, slots)


def add_files_of(catalog: Catalog, volumes: Collection[bytes]) -> None:
    """Note that the files of volumes have to be removed. Inside the transaction that removes the rows of the volumes."""
    bytes_taken = catalog.take_lock_bytes(len(volumes))
    catalog.add_all_work(("volume", id, byte, "release") for id, byte in zip(volumes, bytes_taken, strict=True))


def unlink_files_of(store: OpenStore, volumes: Collection[bytes]) -> None:
    """Remove the lock files and the unflushed records of volumes that have no row any more. This may be done again.

    If one cannot be unlinked, the others are unlinked all the same, and the error is raised at the end.
    """
    store.catalog.refuse_moved()
    for volume in store.catalog.which_are_volumes(volumes):
        raise FormatError(f"{store.catalog.path} is damaged: it frees the files of {volume.hex()}, which is a volume")
    failed: OSError | None = None
    for path in (path for volume in volumes for path in store.layout.files_of_volume(volume)):
        try:
            os.unlink(path)  # noqa: PTH108 - a FilePath of each of a thousand takes longer than unlinking it
        except FileNotFoundError:
            pass
        except OSError as error:
            failed = error
    if failed:
        raise failed


def _refuse_named(store: OpenStore, row: WorkRow) -> None:
    """Refuse to free a file of a layer. No operation notes such work, but a damaged or hostile catalog may have it."""
    catalog = store.catalog
    is_named = catalog.has_map if row.kind == "map" else catalog.has_segment
    if is_named(row.target):
        raise FormatError(f"{catalog.path} is damaged: it frees the {row.kind} {row.target.hex()}, which a layer has")


def open_to_free(path: "str | os.PathLike[str]") -> int | None:
    """Open a file of the store that is about to be overwritten or unlinked. Returns None if it is gone.

    Raises
    ------
    StateError
        The file is no regular file, or has another name too, so it may be somebody else's.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == ELOOP:
            raise StateError(f"{path} is a symbolic link, and no file of a store is; look at what it is") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "has another name too (a hard link)" if stat.S_ISREG(found.st_mode) else "is not a regular file"
        raise StateError(f"{path} {what}, so it is neither wiped nor removed; look at what it is")
    return descriptor


def _open_own_to_free(store: OpenStore, path: FilePath) -> int | None:
    """Open a file to free it, and make sure then that it is in the store that was opened, and in no copy of it."""
    descriptor = open_to_free(path)
    try:
        store.catalog.refuse_moved()
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return descriptor


def _free_file(store: OpenStore, row: WorkRow, *, unlink: bool) -> None:
    """Wipe a file if it has policy `zero`, and unlink it if `unlink` is true.

    Unlinking is separate because freeing the pages and blocks takes as long as writing the zeros.
    """
    path = store.layout.map_file(row.target) if row.kind == "map" else store.layout.segment_file(row.target)
    descriptor = _open_own_to_free(store, path)
    if descriptor is None:
        return
    try:
        if row.wipe == "zero" or wants_zeros(descriptor):
            result = wipe(descriptor, [(0, os.fstat(descriptor).st_size)], zero=True, punch=False)
            store.note_unwipeable(result.bytes_unwipeable)
        if unlink:
            path.unlink()
    finally:
        os.close(descriptor)


def wants_zeros(descriptor: int) -> bool:
    """Whether the header of a segment or map says that the file has to be wiped, whatever volume it belongs to now."""
    header = read_all(descriptor, HEADER_BYTES)
    return header[:8] in (MAGIC_SEGMENT, MAGIC_MAP) and bool(int.from_bytes(header[24:32], "little") & _WIPE_ZERO)


def segment_wants_zeros(path: FilePath) -> bool:
    """Whether the header of a segment says that it has to be wiped. Raises FileNotFoundError if there is no such file.

    No data path may have opened the file yet, so a link or a pipe may be in its place. A link is not followed, and a
    pipe is not waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return wants_zeros(descriptor)
    finally:
        os.close(descriptor)


def has_to_be_wiped(store: OpenStore, chain: "Chain") -> bool:
    """Whether something of a chain has to be overwritten when it is freed, and so have the copies of it that a store makes.

    A layer may have taken segments over from one with another policy, so they are asked too: see `segment_wants_zeros`.
    """
    return any(layer.wipe == "zero" for layer in chain.layers) or any_wants_zeros(
        store, (row.id for rows in chain.segments.values() for row in rows)
    )


def any_wants_zeros(store: OpenStore, segments: Iterable[bytes]) -> bool:
    """Whether the header of one of these segments says that it has to be wiped. One to which nothing was written has none."""
    for id in segments:
        with suppress(FileNotFoundError):
            if segment_wants_zeros(store.layout.segment_file(id)):
                return True
    return False


def _reclaim_slots(store: OpenStore, row: WorkRow, slots: SlotsOfLayers) -> bool:
    """Free the slots of a segment that its owner's map does not name.

    The owner may change meanwhile, but the set of live slots never grows.
    """
    with store.catalog.reading():
        segment = store.catalog.segment_with_id(row.target)
        owner = store.catalog.layer_with_id(segment.layer) if segment else None
    if segment is None:  # the whole segment was freed meanwhile
        return True
    if owner is None:
        raise damaged(
            store.catalog.path,
            f"the row {segment.id.hex()} of segments names the layer {segment.layer.hex()}, which is not there",
        )
    live = _live_slots(store, segment, owner, slots)
    if live is None:
        return False
    if not live and row.id <= store.work_found:
        from onionskin.operations.segment_owners import refuse_of_another  # a look at all maps, which is seldom

        refuse_of_another(store, segment)
    for volume in store.open_handles():
        volume.wait_for_readers()  # a read may still copy from a slot that it looked up before the slot was freed
    descriptor = _open_own_to_free(store, store.layout.segment_file(segment.id))
    if descriptor is None:
        return True
    try:
        ranges = unused_ranges(
            live, header_bytes=HEADER_BYTES, slot_bytes=owner.block_size, file_bytes=os.fstat(descriptor).st_size
        )
        if ranges:
            result = wipe(descriptor, ranges, zero=row.wipe == "zero" or wants_zeros(descriptor), punch=True)
            store.note_unwipeable(result.bytes_unwipeable)
    finally:
        os.close(descriptor)
    return True


def _live_slots(store: OpenStore, segment: SegmentRow, owner: LayerRow, slots: SlotsOfLayers) -> bytes | None:
    """Return the live slots of a segment. If its owner is the head of a volume that is not open here, return None.

    The data path of an open head knows the live slots. But the head may be sealed before the path is asked. The answer
    then applies to the next head, which no longer has the blocks that were written again. So after the answer, it is
    checked that the volume still has the same head. This is enough: a volume gets its new head before the data path
    goes on with it, and the path gives no answer during a seal.
    """
    if not owner.sealed:
        path = store.path_of_head(owner.id)
        try:
            live = None if path is None else path.live_slots(segment.id)
        except FileNotFoundError:
            if store.catalog.segment_with_id(segment.id) == segment:
                raise
            return None  # the head has given the segment up since its row was read: nothing failed
        return live if path is store.path_of_head(owner.id) else None
    return slots.of(owner, segment.id)


def remove_orphans(store: OpenStore) -> list[str]:
    """Wipe and remove files that no row names. `check --repair` calls this. Returns the paths of the removed files.

    A crash leaves no such files, but older versions of onionskin could leave some. No transaction can name a file
    meanwhile, and nothing is done if another handle has the store open. Nor is it where the catalog is damaged, which
    `check` reports: the file may be that of a row that cannot be read, and be needed when the catalog is restored.
    """
    removed = []
    with store.locks.exclusive(STORE_BYTE) as is_held:
        if not is_held:
            return []
        store.catalog.sync_found()  # as in `do_work`
        with store.catalog.transaction():
            for path in [] if store.catalog.unsound_rows() else orphans(store):
                with suppress(StateError):  # a store makes no such file, and `check` reports it
                    descriptor = open_to_free(path)
                    if descriptor is None:
                        continue
                    try:
                        wipe(descriptor, [(0, os.fstat(descriptor).st_size)], zero=True, punch=False)
                        path.unlink()
                    finally:
                        os.close(descriptor)
                    removed.append(str(path))
    return removed


def orphans(store: OpenStore) -> "list[Path]":
    """Return the files that have the name of a map or a segment, but no row in the catalog."""
    from pathlib import Path

    catalog, layout = store.catalog, store.layout
    with catalog.reading():
        work = catalog.all_sound(WorkRow)
        segments = catalog.all_sound(SegmentRow)
        maps = {row.map_id for row in catalog.all_sound(LayerRow)} | {row.target for row in work}
        maps |= {row.id for row in segments if row.role == "spare"}  # the map of a next head may be made beforehand
        files = {row.id for row in segments} | {row.target for row in work}
        return sorted(
            path
            for directory, suffix, named in ((layout.layers, ".map", maps), (layout.segments, ".seg", files))
            for path in Path(directory).iterdir()
            if path.suffix == suffix and _ID_NAME.fullmatch(path.stem) and bytes.fromhex(path.stem) not in named
        )
