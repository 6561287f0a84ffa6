"""Writes to guest RAM come to be noted: by the preload library in the hypervisor, which arms it, and by this process.

A hypervisor maps its RAM long before it answers its first command. One that starts from a snapshot has its writes noted
from then on, by a thread, beside the rest of its start.

What must hold: a page that does not read as the RAM file counts as unsaved, whenever it was written. The hypervisor may write
to RAM while this is done. Page 0 is written as it is, and dropped, meanwhile: what the hypervisor puts there at the same time
is lost. That is nothing where a state is loaded next, as RAM is put right behind that (`restore.settle`), and so only such
a start is noted beside.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onionskin.base.threads import Thread
from onionskin.errors import StateError
from onionskin.kernels._ram import PageTracker
from onionskin.machine.preload import MappedRam, Preload

if TYPE_CHECKING:
    from onionskin.machine.ram import GuestRam

LOOK_SECONDS = 0.001  # so often it is asked whether RAM is mapped: it is from the middle of 20 ms on


@dataclass(eq=False, slots=True)
class Noted:
    """RAM whose writes are noted: where it is, and what reads and writes it from outside."""

    where: MappedRam
    tracker: PageTracker
    ram: "GuestRam"

    def is_at(self, where: MappedRam) -> bool:
        """Whether that is where RAM is mapped."""
        return (self.where.start, self.where.length) == (where.start, where.length)

    def close(self) -> None:
        """Give it up."""
        self.ram.close()


def note_writes(pid: int, name: str, preload: Preload, *, again: bool) -> Noted:
    """Have writes to the RAM of a process noted from now on. See `QemuProcess.note_writes`."""
    where = preload.where()
    if not where.length:
        raise StateError(f"QEMU of machine {name!r} has not mapped its RAM as it was told to")
    from onionskin.machine.ram import FIRST_PAGE, GuestRam  # it brings NumPy, which whoever only looks needs not

    again = again or where.is_armed  # by `NotingBeside`, which failed then
    tracker = PageTracker(pid, where.start, where.length)
    try:
        ram = GuestRam(tracker, where.length)
        # The marks of noting look like pages that were swapped out.
        if not again or swapped_bytes(pid):
            ram.add_private(swapped=True)
        # QEMU may have put something into it (-device loader), which is nowhere else.
        is_as_in_file = not (ram.unsaved_runs["start"] == FIRST_PAGE["start"]).any()
        ram.try_out(writes=not again)
        if not again and is_as_in_file:
            with suppress(OSError):  # a revert writes over what cannot be dropped
                preload.forget(FIRST_PAGE)
        preload.arm()
        ram.add_private(swapped=False)
    except BaseException:
        tracker.close()
        raise
    return Noted(where, tracker, ram)


def swapped_bytes(pid: int) -> int:
    """Return how much of a process is swapped out."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmSwap:"):
            return int(line.split()[1]) << 10
    return 0


class NotingBeside:
    """Has the writes of a process noted as soon as it has mapped its RAM, in a thread.

    The library has one connection at a time: it has none of this any more behind `take`, and behind `close`.

    Parameters
    ----------
    pid : int
    name : str
        The machine, for errors.
    path : Path
        The library's socket, which may not be there yet.
    """

    def __init__(self, pid: int, name: str, path: Path) -> None:
        self.pid = pid
        self._name = name
        self._path = path
        self._noted: Noted | None = None
        self._stopping = threading.Event()
        self._thread: Thread | None = Thread(target=self._work, name="onionskin noting", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be started now: it is done when the process answers
            self._thread = None

    def _work(self) -> None:
        # What goes wrong here is done again when the process answers, and goes wrong there or not.
        with suppress(OSError, StateError, MemoryError), self._connected() as preload:
            is_last = False
            while not preload.where().length:
                if is_last:
                    return
                is_last = self._stopping.wait(LOOK_SECONDS)  # it has answered: one more look finds RAM
            self._noted = note_writes(self.pid, self._name, preload, again=False)

    def _connected(self) -> Preload:
        is_last = False
        while True:
            try:
                return Preload(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                if is_last:
                    raise
                is_last = self._stopping.wait(LOOK_SECONDS)

    def take(self) -> Noted | None:
        """Return what was noted, once, or None where it was not. The process has answered, so its RAM is mapped by now."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        noted, self._noted = self._noted, None
        return noted

    def close(self) -> None:
        """Give up what was noted, once the thread has ended: the process answers it, or has ended."""
        if (noted := self.take()) is not None:
            noted.close()
