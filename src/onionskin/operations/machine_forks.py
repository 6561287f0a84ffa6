"""Forks of a machine: machines that begin as a snapshot of it, with forks of its disks and of its RAM.

What must hold: all machines of a call are there, with all that is theirs, or none: one transaction writes all rows. The
volumes of a fork go with it. Its lifetime and its labels are those of its RAM volume, which tells where it comes from, too.

Some of the machines of a call may be there already: a pool made them beforehand, and their processes wait (`make_waiting`).
They get their names, labels and lifetime in that transaction, and count from then on as machines that ran.
"""

import json
import time
from collections.abc import Sequence

from onionskin.base.durations import end_of
from onionskin.base.naming import some_of
from onionskin.base.records import replaced
from onionskin.catalog import (
    Catalog,
    LabelRow,
    MachineDiskRow,
    MachineRow,
    MachineSnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.volumes import NUMBER_MAX
from onionskin.errors import StateError
from onionskin.operations import forks, lineage, machines
from onionskin.operations.forks import Wanted
from onionskin.storage.chain import insert_heads
from onionskin.storage.open_store import OpenStore

POOL_LABEL = "pool"
WAITING_SECONDS = 300  # from then on `expire` drops one that waits, if it is off


def make_waiting(store: OpenStore, of: bytes, machine: str, snapshot: str, count: int) -> dict[str, bytes]:
    """Make forks that a pool will hold, of the machine with an id, which is called so.

    Returns their ids by their names. They are dropped by `expire` if they are left.
    """
    wanted = forks.check_wanted(
        *(
            machine,
            snapshot,
            [f"{machines.WAITING_PREFIX}{new_id().hex()[-12:]}" for _ in range(count)],
            None,
            None,
            None,
        ),
        *(WAITING_SECONDS, {POOL_LABEL: f"{machine}@{snapshot}"}, None),
    )
    return fork_machine(store, wanted, of=of)


def is_taken(machine: MachineRow) -> bool:
    """Whether a fork has taken a machine that waited in a pool."""
    return machine.resumes == machines.BOOTS


def fork_machine(
    store: OpenStore, wanted: Wanted, waiting: Sequence[bytes] = (), *, of: bytes | None = None
) -> dict[str, bytes]:
    """Make forks of a snapshot of a machine. Returns their ids by their names, in their order.

    `wanted` names the machine as it does a volume; where it was found before, `of` is its id. Where an earlier call made the
    forks, under the same key, the id of one that is gone is empty.

    The first of them are those machines of `waiting` that a pool holds, as long as they are forks of the snapshot as it is:
    their processes are to be told.
    """
    store.catalog.refuse_read_only()
    if wanted.snapshot is None:
        raise ValueError(
            f"a machine is forked as one of its snapshots, such as {wanted.volume}@ready; take one, or name one"
        )
    for name in wanted.names or ():
        machines.check_machine_name(name)
    return store.change(lambda: _fork(store, wanted, waiting, wanted.volume if of is None else of))


def _fork(store: OpenStore, wanted: Wanted, waiting: Sequence[bytes], of: machines.Which) -> dict[str, bytes]:
    """Write the rows. Inside the transaction, which may run twice."""
    catalog = store.catalog
    if wanted.key is not None and (made := forks.call_under(store, wanted.key, _digest(wanted))) is not None:
        return _still_there(catalog, made)
    machine = machines.find(catalog, of)
    taken = machines.find_snapshot(catalog, machine, wanted.snapshot or "")
    disks = catalog.disks_of_machine(machine.id)
    names = _free_names(store, wanted, disks)
    usable = _usable(store, waiting, machine, taken)[: len(names)]
    for one, name in zip(usable, names, strict=False):
        _take(store, wanted, one, name)
    if new := names[len(usable) :]:
        _make(store, replaced(wanted, count=len(new)), machine, taken, disks, new)
    found = {row.name: row.id for row in catalog.machines_named(names)}
    ids = {name: found[name] for name in names}
    if wanted.key is not None:
        forks.note_call(store, wanted.key, _digest(wanted), names, list(ids.values()))
    return ids


def _still_there(catalog: Catalog, made: forks.Made) -> dict[str, bytes]:
    """Return the ids of what an earlier call made, by the names that it gave; of one that is gone the id is empty.

    By their ids: one may have been renamed since, and another machine may have its name. Where an older onionskin noted no
    ids, the names are all that there is.
    """
    if made.ids is None:
        by_name = {row.name: row.id for row in catalog.machines_named(made.names)}
        return {name: by_name.get(name, b"") for name in made.names}
    return {
        name: id if catalog.machine_with_id(id) is not None else b""
        for name, id in zip(made.names, made.ids, strict=True)
    }


def _usable(
    store: OpenStore, waiting: Sequence[bytes], machine: MachineRow, taken: MachineSnapshotRow
) -> list[MachineRow]:
    """Return those of the machines that wait in a pool which are as a fork that is made now."""
    catalog = store.catalog
    source = catalog.snapshot_of_layer(taken.ram) if taken.ram else None
    found = []
    for id in waiting if source else ():
        row = catalog.machine_with_id(id)
        origin = catalog.lineage_of(row.ram) if row else None
        if row is None or origin is None or source is None:
            continue
        is_same = (origin.parent, origin.guid) == (machine.ram, source.guid)
        is_waiting = POOL_LABEL in catalog.labels_of(row.ram) and row.stands_on is None and not is_taken(row)
        if is_same and is_waiting and (row.configuration, row.recorded) == (taken.configuration, taken.recorded):
            found.append(row)
    return found


def _take(store: OpenStore, wanted: Wanted, machine: MachineRow, name: str) -> None:
    """Make a machine that waited in a pool the fork of this name. From then on its guest may run."""
    catalog, now_ns = store.catalog, time.time_ns()
    names = {disk.volume: machines.disk_name(name, disk.name) for disk in catalog.disks_of_machine(machine.id)}
    for volume, called in names.items() | {(machine.ram, machines.ram_name(name))}:
        catalog.update(VolumeRow, volume, name=called, created_ns=now_ns)
        lineage.rename(catalog, volume, called)
    expires_ns = None if wanted.lifetime_ns is None else end_of(now_ns, wanted.lifetime_ns)
    catalog.update(VolumeRow, machine.ram, expires_ns=expires_ns)
    catalog.set_labels(machine.ram, wanted.labels)
    catalog.update_machine(machine.id, name=name, created_ns=now_ns, resumes=machines.BOOTS, state_bytes=0, recorded="")


def _make(
    store: OpenStore,
    wanted: Wanted,
    machine: MachineRow,
    taken: MachineSnapshotRow,
    disks: Sequence[MachineDiskRow],
    names: Sequence[str],
) -> None:
    """Write the rows of machines of these names."""
    catalog = store.catalog
    of_disks = [_fork_disk(store, wanted, names, disk, taken) for disk in disks]
    now_ns = time.time_ns()
    rams = _fork_ram(store, wanted, names, taken) if taken.ram else _new_ram(store, wanted, names, machine, now_ns)
    rows = [
        MachineRow(
            new_id(),
            name,
            ram,
            taken.configuration,
            now_ns,
            None,
            machines.RESUMES if taken.ram else machines.BOOTS,
            taken.state_bytes,
            taken.recorded,
        )
        for name, ram in zip(names, rams, strict=True)
    ]
    catalog.insert_all(rows)
    catalog.insert_all(
        MachineDiskRow(row.id, disk.position, disk.name, volume, 1)
        for disk, volumes in zip(disks, of_disks, strict=True)
        for row, volume in zip(rows, volumes, strict=True)
    )


def _digest(wanted: Wanted) -> bytes:
    from hashlib import sha256  # it loads OpenSSL, which only forks need

    return sha256(json.dumps(["machine", wanted.digest().hex()]).encode()).digest()


def _fork_disk(
    store: OpenStore, wanted: Wanted, names: Sequence[str], disk: MachineDiskRow, taken: MachineSnapshotRow
) -> list[bytes]:
    """Fork a disk once for each machine. Returns the ids of the volumes."""
    bound = {one.position: one.layer for one in store.catalog.disks_of_machine_snapshot(taken.id)}
    layer = bound.get(disk.position, b"")
    plain = replaced(wanted, labels={}, lifetime_ns=None)
    return _fork_layer(store, plain, [machines.disk_name(name, disk.name) for name in names], layer)


def _fork_ram(store: OpenStore, wanted: Wanted, names: Sequence[str], taken: MachineSnapshotRow) -> list[bytes]:
    assert taken.ram is not None
    return _fork_layer(store, wanted, [machines.ram_name(name) for name in names], taken.ram)


def _fork_layer(store: OpenStore, wanted: Wanted, names: Sequence[str], layer: bytes) -> list[bytes]:
    catalog = store.catalog
    row = catalog.snapshot_of_layer(layer)
    volume = catalog.volume_with_id(row.volume) if row else None
    if row is None or volume is None:
        raise StateError(f"a part of snapshot {wanted.volume}@{wanted.snapshot} is missing; run 'onionskin check'")
    ids = tuple(new_id() for _ in names)
    forks.insert_named(store, replaced(wanted, ids=ids), names, volume, row, catalog.layer(layer))
    return list(ids)


def _new_ram(store: OpenStore, wanted: Wanted, names: Sequence[str], machine: MachineRow, now_ns: int) -> list[bytes]:
    """Make RAM volumes for forks of a snapshot that has no RAM. Returns their ids."""
    catalog = store.catalog
    memory_bytes, _ = machines.memory_of(catalog, machine)
    source = catalog.volume_with_id(machine.ram)
    wipe = wanted.wipe or (catalog.layer(source.head).wipe if source else catalog.defaults().wipe)
    heads = [machines.new_ram_head(memory_bytes, wipe) for _ in names]
    insert_heads(catalog, heads)
    expires_ns = None if wanted.lifetime_ns is None else end_of(now_ns, wanted.lifetime_ns)
    rows = [
        VolumeRow(new_id(), machines.ram_name(name), head.layer.id, now_ns, expires_ns)
        for name, head in zip(names, heads, strict=True)
    ]
    catalog.insert_all(rows)
    lineage.begin(catalog, rows, machine.ram)
    catalog.insert_all(LabelRow(row.id, key, value) for row in rows for key, value in wanted.labels.items())
    return [row.id for row in rows]


def _free_names(store: OpenStore, wanted: Wanted, disks: Sequence[MachineDiskRow]) -> list[str]:
    """Return the names that were given, or those with the next numbers; none is taken, nor one of their volumes' names."""
    catalog, pattern = store.catalog, wanted.pattern
    if (len(disks) + 1) * wanted.count > forks.FORKS_MAX:
        raise ValueError(
            f"one call makes at most {forks.FORKS_MAX:,} volumes, and each of these machines has {len(disks) + 1}"
        )
    if wanted.names is not None:
        names = list(wanted.names)
    else:
        last = catalog.greatest_machine_number(pattern.prefix, pattern.suffix)
        if last + wanted.count > NUMBER_MAX:
            raise StateError(f"there are no numbers left behind {pattern.name(last)!r}; choose another pattern")
        names = [pattern.name(number) for number in range(last + 1, last + wanted.count + 1)]
    machines.refuse_taken(store, names)
    own = [machines.ram_name(name) for name in names]
    own += [machines.disk_name(name, disk.name) for name in names for disk in disks]
    if len(set(own)) < len(own):
        raise ValueError(f"volumes of these machines would have the same names: {some_of(sorted(own))}; choose others")
    for name in names:
        machines.check_owned_names(catalog, name, disks)
    forks.refuse_taken(store, own)
    return names


__all__ = ["fork_machine"]
