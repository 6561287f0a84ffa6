"""The snapshots of a volume that is open: taking one, reverting to one, dropping one's name.

What must hold: a change is one transaction, and whether it is allowed is asked inside it: another process may name or
clone a layer at any time. What is left to do behind it (folding, freeing) may fail, and the next opening does it.
"""

from itertools import takewhile

from onionskin.base.naming import some_of
from onionskin.catalog import LayerRow, SnapshotRow
from onionskin.catalog.tree import (
    Snapshot,
    descendants,
    describe_snapshot,
    find_snapshot,
    free_unneeded,
    nearest_snapshot,
    unnamed_around,
    users_of,
)
from onionskin.errors import StateError
from onionskin.operations import holds, reclaim, snapshot_names
from onionskin.operations.flush import flush
from onionskin.operations.fold import fold_where_unnamed
from onionskin.operations.hidden_blocks import free_hidden
from onionskin.operations.restart import restart_on
from onionskin.operations.seal import seal
from onionskin.storage.block_maps import map_is_used
from onionskin.storage.chain import read_chain
from onionskin.storage.open_head import OpenDisk, OpenHead


def take(volume: OpenHead, name: str | None, note: str, guid: bytes) -> Snapshot:
    """Name the disk as it is now. See `Volume.snapshot`."""
    with volume.operation(during_merge=True):
        catalog = volume.store.catalog
        taken: list[Snapshot] = []

        def check_free() -> None:
            volume.refuse_half_merged()
            if name is not None:
                snapshot_names.refuse_taken(catalog, volume.row.id, volume.name, name)

        def name_it(sealed: LayerRow, head: LayerRow) -> None:
            # The head's lock byte is a number that no snapshot has yet. One of its own would lie between the bytes of
            # the chain, which are locked in stretches: for the kernel each stretch costs the more the more there are.
            number = head.map_lock_byte
            called = name or snapshot_names.name_of_time(catalog, volume.row.id, head.created_ns)
            row = SnapshotRow(volume.row.id, called, sealed.id, guid, head.created_ns, note, number)
            taken.append(describe_snapshot(catalog, volume.row, row, sealed))
            catalog.insert(row)

        seal(volume, check=check_free, also=name_it)
        return taken[0]


def parent_of(volume: OpenDisk) -> Snapshot | None:
    """Return the snapshot of this volume that the disk stands on."""
    catalog = volume.store.catalog
    with catalog.reading():
        row = nearest_snapshot(catalog, volume.row, catalog.layer(volume.head).parent)
        return describe_snapshot(catalog, volume.row, row, catalog.layer(row.layer)) if row else None


def is_changed(volume: OpenDisk) -> bool:
    """Whether anything was written, trimmed or resized since `parent_of`. Flushes, to know."""
    flush(volume)
    catalog = volume.store.catalog
    named = {row.layer for row in catalog.snapshots_of(volume.row.id)}
    chain = read_chain(catalog, volume.head).layers
    above = list(takewhile(lambda layer: layer.id not in named, reversed(chain)))
    below = chain[-len(above) - 1] if len(above) < len(chain) else None
    if below and below.size_bytes != volume.size_bytes:
        return True
    return any(map_is_used(volume.store, layer) for layer in above)


def revert(volume: OpenHead, name: str) -> None:
    """Make the disk read as a snapshot again. See `Volume.revert`."""
    with volume.operation():
        catalog = volume.store.catalog
        target = find_snapshot(catalog, volume.row, name).layer
        around = unnamed_around(catalog, catalog.layer(volume.head).parent)
        restart_on(volume, target, lambda: None)
        free_hidden(volume, around)


def discard(volume: OpenHead, name: str, *, recursive: bool) -> None:
    """Drop a snapshot's name and all that was written after it on its branch. See `Volume.discard`."""
    with volume.operation():
        catalog = volume.store.catalog
        layer = find_snapshot(catalog, volume.row, name).layer
        parent = catalog.layer(layer).parent
        around = unnamed_around(catalog, layer)

        def drop() -> None:
            # Asked where nobody can change the answer: others may clone a snapshot at any time.
            above = descendants(catalog, layer)
            _refuse_discard(volume, name, above, recursive)
            named = [*above, layer]
            holds.refuse_held(catalog, named)
            for id in named:
                catalog.remove_snapshot_of_layer(id)
            for id in named:
                free_unneeded(catalog, id)

        above = descendants(catalog, layer)
        _refuse_discard(volume, name, above, recursive)
        if volume.head in above:
            restart_on(volume, layer, drop)
        else:
            volume.store.change(drop)
            reclaim.work_soon(volume.store)
        fold_where_unnamed(volume, [layer, parent])
        free_hidden(volume, around)


def _refuse_discard(volume: OpenHead, name: str, above: set[bytes], recursive: bool) -> None:
    catalog = volume.store.catalog
    users = users_of(catalog, above, besides=[volume.row.id])
    if users:
        raise StateError(
            f"snapshot {name!r} is needed by {some_of(users)}; delete or flatten those volumes first, or merge the "
            "snapshot instead"
        )
    named = sorted(row.name for row in catalog.snapshots_of(volume.row.id) if row.layer in above)
    if named and not recursive:
        raise StateError(
            f"snapshots were taken after {name!r}: {some_of(named)}; pass recursive to discard them too, or merge "
            f"{name!r} to keep what was written"
        )


def merge(volume: OpenHead, name: str) -> None:
    """Drop a snapshot's name and keep all data. See `Volume.merge`."""
    with volume.operation():
        catalog = volume.store.catalog
        row = find_snapshot(catalog, volume.row, name)
        around = unnamed_around(catalog, row.layer)

        def drop() -> None:
            holds.refuse_held(catalog, [row.layer])
            catalog.remove_snapshot(volume.row.id, name)
            free_unneeded(catalog, row.layer)

        volume.store.change(drop)
        reclaim.work_soon(volume.store)
        fold_where_unnamed(volume, [row.layer])
        free_hidden(volume, around)
