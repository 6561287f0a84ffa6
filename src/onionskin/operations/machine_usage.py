"""What snapshots of a machine take, and what dropping some would lose.

What must hold: nothing is changed. The sums are those of the disks and of the RAM, each found as for a volume.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from onionskin.catalog import Catalog, MachineRow, MachineSnapshotRow, VolumeRow
from onionskin.operations import holds, losses, machine_tree, machines
from onionskin.operations import usage as usages
from onionskin.operations.losses import Loss
from onionskin.operations.machines import Which
from onionskin.operations.snapshots import all_of_branches, refuse_discard
from onionskin.operations.unflushed import refuse_open
from onionskin.storage.open_store import OpenStore


@dataclass(frozen=True, slots=True)
class MachineUsage:
    """The space that one snapshot of a machine takes.

    Attributes
    ----------
    snapshot : str or None
        Its name. None stands for the disks and the RAM as they are now.
    disk_bytes_held, ram_bytes_held : int
        The data that was written between the previous snapshot and this one; RAM is with the state of the devices.
    bytes_freed_by_discard, bytes_freed_by_merge : int
        What a discard of it and of all that descends from it would free, and what a merge of it.
    """

    snapshot: str | None
    disk_bytes_held: int
    ram_bytes_held: int
    bytes_freed_by_discard: int
    bytes_freed_by_merge: int


def usage(store: OpenStore, which: Which) -> list[MachineUsage]:
    """Return what each snapshot of a machine holds, oldest first, and at last what its disks and RAM hold now."""
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        taken = catalog.snapshots_of_machine(machine.id)
        volumes = machines.volumes_of(catalog, machine)
        named = {
            row.id: {one.volume: one.name for one in catalog.snapshots_of_layers(_layers_of(catalog, row))}
            for row in taken
        }
    of = {volume.id: {one.snapshot: one for one in usages.usage(store, volume.name)} for volume in volumes}
    whole: list[tuple[str | None, dict[bytes, str | None]]] = [(row.name, dict(named[row.id])) for row in taken]
    whole.append((None, {volume.id: None for volume in volumes}))
    found = []
    for snapshot, names in whole:
        parts = {volume: of[volume][called] for volume, called in names.items() if called in of.get(volume, {})}
        found.append(
            MachineUsage(
                snapshot,
                sum(part.bytes_held for volume, part in parts.items() if volume != machine.ram),
                sum(part.bytes_held for volume, part in parts.items() if volume == machine.ram),
                sum(part.bytes_freed_by_discard for part in parts.values()),
                sum(part.bytes_freed_by_merge for part in parts.values()),
            )
        )
    return found


def _layers_of(catalog: Catalog, row: MachineSnapshotRow) -> list[bytes]:
    return catalog.layers_of_machine_snapshots([row.id])


def loss_of_revert(store: OpenStore, which: Which, snapshot: str) -> Loss:
    """Return what a revert of a machine would drop of its disks. What is not flushed is not counted."""
    catalog = store.catalog

    def find() -> tuple[list[VolumeRow], list[str], Collection[bytes], Collection[bytes]]:
        machine = machines.find(catalog, which)
        row = machines.find_snapshot(catalog, machine, snapshot)
        disks = catalog.volumes_with_ids(disk.volume for disk in catalog.disks_of_machine(machine.id))
        return [], [], [disk.head for disk in disks], _layers_of(catalog, row)

    return losses.of_names(store, find)


def loss_of_beginning(store: OpenStore, which: Which) -> Loss:
    """Return what is dropped of the disks of a fork that is put back to what it was made from."""
    catalog = store.catalog

    def find() -> tuple[list[VolumeRow], list[str], Collection[bytes], Collection[bytes]]:
        machine = machines.find(catalog, which)
        layers, _ = machine_tree.beginning_of_fork(catalog, machine)
        disks = catalog.volumes_with_ids(disk.volume for disk in catalog.disks_of_machine(machine.id))
        return [], [], [disk.head for disk in disks], list(layers.values())

    return losses.of_names(store, find)


def loss_of_merge(store: OpenStore, which: Which, snapshots: Sequence[str]) -> Loss:
    """Return what goes with the names of snapshots of a machine alone: what nothing reads then."""
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        going = machine_tree.chosen(catalog, machine, snapshots)
        machine_tree.refuse_awaited(catalog, machine, going)
        named = catalog.snapshots_of_layers(catalog.layers_of_machine_snapshots(row.id for row in going))
        volumes = machines.volumes_of(catalog, machine)
    parts = [
        losses.of_merge(store, volume.name, [row.name for row in named if row.volume == volume.id], for_machine=True)
        for volume in volumes
        if any(row.volume == volume.id for row in named)
    ]
    counts = [part.bytes_freed for part in parts]
    return Loss(
        (),
        tuple(f"{machine.name}@{row.name}" for row in going),
        None if None in counts else sum(count or 0 for count in counts),
        any(part.is_lost for part in parts),
    )


def loss_of_discard(store: OpenStore, which: Which, snapshots: Sequence[str], *, recursive: bool) -> Loss:
    """Return what a discard of snapshots of a machine would drop, with all that was written after them."""
    catalog = store.catalog
    found = machines.find(catalog, which)
    runs = machines.is_running(store, found)

    def find() -> tuple[list[VolumeRow], list[str], Collection[bytes], Collection[bytes]]:
        machine = machines.find(catalog, found.id)
        going = machine_tree.going_with(catalog, machine, snapshots, recursive=recursive)
        machine_tree.refuse_awaited(catalog, machine, going, but_own=not runs)
        if runs:
            machine_tree.refuse_run_on(machine, going)
        elif machine.stands_on in {row.id for row in going}:
            for disk in machines.disks_of(catalog, machine).values():
                refuse_open(store, disk)
        dropped, kept = _branches(catalog, machine, going, recursive)
        machine_tree.refuse_others(catalog, dropped, going)
        holds.refuse_held(catalog, dropped, for_machine=True)
        return [], [f"{machine.name}@{row.name}" for row in going], dropped, kept

    return losses.of_names(store, find)


def _branches(
    catalog: Catalog, machine: MachineRow, going: Sequence[MachineSnapshotRow], recursive: bool
) -> tuple[set[bytes], set[bytes]]:
    """Return the layers that go with snapshots of a machine, and those that stay because a disk is put on them."""
    named = catalog.snapshots_of_layers(catalog.layers_of_machine_snapshots(row.id for row in going))
    dropped: set[bytes] = set()
    kept: set[bytes] = set()
    for volume in machines.volumes_of(catalog, machine):
        rows = [row for row in named if row.volume == volume.id]
        branches = refuse_discard(catalog, volume, rows, recursive)
        dropped |= all_of_branches(branches)
        if volume.id != machine.ram:
            kept |= {root for root, above in branches.items() if volume.head in above}
    return dropped, kept
