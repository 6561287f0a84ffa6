"""Removing machines, by their names or because their lifetime is over.

What must hold: machines are removed in one transaction, all or none, each kept off meanwhile. Their RAM, and the disks that
go with them, go too. Other disks stay as they are, and so does all that was written to them: only the names go that the
snapshots of the machine gave them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from onionskin.base.held import enter, held, held_together
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.naming import some_of
from onionskin.catalog import Catalog, MachineRow, VolumeRow
from onionskin.catalog.tree import remove_unreachable_layers
from onionskin.errors import OnionskinError, StateError
from onionskin.operations import holds, losses, machines, volumes
from onionskin.operations.losses import Loss
from onionskin.operations.machines import Which
from onionskin.storage.locks import locked_to_remove
from onionskin.storage.open_store import OpenStore


class Removed(NamedTuple):
    """What became of a removal: bytes on the disk that go, layers that may be alone now, and volumes that are to be folded.

    `machines` are the ids of those that are gone.
    """

    bytes_freed: int
    stood_on: list[bytes]
    volumes: list[str]
    machines: list[bytes]


# Raises StateError where a process of machines is there, which are kept off.
RefuseProcesses = Callable[[Sequence[MachineRow]], None]


class _Parts(NamedTuple):
    """What belongs to machines that go together."""

    machines: list[MachineRow]
    going: list[VolumeRow]  # the volumes that go with them
    staying: list[VolumeRow]
    names: list[str]  # of their snapshots
    layers: list[bytes]  # of the volumes that stay, whose names go


def ids_of(catalog: Catalog, names: Sequence[Which]) -> dict[Which, bytes]:
    """Return the ids of machines, by what they were named by, in that order."""
    with catalog.reading():
        return {name: machines.find(catalog, name).id for name in dict.fromkeys(names)}


def delete(
    store: OpenStore,
    names: Sequence[Which],
    refuse_processes: RefuseProcesses,
    *,
    recursive: bool,
    agreed: Mapping[Which, bytes] | None = None,
) -> Removed:
    """Remove machines that are off. With `agreed`, only while their names mean the machines with these ids."""
    catalog = store.catalog
    catalog.refuse_read_only()
    wanted = ids_of(catalog, names)
    if agreed is not None and wanted != agreed:
        raise StateError(
            f"machines of {store.path} were renamed meanwhile, and a name means another one now; nothing was changed; look "
            "at them, and try again"
        )

    def remove() -> tuple[Removed, list[bytes]]:
        if ids_of(catalog, names) != wanted:
            raise StateError(f"machines of {store.path} were renamed meanwhile; nothing was changed; try again")
        parts = _parts(catalog, list(wanted.values()), recursive=recursive)
        return _remove(store, parts), [row.id for row in parts.going]

    with _kept_off(store, list(wanted.values())):
        refuse_processes([row for id in wanted.values() if (row := catalog.machine_with_id(id))])
        removed, gone = store.change(remove)
        volumes.unlink_files(store, gone)
    return removed


def loss_of_delete(store: OpenStore, names: Sequence[str], *, recursive: bool) -> Loss:
    """Return what a removal of machines would drop. One that runs is refused."""
    catalog = store.catalog
    ids = list(ids_of(catalog, names).values())

    def find() -> tuple[list[VolumeRow], list[str], list[bytes], list[tuple[bytes, list[bytes]]]]:
        parts = _parts(catalog, ids, recursive=recursive)
        own = catalog.snapshots_of_volumes(row.id for row in parts.going)
        layers = [row.layer for rows in own.values() for row in rows]
        holds.refuse_held(catalog, [*layers, *parts.layers], for_machine=True)
        named = sorted(catalog.snapshots_of_layers(parts.layers), key=lambda row: row.number)
        staying = [(disk.head, [row.layer for row in named if row.volume == disk.id]) for disk in parts.staying]
        return parts.going, parts.names, [*layers, *(row.head for row in parts.going), *parts.layers], staying

    with _kept_off(store, ids):
        return losses.of_names_and_folds(store, find)


@held
def _kept_off(store: OpenStore, ids: Sequence[bytes]) -> Iterator[None]:
    """Keep machines off, and the disks that go with them closed."""
    catalog = store.catalog
    with held_together() as stack:
        for id in sorted(ids):
            machine = catalog.machine_with_id(id)
            if machine is None:
                raise StateError(f"a machine of {store.path} was deleted meanwhile; try again")
            enter(stack, partial(machines.kept_off, store, machine))
            owned = [disk.volume for disk in catalog.disks_of_machine(id) if disk.owned]
            names = {row.id: row.name for row in catalog.volumes_with_ids(owned)}
            enter(stack, partial(locked_to_remove, store.layout, names))
        yield


def _parts(catalog: Catalog, ids: Sequence[bytes], *, recursive: bool) -> _Parts:
    """Find what belongs to machines that go together, or raise StateError where something needs them."""
    rows = [row for row in (catalog.machine_with_id(id) for id in ids) if row]
    disks = [disk for row in rows for disk in catalog.disks_of_machine(row.id)]
    owned = [disk.volume for disk in disks if disk.owned] + [row.ram for row in rows]
    staying = catalog.volumes_with_ids(disk.volume for disk in disks if not disk.owned)
    taken = [(row, one) for row in rows for one in catalog.snapshots_of_machine(row.id)]
    names = [f"{row.name}@{one.name}" for row, one in taken]
    if taken and not recursive:
        raise StateError(
            f"there are snapshots of machines that would go: {some_of(names)}; ask for a recursive removal to remove them too"
        )
    going = catalog.volumes_with_ids(owned)
    _refuse_forked(catalog, rows, going)
    layers = catalog.layers_of_machine_snapshots(one.id for _, one in taken)
    kept = {row.id for row in staying}
    bound = [row.layer for row in catalog.snapshots_of_layers(layers) if row.volume in kept]
    return _Parts(rows, going, staying, names, bound)


def _refuse_forked(catalog: Catalog, rows: Sequence[MachineRow], going: Sequence[VolumeRow]) -> None:
    """Raise StateError where machines that stay stand on one that goes, or its disks."""
    try:
        volumes.refuse_delete(catalog, going, recursive=True)
    except StateError as error:
        others = catalog.machines_of_volumes(fork.id for volume in going for fork in catalog.forks_of(volume.id))
        gone = {row.id for row in rows}
        forks = sorted({row.name for row in others.values() if row.id not in gone})
        if not forks:
            raise
        names = some_of(sorted(row.name for row in rows))
        if all(fork.startswith(machines.WAITING_PREFIX) for fork in forks):
            raise StateError(
                f"a pool has forks of {names} ready: {some_of(forks)}; end it first, with 'onionskin machine pool --stop'; "
                "nothing was removed"
            ) from None
        raise StateError(f"machines were forked from {names}: {some_of(forks)}; delete those first ({error})") from None


def _remove(store: OpenStore, parts: _Parts) -> Removed:
    """Remove all rows. Inside a transaction."""
    catalog = store.catalog
    holds.refuse_held(catalog, parts.layers, for_machine=True)
    for machine in parts.machines:
        catalog.update_machine(machine.id, stands_on=None)
        for one in reversed(catalog.snapshots_of_machine(machine.id)):
            catalog.remove_machine_snapshot(one)
        catalog.remove_machine(machine.id)
    freed, stood_on = volumes.remove_rows(store, parts.going, recursive=True, for_machine=True)
    for layer in parts.layers:
        catalog.remove_snapshot_of_layer(layer)
    stood_on += remove_unreachable_layers(catalog, *parts.layers)
    return Removed(freed, stood_on, [row.name for row in parts.staying], [machine.id for machine in parts.machines])


# ---- those whose lifetime is over ----


def would_expire(store: OpenStore) -> list[str]:
    """Return the names of the machines that `expire` would remove now. Nothing is changed."""
    names = []
    for machine in store.catalog.expired_machines(time.time_ns()):
        with suppress(OnionskinError):
            loss_of_delete(store, [machine.name], recursive=False)  # which refuses as the removal itself does
            names.append(machine.name)
    return names


def expire(store: OpenStore, refuse_processes: RefuseProcesses) -> tuple[list[str], list[Removed]]:
    """Remove the machines whose lifetime is over: not those that run, that have snapshots, or that were forked.

    Returns their names, and what became of each.
    """
    catalog = store.catalog
    names: list[str] = []
    removed: list[Removed] = []
    for machine in catalog.expired_machines(time.time_ns()):
        with suppress(OnionskinError):
            removed.append(
                delete(store, [machine.name], refuse_processes, recursive=False, agreed={machine.name: machine.id})
            )
            names.append(machine.name)
    return names, removed
