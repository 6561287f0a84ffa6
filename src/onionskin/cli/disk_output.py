"""Stdout for the bytes of a disk: export, delta and read write there, and a shell may have put anything in its place.

What must hold: nothing is written over a file that a disk of the store reads, nor over a block device that is a base, shares
bytes with one, or is in use. As long as it is written, a file or a device becomes no base, and nobody mounts the device.
"""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onionskin.cli import output

if TYPE_CHECKING:
    from onionskin.store import Store


@contextlib.contextmanager
def stdout_for_a_disk(store: "Store", size_bytes: int = 0) -> Iterator[output.StandardStream]:
    """Give stdout, if the bytes of a disk of this store may be written to it, and so many fit where it is a device."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # a program has put an object of its own there
        yield output.StandardStream("stdout")
        return
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        yield output.StandardStream("stdout")
        return
    from onionskin.storage.locks import written_over

    with contextlib.ExitStack() as stack:
        stack.enter_context(written_over(descriptor, "stdout"))  # first, so that what is found stays so
        if stat.S_ISBLK(mode):
            _refuse_device(store, descriptor, size_bytes, stack)
        else:
            from onionskin.operations.export import refuse_open_file

            refuse_open_file(store._opened, descriptor, "stdout")
        yield output.StandardStream("stdout")


def _refuse_device(store: "Store", descriptor: int, size_bytes: int, stack: contextlib.ExitStack) -> None:
    from onionskin.exchange.block_devices import claimed
    from onionskin.operations.export import refuse_needed_device

    refuse_needed_device(store._opened, os.fstat(descriptor).st_rdev, "stdout", is_held=True)
    stack.enter_context(claimed(descriptor, "stdout"))
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    found = os.lseek(descriptor, 0, os.SEEK_END) - at
    os.lseek(descriptor, at, os.SEEK_SET)
    if found < size_bytes:
        raise OSError(
            errno.ENOSPC, f"the device has {found} bytes from there on, and {size_bytes} are to be written", "stdout"
        )
