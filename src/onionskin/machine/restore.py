"""A machine as a snapshot has it: what a start from one needs, and going back to one in place.

What must hold: whatever decides whether the state can be loaded is compared before anything is touched. RAM is as the
snapshot has it before the state of the devices is loaded, since both must agree, and again after that: loading it resets
the machine, which copies its ROMs over RAM. A machine that is between two states stays stopped (`is_broken`).
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from onionskin.base.lazy import logger
from onionskin.base.os_errors import words_of
from onionskin.base.sizes import format_size
from onionskin.errors import OnionskinError, StateError
from onionskin.kernels._ram import PAGE_BYTES
from onionskin.machine.hypervisor import Configuration, Recorded, compare
from onionskin.machine.preload import RefusedError
from onionskin.machine.ram import PIECE_PAGES, GuestRam, blocks_of, mark, runs_of
from onionskin.machine.ram_files import RamFile, RamFiles, Source
from onionskin.machine.running import Running, StateFile, Stop, diff_of_layers, open_layer, source_of, stopped
from onionskin.operations import machine_tree, machines
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.catalog import MachineRow, MachineSnapshotRow, VolumeRow
    from onionskin.store import Store

_log = logger(__name__)
_T = TypeVar("_T")
_ShapeOf = tuple[list[int], list[str]]  # of a machine: the bytes of its disks, and its devices
_GENERATION_BYTES = 16
_GENERATION_OFFSET = 40  # in its page, of which nothing else is set: QEMU's docs/specs/vmgenid
# The firmware puts that page near the end of RAM, or of that part of a larger one which is below 4 GiB.
_ENDS_OF_RAM = (0x80000000, 0xB0000000, 0xC0000000, 0xE0000000)
_FIRMWARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """The RAM and device state of a machine that a store has.

    Attributes
    ----------
    machine : str
    layer : bytes
        The layer of the RAM volume.
    volume : VolumeRow
        The RAM volume.
    state_bytes : int
        Behind the RAM.
    configuration : Configuration
    recorded : Recorded
    """

    machine: str
    layer: bytes
    volume: "VolumeRow"
    state_bytes: int
    configuration: Configuration
    recorded: Recorded

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM."""
        return self.configuration.memory_bytes


def find_saved(store: "Store", machine: "MachineRow", snapshot: str | None) -> Saved:
    """Find a snapshot of a machine; or, with None, what its next start goes on from.

    Raises
    ------
    SnapshotNotFoundError
        There is no snapshot of that name.
    StateError
        It has no RAM.
    """
    catalog = store._opened.catalog
    with catalog.reading():
        volume = catalog.volume_with_id(machine.ram)
        if snapshot is not None:
            row: MachineSnapshotRow | None = machines.find_snapshot(catalog, machine, snapshot)
        else:
            row = catalog.machine_snapshot_with_id(machine.stands_on) if machine.stands_on else None
        layer = row.ram if row else catalog.layer(volume.head).parent if volume else None
    if volume is None or layer is None:
        raise StateError(
            f"snapshot {row.name!r} of machine {machine.name!r} has no RAM: the machine was off when it was taken; stop the "
            "machine, revert it, and start it"
            if row
            else f"machine {machine.name!r} has no RAM to go on from; start it from its disks"
        )
    have = row or machine
    return Saved(
        machine.name,
        layer,
        volume,
        have.state_bytes,
        Configuration.from_json(have.configuration),
        Recorded.from_json(have.recorded),
    )


class Prepared:
    """What a machine that starts as a snapshot has it needs. A context manager, for the time of the start.

    Attributes
    ----------
    saved : Saved
    ram_file : RamFile
        Its path is what the machine maps. As long as the process lives, it holds it itself.
    state : StateFile
        For the state of the devices, which `read_state` puts there.
    """

    def __init__(self, store: "Store", saved: Saved) -> None:
        self._store = store
        files = RamFiles(store._opened)
        self.saved: Saved = saved
        self._has_state = False
        self._ends = ExitStack()
        try:
            self.state: StateFile = self._ends.enter_context(StateFile())
            source = source_of(store, saved.volume, saved.layer, saved.ram_bytes)
            self.ram_file: RamFile = self._ends.enter_context(files.use(source))
        except BaseException:
            self._ends.close()
            raise

    def read_state(self) -> None:
        """Read the state of the devices, or raise FormatError where it is damaged. Further calls do nothing."""
        if not self._has_state:
            with open_layer(self._store, self.saved.volume, self.saved.layer) as view:
                self.state.read(view, self.saved.ram_bytes, self.saved.state_bytes, self.saved.recorded.state_crc32)
            self._has_state = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give both up. Further calls do nothing."""
        self._ends.close()


def find_fit(store: "Store", machine: "MachineRow", snapshot: str | None, now: Recorded) -> Saved:
    """Find what a machine starts from, as `find_saved` does, if it can run here.

    Parameters
    ----------
    store : Store
    machine : MachineRow
    snapshot : str or None
    now : Recorded
        What would run here (`Hypervisor.check`).

    Raises
    ------
    SnapshotNotFoundError
        There is no snapshot of that name.
    StateError
        It has no RAM, or cannot run here; the difference is named.
    """
    saved = find_saved(store, machine, snapshot)
    compare(saved.recorded, now)
    return saved


def _state_of(view: Volume, saved: Saved) -> StateFile:
    return StateFile.of(view, saved.ram_bytes, saved.state_bytes, saved.recorded.state_crc32)


def settle(running: Running, saved: Saved) -> None:
    """Put RAM right after the state of the devices was loaded: with it, ROMs were copied over RAM again.

    The page in which the hypervisor writes the VM generation id stays as it wrote it: the guest is told by it.
    """
    with open_layer(running.store, saved.volume, saved.layer) as view:
        _settle(running, view)


def _settle(running: Running, view: Volume) -> NDArray[np.int64]:
    """Do what `settle` does. Return the pages that were looked at: all that were written since RAM was put back."""
    ram = running.guest_ram
    if isinstance(ram, GuestRam):
        ram.note_written()
    else:
        ram.collect()
    numbers = blocks_of(ram.unsaved_runs)
    generation = uuid.UUID(running.identity.generation).bytes_le
    wrong = np.zeros(ram.length // PAGE_BYTES, np.bool_)
    kept = wrong.copy()
    for at in range(0, len(numbers), PIECE_PAGES):
        piece = numbers[at : at + PIECE_PAGES]
        pages, wanted = ram.read_pages(piece), view.read_blocks(piece)
        for index in np.flatnonzero((pages != wanted).any(1)).tolist():
            is_told = _has_generation(pages[index], wanted[index], generation)
            (kept if is_told else wrong)[piece[index]] = True
    ram.put_back(runs_of(wrong), view)
    ram.add_unsaved(runs_of(kept))
    return numbers


def _has_generation(page: NDArray[np.uint8], wanted: NDArray[np.uint8], generation: bytes) -> bool:
    """Whether a page differs from the snapshot's in the VM generation id alone."""
    differ = np.flatnonzero(page != wanted)
    at = page.tobytes().find(generation)
    return at >= 0 and at <= differ[0] and differ[-1] < at + _GENERATION_BYTES


def revert(
    running: Running,
    snapshot: str,
    *,
    stays: bool = False,
    to_note: Callable[[Recorded, bool], Callable[[], None]] = lambda recorded, is_frozen: lambda: None,
) -> None:
    """Put a machine back to a snapshot, in the process that it runs in. It goes on if it ran, and stays stopped if not.

    Where its file systems were frozen then, they are again (`Running.is_frozen`), and whoever called this has them thawed.

    One whose guest has shut down or died, in a process that stays, goes on too, as it would if the process had ended. So does
    one that stands still for an error of a disk: it ran at the snapshot, and what had the error is put back.

    Parameters
    ----------
    running : Running
    snapshot : str
        The name.
    stays : bool
        Whether its user wants it to stand still.
    to_note : callable
        Called while that becomes durable, with what is recorded of the machine then, and whether its file systems are frozen.
        What it returns is called when it is durable, before the guest goes on.

    Raises
    ------
    SnapshotNotFoundError
        There is no snapshot of that name.
    StateError
        It has no RAM, or cannot run here: nothing was touched. Or it failed half-way: the machine stays stopped until it is
        reverted again, or stopped.
    """
    with running.guard, machines.snapshots_kept(running.store._opened, running.machine.id):
        running.open_ram_again()
        saved = find_saved(running.store, running.machine, snapshot)
        compare(saved.recorded, running.recorded)
        running.refuse_altered_ram("nothing was changed")
        going_back = machine_tree.RevertInPlace(running.store._opened, running.name, snapshot)
        with (
            _StateOfDevices(running, saved) as state,
            _VolumesGoingBack(running, going_back) as volumes,
            # A guest that runs keeps the hypervisor from answering for milliseconds each time, and it is thrown away.
            _stopped_to_revert(
                running, stays, lambda: _look(running, saved, snapshot, partial(_shape, running))
            ) as stop,
            ExitStack() as opened,
        ):
            shape, opening = state.open_beside(opened)
            elsewhere = _look(running, saved, snapshot, shape.result)
            view, load_state = opening.result()
            mark(running.guest_ram._unsaved, elsewhere)
            with _unsaved_unless_done(running), volumes.going():
                _put_back(running, saved, view)
                load_state()  # this reads no disk
                renew_generation(running, _settle(running, view))
                volumes.wait_until_ready()
                stop.refuse_went_on(f"a revert to {snapshot!r}")
                recorded = replace(running.recorded, guest_kernel=saved.recorded.guest_kernel)

                def beside() -> Callable[[], None]:
                    with opened:
                        return to_note(recorded, saved.recorded.is_frozen)

                # The guest may write from here on. What it would wait for otherwise is done beside the transaction.
                note = volumes.finish(beside)
            running.recorded, running.is_frozen, running.is_broken = recorded, saved.recorded.is_frozen, False
            note()


def _begun(running: Running, call: Callable[[], _T]) -> tuple[ThreadPoolExecutor, Future[_T]]:
    """Begin a call in a thread of its own, before anything was changed. Return the thread, and what comes of the call."""
    thread = ThreadPoolExecutor(1, "onionskin revert")
    try:
        return thread, thread.submit(call)
    except RuntimeError as error:  # no thread can be started now
        raise StateError(
            f"machine {running.name!r} cannot be put back now: {error}; nothing was changed; try again"
        ) from None


class _StateOfDevices:
    """What a snapshot has of a machine's devices, and its RAM. A thread of its own reads it while the machine is stopped.

    And it has the hypervisor open it, while that is looked at. A context manager.
    """

    def __init__(self, running: Running, saved: Saved) -> None:
        self._running, self._saved = running, saved
        self._read_into = ExitStack()
        self._thread, self._reading = _begun(running, self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._read_into.close()

    def _read(self) -> tuple[Volume, StateFile]:
        saved = self._saved
        view = self._read_into.enter_context(open_layer(self._running.store, saved.volume, saved.layer))
        return view, self._read_into.enter_context(_state_of(view, saved))

    def open_beside(self, opened: ExitStack) -> tuple[Future[_ShapeOf], Future[tuple[Volume, Callable[[], None]]]]:
        """Have the hypervisor open it, which is stopped, as `Process.loading` does. At the end of `opened` it lets go of it.

        Return what comes of two questions: the shape of the machine, which is asked for before; and the RAM volume as the
        snapshot has it, with what loads the state.
        """

        def open_it() -> tuple[Volume, Callable[[], None]]:
            shape.result()  # who answers nothing is asked for nothing more
            view, state = self._reading.result()
            return view, opened.enter_context(self._running.process.loading(state.path))

        shape = self._thread.submit(_shape, self._running)
        opening = self._thread.submit(open_it)
        opened.callback(wait, [opening])
        return shape, opening


class _NotPutBack(Exception):
    """The machine is between two states, so its RAM volume stays where it is."""


class _VolumesGoingBack:
    """The volumes of a machine are put back, in a thread of their own: the disks at once, and the RAM volume by `finish`.

    All of that is done before which need not wait for the machine, which is between two states from `going` on. A context
    manager, whose end waits for the thread. Where `going` was not entered until then, nothing is put back; where `finish`
    was not called, the RAM volume stays as it is.
    """

    def __init__(self, running: Running, going_back: machine_tree.RevertInPlace) -> None:
        self._running, self._going_back = running, going_back
        self._is_begun, self._is_ready, self._is_told = threading.Event(), threading.Event(), threading.Event()
        self._is_changed = threading.Event()
        self._goes = self._goes_on = self._has_changed = False
        self._thread, self._work = _begun(running, self._put_back)
        self._work.add_done_callback(lambda _: self._end_waiting())  # also where it failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_begun.set()
        self._is_told.set()
        self._thread.shutdown()
        # The machine is back, and goes on already.
        if self._has_changed and (why := self._work.exception()) is not None:
            _log.warning("machine %r: its RAM volume is to be opened again: %s", self._running.name, why)

    def _end_waiting(self) -> None:
        self._is_ready.set()
        self._is_changed.set()

    def _note_changed(self) -> None:
        self._has_changed = True
        self._is_changed.set()

    @contextmanager
    def going(self) -> Iterator[None]:
        """Put the disks back. Behind the block the volumes stay as they are: the machine may go on, or stays stopped."""
        self._running.is_broken = self._goes = True
        self._is_begun.set()
        try:
            yield
        finally:
            self._is_told.set()
            if not self._has_changed:
                wait([self._work])

    def _put_back(self) -> None:
        store = self._running.store
        self._is_begun.wait()
        if not self._goes:
            return
        self._going_back.put_disks_back(store._put_back_together, store._put_back)
        ram = self._running.ram_volume._opened.to_write()
        self._going_back.put_ram_back(ram, self._wait, self._note_changed)

    def _wait(self) -> None:
        self._is_ready.set()
        self._is_told.wait()
        if not self._goes_on:
            raise _NotPutBack

    def wait_until_ready(self) -> None:
        """Return when the disks are back, or raise what kept them, or the RAM volume, from that."""
        self._is_ready.wait()
        if self._work.done():
            self._work.result()

    def finish(self, beside: Callable[[], _T]) -> _T:
        """Put the RAM volume back: the machine is. `beside` is done meanwhile; return what it returns.

        On return that is durable. What the volume was is given up behind it, while the guest begins to run.
        """
        self._goes_on = True
        self._is_told.set()
        try:
            return beside()
        finally:
            self._is_changed.wait()
            if not self._has_changed:
                self._work.result()


def _shape(running: Running) -> _ShapeOf:
    """Ask how large the disks are in the process that runs, and which devices it has."""
    return running.process.disk_bytes(), running.process.plugged()


def _look(running: Running, saved: Saved, snapshot: str, shape: Callable[[], _ShapeOf]) -> NDArray[np.void]:
    """Return the runs of RAM that differ between what a machine stands on and a snapshot, before anything is changed.

    StateError: it cannot go back to that in the process that it runs in, whose `shape` is as that returns it.
    """
    elsewhere = _changed_between(running, saved)
    if isinstance(running.guest_ram, GuestRam):
        running.guest_ram.note_written(again=True)  # most of it is written over next
    else:
        running.guest_ram.collect()
    disk_bytes, plugged = shape()
    _refuse_resized(running, snapshot, disk_bytes)
    running.refuse_other_devices("nothing was changed", plugged)
    running.refuse_without_room(elsewhere, "nothing was changed")
    return elsewhere


def _refuse_resized(running: Running, snapshot: str, disk_bytes: list[int]) -> None:
    """Raise StateError where a disk has another size in a snapshot: a hypervisor learns that of a disk when it starts."""
    catalog = running.store._opened.catalog
    with catalog.reading():
        machine = running.machine
        taken = catalog.disks_of_machine_snapshot(machines.find_snapshot(catalog, machine, snapshot).id)
        before = [catalog.layer(disk.layer).size_bytes for disk in taken]
        names = [disk.name for disk in catalog.disks_of_machine(machine.id)]
    for name, then, now in zip(names, before, disk_bytes, strict=False):
        if then != now:
            raise StateError(
                f"snapshot {snapshot!r} of machine {running.name!r} cannot be gone back to while it runs: disk {name!r} had "
                f"{format_size(then)} then, and has {format_size(now)} in the process that runs; stop the machine, with "
                "'onionskin machine stop', and revert it then; nothing was changed"
            )


@contextmanager
def _unsaved_unless_done(running: Running) -> Iterator[None]:
    """Where the block fails, count all as unsaved again that was so before it: the RAM volume is where it was.

    RAM may be as the snapshot has it by then, so it differs from what the next revert takes the machine to stand on.
    """
    runs = running.guest_ram.unsaved_runs
    try:
        yield
    except BaseException:
        running.guest_ram.add_unsaved(runs)
        raise


def renew_generation(running: Running, written: NDArray[np.int64]) -> None:
    """Give a guest another VM generation id, after the state of its devices was loaded: it has gone back in time.

    QEMU has the id from its command line alone. As it loads a state, it writes that id to the page of RAM in which the guest
    looks, and tells the guest to look. So what is there by the time at which the guest goes on is what it finds. A machine
    without such a page, as its firmware has not run yet, gets none.

    The page is looked for among those first that were `written` since, as that one was where writes are noted.
    """
    ram = running.guest_ram
    wanted = uuid.UUID(running.identity.generation).bytes_le.ljust(PAGE_BYTES - _GENERATION_OFFSET, b"\0")
    ends = sorted({ram.length, *(end for end in _ENDS_OF_RAM if end < ram.length)})
    places = [np.arange(max(end - _FIRMWARE_BYTES, 0) // PAGE_BYTES, end // PAGE_BYTES, dtype=np.int64) for end in ends]
    for numbers in (*(np.intersect1d(place, written) for place in places), *places):
        for number, page in zip(numbers.tolist(), ram.read_pages(numbers), strict=True):
            if page[_GENERATION_OFFSET:].tobytes() != wanted:
                continue
            new = uuid.uuid4()
            page[_GENERATION_OFFSET : _GENERATION_OFFSET + _GENERATION_BYTES] = np.frombuffer(new.bytes_le, np.uint8)
            ram.write_page(number, page)
            running.generation = str(new)
            return


def _changed_between(running: Running, saved: Saved) -> NDArray[np.void]:
    """Return the runs of RAM that differ between what the machine stands on and a snapshot."""
    opened = running.ram_volume._opened
    at = opened.store.catalog.layer(opened.head).parent
    if at == saved.layer:
        return np.empty(0, runs_of(np.zeros(0, np.bool_)).dtype)
    if at is None:
        at = opened.head
    return diff_of_layers(running.store, at, saved.layer, saved.ram_bytes)


def _put_back(running: Running, saved: Saved, view: Volume) -> None:
    """Make RAM as a snapshot has it: by what costs least of what can be done."""
    ram, preload = running.guest_ram, running.process.ram()
    pages = ram.unsaved_runs
    if preload is not None:
        preload.wait_for_unanswered()  # what drops memory, or writes to it
    if not isinstance(ram, GuestRam):
        ram.put_back(pages, view)
        return
    is_mapped = running.mapped == saved.layer
    if preload and is_mapped and _is_done(running, partial(ram.drop, pages, preload), "is written over instead"):
        return
    if (file := running.files.use_if_there(_source_of(running, saved))) is None:
        ram.put_back(pages, view)
        return
    with file:
        if preload is not None:
            fill = partial(ram.fill, pages, file.descriptor, preload)
            if _is_done(running, fill, "is written over from outside"):
                return
        ram.put_back_from(pages, file.descriptor)


def _is_done(running: Running, change: Callable[[], None], instead: str) -> bool:
    """Have the library in the process change RAM, or return False where it does not.

    The kernel drops no memory that is locked, nor in a sandbox; and an older library writes no file to it. Where no answer
    comes, all that may be done later, and undo what was written until then.
    """
    try:
        change()
    except RefusedError as error:
        _log.warning("machine %r: %s; what it wrote to its memory %s", running.name, error, instead)
        return False
    return True


def _source_of(running: Running, saved: Saved) -> Source:
    return source_of(running.store, saved.volume, saved.layer, saved.ram_bytes)


@contextmanager
def _stopped_to_revert(running: Running, stays: bool, look: Callable[[], object]) -> Iterator[Stop]:
    """Stop a machine for the time of the block. It goes on behind that, unless it is between two states then.

    One that sleeps is woken, as it might wake by itself, and write to disks that are being put back; but where `look` refuses
    the revert, it sleeps on.
    """
    was_broken = running.is_broken
    with stopped(running.process, before_waking=look) as stop:
        stood_by_itself = not stop.ran and not stays and running.process.has_stopped_itself
        running.goes_on = stop.ran or stood_by_itself or (was_broken and running.goes_on)
        try:
            yield stop
        except BaseException as error:
            if not running.is_broken:
                raise
            stop.leave()
            with suppress(OnionskinError):
                running.process.pause()  # somebody else may have let it go on
            if isinstance(error, OSError | OnionskinError):
                raise StateError(
                    f"machine {running.name!r} could not be put back, and is between two states: it stays stopped; revert "
                    f"it again, or stop it and start it from a snapshot: {words_of(error)}"
                ) from error
            raise
        if (was_broken or stood_by_itself) and running.goes_on:
            running.process.resume()
