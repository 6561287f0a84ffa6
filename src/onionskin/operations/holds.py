"""Holds: who needs a snapshot, so that nobody drops its name.

What must hold: `refuse_held` is asked inside each transaction that drops a snapshot's name, whatever for, so that no hold
comes between the question and the drop. The catalog's own reference from a hold to its snapshot is behind it.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from onionskin.base.naming import check_name, some_of
from onionskin.base.records import record
from onionskin.catalog import Catalog, HoldRow, MachineSnapshotRow
from onionskin.catalog.tree import find_snapshot, when
from onionskin.errors import StateError
from onionskin.operations.ownership import refuse_bound
from onionskin.operations.snapshot_names import find_chosen
from onionskin.storage.open_store import OpenStore


@record
class Hold:
    """Somebody who needs a snapshot: it is not discarded, merged or deleted, and neither is its volume.

    Attributes
    ----------
    snapshot : str
    holder : str
        Who it is, in words of their own choice.
    created : datetime.datetime
        Since when, in UTC.
    volume : str
        The volume of the snapshot.
    """

    snapshot: str
    holder: str
    created: datetime
    volume: str = ""


def refuse_held(catalog: Catalog, layers: Iterable[bytes], *, for_machine: bool = False) -> None:
    """Raise StateError where a snapshot of one of these layers is held, or belongs to a snapshot of a machine.

    Inside the transaction that would drop it. `for_machine`: it is dropped with the snapshot of the machine.
    """
    dropped = list(layers)
    if not for_machine:
        refuse_bound(catalog, dropped)
    held = catalog.holds_on(dropped)
    if not held:
        return
    bound = catalog.machine_snapshots_of_layers(hold.layer for hold in held)
    names = list(dict.fromkeys(f"{_name_of(catalog, hold.layer, bound)} by {hold.holder!r}" for hold in held))
    verbs = ["machine unhold"] * bool(bound) + ["unhold"] * (len(bound) < len({hold.layer for hold in held}))
    ways = " and ".join(f"'onionskin {verb}'" for verb in verbs)
    raise StateError(f"held: {some_of(names)}; nothing was dropped; let it go with {ways} first")


def _name_of(catalog: Catalog, layer: bytes, bound: Mapping[bytes, MachineSnapshotRow]) -> str:
    """Return what the snapshot of a layer is called, or that of the machine which binds it."""
    if layer in bound:
        machine = catalog.machine_with_id(bound[layer].machine)
        return f"{machine.name if machine else bound[layer].machine.hex()}@{bound[layer].name}"
    row = catalog.snapshot_of_layer(layer)
    volume = catalog.volume_with_id(row.volume) if row else None
    return f"{volume.name}@{row.name}" if row and volume else layer.hex()  # in a damaged catalog


def hold(
    store: OpenStore, volume: str, snapshots: Sequence[str], holder: str, guids: str | Sequence[str] | None = None
) -> None:
    """Keep snapshots until the holder lets them go: all of them, or none."""
    holder = check_name("holder", holder)

    def change() -> None:
        row = store.catalog.volume(volume)
        for snapshot, found in zip(snapshots, find_chosen(store.catalog, row, snapshots, guids), strict=True):
            layer = found.layer
            if any(one.holder == holder for one in store.catalog.holds_on([layer])):
                raise StateError(
                    f"{volume}@{snapshot} is held by {holder!r} already; choose another name for this holder"
                )
            store.catalog.insert(HoldRow(layer, holder, time.time_ns()))

    store.change(change)


def unhold(
    store: OpenStore, volume: str, snapshots: Sequence[str], holder: str, guids: str | Sequence[str] | None = None
) -> None:
    """Let snapshots go: all of them, or none."""

    def change() -> None:
        row = store.catalog.volume(volume)
        for snapshot, found in zip(snapshots, find_chosen(store.catalog, row, snapshots, guids), strict=True):
            layer = found.layer
            holders = [one.holder for one in store.catalog.holds_on([layer])]
            if holder not in holders:
                by = f"held by {some_of(holders)}" if holders else "held by nobody"
                raise StateError(f"{volume}@{snapshot} is not held by {holder!r}; it is {by}")
            store.catalog.drop_hold(layer, holder)

    store.change(change)


def holds(store: OpenStore, volume: str, snapshot: str | None) -> list[Hold]:
    """Return who holds a snapshot of a volume, or any of them: in the order of taking, and of holding."""
    catalog = store.catalog
    with catalog.reading():
        row = catalog.volume(volume)
        rows = catalog.snapshots_of(row.id) if snapshot is None else [find_snapshot(catalog, row, snapshot)]
        found = catalog.holds_on([one.layer for one in rows])
    places = {one.layer: place for place, one in enumerate(rows)}
    found.sort(key=lambda hold: places[hold.layer])
    return [Hold(rows[places[one.layer]].name, one.holder, when(one.created_ns), volume) for one in found]


def holds_of_store(store: OpenStore) -> list[Hold]:
    """Return who holds any snapshot of a store: by volume, in the order of taking, and of holding."""
    catalog = store.catalog
    with catalog.reading():
        found = catalog.holds()
        taken = {row.layer: row for row in catalog.snapshots_of_layers({one.layer for one in found})}
        volumes = {row.volume: catalog.volume_with_id(row.volume) for row in taken.values()}
    listed = []
    for one in found:
        row = taken.get(one.layer)
        volume = volumes[row.volume] if row else None
        if row and volume:
            listed.append((volume.name, row.number, Hold(row.name, one.holder, when(one.created_ns), volume.name)))
    return [hold for _, _, hold in sorted(listed, key=lambda one: one[:2])]
