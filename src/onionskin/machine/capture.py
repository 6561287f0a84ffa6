"""A snapshot of a machine while it runs: RAM, devices, disks and configuration at one instant.

    rounds      RAM is written to the RAM volume while the machine runs, again and again, until little is left
    ready       all is done that the cut of the disks needs, while the machine runs
    stop        of the machine
    cut         at the same time: the disks are cut; the state of the devices is saved; RAM is collected for the last time
    go on       of the machine
    write       the rest of RAM and the state are written to the RAM volume, while what was cut of the disks is made durable
    commit      the RAM volume is made durable, and one transaction seals it, and names all

What must hold: whatever fails at any step, nothing of the snapshot remains, and the machine goes on, unless it was stopped
before. Which pages were written since the snapshot before stays in `guest_ram` until the commit, and where there is none, all
of them are collected anew: so the next snapshot has them.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onionskin.base.lazy import logger
from onionskin.errors import OnionskinError, StateError
from onionskin.machine.ram import GuestRam
from onionskin.machine.running import Running, StateFile, source_of, stopped
from onionskin.machine.taken import MachineSnapshot
from onionskin.operations.machine_snapshots import MachineCut, cut_machine, refuse_taken_name

if TYPE_CHECKING:
    from onionskin.base.annotations import RecordedMode
    from onionskin.catalog import MachineSnapshotRow

_log = logger(__name__)

MODES = ("live", "pause")
ROUNDS_MAX = 12
FEW_PAGES = 128  # so many are collected in less than a millisecond


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
        running.open_ram_again()
        taken = _taken(running, name, note, mode, freeze, go_on)
        _make_file_soon(running)
        return taken


def _taken(
    running: Running, name: str | None, note: str, mode: str, freeze: bool, go_on: Callable[[], None]
) -> MachineSnapshot:
    store = running.store
    refuse_taken_name(store._opened, running.name, name)
    try:
        with StateFile() as state, _NodeOfState(running, state.path) as node:
            if mode == "live" and not running.process.is_paused:
                _rounds(running, go_on)  # before anybody is told of a cut, and waits for it: this may take minutes
            go_on()
            with cut_machine(store._opened, running.name, running.open_disk, store._find_served) as cut:
                cut.check(name)
                taken = _taken_with(running, cut, state, node, name, note, mode, freeze, go_on)
    except BaseException:
        running.guest_ram.collect_again()
        raise
    running.guest_ram.forget_saved()
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
    node: "_NodeOfState",
    name: str | None,
    note: str,
    mode: str,
    freeze: bool,
    go_on: Callable[[], None],
) -> MachineSnapshot:
    ram, volume = running.guest_ram, running.ram_volume
    with _Cutting(cut) as cutting:
        pause_seconds, frozen = _captured(running, cutting, node, mode, freeze, go_on)
        node.let_go()  # while RAM is written
        running.refuse_altered_ram("nothing was taken")
        go_on()
        bytes_stored = ram.save(volume)  # while what was cut of the disks becomes durable
        state_bytes, state_stored, crc32 = state.save(volume, ram.length)
        go_on()
        cutting.result()
    row = cut.commit(
        name,
        note,
        mode=mode,
        configuration=running.configuration.to_json(),
        recorded=replace(running.recorded, is_frozen=freeze or running.is_frozen, state_crc32=crc32).to_json(),
        ram=volume._opened.to_write(),
        state_bytes=state_bytes,
    )
    return MachineSnapshot(
        row.name,
        note,
        cast("RecordedMode", mode),
        pause_seconds,
        bytes_stored + state_stored,
        _names_of_disks(running, row),
        tuple(frozen),
    )


def _names_of_disks(running: Running, row: "MachineSnapshotRow") -> tuple[str, ...]:
    catalog = running.store._opened.catalog
    names = {disk.position: disk.name for disk in catalog.disks_of_machine(row.machine)}
    return tuple(names[disk.position] for disk in catalog.disks_of_machine_snapshot(row.id) if disk.position in names)


def _captured(
    running: Running, cutting: "_Cutting", node: "_NodeOfState", mode: str, freeze: bool, go_on: Callable[[], None]
) -> tuple[float, list[str]]:
    """Cut the disks, collect RAM, and save the state of the devices, all as they are at one instant."""
    process, ram = running.process, running.guest_ram
    node.wait_until_prepared()
    with _frozen(running, freeze) as frozen:
        cutting.begin()
        go_on()
        if mode == "live" and isinstance(ram, GuestRam):
            ram.stream(running.ram_volume)  # what was written meanwhile
        with stopped(process) as stop:
            cutting.cut()
            devices = process.save_state(ram.collect)
            is_cut = cutting.is_cut  # else it may be let go on behind the last answer, and before the cut
            cutting.wait_until_cut()
            running.refuse_other_devices("nothing was taken", devices)
            stop.refuse_disturbed("a snapshot, of which nothing was taken", is_heard=is_cut)
    return stop.seconds, frozen


def _rounds(running: Running, go_on: Callable[[], None]) -> None:
    """Write RAM to the RAM volume while the machine runs, until little is left or it gets no less."""
    ram = running.guest_ram
    assert isinstance(ram, GuestRam)
    before = ram.length
    for _ in range(ROUNDS_MAX):
        found = ram.stream(running.ram_volume)
        go_on()
        if found <= FEW_PAGES or found > before * 3 // 4:
            break
        before = found


class _NotCut(Exception):
    """The machine could not be stopped, so its disks are not cut."""


class _Cutting:
    """The cut of the disks, in a thread of its own: prepared before the machine stops, and made durable when it goes on.

    A context manager, whose end waits for the thread. Where `cut` was not called until then, nothing is cut.
    """

    def __init__(self, cut: MachineCut) -> None:
        self._cut = cut
        self._is_ready, self._is_told, self._is_cut = threading.Event(), threading.Event(), threading.Event()
        self._goes_on = False
        self._sealing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "onionskin cut")

    def __enter__(self) -> "_Cutting":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_told.set()
        self._thread.shutdown()

    def begin(self) -> None:
        """Do all that can be done while the machine runs."""
        self._sealing = self._thread.submit(self._cut.seal, self._is_cut.set, self._wait)
        self._sealing.add_done_callback(lambda _: self._end_waiting())  # also where it failed
        self._is_ready.wait()
        self._raise_what_failed()

    def _wait(self) -> None:
        self._is_ready.set()
        self._is_told.wait()
        if not self._goes_on:
            raise _NotCut

    def _end_waiting(self) -> None:
        self._is_ready.set()
        self._is_cut.set()

    def cut(self) -> None:
        """Have the disks cut: the machine stands still."""
        self._goes_on = True
        self._is_told.set()

    @property
    def is_cut(self) -> bool:
        """Whether nobody would wait in `wait_until_cut`."""
        return self._is_cut.is_set()

    def wait_until_cut(self) -> None:
        """Wait until what the guest writes is in the snapshot no more."""
        self._is_cut.wait()
        self._raise_what_failed()

    def _raise_what_failed(self) -> None:
        assert self._sealing is not None
        if self._sealing.done():
            self._sealing.result()

    def result(self) -> None:
        """Wait until what was cut is durable, or raise what kept it from that."""
        assert self._sealing is not None
        self._sealing.result()


class _NodeOfState:
    """What the hypervisor has of the file of the state, in a thread of its own: it waits for answers, as the others do.

    It is prepared while RAM is collected and the disks are found, and let go of while RAM is written. A context manager,
    whose end waits for it.
    """

    def __init__(self, running: Running, path: Path) -> None:
        self._running = running
        self._thread = ThreadPoolExecutor(1, "onionskin state")
        self._prepared = self._thread.submit(running.process.prepare_state, path)
        self._is_let_go = False

    def __enter__(self) -> "_NodeOfState":
        return self

    def __exit__(self, *error: object) -> None:
        self.let_go()
        self._thread.shutdown()

    def wait_until_prepared(self) -> None:
        """Return when the state can be saved, or raise what kept it from that."""
        self._prepared.result()

    def let_go(self) -> None:
        """Begin to let go of the file. Further calls do nothing.

        Nobody waits for that until the snapshot is there: the hypervisor answers late while its guest runs.
        """
        if not self._is_let_go:
            self._is_let_go = True
            self._thread.submit(_finish_state, self._running)


def _finish_state(running: Running) -> None:
    """Have the hypervisor let go of the file of the state. It has none of the snapshot's bytes to lose."""
    try:
        running.process.finish_state()
    except (OSError, OnionskinError) as error:
        _log.warning("machine %r: the file for the state of its devices was not given up: %s", running.name, error)


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
