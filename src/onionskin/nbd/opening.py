"""Opening a volume that is to be served.

A group snapshot, or a fork of a disk as it is now, opens a volume that nobody holds, and closes it again. A server that
starts at that moment waits for it, for a bounded time. A volume that is served already is refused at once.

Forks of one snapshot that clients ask for at once are opened together.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

from onionskin.base.closing import call_all
from onionskin.base.naming import is_text
from onionskin.catalog.rows import LayerRow, VolumeRow
from onionskin.errors import OnionskinError, StateError
from onionskin.storage.layout import bytes_in
from onionskin.storage.locks import VolumeLock, WritersOpening, volume_holder
from onionskin.storage.open_head import OpenHead, is_unwritten
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain
from onionskin.store import Store
from onionskin.volume import Volume

Give = Callable[[str, Volume], object]

WAIT_SECONDS = 2.0
_AGAIN_SECONDS = 0.01


def open_to_serve(store: Store, name: str, *, is_one_of_many: bool = False) -> Volume:
    """Open a volume for writing. Raise StateError if it is held for longer than a group or a fork holds it.

    One of many shares the file of its lock with the others of its store.
    """
    layout = store._opened.layout
    deadline = time.monotonic() + WAIT_SECONDS
    was_free = False
    while True:
        try:
            return store._open_to_write(name, is_one_of_many=is_one_of_many)
        except StateError:
            id = store._opened.catalog.volume(name).id
            is_held = volume_holder(layout.volume_lock(id)) is not None
            is_served = is_held and layout.volume_control(id).exists()
            if is_served or (was_free and not is_held) or time.monotonic() > deadline:
                raise
            was_free = was_free or not is_held  # given up meanwhile; if the next try fails too, that is not why
        time.sleep(_AGAIN_SECONDS)


def stands_beside(first: Volume, name: str) -> bool:
    """Whether a volume of the same store stands on the snapshot that `first` is read through, since nothing was written."""
    catalog, below = first.store._opened.catalog, first._opened.read_through
    row = catalog.volume_named(name) if below is not None and is_text(name) else None
    head = catalog.layer_with_id(row.head) if row else None  # it may have been replaced since
    return head is not None and head.parent == below


def open_beside(first: Volume, names: Iterable[str], give: Give) -> None:
    """Open those of the volumes that stand on the same snapshot as `first`, if nothing was written to it or to them.

    They are volumes of its store. What is asked of the catalog is asked once for all of them, which is half of the work.
    Each is handed to `give`, which has to close it, as soon as it is open: so its client is answered while the next ones are
    opened. Those that cannot be opened so are left out; to open each by itself works, or says why not.
    """
    of, below = first.store._opened, first._opened.read_through
    given: set[str] = set()
    locks: dict[str, tuple[bytes, VolumeLock]] = {}
    if below is None:
        return
    try:
        view = of.views.take(below, lambda: of.open_layer(below))
        try:
            _lock_all(of, names, locks)
            _open_locked(first.store, view, locks, given, give)
        finally:
            of.views.give_back(below)
    except (OnionskinError, OSError):
        pass  # those that are open already are as they should be
    finally:
        call_all([lock.close for name, (_, lock) in locks.items() if name not in given])


def _lock_all(of: OpenStore, names: Iterable[str], locks: dict[str, tuple[bytes, VolumeLock]]) -> None:
    """Lock volumes, whose ids and locks are put into `locks`. Those that are locked or not there are left out."""
    owned = of.catalog.owned_volumes()  # these have rules of their own
    rows = [row for row in of.catalog.volumes_named(filter(is_text, names)) if row.id not in owned]
    opening = WritersOpening(of.layout.lock)
    try:
        for row in rows:
            with suppress(OnionskinError):
                locks[row.name] = row.id, VolumeLock(of.layout, row.id, row.name, opening=opening)
    finally:
        opening.leave()


def _open_locked(
    store: Store, view: OpenChain, locks: Mapping[str, tuple[bytes, VolumeLock]], given: set[str], give: Give
) -> None:
    """Open heads that nothing was written to, by the view of the layer that they stand on. Their names go into `given`.

    The volumes and the files of the view are locked, so what the rows say now holds until the heads are open.
    """
    of, top = store._opened, view.chain.top
    of.catalog.refuse_moved()  # the locks were opened by their names
    with of.catalog.reading():
        # Until they were locked, the names may have come to mean other volumes.
        rows = {row.head: row for row in of.catalog.volumes_named(locks) if row.id == locks[row.name][0]}
        heads = [head for head in of.catalog.layers_with_ids(rows) if head.parent == top.id]
        segments = of.catalog.segments_of(heads)
        is_read_through = not of.catalog.staged_volumes() and store._is_read_through(
            top.id, *(rows[head.id].id for head in heads)
        )
    if not (is_read_through and store._is_on_its_base(view)):
        return
    of.catalog.sync_found()  # a crash must not undo the rows and leave the files of the locks
    for head in heads:
        row = rows[head.id]
        files = [of.layout.segment_path(segment.id) for segment in segments[head.id]]
        is_same = (top.size_bytes, top.block_size) == (head.size_bytes, head.block_size)
        if is_same and is_unwritten(of, row.id, head) and not any(bytes_in(file) for file in files):
            volume = Volume(_opened_head(store, row, head, locks[row.name][1]), store)
            given.add(row.name)
            give(row.name, volume)


def _opened_head(store: Store, row: VolumeRow, head: LayerRow, lock: VolumeLock) -> OpenHead:
    """Make the handle of one head, with one more use of the view that it is read through."""
    of, below = store._opened, head.parent
    assert below is not None
    of.reserve.retry(partial(lock.make_file, of.shared_file))
    view = of.views.take(below, lambda: of.open_layer(below))
    try:
        handle = store._unwritten_head(row, head, view, lock)
    except BaseException:
        of.views.give_back(below)
        raise
    of.register(handle)
    return handle
