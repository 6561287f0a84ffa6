"""A machine that runs: what its supervisor has in its hands, and what capture and restore work with.

What must hold: whoever stops the machine for a moment lets it go on, whatever fails meanwhile, unless it was stopped
before (`stopped`). One thing is done at a time (`guard`).
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from onionskin.base.dtypes import PAGE_RUN
from onionskin.base.files import is_on_tmpfs, read_all, write_all
from onionskin.base.lazy import logger
from onionskin.base.sizes import format_size
from onionskin.base.states import DATA
from onionskin.errors import FormatError, OnionskinError, StateError
from onionskin.kernels import _ram
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine.device_state import crc32_of, open_layer, read_state
from onionskin.machine.monitor import MonitorTimeout
from onionskin.machine.ram import ComparedRam, GuestRam, UnsavedRam, page_aligned
from onionskin.machine.ram_files import RamFiles, Source, was_written_to
from onionskin.operations.differences import diff_of_chains
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import read_layers
from onionskin.storage.open_head import OpenHead
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.catalog import MachineRow, VolumeRow
    from onionskin.machine.hypervisor import Configuration, Identity, Process, Recorded
    from onionskin.machine.monitor import Standstill
    from onionskin.store import Store

_log = logger(__name__)

STATE_ROOM_BYTES = 64 << 20  # behind the RAM in the RAM volume, for the state of the devices
_RESUME_TRIES = 3
_ROOM_BESIDE_BYTES = 1 << 20  # for what a revert writes to a store besides RAM


@dataclass(eq=False)
class Running:
    """A machine that runs.

    Attributes
    ----------
    store : Store
    name : str
        Of the machine.
    process : Process
        The hypervisor's.
    ram_volume : Volume
        Open for writing. It has the RAM, and the state of the devices behind it.
    configuration, recorded
        What the machine is made of, and what it runs on.
    identity : Identity
        What this process was started with.
    generation : str
        The VM generation id that the guest was told at last. The process writes its own whenever a state is loaded.
    plugged : list of str
        The devices that the process was started with.
    directory : Path
        For the files of this machine while it runs.
    mapped : bytes or None
        The layer of a RAM volume whose RAM file the process maps privately; None: an empty file, or a file of its own.
    guest_ram : UnsavedRam
        What it wrote to its RAM.
    files : RamFiles
        The RAM files of the store.
    is_broken : bool
        Whether going back to a snapshot failed half-way: the machine stays stopped until that is done again.
    goes_on : bool
        Whether it goes on when that is done, as it ran before.
    is_frozen : bool
        Whether the guest's file systems are as frozen as they were in the snapshot that it goes on from.
    has_server : bool
        Whether a process serves its disks at all times, and is started again when it dies.
    """

    store: "Store"
    name: str
    process: "Process"
    ram_volume: Volume
    configuration: "Configuration"
    recorded: "Recorded"
    identity: "Identity"
    directory: Path
    mapped: bytes | None
    guest_ram: UnsavedRam
    files: RamFiles
    is_broken: bool = False
    goes_on: bool = False
    is_frozen: bool = False
    has_server: bool = False
    generation: str = ""
    plugged: list[str] = field(default_factory=list)
    guard: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def attach(
        cls,
        store: "Store",
        name: str,
        process: "Process",
        ram_volume: Volume,
        configuration: "Configuration",
        recorded: "Recorded",
        identity: "Identity",
        directory: Path,
        *,
        mapped: bytes | None,
        plugged: list[str] | None = None,
        differ: NDArray[Any] | None = None,
    ) -> Self:
        """Take a machine in hand that was started, or whose supervisor died.

        All that the process has and the RAM volume has not counts as unsaved: `differ`, where it was looked for already.
        `plugged` are the devices that it was started with, where that was noted before; else those that it has now.
        """
        guest_ram = process.guest_ram or ComparedRam(process.ram_file, ram_volume)
        running = cls(
            store, name, process, ram_volume, configuration, recorded, identity, directory, mapped, guest_ram,
            RamFiles(store._opened),
        )  # fmt: skip
        running.generation = identity.generation
        running.plugged = process.plugged() if plugged is None else plugged
        if differ is None:
            differ = differing_pages(store, ram_volume, mapped, guest_ram.length)
        running.guest_ram.add_unsaved(differ)
        return running

    @property
    def machine(self) -> "MachineRow":
        """The row of the machine now."""
        row = self.store._opened.catalog.machine_of_ram(self.ram_volume._opened.row.id)
        if row is None:
            raise StateError(f"machine {self.name!r} was deleted")
        return row

    def open_ram_again(self) -> None:
        """Open the RAM volume again, if a sync of it failed and it takes nothing more.

        The machine has all that the volume may have lost: what is unsaved counts as unsaved until a snapshot has it. Where
        this fails, the volume is closed, and does not say any more that the machine runs.
        """
        if not (self.ram_volume.closed or self.ram_volume._path.poisoned):
            return
        _log.warning("machine %r: a sync of its RAM volume failed; the volume is opened again", self.name)
        row = self.machine
        with suppress(OSError, OnionskinError):
            self.ram_volume.close()
        self.ram_volume = self.store._open_ram(row)
        self.guest_ram.use_volume(self.ram_volume)

    def refuse_other_devices(self, what: str, now: list[str] | None = None) -> None:
        """Raise StateError where devices were added or taken since the process was started: no other process has those.

        It is asked for those that it has `now`, unless they are known.
        """
        now = self.process.plugged() if now is None else now
        new, gone = (
            [one for one in these if one not in those] for these, those in ((now, self.plugged), (self.plugged, now))
        )
        if new or gone:
            said = " and ".join(
                [f"has {', '.join(new)} in addition"] * bool(new) + [f"has {', '.join(gone)} no more"] * bool(gone)
            )
            raise StateError(
                f"machine {self.name!r} {said}, since its devices were changed while it ran; undo that, or stop the machine "
                f"and give its devices to 'onionskin machine create'; {what}"
            )

    def refuse_altered_ram(self, what: str) -> None:
        """Raise StateError where somebody wrote to the file that RAM is mapped over, which the guest reads."""
        if self.mapped is not None and self.guest_ram.is_tracked and was_written_to(self.process.ram_file):
            raise StateError(
                f"somebody wrote to {self.process.ram_file}, which machine {self.name!r} has its RAM over, so its RAM is not "
                f"as it wrote it; end it, with 'onionskin machine stop --force', and revert it; {what}"
            )

    def refuse_without_room(self, runs: NDArray[Any], what: str) -> None:
        """Raise StateError where unsaved pages and these runs cannot be written: the file below RAM is in memory, and full.

        tmpfs makes a page of each hole there first, also of one that is mapped privately.
        """
        try:
            descriptor = os.open(self.process.ram_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # it was dropped, and is the process's alone
            return
        try:
            if not is_on_tmpfs(descriptor):
                return
            found = os.fstatvfs(descriptor)
            wanted = self.guest_ram.bytes_in_holes(descriptor, runs) + _ROOM_BESIDE_BYTES
        finally:
            os.close(descriptor)
        free = found.f_bavail * found.f_frsize
        if found.f_blocks and free < wanted:  # one without blocks has no limit
            raise StateError(
                f"{self.process.ram_file.parent} is in memory (tmpfs) and has {format_size(free)} left, and to put RAM of "
                f"machine {self.name!r} back takes up to {format_size(wanted)} there; make room; {what}"
            )

    def open_disk(self, volume: str) -> "OpenHead":
        """Open a disk that nobody serves, to cut it. One whose server is about to be back is the server's to open."""
        if self.has_server:
            raise StateError(f"the server of volume {volume!r} has just died, and is started again; try again")
        return self.store._open_to_cut(volume)

    def close(self) -> None:
        """Let go of what this has beside the process and the volume, once what is under way has ended.

        The hypervisor may have been killed while a snapshot writes what it collected of RAM: that snapshot is whole.
        """
        with self.guard:
            self.files.finish(is_wanted=False)
            self.guest_ram.close()


def differing_pages(store: "Store", volume: Volume, mapped: bytes | None, length: int) -> NDArray[Any]:
    """Return the runs of RAM in which the RAM volume may have something else than what the process was started over."""
    from onionskin.machine.ram import runs_of_extents

    if mapped is None:
        return runs_of_extents(volume.extents(), length, only_data=True)
    opened = volume._opened
    if opened.head != mapped:
        volume.flush()
    try:
        return diff_of_layers(store, mapped, opened.head, length)
    except FormatError:
        raise
    except OnionskinError:  # the layer of the file is gone: it was folded into another one
        return np.array([(0, length)], PAGE_RUN)


def diff_of_layers(store: "Store", one: bytes, other: bytes, length: int) -> NDArray[Any]:
    """Return the runs of RAM that may differ between two layers of RAM volumes."""
    from onionskin.machine.ram import runs_of_extents

    opened = store._opened
    with locked_maps(
        opened,
        lambda: (read_layers(opened.catalog, one), read_layers(opened.catalog, other)),
        lambda chains: {*chains[0].layers, *chains[1].layers},
    ) as chains:
        return runs_of_extents(diff_of_chains(opened, *chains).array(), length, only_data=False)


def source_of(store: "Store", volume: "VolumeRow", layer: bytes, length: int) -> Source:
    """Return where the RAM file of a layer is made from."""
    policy = store._opened.catalog.layer(layer).wipe
    return Source(layer, policy, length, lambda: open_layer(store, volume, layer))


@contextmanager
def stopped(process: "Process", *, before_waking: Callable[[], object] | None = None) -> Iterator["Stop"]:
    """Stop a machine for the time of the block, or until `Stop.end`. One that was stopped before stays so.

    One whose guest sleeps (S3) is woken before, behind `before_waking`, which may refuse that; without, it is not stopped.

    What the block fails with is raised also where the machine does not answer when it is to go on: that is why.
    """
    stop = Stop(process)
    try:
        stop.begin(before_waking)
        yield stop
    except BaseException:
        try:
            stop.end()
        except (OSError, OnionskinError) as error:
            _log.warning("it does not go on behind what failed: %s", error)
        raise
    stop.end()


class Stop:
    """A machine that is stopped for a moment.

    Attributes
    ----------
    seconds : float
        For how long it was stopped; 0 if it was stopped before.
    ran : bool
        Whether it goes on at the end.
    """

    def __init__(self, process: "Process") -> None:
        self._process = process
        self._standstill: Standstill
        self._begun = 0.0
        self.seconds: float = 0.0
        self.ran: bool = False

    def begin(self, before_waking: Callable[[], object] | None = None) -> None:
        """Stop it. See `stopped`."""
        self._standstill = self._process.watch(stands=True)
        self.ran = not self._process.is_paused if before_waking is None else self._process.wake(before_waking)
        self._begun = time.monotonic()
        if self.ran:
            self._standstill = self._process.watch(stands=False)
            try:
                self._process.pause(
                    runs=True
                )  # if this fails, it may be stopped all the same, later: `end` lets it go on
            except MonitorTimeout:  # it was told to go on behind that, whenever it answers again
                self.ran = False
                raise
            if not self._standstill.stands:
                raise StateError(
                    "its guest sleeps (S3), and it is not stopped then; wake it, with 'onionskin machine resume'"
                )

    def refuse_went_on(self, what: str, *, is_heard: bool = False) -> None:
        """Raise StateError where somebody else let it go on since it was stopped: it is as at no instant.

        `is_heard`: it was asked for something else just now, and with the answer all is heard that was reported of it.
        """
        if not is_heard:
            self._process.hear_all()
        if self._standstill.went_on:
            raise StateError(
                f"somebody else let the machine go on, by a monitor of their own, while it stood still for {what}; try again"
            )

    def refuse_disturbed(self, what: str, *, is_heard: bool = False) -> None:
        """Raise StateError where somebody else let it go on, or it was reset, since it was stopped. See `refuse_went_on`."""
        self.refuse_went_on(what, is_heard=is_heard)
        if self._standstill.was_reset:
            raise StateError(f"the machine was reset while it stood still for {what}; try again")

    def leave(self) -> None:
        """Leave it stopped at the end."""
        self.ran = False

    def end(self) -> None:
        """Let it go on, if it ran. Further calls do nothing."""
        if not self.ran:
            return
        for left in reversed(range(_RESUME_TRIES)):
            try:
                self._process.resume()
                break
            except MonitorTimeout:  # it was told, and goes on when it answers again: nobody waits for that three times
                raise
            except (OSError, OnionskinError):
                if not left:
                    raise
        self.ran = False
        self.seconds = time.monotonic() - self._begun


class StateFile:
    """A file in memory for the state of the devices, which has no name on any disk. A context manager.

    Attributes
    ----------
    path : Path
        By which other processes of this user open it, as long as it is open here.
    """

    def __init__(self) -> None:
        try:
            self._descriptor = os.memfd_create("onionskin device state", os.MFD_CLOEXEC)
        except OSError as error:
            raise StateError(
                f"the state of the devices wants a file in memory, which cannot be made here (memfd_create): {error.strerror}"
            ) from error
        self.path: Path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Overwrite and close it. Further calls do nothing."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            write_all(self._descriptor, bytes(os.fstat(self._descriptor).st_size))  # others may have it open
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1

    @classmethod
    def of(cls, volume: Volume, ram_bytes: int, state_bytes: int, crc32: str) -> Self:
        """Make one with what a RAM volume, or a snapshot of it, has behind the RAM. See `device_state.read_state`."""
        made = cls()
        try:
            made.read(volume, ram_bytes, state_bytes, crc32)
        except BaseException:
            made.close()
            raise
        return made

    def read(self, volume: Volume, ram_bytes: int, state_bytes: int, crc32: str) -> None:
        """Have in it what a RAM volume, or a snapshot of it, has behind the RAM. See `device_state.read_state`."""
        write_all(self._descriptor, read_state(volume, ram_bytes, state_bytes, crc32))

    def save(self, volume: Volume, ram_bytes: int) -> tuple[int, int, str]:
        """Write it behind the RAM of a volume. Return its length, how many bytes were not there already, and its checksum."""
        length = os.fstat(self._descriptor).st_size
        if not length:
            raise StateError("the hypervisor saved no state of its devices")
        if length > volume.size_bytes - ram_bytes:
            raise StateError(
                f"the state of the devices has {length} bytes, and there is room for {volume.size_bytes - ram_bytes} behind "
                "the RAM; take devices with much memory of their own (graphics) off the machine"
            )
        count = -(-length // PAGE_BYTES)
        pages, before = page_aligned(count), page_aligned(count)
        pages[:] = 0
        flat = pages.reshape(-1)
        flat[:length] = np.frombuffer(read_all(self._descriptor, length), np.uint8)
        numbers = np.arange(count, dtype=np.int64) + ram_bytes // PAGE_BYTES
        volume.read_blocks(numbers, before)
        changed = _ram.classify(flat, before.reshape(-1)) != _ram.SAME
        if changed.any():
            volume.write_blocks(numbers[changed], np.ascontiguousarray(pages[changed]).reshape(-1))
        end = ram_bytes + count * PAGE_BYTES
        extents = volume.extents()
        behind = extents["offset"].astype(np.int64) + extents["length"].astype(np.int64) > end
        if (behind & (extents["state"] == DATA)).any():  # a state before this one was longer
            volume.zero(end, volume.size_bytes - end)
        return length, int(np.count_nonzero(changed)) * PAGE_BYTES, crc32_of(flat[:length].data)


__all__ = ["STATE_ROOM_BYTES", "GuestRam", "Running", "StateFile", "Stop", "open_layer", "stopped"]
