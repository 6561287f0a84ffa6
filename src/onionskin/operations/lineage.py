"""Where volumes come from: which was cloned or forked from which, and as what it began.

What must hold: a volume that has a name has its lineage from the transaction that gives it the name, with the name that it
has now; one that is gone keeps it as long as another comes from it, and no longer.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from onionskin.base.records import record
from onionskin.catalog import Catalog, LineageRow, SnapshotRow, VolumeRow
from onionskin.catalog.tree import find_snapshot, when
from onionskin.storage.open_store import OpenStore

ORIGINS_MAX = 16


@record
class Ancestor:
    """A volume that another one was cloned or forked from.

    Attributes
    ----------
    name : str
        What it is called, or was when it was dropped.
    snapshot : str or None
        Its snapshot that the other one began as, by the name that it had then. None: it began as the disk was, by a cut
        without a name.
    created : datetime.datetime
        In UTC.
    dropped : datetime.datetime or None
        None: it is there.
    """

    name: str
    snapshot: str | None
    created: datetime
    dropped: datetime | None


def begin(catalog: Catalog, volumes: Iterable[VolumeRow], parent: bytes | None = None) -> None:
    """Write down where new volumes come from. Inside the transaction that makes them."""
    catalog.insert_all(LineageRow(row.id, parent, row.name, None, None, row.created_ns, None) for row in volumes)


def begin_forks(
    catalog: Catalog,
    ids: Sequence[bytes],
    names: Sequence[str],
    created_ns: int,
    parent: bytes,
    snapshot: SnapshotRow | None,
) -> None:
    """Write down that new volumes are forks of one. Inside the transaction that makes them."""
    name, guid = (snapshot.name, snapshot.guid) if snapshot else (None, None)
    catalog.insert_copies(LineageRow(ids[0], parent, names[0], name, guid, created_ns), volume=ids, name=names)


def rename(catalog: Catalog, volume: bytes, name: str) -> None:
    """Write down the new name of a volume. Inside the transaction that gives it."""
    catalog.update(LineageRow, volume, name=name)


def lineage(store: OpenStore, name: str) -> list[Ancestor]:
    """Return what a volume comes from, the nearest first."""
    catalog = store.catalog
    found: list[Ancestor] = []
    with catalog.reading():
        row = catalog.lineage_of(catalog.volume(name).id)
        seen: set[bytes] = set()
        while row and (parent := catalog.lineage_of(row.parent)) and parent.volume not in seen:
            seen.add(parent.volume)  # a damaged catalog may have circles
            dropped = None if parent.dropped_ns is None else when(parent.dropped_ns)
            found.append(Ancestor(parent.name, row.snapshot, when(parent.created_ns), dropped))
            row = parent
    return found


def origins(rows: Mapping[bytes, LineageRow], volume: bytes) -> list[Ancestor]:
    """Return what a volume comes from, given the rows of all volumes: its parent, and as long as one is gone that one's.

    So what is gone is said with what comes from it. It ends after `ORIGINS_MAX`; `lineage` returns all.
    """
    found: list[Ancestor] = []
    row = rows.get(volume)
    while row and row.parent and (parent := rows.get(row.parent)) and len(found) < ORIGINS_MAX:
        dropped = None if parent.dropped_ns is None else when(parent.dropped_ns)
        found.append(Ancestor(parent.name, row.snapshot, when(parent.created_ns), dropped))
        row = parent if dropped else None
    return found


def forks_of(store: OpenStore, name: str, snapshot: str | None) -> list[str]:
    """Return the names of the volumes that were cloned or forked from a snapshot of a volume, or from any state of it."""
    catalog = store.catalog
    with catalog.reading():
        row = catalog.volume(name)
        if snapshot is None:
            return [fork.name for fork in catalog.forks_of(row.id)]
        guid = find_snapshot(catalog, row, snapshot).guid
        return [fork.name for fork in catalog.forks_of_snapshot(row.id, guid)]
