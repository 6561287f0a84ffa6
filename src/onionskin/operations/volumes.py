"""What is done to volumes by their names or their ids, whether they are open or not: a new one, a new name, the end.

What must hold: what a name means is asked inside the transaction that changes it. Several volumes are removed in one
transaction, all or none; whoever removes one holds the byte of its writer.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from onionskin.base.held import enter, held_together
from onionskin.base.naming import check_name, plain_name, some_of
from onionskin.catalog import Catalog, VolumeRow
from onionskin.catalog.rows import STAGED_PREFIX
from onionskin.catalog.tree import descendants, remove_unreachable_layers, users_of
from onionskin.errors import StateError, VolumeExistsError
from onionskin.operations import holds, lineage, ownership, reclaim
from onionskin.storage.chain import NewHead
from onionskin.storage.locks import is_for_a_moment, locked_to_remove
from onionskin.storage.open_store import OpenStore

_MOMENT_SECONDS = 1.0  # for which others may hold a volume that they give up by themselves
_AGAIN_SECONDS = 0.01
_UNLINKED_AT_ONCE = 16  # by the caller who waits for the removal


def insert(store: OpenStore, id: bytes, name: str, head: NewHead) -> None:
    """Write the rows of a volume that comes from no other one. Inside a transaction."""
    refuse_taken(store, name)
    head.insert(store.catalog)
    row = VolumeRow(id, name, head.layer.id, head.layer.created_ns)
    store.catalog.insert(row)
    lineage.begin(store.catalog, [row])


def rename(store: OpenStore, name: str, new_name: str) -> None:
    """Give the volume that has a name now another one."""
    new_name = check_name("volume", new_name)
    store.change(lambda: _rename(store, store.catalog.volume(name), new_name))


def rename_volume(store: OpenStore, id: bytes, new_name: str, check: Callable[[], None] = lambda: None) -> None:
    """Give the volume with this id another name, whatever it is called now. A staged volume becomes a volume by it.

    `check` is called in the transaction, and raises where nothing is to be done any more.
    """
    new_name = check_name("volume", new_name)

    def change() -> None:
        check()
        _rename(store, store.catalog.volume_that_is(id), new_name)

    store.change(change)


def _rename(store: OpenStore, row: VolumeRow, new_name: str) -> None:
    advice = "rename the machine, with 'onionskin machine rename {machine}'"
    ownership.refuse_owned(store.catalog, [row.id], "renamed", advice)
    refuse_taken(store, new_name)
    store.catalog.update(VolumeRow, row.id, name=new_name)
    if row.name.startswith(STAGED_PREFIX):
        lineage.begin(store.catalog, [VolumeRow(row.id, new_name, row.head, row.created_ns)])
    else:
        lineage.rename(store.catalog, row.id, new_name)


def refuse_taken(store: OpenStore, name: str) -> None:
    """Raise VolumeExistsError where there is a volume of that name."""
    if store.catalog.has_volume_named(name):
        raise VolumeExistsError(f"the store {store.path} already has a volume {name!r}; choose another name")


# ---- removing ----


def delete(
    store: OpenStore, names: Sequence[str], *, recursive: bool, agreed: Mapping[str, bytes] | None = None
) -> tuple[int, list[bytes]]:
    """Remove the volumes of these names, all or none. See `Store.delete`.

    If `agreed` is given, the names must still mean the volumes with these ids, about which somebody was asked.

    Returns the bytes on the disk of the data that goes, and the layers without a name that may have only one child now.
    """
    catalog = store.catalog
    catalog.refuse_read_only()
    wanted = list(dict.fromkeys(names))

    def remove() -> tuple[int, list[bytes]] | None:
        if ids_of(catalog, wanted) != ids:
            return None  # somebody renamed one since it was locked
        return remove_volumes(store, list(ids.values()), recursive=recursive)

    deadline = time.monotonic() + _MOMENT_SECONDS
    while True:
        ids = ids_of(catalog, wanted)
        if agreed is not None and ids != agreed:
            raise StateError(
                f"volumes of {store.path} were renamed meanwhile, and a name means another one now; nothing was changed; "
                "look at them, and try again"
            )
        ownership.refuse_removed(catalog, ids.values())  # before its machine, which may run, is found in the way
        with held_together() as stack:
            if lock_unless_for_a_moment(stack, store, {id: name for name, id in ids.items()}, deadline):
                removed = store.change(remove)
                if removed is not None:
                    unlink_files(store, ids.values())
                    return removed


def lock_unless_for_a_moment(stack: ExitStack, store: OpenStore, volumes: Mapping[bytes, str], deadline: float) -> bool:
    """Hold volumes to remove them. False: somebody has one for a moment, so what the names mean has to be asked again.

    As `expire` has one that it may drop: to say that it is open would not be so. Behind the deadline, that is raised.
    """
    try:
        enter(stack, partial(locked_to_remove, store.layout, volumes))
    except StateError:
        if time.monotonic() > deadline or not is_for_a_moment(store.layout, volumes):
            raise
        time.sleep(_AGAIN_SECONDS)
        return False
    return True


def delete_by_id(store: OpenStore, id: bytes) -> list[bytes]:
    """Remove a volume and its snapshots, whatever it is called now; nothing is done if it is gone.

    Who holds it for a moment is waited for: another process that cuts it, or looks whether it may be dropped. Returns the
    layers without a name that may have only one child now.
    """
    deadline = time.monotonic() + _MOMENT_SECONDS
    while row := store.catalog.volume_with_id(id):
        with held_together() as stack:
            try:
                enter(stack, partial(locked_to_remove, store.layout, {id: row.name}))
            except StateError:
                if time.monotonic() > deadline:
                    raise
            else:
                _, stood_on = store.change(lambda: remove_volumes(store, [id], recursive=True))
                unlink_files(store, [id])
                return stood_on
        time.sleep(_AGAIN_SECONDS)
    return []


def ids_of(catalog: Catalog, names: Sequence[str]) -> dict[str, bytes]:
    """Return the ids of the volumes of these names, in their order; raise VolumeNotFoundError where there is none."""
    with catalog.reading():
        asked = map(plain_name, names)
        found = {row.name: row.id for row in catalog.volumes_named(asked) if row.name[0] != STAGED_PREFIX}
        return {name: found.get(name) or catalog.volume(name).id for name in names}


def remove_volumes(store: OpenStore, ids: Sequence[bytes], *, recursive: bool) -> tuple[int, list[bytes]]:
    """Remove volumes, with their snapshots if `recursive`. Inside a transaction; the byte of each one's writer is held."""
    catalog = store.catalog
    rows = catalog.volumes_with_ids(ids)
    ownership.refuse_removed(catalog, ids)
    return remove_rows(store, rows, recursive=recursive)


def remove_rows(
    store: OpenStore, rows: Sequence[VolumeRow], *, recursive: bool, for_machine: bool = False
) -> tuple[int, list[bytes]]:
    """Remove volumes that belong to no machine any more, as `remove_volumes` does. Inside a transaction."""
    catalog = store.catalog
    refuse_delete(catalog, rows, recursive)
    gone = [row.id for row in rows]
    named = catalog.snapshots_of_volumes(gone)
    layers = [snapshot.layer for snapshots in named.values() for snapshot in snapshots]
    holds.refuse_held(catalog, layers, for_machine=for_machine)
    catalog.remove_snapshots_of(named)
    catalog.remove_volumes(gone)
    catalog.end_lineage(gone, time.time_ns())
    reclaim.add_files_of(catalog, gone)
    before = catalog.last_work()
    stood_on = remove_unreachable_layers(catalog, *(row.head for row in rows), *layers)
    return _bytes_of(store, catalog.segments_freed_since(before)), stood_on


def refuse_delete(catalog: Catalog, rows: Sequence[VolumeRow], recursive: bool) -> None:
    """Raise StateError where volumes that are deleted together have snapshots that others need, or have any at all."""
    together = {row.id for row in rows}
    snapshots = catalog.snapshots_of_volumes(together)
    for row in rows:
        named = snapshots.get(row.id)
        if not named:
            continue
        above: set[bytes] = set()
        for snapshot in named:  # in the order of taking: what stands on an earlier one is found with that
            if snapshot.layer not in above:
                above |= {snapshot.layer, *descendants(catalog, snapshot.layer)}
        users = users_of(catalog, above, besides=together)
        if users:
            raise StateError(
                f"volume {row.name!r} has snapshots that {some_of(users)} need; delete or flatten those first"
            )
        if not recursive:
            names = some_of(sorted(snapshot.name for snapshot in named))
            raise StateError(
                f"volume {row.name!r} has snapshots: {names}; ask for a recursive removal to remove them too"
            )


def _bytes_of(store: OpenStore, segments: Sequence[bytes]) -> int:
    """Return what these segments take on the disk. One that nothing was written to has no file."""
    total = 0
    for id in segments:
        with suppress(FileNotFoundError):
            total += os.stat(store.layout.segment_path(id)).st_blocks * 512  # noqa: PTH116 - of a thousand
    return total


def unlink_files(store: OpenStore, ids: Collection[bytes]) -> None:
    """Unlink the own files of volumes that were removed. Those of many volumes are left to the background.

    It is pending work, and nobody makes such a file again: its volume has no row.
    """
    if len(ids) > _UNLINKED_AT_ONCE:
        return
    with suppress(OSError):  # they are removed, and what cannot be unlinked now stays pending
        reclaim.unlink_files_of(store, ids)
