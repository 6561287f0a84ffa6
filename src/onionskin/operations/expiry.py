"""Dropping volumes whose lifetime is over.

What must hold: only whoever asks for it, and a server of the whole store, drops them, never an opening; none goes that is
open, that has a snapshot, or that a clone or a fork was made of which is there still, and that is asked inside the
transaction that drops it.

The clock is the one that tells the date (CLOCK_REALTIME), since a lifetime goes on while a machine is off. Where that clock
is set forward, volumes go early; where it is set back, late.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from onionskin.base.held import enter, held_together
from onionskin.base.lazy import logger
from onionskin.catalog import VolumeRow
from onionskin.errors import FormatError, StateError, VolumeNotFoundError
from onionskin.operations import forks, reclaim
from onionskin.operations.unflushed import refuse_open
from onionskin.operations.volumes import remove_volumes, unlink_files
from onionskin.storage.locks import locked_to_remove
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)

_AT_ONCE = 64  # that are locked together, and dropped in one transaction


def expire(store: OpenStore) -> list[str]:
    """Drop what may be dropped now. Returns the names, sorted."""
    store.catalog.refuse_read_only()
    return sorted(name for rows in due(store) for name in drop(store, rows))


def would_expire(store: OpenStore) -> list[str]:
    """Return the names of the volumes that `expire` would drop now, sorted. Nothing is changed."""
    names = []
    for rows in due(store):
        for row in rows:
            with _left_alone(store, row):
                store.catalog.refuse_other_id(row)
                refuse_open(store, row.name)
                names.append(row.name)
    return sorted(names)


def due(store: OpenStore) -> Iterator[Sequence[VolumeRow]]:
    """Yield the volumes that may be dropped now if nobody has them open, as many at a time as `drop` takes."""
    rows = store.catalog.expired(time.time_ns())
    for first in range(0, len(rows), _AT_ONCE):
        yield rows[first : first + _AT_ONCE]


def drop(store: OpenStore, rows: Sequence[VolumeRow]) -> list[str]:
    """Drop volumes in one transaction, those that are open and those that may not go any more left out; returns the names."""
    if rows:  # a snapshot or a fork whose row is damaged keeps nothing
        store.catalog.refuse_dangling()
        store.catalog.refuse_snapshots_of_nobody()
    names, stood_on = _drop(store, rows)
    if names:
        reclaim.work_soon(store)
        forks.fold_what_stays(store, stood_on)
    return names


def _drop(store: OpenStore, rows: Sequence[VolumeRow]) -> tuple[list[str], list[bytes]]:
    catalog = store.catalog
    with held_together() as stack:
        locked = []
        for row in rows:
            with _left_alone(store, row):
                store.catalog.refuse_other_id(row)
                enter(stack, partial(locked_to_remove, store.layout, {row.id: row.name}))
                locked.append(row.id)

        def change() -> tuple[list[VolumeRow], list[bytes]]:
            now_ns = time.time_ns()
            found = [row for id in locked if (row := catalog.volume_with_id(id))]
            going = [
                row for row in found if row.expires_ns is not None and row.expires_ns <= now_ns and _may_go(store, row)
            ]
            return going, remove_volumes(store, [row.id for row in going], recursive=False)[1]

        if not locked:
            return [], []
        gone, stood_on = store.change(change)
        unlink_files(store, [row.id for row in gone])
    return [row.name for row in gone], stood_on


@contextmanager
def _left_alone(store: OpenStore, row: VolumeRow) -> Iterator[None]:
    """Go on with the others where a volume is open, or has something else in place of its lock file. That is said once."""
    try:
        yield
    except (StateError, VolumeNotFoundError):  # it is open, or has gone
        pass
    except FormatError as error:
        if row.id not in store.reported_volumes:
            store.reported_volumes.add(row.id)
            _log.warning("%s: the lifetime of volume %r is over, and it stays: %s", store.path, row.name, error)


def _may_go(store: OpenStore, row: VolumeRow) -> bool:
    """Whether nothing stands on a volume but its own head, and no machine has it. What is held is a snapshot."""
    catalog = store.catalog
    return not (catalog.snapshot_count(row.id) or catalog.has_forks(row.id) or catalog.machines_of_volumes([row.id]))
