"""Opening a volume that is to be served.

A group snapshot, or a fork of a disk as it is now, opens a volume that nobody holds, and closes it again. A server that
starts at that moment waits for it, for a bounded time. A volume that is served already is refused at once.

Forks of one snapshot that clients ask for at once are opened together.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from onionskin.base.closing import call_all
from onionskin.base.naming import is_text
from onionskin.catalog.rows import LayerRow, VolumeRow
from onionskin.errors import OnionskinError, StateError
from onionskin.storage.locks import VolumeLock, WritersOpening, volume_holder
from onionskin.storage.open_head import OpenHead, unwritten
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain
from onionskin.store import Store
from onionskin.volume import Volume

Give = Callable[[dict[str, Volume]], object]

WAIT_SECONDS = 2.0
_AGAIN_SECONDS = 0.01
_AT_ONCE_MAX = 16  # the first clients are answered before so many are open


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
    They are handed to `give`, which has to close them, as soon as a few are open: so their clients are answered while the
    next ones are opened. Those that cannot be opened so are left out; to open each by itself works, or says why not.
    """
    of, below = first.store._opened, first._opened.read_through
    given: set[str] = set()
    locks: dict[str, tuple[VolumeRow, VolumeLock]] = {}
    if below is None:
        return
    try:
        view = of.views.take(below, lambda: of.open_layer(below))
        try:
            version = of.catalog.version()
            _lock_all(of, names, locks)
            _open_locked(first.store, view, version, locks, given, give)
        finally:
            of.views.give_back(below)
    except (OnionskinError, OSError):
        pass  # those that are open already are as they should be
    finally:
        call_all([lock.close for name, (_, lock) in locks.items() if name not in given])


def _lock_all(of: OpenStore, names: Iterable[str], locks: dict[str, tuple[VolumeRow, VolumeLock]]) -> None:
    """Lock volumes, whose rows and locks are put into `locks`. Those that are locked or not there are left out."""
    owned = of.catalog.owned_volumes()  # these have rules of their own
    rows = [row for row in of.catalog.volumes_named(filter(is_text, names)) if row.id not in owned]
    opening = WritersOpening(of.layout.lock)
    try:
        for row in rows:
            with suppress(OnionskinError):
                locks[row.name] = row, VolumeLock(of.layout, row.id, row.name, opening=opening)
    finally:
        opening.leave()


def _open_locked(
    store: Store,
    view: OpenChain,
    version: tuple[int, int],
    locks: Mapping[str, tuple[VolumeRow, VolumeLock]],
    given: set[str],
    give: Give,
) -> None:
    """Open heads that nothing was written to, by the view of the layer that they stand on. Their names go into `given`.

    `version` is what the catalog had before the rows were read by which the volumes were locked.
    The volumes and the files of the view are locked, so what the rows say now holds until the heads are open.
    """
    of, top = store._opened, view.chain.top
    of.catalog.refuse_moved()  # the locks were opened by their names
    with of.catalog.reading():
        now = [row for row, _ in locks.values()]
        if of.catalog.version() != version:  # until they were locked, the names may have come to mean other volumes
            owned = of.catalog.owned_volumes()  # a machine may have come between the two questions of `_lock_all`
            named = of.catalog.volumes_named(locks)
            now = [row for row in named if row.id == locks[row.name][0].id and row.id not in owned]
        rows = {row.head: row for row in now}
        heads = [head for head in of.catalog.layers_with_ids(rows) if head.parent == top.id]
        segments = of.catalog.segments_of(heads)
        is_read_through = not of.catalog.staged_volumes() and store._is_read_through(
            top.id, *(rows[head.id].id for head in heads)
        )
    if not (is_read_through and store._is_on_its_base(view)):
        return
    of.catalog.sync_found()  # a crash must not undo the rows and leave the files of the locks
    left = [head for head in heads if (head.size_bytes, head.block_size) == (top.size_bytes, top.block_size)]
    count = 1
    while left:
        opened: dict[str, Volume] = {}
        at_once, left, count = left[:count], left[count:], min(2 * count, _AT_ONCE_MAX)
        try:
            with_file = _with_files(of, [locks[rows[head.id].name][1] for head in at_once])
            # Only now: a writer that knows no bytes, of an older onionskin, locks such a file alone, and may have written.
            for head in unwritten(of, [(rows[head.id].id, head, segments[head.id]) for head in at_once]):
                row, lock = rows[head.id], locks[rows[head.id].name][1]
                if lock in with_file:
                    opened[row.name] = Volume(_opened_head(store, row, head, lock), store)
        finally:
            given.update(opened)
            give(opened)


def _with_files(of: OpenStore, locks: Sequence[VolumeLock]) -> set[VolumeLock]:
    """Make the files of locks. Returns those that have theirs: something may be in the way of others."""
    found = set(locks)
    for lock in VolumeLock.make_files_together(locks, of.shared_file):
        try:
            of.reserve.retry(partial(lock.make_file, of.shared_file))
        except (OnionskinError, OSError):
            found.discard(lock)
    return found


def _opened_head(store: Store, row: VolumeRow, head: LayerRow, lock: VolumeLock) -> OpenHead:
    """Make the handle of one head, with one more use of the view that it is read through."""
    of, below = store._opened, head.parent
    assert below is not None
    view = of.views.take(below, lambda: of.open_layer(below))
    use = [below]
    try:
        handle = store._unwritten_head(row, head, view, lock, use)
    except BaseException:
        of.views.end(use)
        raise
    of.register(handle)
    return handle
