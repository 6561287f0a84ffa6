"""A snapshot of a machine while it runs: RAM, devices, disks and configuration at one instant.

    rounds      what was written to RAM is collected again and again while the machine runs, until little is left
    stop        of the machine
    cut         at the same time: the disks are cut; the state of the devices is saved; RAM is collected for the last time
    go on       of the machine
    write       RAM and state are written to the RAM volume, and made durable
    commit      one transaction seals the RAM volume, and names all

What must hold: whatever fails at any step, nothing of the snapshot remains, and the machine goes on, unless it was stopped
before. What was written to RAM since the snapshot before stays in `guest_ram` until the commit, so the next snapshot has it.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onionskin.base.lazy import logger
from onionskin.catalog import CommitUnknownError
from onionskin.errors import OnionskinError, StateError
from onionskin.machine.running import Running, StateFile, Stop, source_of, stopped
from onionskin.operations.machine_snapshots import MachineCut, cut_machine

if TYPE_CHECKING:
    from onionskin.catalog import MachineSnapshotRow

_log = logger(__name__)

MODES = ("live", "pause")
ROUNDS_MAX = 12
FEW_PAGES = 128  # so many are collected in less than a millisecond


@dataclass(frozen=True, slots=True)
class MachineSnapshot:
    """A snapshot of a machine that was taken.

    Attributes
    ----------
    name, note, mode : str
        As it is called; and how it was taken: "live", "pause", or "off".
    pause_seconds : float
        For how long the machine stood still; 0 where it did not run.
    bytes_stored : int
        What RAM and the state of the devices took in the store.
    disks : tuple of str
        The names of the disks in it.
    frozen : tuple of str
        What the guest's agent froze.
    """

    name: str
    note: str
    mode: str
    pause_seconds: float = 0.0
    bytes_stored: int = 0
    disks: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def _go_on() -> None:
    """Is called between the steps, to give up by an exception."""


def snapshot(
    running: Running,
    name: str | None = None,
    note: str = "",
    mode: str | None = None,
    *,
    freeze: bool = False,
    go_on: Callable[[], None] = _go_on,
) -> MachineSnapshot:
    """Take a snapshot of a machine that runs or is paused.

    Parameters
    ----------
    running : Running
    name : str, optional
        By default the time.
    note : str
    mode : {"live", "pause"}, optional
        Whether RAM is collected while the machine runs; by default where that can be done here.
    freeze : bool
        Whether the guest's file systems are frozen by its agent meanwhile.
    go_on : callable
        Called between the steps. An exception of it gives the snapshot up.

    Raises
    ------
    SnapshotExistsError
        The name is taken.
    StateError, OSError
        It was not taken, nothing of it remains, and the machine goes on.
    """
    mode = _checked_mode(running, mode)
    with running.guard:
        if running.is_broken:
            raise StateError(
                f"machine {running.name!r} is between two states, since a revert of it failed; revert it again"
            )
        store = running.store
        cutting = cut_machine(store._opened, running.name, running.open_disk, store._find_served)
        with StateFile() as state, cutting as cut:
            cut.check(name)
            taken = _taken_with(running, cut, state, name, note, mode, freeze, go_on)
        _make_file_soon(running)
        return taken


def _checked_mode(running: Running, mode: str | None) -> str:
    is_tracked = running.guest_ram.is_tracked
    if mode is None:
        return "live" if is_tracked else "pause"
    if mode not in MODES:
        raise ValueError(f"a snapshot of a running machine is taken in mode 'live' or 'pause', not {mode!r}")
    if mode == "live" and not is_tracked:
        raise StateError(
            f"what machine {running.name!r} writes to its RAM cannot be noted here (Linux 6.7 and permission for "
            "userfaultfd), so no live snapshot of it can be taken; use mode 'pause'"
        )
    return mode


def _taken_with(
    running: Running,
    cut: MachineCut,
    state: StateFile,
    name: str | None,
    note: str,
    mode: str,
    freeze: bool,
    go_on: Callable[[], None],
) -> MachineSnapshot:
    pause_seconds, frozen = _captured(running, cut, state, mode, freeze, go_on)
    go_on()
    ram, volume = running.guest_ram, running.ram_volume
    bytes_stored = ram.save(volume)
    state_bytes, state_stored = state.save(volume, ram.length)
    go_on()
    volume.flush()  # so that the seal has little to write while it holds the volume
    try:
        row = cut.commit(
            name,
            note,
            mode=mode,
            configuration=running.configuration.to_json(),
            recorded=running.recorded.to_json(),
            ram=volume._opened.to_write(),
            state_bytes=state_bytes,
        )
    except CommitUnknownError:
        raise  # all stays unsaved: the next snapshot finds out what the volume has
    ram.forget_saved()
    return MachineSnapshot(
        row.name, note, mode, pause_seconds, bytes_stored + state_stored, _names_of_disks(running, row), tuple(frozen)
    )


def _names_of_disks(running: Running, row: "MachineSnapshotRow") -> tuple[str, ...]:
    catalog = running.store._opened.catalog
    names = {disk.position: disk.name for disk in catalog.disks_of_machine(row.machine)}
    return tuple(names[disk.position] for disk in catalog.disks_of_machine_snapshot(row.id) if disk.position in names)


def _captured(
    running: Running, cut: MachineCut, state: StateFile, mode: str, freeze: bool, go_on: Callable[[], None]
) -> tuple[float, list[str]]:
    """Cut the disks, collect RAM, and save the state of the devices, all as they are at one instant."""
    process = running.process
    process.prepare_state(state.path)
    try:
        if mode == "live" and not process.is_paused:
            _rounds(running, go_on)
        go_on()
        with _frozen(running, freeze) as frozen, stopped(process) as stop:
            _cut_all(running, cut, stop)
    finally:
        _finish_state(running)
    return stop.seconds, frozen


def _rounds(running: Running, go_on: Callable[[], None]) -> None:
    """Collect RAM while the machine runs, until little is left or it gets no less."""
    before = running.guest_ram.length
    for _ in range(ROUNDS_MAX):
        found = running.guest_ram.collect()
        go_on()
        if found <= FEW_PAGES or found > before * 3 // 4:
            break
        before = found


def _cut_all(running: Running, cut: MachineCut, stop: Stop) -> None:
    """Cut all while the machine stands still, and let it go on as soon as all is cut."""
    is_cut = threading.Event()
    with ThreadPoolExecutor(1, "onionskin cut") as thread:
        sealing = thread.submit(cut.seal, is_cut.set)
        sealing.add_done_callback(lambda _: is_cut.set())  # also where it failed
        running.guest_ram.collect()
        running.process.save_state()
        is_cut.wait()
        if not _has_failed(sealing):
            stop.end()
        sealing.result()  # what was cut is durable, or this raises


def _has_failed(work: "Future[None]") -> bool:
    return work.done() and work.exception() is not None


@contextmanager
def _frozen(running: Running, freeze: bool) -> Iterator[list[str]]:
    if not freeze:
        yield []
        return
    frozen = running.process.freeze()
    try:
        yield frozen
    finally:
        running.process.thaw()


def _finish_state(running: Running) -> None:
    """Have the hypervisor let go of the file of the state. It has none of the snapshot's bytes to lose."""
    try:
        running.process.finish_state()
    except (OSError, OnionskinError) as error:
        _log.warning("machine %r: the file for the state of its devices was not given up: %s", running.name, error)


def _make_file_soon(running: Running) -> None:
    """Make the RAM file of the snapshot that was just taken in the background, for forks and starts."""
    if not running.guest_ram.is_tracked:
        return
    opened = running.ram_volume._opened
    try:
        layer = opened.store.catalog.layer(opened.head).parent
        if layer is not None:
            running.files.make_soon(source_of(running.store, opened.row, layer, running.guest_ram.length))
    except (OSError, OnionskinError) as error:
        _log.warning("machine %r: the RAM file was not made beforehand: %s", running.name, error)
