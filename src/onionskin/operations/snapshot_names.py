"""Changes the name and the note of a snapshot.

What must hold: a name is looked up inside the transaction that changes it. What is open is bound to a layer, which
keeps its id, so it goes on. Clones, holds, and the GUID by which other stores know the snapshot stay too.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from onionskin.base.naming import check_name, check_note
from onionskin.catalog import Catalog, SnapshotRow, VolumeRow
from onionskin.catalog.tree import find_snapshot
from onionskin.errors import SnapshotExistsError, StateError
from onionskin.operations.ownership import refuse_bound
from onionskin.storage.open_store import OpenStore


def rename(store: OpenStore, volume: str, name: str, new_name: str) -> None:
    """Give a snapshot another name."""
    new_name = check_name("snapshot", new_name)

    def change() -> None:
        row = find_snapshot(store.catalog, store.catalog.volume(volume), name)
        if new_name != name:
            refuse_taken(store.catalog, row.volume, volume, new_name)
            refuse_bound(store.catalog, [row.layer], "renamed")
            store.catalog.update_snapshot(row.layer, name=new_name)

    store.change(change)


def set_note(store: OpenStore, volume: str, name: str, note: str) -> None:
    """Replace the note of a snapshot."""
    note = check_note(note)

    def change() -> None:
        row = find_snapshot(store.catalog, store.catalog.volume(volume), name)
        store.catalog.update_snapshot(row.layer, note=note)

    store.change(change)


def find_chosen(
    catalog: Catalog, volume: VolumeRow, names: Sequence[str], guids: str | Sequence[str] | None
) -> list[SnapshotRow]:
    """Return the snapshots with these names; raise StateError if one of them has not the GUID that was chosen by its name."""
    rows = [find_snapshot(catalog, volume, name) for name in names]
    if guids is None:
        return rows
    wanted = [guids] if isinstance(guids, str) else list(guids)
    if len(wanted) != len(rows):
        raise ValueError(f"{len(rows)} snapshots are named, and {len(wanted)} GUIDs are given; give one for each")
    for row, guid in zip(rows, wanted, strict=True):
        if row.guid.hex() != guid:
            raise StateError(
                f"{row.name!r} is another snapshot of {volume.name!r} now; nothing was changed; look at the snapshots, and "
                "try again"
            )
    return rows


def name_of_time(catalog: Catalog, volume_id: bytes, time_ns: int) -> str:
    """Return a name for a snapshot that was given none: the time in UTC, or the next millisecond whose name is free.

    Inside the transaction that takes the snapshot. All such names have the same length, so they sort by time.
    """
    milliseconds = time_ns // 1_000_000
    while True:
        second = datetime.fromtimestamp(milliseconds // 1000, UTC)
        name = f"{second:%Y%m%dT%H%M%S}.{milliseconds % 1000:03}Z"
        if not catalog.has_snapshot_named(volume_id, name):
            return name
        milliseconds += 1


def refuse_taken(catalog: Catalog, volume_id: bytes, volume: str, name: str) -> None:
    """Raise SnapshotExistsError if a volume has a snapshot of that name. Inside the transaction that gives the name."""
    if catalog.has_snapshot_named(volume_id, name):
        raise SnapshotExistsError(f"volume {volume!r} already has a snapshot {name!r}; choose another name")
