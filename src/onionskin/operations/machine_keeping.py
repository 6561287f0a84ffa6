"""Which snapshots of a machine stay, and what they are called: holds, retention, names and notes.

What must hold: a hold of a snapshot of a machine is a hold of each snapshot of a volume that it binds, all in one
transaction. So whatever drops one of those finds it, by `holds.refuse_held`. The same is true of a name and of a note: a
snapshot of a machine and those that it binds have one name.
"""

import time
from collections.abc import Callable, Collection, Sequence

from onionskin.base.naming import check_name, check_note, some_of
from onionskin.base.records import replaced
from onionskin.catalog import Catalog, HoldRow, MachineRow, MachineSnapshotRow
from onionskin.catalog.tree import when
from onionskin.errors import StateError
from onionskin.operations import machine_tree, machines
from onionskin.operations.holds import Hold
from onionskin.operations.machine_snapshots import refuse_taken
from onionskin.operations.machines import Which
from onionskin.operations.prune import Retention, Rules, retained
from onionskin.storage.open_store import OpenStore

AWAITED = "awaited"  # what keeps a snapshot that a machine is about to go on from

# ---- holds ----


def hold(store: OpenStore, which: Which, snapshots: Sequence[str], holder: str) -> None:
    """Keep snapshots of a machine until the holder lets them go: all of them, or none."""
    holder = check_name("holder", holder)
    catalog = store.catalog

    def change() -> None:
        machine = machines.find(catalog, which)
        for row in machine_tree.chosen(catalog, machine, snapshots):
            layers = catalog.layers_of_machine_snapshots([row.id])
            if not layers:
                raise StateError(
                    f"snapshot {row.name!r} of machine {machine.name!r} has neither disks nor RAM: nothing to hold"
                )
            held = {one.layer for one in catalog.holds_on(layers) if one.holder == holder}
            if held == set(layers):
                raise StateError(
                    f"{machine.name}@{row.name} is held by {holder!r} already; choose another name for this holder"
                )
            now_ns = time.time_ns()
            catalog.insert_all(HoldRow(layer, holder, now_ns) for layer in layers if layer not in held)

    store.change(change)


def unhold(store: OpenStore, which: Which, snapshots: Sequence[str], holder: str) -> None:
    """Let snapshots of a machine go: all of them, or none."""
    catalog = store.catalog

    def change() -> None:
        machine = machines.find(catalog, which)
        for row in machine_tree.chosen(catalog, machine, snapshots):
            found = catalog.holds_on(catalog.layers_of_machine_snapshots([row.id]))
            if not any(one.holder == holder for one in found):
                others = sorted({one.holder for one in found})
                by = f"held by {some_of(others)}" if others else "held by nobody"
                raise StateError(f"{machine.name}@{row.name} is not held by {holder!r}; it is {by}")
            for one in found:
                if one.holder == holder:
                    catalog.drop_hold(one.layer, holder)

    store.change(change)


def holds(store: OpenStore, which: Which, snapshot: str | None) -> list[Hold]:
    """Return who holds a snapshot of a machine, or any of them: in the order of taking, and of holding.

    Whoever holds a part of one, as its snapshot of a disk, keeps all of it, and counts.
    """
    catalog = store.catalog
    listed = []
    with catalog.reading():
        machine = machines.find(catalog, which)
        taken = catalog.snapshots_of_machine(machine.id)
        if snapshot is not None:
            taken = [machines.find_snapshot(catalog, machine, snapshot)]
        for row in taken:
            since: dict[str, int] = {}
            for one in catalog.holds_on(catalog.layers_of_machine_snapshots([row.id])):
                since[one.holder] = min(one.created_ns, since.get(one.holder, one.created_ns))
            of_row = sorted(since.items(), key=lambda one: one[1])
            listed += [Hold(row.name, holder, when(created_ns), machine.name) for holder, created_ns in of_row]
    return listed


# ---- names and notes ----


def rename_snapshot(store: OpenStore, which: Which, snapshot: str, new_name: str) -> None:
    """Give a snapshot of a machine another name, and those of its disks and its RAM too."""
    new_name = check_name("snapshot", new_name)
    catalog = store.catalog

    def change() -> None:
        machine = machines.find(catalog, which)
        row = machines.find_snapshot(catalog, machine, snapshot)
        if new_name == row.name:
            return
        named = catalog.snapshots_of_layers(catalog.layers_of_machine_snapshots([row.id]))
        refuse_taken(catalog, machine, [one.volume for one in named], new_name)
        for one in named:
            catalog.update_snapshot(one.layer, name=new_name)
        catalog.update(MachineSnapshotRow, row.id, name=new_name)

    store.change(change)


def set_note(store: OpenStore, which: Which, snapshot: str, note: str) -> None:
    """Replace the note of a snapshot of a machine, and of those of its disks and its RAM."""
    note = check_note(note)
    catalog = store.catalog

    def change() -> None:
        row = machines.find_snapshot(catalog, machines.find(catalog, which), snapshot)
        for layer in catalog.layers_of_machine_snapshots([row.id]):
            catalog.update_snapshot(layer, note=note)
        catalog.update(MachineSnapshotRow, row.id, note=note)

    store.change(change)


# ---- retention ----

Plan = list[tuple[MachineSnapshotRow, Retention]]


def planned(store: OpenStore, which: Which, rules: Rules, pooled: Collection[bytes] = ()) -> Plan:
    """Return what a prune would do with each snapshot of a machine, in the order of taking.

    `pooled` are the ids of those of which pools make forks.
    """
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        taken = catalog.snapshots_of_machine(machine.id)
        infos = machine_tree.list_snapshots(store, machine.id)
        kept = {row.id: why for row in taken if (why := _why_kept(catalog, machine, row, pooled))}
    found = retained(infos, rules, now=when(time.time_ns()))
    return [
        (row, replaced(one, kept_by=(*kept.get(row.id, ()), *one.kept_by)))
        for row, one in zip(taken, found, strict=True)
    ]


def prune(
    store: OpenStore,
    which: Which,
    rules: Rules,
    merge: Callable[[Sequence[MachineSnapshotRow]], object],
    pooled: Collection[bytes] = (),
) -> list[Retention]:
    """Drop the snapshots of a machine that no rule keeps, all of them at once, and return what became of each.

    `merge` drops them in one transaction, or raises StateError where one is not what it was, or is needed. What somebody
    holds or is about to go on from by then is kept, and the others go.
    """
    plan = planned(store, which, rules, pooled)
    while going := [row for row, one in plan if not one.kept_by]:
        try:
            merge(going)
            break
        except StateError:
            now = {row.id: one for row, one in planned(store, which, rules, pooled)}
            kept = {row.id for row in going if row.id in now and now[row.id].kept_by}
            if not kept:
                raise
            plan = [(row, now[row.id] if row.id in kept else one) for row, one in plan]
    return [one for _, one in plan]


def _why_kept(
    catalog: Catalog, machine: MachineRow, row: MachineSnapshotRow, pooled: Collection[bytes]
) -> tuple[str, ...]:
    """Return what keeps a snapshot beside the rules: somebody holds it, or is about to go on from it."""
    held = ("held",) if catalog.holds_on(catalog.layers_of_machine_snapshots([row.id])) else ()
    if row.id in pooled:
        return (*held, AWAITED)
    try:
        machine_tree.refuse_awaited(catalog, machine, [row])
    except StateError:
        return (*held, AWAITED)
    return held
