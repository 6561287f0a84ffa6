"""Forks of a machine: machines that begin as a snapshot of it, with forks of its disks and of its RAM.

What must hold: all machines of a call are there, with all that is theirs, or none: one transaction writes all rows. The
volumes of a fork go with it. Its lifetime and its labels are those of its RAM volume, which tells where it comes from, too.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from onionskin.base.naming import some_of
from onionskin.catalog import (
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


def fork_machine(store: OpenStore, wanted: Wanted) -> list[str]:
    """Make forks of a snapshot of a machine. Returns their names. `wanted` names the machine as it does a volume."""
    store.catalog.refuse_read_only()
    if wanted.snapshot is None:
        raise ValueError(
            f"a machine is forked as one of its snapshots, such as {wanted.volume}@ready; take one, or name one"
        )
    for name in wanted.names or ():
        machines.check_machine_name(name)
    return store.change(lambda: _fork(store, wanted))


def _fork(store: OpenStore, wanted: Wanted) -> list[str]:
    """Write the rows. Inside the transaction, which may run twice."""
    catalog = store.catalog
    if wanted.key is not None and (made := forks.made_under(store, wanted.key, _digest(wanted))) is not None:
        return made
    machine = machines.find(catalog, wanted.volume)
    taken = machines.find_snapshot(catalog, machine, wanted.snapshot or "")
    disks = catalog.disks_of_machine(machine.id)
    names = _free_names(store, wanted, disks)
    of_disks = [_fork_disk(store, wanted, names, disk, taken) for disk in disks]
    now_ns = time.time_ns()
    rams = (
        _fork_ram(store, wanted, names, machine, taken)
        if taken.ram
        else _new_ram(store, wanted, names, machine, now_ns)
    )
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
    if wanted.key is not None:
        forks.note_call(store, wanted.key, _digest(wanted), names)
    return names


def _digest(wanted: Wanted) -> bytes:
    return sha256(json.dumps(["machine", wanted.digest().hex()]).encode()).digest()


def _fork_disk(
    store: OpenStore, wanted: Wanted, names: Sequence[str], disk: MachineDiskRow, taken: MachineSnapshotRow
) -> list[bytes]:
    """Fork a disk once for each machine. Returns the ids of the volumes."""
    bound = {one.position: one.layer for one in store.catalog.disks_of_machine_snapshot(taken.id)}
    layer = bound.get(disk.position, b"")
    plain = replace(wanted, labels={}, lifetime_ns=None)
    return _fork_layer(store, plain, [machines.disk_name(name, disk.name) for name in names], layer)


def _fork_ram(
    store: OpenStore, wanted: Wanted, names: Sequence[str], machine: MachineRow, taken: MachineSnapshotRow
) -> list[bytes]:
    assert taken.ram is not None
    return _fork_layer(store, wanted, [machines.ram_name(name) for name in names], taken.ram)


def _fork_layer(store: OpenStore, wanted: Wanted, names: Sequence[str], layer: bytes) -> list[bytes]:
    catalog = store.catalog
    row = catalog.snapshot_of_layer(layer)
    volume = catalog.volume_with_id(row.volume) if row else None
    if row is None or volume is None:
        raise StateError(f"a part of snapshot {wanted.volume}@{wanted.snapshot} is missing; run 'onionskin check'")
    ids = tuple(new_id() for _ in names)
    forks.insert_named(store, replace(wanted, ids=ids), names, volume, row, catalog.layer(layer))
    return list(ids)


def _new_ram(store: OpenStore, wanted: Wanted, names: Sequence[str], machine: MachineRow, now_ns: int) -> list[bytes]:
    """Make RAM volumes for forks of a snapshot that has no RAM. Returns their ids."""
    catalog = store.catalog
    memory_bytes, _ = machines.memory_of(catalog, machine)
    source = catalog.volume_with_id(machine.ram)
    wipe = wanted.wipe or (catalog.layer(source.head).wipe if source else catalog.defaults().wipe)
    heads = [machines.new_ram_head(memory_bytes, wipe) for _ in names]
    insert_heads(catalog, heads)
    expires_ns = None if wanted.lifetime_ns is None else now_ns + wanted.lifetime_ns
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
