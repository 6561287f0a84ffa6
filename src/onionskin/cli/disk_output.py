"""Stdout for the bytes of a disk: export, delta and read write there, and a shell may have put anything in its place.

What must hold: nothing is written over a file that a disk of the store reads, nor over a block device that is a base, shares
bytes with one, or is in use. A device becomes no base as long as it is written.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onionskin.cli import output

if TYPE_CHECKING:
    from onionskin.storage.open_store import OpenStore
    from onionskin.store import Store


@contextlib.contextmanager
def stdout_for_a_disk(store: "Store") -> Iterator[output.StandardStream]:
    """Give stdout, if the bytes of a disk of this store may be written to it."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # a program has put an object of its own there
        yield output.StandardStream("stdout")
        return
    found = os.fstat(descriptor)
    if stat.S_ISBLK(found.st_mode):
        from onionskin.storage.locks import written_over

        with written_over(found.st_rdev, "stdout"):  # first, so that what is found stays so
            _refuse_device(store._opened, descriptor, found.st_rdev)
            yield output.StandardStream("stdout")
        return
    from onionskin.operations.export import refuse_open_file

    refuse_open_file(store._opened, descriptor, "stdout")
    yield output.StandardStream("stdout")


def _refuse_device(store: "OpenStore", descriptor: int, number: int) -> None:
    from onionskin.exchange.block_devices import files_below, refuse_in_use
    from onionskin.operations.export import refuse_device_of_base, refuse_file_below

    files = files_below(number, "stdout")
    refuse_device_of_base(store, number, "stdout", is_held=True)
    for file in files:
        refuse_file_below(store, "stdout", file)
    refuse_in_use(descriptor, "stdout")
