"""What machines and their snapshots leave beside the store's own files when they are gone: RAM files, and directories.

What must hold: nothing is dropped that somebody uses. What cannot be dropped now is looked at the next time. A machine stays
as long as a process of it is there, which nobody would find otherwise.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from onionskin.errors import StateError
from onionskin.machine import orphans, pool
from onionskin.machine.ram_files import RamFiles
from onionskin.machine.record import Record, directory_of, remove_directory

if TYPE_CHECKING:
    from onionskin.catalog import MachineRow
    from onionskin.store import Store


def drop_leftovers(store: "Store", gone: Iterable[bytes]) -> None:
    """Drop the RAM files whose layers are gone, wiped as their policy says, and the directories of these machines.

    Beside that, copies of RAM in memory that no process has any more, of whatever store.
    """
    opened = store._opened
    with suppress(OSError):
        RamFiles(opened).sweep()
    orphans.drop_forgotten_copies()
    for machine in gone:
        remove_directory(directory_of(opened.layout.root, machine))


def refuse_processes(store: "Store", machines: "Iterable[MachineRow]") -> None:
    """Raise StateError where processes of machines are there, which are kept off: pools, or what a killed supervisor left."""
    rows = list(machines)
    for one in rows:
        pool.refuse_pooled(store, one)
    names = {directory_of(store._opened.layout.root, one.id): one.name for one in rows}
    for directory, started in orphans.processes(names).items():
        recorded = Record.read(directory)  # what another user started is found by that alone
        noted = () if recorded is None else (recorded.hypervisor, recorded.server)
        found = dict.fromkeys([*started, *(one for one in noted if one is not None and one.is_alive)])
        if found:
            name, pids = names[directory], ", ".join(str(one.pid) for one in found)
            raise StateError(
                f"machine {name!r} has processes that its supervisor left when it was killed: {pids}; end them, with "
                f"'onionskin machine stop --force {name}'; nothing was removed"
            )
