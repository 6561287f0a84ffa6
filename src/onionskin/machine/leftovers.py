"""What machines and their snapshots leave beside the store's own files when they are gone: RAM files, and directories.

What must hold: nothing is dropped that somebody uses. What cannot be dropped now is looked at the next time.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from onionskin.machine.ram_files import RamFiles
from onionskin.machine.record import directory_of, remove_directory

if TYPE_CHECKING:
    from onionskin.store import Store


def drop_leftovers(store: "Store", gone: Iterable[bytes]) -> None:
    """Drop the RAM files whose layers are gone, wiped as their policy says, and the directories of these machines."""
    opened = store._opened
    with suppress(OSError):
        RamFiles(opened).sweep()
    for machine in gone:
        remove_directory(directory_of(opened.layout.root, machine))
