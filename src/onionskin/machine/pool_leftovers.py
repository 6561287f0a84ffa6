"""What a pool leaves that was killed, where supervisors of machines that waited in it were killed too.

A supervisor ends when its pool has gone, and a pool cleans up after a supervisor that has gone. Where both are gone, the
hypervisor and the server of the disks stand there, and the row of a machine that no fork can take any more. Whoever does
something with pools of that machine next ends them, and so does `expire`.

What must hold: a machine that a fork has taken stays, whatever became of its pool. Nobody ends what a supervisor holds, or
what a pool that is there will clean up.
"""

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from onionskin.errors import OnionskinError
from onionskin.machine.pool import MachinePool
from onionskin.machine.record import Record, directory_of
from onionskin.operations import machine_forks, machines

if TYPE_CHECKING:
    from onionskin.catalog import Catalog, MachineRow
    from onionskin.store import Store

DYING_SECONDS = 10.0  # so long the locks of a process that was killed are waited for


def end_of(store: "Store", machine: "MachineRow") -> None:
    """End the machines that waited in pools of a machine which have gone, and drop them."""
    catalog = store._opened.catalog
    with catalog.reading():
        waiting = [
            row
            for one in catalog.machines_awaiting(machine.ram)
            if (row := catalog.machine_named(one.name)) is not None and _is_waiting(catalog, row)
        ]
    for row in waiting:
        with suppress(OSError, OnionskinError):  # it is another user's, or somebody was faster
            if _has_no_pool_now(store, row):
                store._machine_of(row).stop(force=True)
                store._delete_machines([row.name], recursive=False, agreed={row.name: row.id})


def end_expired(store: "Store") -> None:
    """End the processes of those, of any machine, whose lifetime is over, for whoever drops them next."""
    catalog = store._opened.catalog
    for row in catalog.expired_machines(time.time_ns()):
        with suppress(OSError, OnionskinError):
            if _is_waiting(catalog, row) and _has_no_pool_now(store, row):
                store._machine_of(row).stop(force=True)


def _is_waiting(catalog: "Catalog", row: "MachineRow") -> bool:
    """Whether a pool made a machine, and no fork has taken it."""
    is_new = row.stands_on is None and not machine_forks.is_taken(row)
    is_named_so = row.name.startswith(machines.WAITING_PREFIX)
    return is_new and is_named_so and machine_forks.POOL_LABEL in catalog.labels_of(row.ram)


def _has_no_pool_now(store: "Store", row: "MachineRow") -> bool:
    """Whether nobody will clean up after a machine that waits: no supervisor holds it, and its pool has gone."""
    deadline = time.monotonic() + DYING_SECONDS
    while machines.is_running(store._opened, row):
        found = Record.read(directory_of(store._opened.layout.root, row.id))
        if found is None or found.supervisor is None or found.supervisor.is_alive or time.monotonic() > deadline:
            return False
        time.sleep(0.02)  # the threads of a process that was killed may hold its locks for longer than it is there
    return not _has_pool(store, row)


def _has_pool(store: "Store", row: "MachineRow") -> bool:
    """Whether the pool that made a machine is there."""
    catalog = store._opened.catalog
    with catalog.reading():
        origin = catalog.lineage_of(row.ram)
        machine = catalog.machine_of_ram(origin.parent) if origin and origin.parent else None
        taken = catalog.snapshots_of_machine(machine.id) if machine else []
        rams = catalog.snapshots_of_layers(one.ram for one in taken if one.ram is not None)
        layers = {one.layer for one in rams if origin and one.guid == origin.guid}
        if machine is None:
            return False
    directory = directory_of(store._opened.layout.root, machine.id)
    return any(MachinePool(directory, one.name, one.id).is_there for one in taken if one.ram in layers)
