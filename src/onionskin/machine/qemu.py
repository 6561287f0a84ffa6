"""QEMU as the hypervisor of machines.

QEMU maps its RAM shared, and the preload library makes that private: so it does not save RAM with the state of the devices
(x-ignore-shared), and the RAM file stays as it is. The state of the devices is an internal snapshot of a small qcow2 file
that no device has.

What must hold: a machine that starts is stopped before its first instruction, and what it writes to its RAM is noted from
before that. Where that cannot be noted, its RAM is a shared file of its own. A `stop` that took too long is taken back, so
that no machine is found stopped later. The process is known by its start too, and only that one is ever killed.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EAGAIN
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin.base.files import CANNOT_LOOK, data_ranges, read_all, write_all
from onionskin.base.sizes import format_size
from onionskin.base.sockets import connect_if_listening, connect_unix
from onionskin.control.client import is_stopped
from onionskin.errors import StateError
from onionskin.machine import qemu_command
from onionskin.machine.agent import GuestAgent
from onionskin.machine.device_state import empty_file
from onionskin.machine.hypervisor import Configuration, Identity, Recorded
from onionskin.machine.loaded_qemu import LoadedQemu
from onionskin.machine.monitor import JOB_PREFIX, Monitor, MonitorError, MonitorTimeout, Standstill
from onionskin.machine.noting import NotingBeside, note_writes
from onionskin.machine.orphans import copy_of_ram, drop_forgotten_copies, make_copy
from onionskin.machine.preload import Preload, library
from onionskin.machine.record import open_log
from onionskin.machine.session import Session, say
from onionskin.storage.locks import start_ticks

if TYPE_CHECKING:
    from onionskin.kernels._ram import PageTracker
    from onionskin.machine.ram import GuestRam

START_SECONDS, START_SECONDS_MAX = 60.0, 240.0  # the longer one as long as it was not stopped by a signal
_ENDING_SECONDS = 5.0
STOP_SECONDS = 10.0
STOP_SECONDS_MAX = (
    60.0  # where the disks are served: QEMU flushes them first, which takes as long as a sync of a busy disk
)
STATE_SECONDS = 60.0
PROBE_SECONDS = 30.0
CONSOLE_SECONDS = 10.0
KILL_SECONDS = 10.0
RESET_SECONDS = 10.0
WAKE_SECONDS = 10.0
_SAID_MAX = 600  # characters of what it wrote, for an error
# As QEMU says it of a guest that has shut down (-no-shutdown) or died, and that goes on only as something else; and before a
# reset of it.
_GUEST_ENDED, _NEEDS_RESET = ("shutdown", "internal-error", "guest-panicked"), ("shutdown", "internal-error")
DISK_ERROR = "io-error"
# And where QEMU stopped it by itself, and nobody wanted it to stand still.
_STOPPED_ITSELF = (*_GUEST_ENDED, DISK_ERROR, "watchdog")
_SLEEPS = "suspended"
STATE_TAG = "s"
_STATE_NODE, _FILE_NODE = "state-", "file-of-state-"
# In the environment: what is written to RAM is found by comparing, as where the kernel or a sandbox forbids to note it.
NO_TRACKING = "ONIONSKIN_NO_TRACKING"

OnEvent = Callable[[str, dict[str, Any]], None]
Command = tuple[str, dict[str, Any] | None]
_HEAP_BYTES = 10 << 20  # that QEMU has beside the kernel when it answers first
# One that was started ahead, for the first machine of this process (`fork.py`).
loaded: LoadedQemu | None = None
# Those with an id, and those without.
_LIST_DEVICES: tuple[Command, ...] = tuple(
    ("qom-list", {"path": path}) for path in ("/machine/peripheral", "/machine/peripheral-anon")
)
# What has to be known of a machine before a state is loaded.
_ASKED_BEFORE_A_LOAD: tuple[Command, ...] = (("query-status", None), ("query-chardev", None))
# RAM is not part of a saved state, as it is mapped shared.
_WITHOUT_RAM: Command = (
    "migrate-set-capabilities",
    {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
)


class QemuHypervisor:
    """Runs machines with QEMU. Any thread may use it.

    Parameters
    ----------
    on_event : callable, optional
        Is given QEMU's events, as `Monitor` gives them.
    """

    def __init__(self, on_event: OnEvent | None = None) -> None:
        self._on_event = on_event

    def check(self, configuration: Configuration, disks: int) -> Recorded:
        """Return what would run here. No process stays.

        Raises
        ------
        StateError
            QEMU is not installed, or cannot run this: an argument that it may not have, a type of machine that it has not.
        """
        program = _find(configuration.program)
        version, types = _probe(program, os.stat(program).st_mtime_ns)  # noqa: PTH116 - a text
        wanted = configuration.machine_type or "pc"
        if wanted not in types:
            raise StateError(
                f"{program} (QEMU {version}) has no machine type {wanted!r}; see {configuration.program} -machine help"
            )
        for path in (configuration.kernel, configuration.initrd):
            if path is not None and not os.access(path, os.R_OK):
                raise StateError(f"{path} cannot be read; the machine boots from it")
            if path is not None and not os.path.isfile(path):  # noqa: PTH113 - a text; whoever opens a FIFO waits
                raise StateError(f"{path} is no file, and the machine boots from it; give a kernel or an initrd")
        return qemu_command.recorded(configuration, disks, version, types[wanted])

    def launch(
        self,
        configuration: Configuration,
        *,
        name: str,
        directory: Path,
        ram_file: Path | None,
        disks: Sequence[str],
        state: Path | None,
        identity: Identity,
        beside_its_start: Callable[[], None] = lambda: None,
    ) -> "QemuProcess":
        """Start a machine that is stopped before its first instruction. See `Hypervisor.launch`."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        machine_type = self.check(configuration, len(disks)).machine_type
        _refuse_taken_sockets(configuration, name)
        if ram_file is None:
            ram_file = _empty_ram(directory, configuration.memory_bytes)

        def start(ram: Path, *, is_tracked: bool, kept: Sequence[int] = ()) -> QemuProcess:
            command = qemu_command.command(
                _find(configuration.program),
                configuration,
                name=name,
                machine_type=machine_type,
                directory=directory,
                ram_file=_stand_in(directory, ram) if is_tracked else ram,
                disks=disks,
                identity=identity,
            )
            process = _start(
                *(command, name, directory, ram, self._on_event, beside_its_start),
                is_tracked=is_tracked,
                notes_beside=is_tracked and state is not None,
                kept=kept,
            )
            try:
                if state is not None:  # while QEMU is at that, its writes come to be noted
                    process.open_state(state, _WITHOUT_RAM)
            except BaseException:
                process.quit(0)
                raise
            return process

        process = _start_tracked(start, ram_file, directory) or _start_compared(start, ram_file, directory)
        try:
            if state is None:
                process.monitor.execute(*_WITHOUT_RAM)
            else:
                process.load_state(state)
        except BaseException:
            process.quit(0)
            raise
        return process


def _start_tracked(start: "Callable[..., QemuProcess]", ram_file: Path, directory: Path) -> "QemuProcess | None":
    """Start a machine whose writes are noted, or return None where they cannot be."""
    if os.environ.get(NO_TRACKING, "") not in ("", "0"):
        return None
    try:
        library()
    except StateError:
        return None
    try:
        process = start(ram_file, is_tracked=True)
        try:
            process.meet_library()
            process.note_writes()
        except (OSError, StateError) as error:
            process.quit(0)
            if isinstance(error, OSError) and error.errno in CANNOT_LOOK:
                raise
            return None
        except BaseException:
            process.quit(0)
            raise
        return process
    finally:
        (directory / qemu_command.STAND_IN).unlink(missing_ok=True)


def _start_compared(start: "Callable[..., QemuProcess]", ram_file: Path, directory: Path) -> "QemuProcess":
    """Start a machine that writes to a copy of its RAM file, which goes with it."""
    copied, descriptor = _copy(ram_file, directory)
    try:
        process = start(copied, is_tracked=False, kept=(descriptor,))
    except BaseException:
        copied.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    process.keep_copy(descriptor)
    return process


class QemuProcess:
    """A machine that QEMU runs. See `Process`.

    Parameters
    ----------
    pid, ticks : int
        The process, and its start.
    name : str
        The machine, for errors.
    directory : Path
        Where its sockets are.
    ram_file : Path
        What its RAM is mapped over.
    on_event : callable, optional
        Is given QEMU's events.
    child : Session, optional
        The process, where it is a child of this one.
    is_tracked : bool
        Whether the preload library is in it.

    Attributes
    ----------
    started_with : list of str or None
        The devices that it was started with, as `plugged`, where it was asked for them.
    """

    def __init__(
        self,
        pid: int,
        ticks: int,
        name: str,
        directory: Path,
        ram_file: Path,
        *,
        on_event: OnEvent | None = None,
        child: Session | None = None,
        is_tracked: bool = True,
    ) -> None:
        self.pid = pid
        self.ticks = ticks
        self.name = name
        self.directory = directory
        self.ram_file = ram_file
        self.guest_ram: GuestRam | None = None
        self.are_disks_served: Callable[[], bool] = lambda: False  # that it has the answers of them which it waits for
        self._child = child
        self._is_tracked = is_tracked
        self._preload: Preload | None = None
        self._tracker: PageTracker | None = None
        self._noting: NotingBeside | None = None
        self._copy = -1  # the descriptor of the copy of its RAM
        self._nodes = 0
        self._opening: tuple[str, Callable[[], list[Any]]] | None = None
        self.started_with: list[str] | None = None
        self._prepared: tuple[str, Path] | None = None
        self._status: int | None = None
        self._is_closed = False
        self._ending = threading.Lock()
        self._on_event = on_event
        self.monitor = self._connect(on_event)
        try:
            self._know_who_answers()
        except BaseException:
            self.monitor.close()
            raise

    def _know_who_answers(self) -> None:
        """Take who answers for the process: a program that was named as QEMU may be a script that starts it.

        Raises
        ------
        StateError
            It is somebody else.
        """
        answers = self.monitor.pid
        if answers in (0, self.pid):
            return
        if self._child is None or not _is_of_session(answers, self._child.pid):
            raise StateError(
                f"process {answers} answers at {self.directory / qemu_command.QMP}, which is not QEMU of machine "
                f"{self.name!r} (process {self.pid}); end it, if it has no business there"
            )
        self.pid, self.ticks = answers, start_ticks(answers)

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection to it has ended, and nobody closed it."""
        return self.monitor.is_broken

    def connect_again(self) -> None:
        """Connect to QEMU again, where the connection has ended and QEMU has not. Nobody may be using the machine.

        Raises
        ------
        OSError, StateError
            It does not answer: it is ending, or somebody else listens in its place.
        """
        found = Monitor(self.directory / qemu_command.QMP, self.name, on_event=self._on_event)
        if found.pid not in (0, self.pid):
            found.close()
            raise StateError(f"process {found.pid} answers for QEMU of machine {self.name!r} (process {self.pid})")
        with self._ending:
            before, self.monitor = self.monitor, found
            before.close()
            if self._is_closed:
                found.close()
        self._prepared = None
        self.drop_leftovers()

    def use_noting(self, noting: NotingBeside) -> None:
        """Take what notes its writes since it was started, which `note_writes` waits for."""
        if noting.pid == self.pid:
            self._noting = noting
        else:  # another process is QEMU
            noting.close()

    def meet_library(self) -> None:
        """Connect to the library in the process. Raise OSError where it is not there."""
        self._preload = Preload(self.directory / qemu_command.PRELOAD)

    def _connect(self, on_event: OnEvent | None) -> Monitor:
        begun = time.monotonic()
        while True:
            try:
                return Monitor(self.directory / qemu_command.QMP, self.name, on_event=on_event)
            except (FileNotFoundError, ConnectionRefusedError):
                if self.wait(0.002) is not None:
                    raise StateError(
                        f"QEMU of machine {self.name!r} did not start: {self._why_not_started()}"
                    ) from None
                waited = time.monotonic() - begun
                if waited > START_SECONDS and (waited > START_SECONDS_MAX or is_stopped(self.pid)):
                    raise StateError(
                        f"QEMU of machine {self.name!r} did not answer within {waited:.0f} s: {self._said()}"
                    ) from None
            except MonitorError:
                if self.wait(_ENDING_SECONDS) is not None:  # it closes its sockets before it has ended
                    raise StateError(
                        f"QEMU of machine {self.name!r} did not start: {self._why_not_started()}"
                    ) from None
                raise

    def _why_not_started(self) -> str:
        said = self._said()
        if qemu_command.NOT_SAVED_SAID in said:
            said += (
                "; QEMU cannot save the state of that, so no snapshot of the machine could be taken while it runs: make the "
                "machine without it"
            )
        return said

    def _said(self) -> str:
        """Return the last that QEMU wrote, for an error."""
        try:
            text = (self.directory / qemu_command.LOG).read_text(errors="replace").strip()
        except OSError:
            text = ""
        return text[-_SAID_MAX:] or f"see {self.directory / qemu_command.LOG}"

    # ---- RAM ----

    def ram(self) -> Preload | None:
        """Return the connection to the library in the process that has its RAM, or None without tracking."""
        return self._preload

    def note_writes(self, *, again: bool = False) -> None:
        """Have writes to RAM noted from now on. What was written before counts as unsaved.

        With `again`, they were noted already, for a process that is gone: all pages count that may differ from the file. The
        machine may run then.

        Raises
        ------
        OSError
            They cannot be noted here.
        """
        assert self._preload is not None
        early, self._noting = self._noting, None
        noted = early.take() if early is not None and not again else None
        if noted is not None and not noted.is_at(self._preload.where()):
            noted.close()  # it was mapped elsewhere at first
            noted = None
        if noted is None:
            noted = note_writes(self.pid, self.name, self._preload, again=again)
        self._tracker, self.guest_ram = noted.tracker, noted.ram

    # ---- running ----

    @property
    def status(self) -> str:
        """What QEMU says of itself: "running", "paused", "io-error", "internal-error", ..."""
        return str(self.monitor.execute("query-status")["status"])

    @property
    def is_paused(self) -> bool:
        """Whether it is stopped now. One whose guest sleeps is not: it wakes when its clock says so."""
        return not self.monitor.is_live and self.status not in ("running", _SLEEPS)

    def hear_all(self) -> None:
        """Hear all that QEMU reported until now: it comes before the answer."""
        self.monitor.execute("query-status")

    @property
    def guest_has_ended(self) -> bool:
        """Whether it is stopped because its guest has shut down, or died, and the process stays all the same."""
        return self.status in _GUEST_ENDED

    @property
    def has_stopped_itself(self) -> bool:
        """Whether it stands still for what happened in it: its guest has ended, or a disk had an error."""
        return self.status in _STOPPED_ITSELF

    def pause(self, *, runs: bool = False) -> bool:
        """Stop the machine. Return whether it ran. It is not asked whether it `runs` where that is known.

        Raises
        ------
        MonitorTimeout
            It could not be stopped in time, because it waits for a disk. It goes on.
        """
        if not runs and self.is_paused:
            return False
        try:
            self.monitor.execute(
                "stop", seconds=STOP_SECONDS, seconds_max=STOP_SECONDS_MAX, is_at_it=self.are_disks_served
            )
        except MonitorTimeout:
            self.monitor.request("cont")
            raise
        if not runs and not self.is_paused:
            raise StateError(
                f"the guest of machine {self.name!r} sleeps (S3), and QEMU does not stop it then; wake it, with "
                "'onionskin machine resume'"
            )
        return True

    def watch(self, *, stands: bool) -> Standstill:
        """Note from now on whether it goes on, or is reset, while it stands still: it does now, or is stopped next."""
        return self.monitor.watch(stands=stands)

    def resume(self) -> None:
        """Let it go on."""
        self.monitor.execute("cont")

    def wake(self, before: Callable[[], object] = lambda: None) -> bool:
        """Wake a guest that sleeps (S3): QEMU before 9.0 does not stop its machine, nor let it go on.

        `before` is called first where it sleeps, and keeps it asleep where that raises. Return whether the machine runs then.

        Raises
        ------
        StateError
            It does not wake.
        """
        deadline = time.monotonic() + WAKE_SECONDS
        if (status := self.status) == _SLEEPS:
            before()
        while status == _SLEEPS:
            self.monitor.execute("system_wakeup")
            if time.monotonic() > deadline:
                raise StateError(
                    f"the guest of machine {self.name!r} sleeps (S3), and does not wake; end the machine, with 'onionskin "
                    "machine stop --force', and revert it or start it then"
                )
            time.sleep(0.01)
            status = self.status
        return status == "running"

    def power_down(self) -> None:
        """Ask the guest to shut down (ACPI)."""
        self.monitor.execute("system_powerdown")

    def plugged(self) -> list[str]:
        """Return the devices that it has now: those of its command line, and what was added or taken since."""
        return _plugged_of(self.monitor.execute_all(_LIST_DEVICES))

    def snapshot_blockers(self) -> list[str]:
        """Say what QEMU takes no snapshot for now, in its words. What it knew of at its start, it refused then."""
        return list(self.monitor.execute("query-migrate").get("blocked-reasons", []))

    def disk_bytes(self) -> list[int]:
        """Return how large its disks are for the guest, in their order: as they were when it was started."""
        found = self.monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {one["node-name"]: int(one["image"]["virtual-size"]) for one in found}
        return [sizes[name] for number in range(len(sizes)) if (name := qemu_command.node_name(number)) in sizes]

    # ---- the state of the devices ----

    def prepare_state(self, path: Path) -> None:
        """Make the file for the state of the devices, and do all that can be done before the machine is stopped."""
        self.finish_state()
        # It may be a file without a name, by a link of /proc.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        self._prepared = (self._add_node(path, is_new=True), path)

    def save_state(self, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
        """Write the state of the devices into the prepared file, while it is stopped. Return the devices, as `plugged`.

        `meanwhile` is called while that is written.
        """
        assert self._prepared is not None
        return _plugged_of(self._run_on_state("snapshot-save", self._prepared[0], _LIST_DEVICES, meanwhile))

    def finish_state(self) -> None:
        """Let go of the prepared file. Further calls do nothing."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._remove_node(prepared[0])

    def open_state(self, path: Path, *before: Command) -> None:
        """Have QEMU open the file of a state, and wait for nothing: `load_state` does. The machine has not run yet.

        Commands that are to be carried out before that are asked for with it.
        """
        node, commands = self._next_node(path)
        asked = (*before, *commands, *_LIST_DEVICES, *_ASKED_BEFORE_A_LOAD)
        self._opening = (node, self.monitor.ask_all(asked))

    def load_state(self, path: Path, *before: Command) -> None:
        """Load the state of the devices, while it is stopped and its RAM is as it was then. QEMU writes to that file.

        What `open_state` has asked for is not asked for again.
        """
        with self.loading(path, *before) as load:
            load()

    @contextmanager
    def loading(self, path: Path, *before: Command) -> Iterator[Callable[[], None]]:
        """Open the file of a state, while the machine may run, and give what loads it, as `load_state`.

        Commands that are to be carried out before that are asked for with it.
        """
        is_start = self._opening is not None
        with self._explained():
            node, known = self._opened_node(path, before)

        def load() -> None:
            status, chardevs = known or self.monitor.execute_all(_ASKED_BEFORE_A_LOAD)
            if status["status"] in _NEEDS_RESET:
                self._reset()
                chardevs = self.monitor.execute("query-chardev")
            with self._explained(), self._console_read(chardevs):
                self._run_on_state("snapshot-load", node)

        try:
            yield load
        finally:
            # A machine that starts has RAM put right next: QEMU is at that meanwhile.
            self._remove_node(node, waits=not is_start)

    def _opened_node(self, path: Path, before: Sequence[Command]) -> tuple[str, list[Any]]:
        """Return the node of the file of a state, and what QEMU said of itself since then, if it can be relied on."""
        opening, self._opening = self._opening, None
        if opening is None:
            return self._add_node(path, *before, is_new=False), []
        node, wait = opening
        try:
            answers = wait()
        except BaseException:
            self._remove_node(node)
            raise
        count = len(_ASKED_BEFORE_A_LOAD)
        self.started_with = _plugged_of(answers[-count - len(_LIST_DEVICES) : -count])
        # Who was at the console then may have gone since; who has come since is in nobody's way.
        return node, answers[-count:] if _is_console_free(answers[-1]) else []

    def _reset(self) -> None:
        """Reset a machine that QEMU would not let go on: not behind the load of a state either."""
        self.monitor.execute("system_reset")
        deadline = time.monotonic() + RESET_SECONDS
        while self.status in _NEEDS_RESET:
            if time.monotonic() > deadline:
                raise StateError(
                    f"the guest of machine {self.name!r} has shut down, and QEMU does not reset it (-no-reboot forbids "
                    "that); stop the machine, with 'onionskin machine stop', and revert it then"
                )
            time.sleep(0.01)

    @contextmanager
    def _console_read(self, chardevs: list[dict[str, Any]]) -> Iterator[None]:
        """Have the console connected for the time of the block.

        A serial port whose last byte nobody has taken yet waits for whoever is connected. Where nobody is when its state is
        loaded, QEMU lets it wait for ever, and the guest with it.
        """
        if not _is_console_free(chardevs):
            yield  # another one would wait behind that
            return
        with connect_unix(self.directory / qemu_command.CONSOLE, seconds=CONSOLE_SECONDS):
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which state could not be loaded."""
        try:
            yield
        except MonitorTimeout:
            raise
        except MonitorError as error:
            raise MonitorError(
                f"the saved state of the devices of machine {self.name!r} cannot be loaded ({error}); it may be damaged: "
                "another snapshot of the machine may have a whole one"
            ) from error

    def drop_leftovers(self) -> None:
        """Let go of what a supervisor that is gone had under way: its jobs, and the files of its states."""
        deadline = time.monotonic() + STATE_SECONDS
        while jobs := [one for one in self.monitor.execute("query-jobs") if one["id"].startswith(JOB_PREFIX)]:
            for one in jobs:
                if one["status"] == "concluded":
                    self.monitor.execute("job-dismiss", {"id": one["id"]})
            if time.monotonic() > deadline:
                raise StateError(
                    f"QEMU of machine {self.name!r} does not end a job that a process before this one began"
                )
            time.sleep(0.01)
        nodes = [one["node-name"] for one in self.monitor.execute("query-named-block-nodes")]
        # Those of an older onionskin have files that are nodes of their own, which go behind them.
        for prefix in (_STATE_NODE, _FILE_NODE):
            for node in nodes:
                if node.startswith(prefix):
                    self._remove_node(node)

    def _run_on_state(
        self,
        command: str,
        node: str,
        then: Sequence[Command] = (),
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[Any]:
        arguments = {"tag": STATE_TAG, "vmstate": node, "devices": [node]}
        return self.monitor.run_job(command, arguments, then=then, meanwhile=meanwhile, seconds=STATE_SECONDS)

    def _next_node(self, path: Path) -> tuple[str, list[Command]]:
        """Return what the next node of the file of a state is called, and the commands that make it."""
        self._nodes += 1
        node = f"{_STATE_NODE}{self._nodes}"
        # Whoever keeps the state syncs it. Its file is part of the node, and so has the same cache: QEMU would sync that too.
        file = {"driver": "file", "filename": str(path.absolute())}
        options = {"driver": "qcow2", "node-name": node, "file": file, "cache": {"direct": False, "no-flush": True}}
        return node, [("blockdev-add", options)]

    def _add_node(self, path: Path, *before: Command, is_new: bool) -> str:
        node, commands = self._next_node(path)
        if is_new:  # QEMU looks at the length when it opens it
            path.write_bytes(empty_file())
        try:
            self.monitor.execute_all([*before, *commands])
        except BaseException:
            self._remove_node(node)  # QEMU adds it also where it refused what was asked before it
            raise
        return node

    def _remove_node(self, node: str, *, waits: bool = True) -> None:
        if not waits:
            self.monitor.request("blockdev-del", {"node-name": node})
            return
        with suppress(MonitorError):  # one that answers late does so when it answers again
            self.monitor.execute("blockdev-del", {"node-name": node})

    # ---- the guest agent ----

    def agent(self) -> GuestAgent:
        """Return a connection to the guest's agent. Raise `NoAgent` where none answers."""
        return GuestAgent(self.directory / qemu_command.AGENT, self.name)

    def freeze(self) -> list[str]:
        """Have the guest's file systems frozen by its agent. Return what was frozen."""
        with self.agent() as agent:
            return agent.freeze()

    def thaw(self) -> None:
        """Have them thawed."""
        with self.agent() as agent:
            agent.thaw()

    # ---- the end ----

    def quit(self, seconds: float) -> None:
        """End the process, within so many seconds; killed, if it does not end by itself."""
        with self._ending:  # by one thread at a time
            if seconds > 0 and self.wait(0) is None:
                with suppress(MonitorError):
                    self.monitor.execute("quit", seconds=seconds)
            if self.wait(seconds) is None:
                self._kill()
                self.wait(KILL_SECONDS)
            self.close()

    def keep_copy(self, descriptor: int) -> None:
        """Have a copy of its RAM, which nobody drops, until `close`; as long as the process runs, that has it too."""
        self._copy = descriptor

    def close(self) -> None:
        """Close the connections. The process goes on, if it still runs."""
        self._is_closed = True
        self.monitor.close()
        noting, self._noting = self._noting, None
        if noting is not None:
            noting.close()
        if self._preload is not None:
            self._preload.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._status is not None and self._child is not None:
            self._child.reap()
        if not self._is_tracked and self._status is not None:
            self.ram_file.unlink(missing_ok=True)
        if self._copy >= 0:
            os.close(self._copy)
            self._copy = -1

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if start_ticks(self.pid) == self.ticks:  # else the descriptor may mean another one
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
        if self._child is not None:
            self._child.kill()

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of the process. Return its exit status, or None where it still runs.

        Of a process that this one did not start, the status is not known, and is 0.
        """
        if self._status is None:
            self._status = self._wait_for_child(seconds) if self._child else self._wait_for_other(seconds)
        return self._status

    def _wait_for_child(self, seconds: float) -> int | None:
        assert self._child is not None
        status = self._child.wait(seconds)
        if status is not None and self._child.pid != self.pid and self._wait_for_other(seconds) is None:
            return None  # a script that started it ended before it
        return status

    def _wait_for_other(self, seconds: float) -> int | None:
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return 0
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if start_ticks(self.pid) != self.ticks or poll.poll(seconds * 1000):
                return 0
            return None
        finally:
            os.close(descriptor)


# ---- starting ----


def _start(
    command: list[str],
    name: str,
    directory: Path,
    ram: Path,
    on_event: OnEvent | None,
    beside_its_start: Callable[[], None],
    *,
    is_tracked: bool,
    notes_beside: bool,
    kept: Sequence[int],
) -> QemuProcess:
    for socket in qemu_command.SOCKETS:
        (directory / socket).unlink(missing_ok=True)
    environment = dict(os.environ)
    if is_tracked:
        # The library takes these out of the environment again, so no child of QEMU inherits them.
        environment |= {
            "LD_PRELOAD": str(library()),
            "ONIONSKIN_RAM": str(ram.absolute()),
            "ONIONSKIN_STAND_IN": str((directory / qemu_command.STAND_IN).absolute()),
            "ONIONSKIN_PRELOAD": qemu_command.PRELOAD,
        }
    log = open_log(directory / qemu_command.LOG, os.O_TRUNC)
    try:
        child = Session(
            _run_loaded(command, directory, log, ram, is_tracked=is_tracked)
            or subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                pass_fds=kept,
                start_new_session=True,  # Ctrl-C is for the command that started it, which ends it in order
            )
        )
    finally:
        os.close(log)
    noting = None
    try:
        beside_its_start()  # QEMU loads its libraries meanwhile, and answers nothing before it has its disks
        if notes_beside:
            noting = NotingBeside(child.pid, name, directory / qemu_command.PRELOAD)
        process = QemuProcess(
            child.pid,
            start_ticks(child.pid),
            name,
            directory,
            ram,
            on_event=on_event,
            child=child,
            is_tracked=is_tracked,
        )
    except BaseException:
        child.kill()
        child.reap()
        if noting is not None:
            noting.close()
        raise
    if noting is not None:
        process.use_noting(noting)
    return process


def _run_loaded(
    command: list[str], directory: Path, log: int, ram: Path, *, is_tracked: bool
) -> "subprocess.Popen[bytes] | None":
    """Have the QEMU that was started ahead run a command line, and return it. Return None where there is none that can."""
    global loaded
    taken, loaded = loaded, None
    if taken is None:
        return None
    if not is_tracked:  # the library is in it
        taken.end()
        return None
    return taken.run(command, directory, log, ram, directory / qemu_command.STAND_IN, qemu_command.PRELOAD)


def load_ahead(program: str, kernel: str | None) -> None:
    """Start a QEMU that loads its libraries, for the first machine of this process. Where that fails, there is none.

    It has the memory for that kernel, which QEMU reads into its heap.
    """
    global loaded
    if os.environ.get(NO_TRACKING, "") in ("", "0"):
        with suppress(OSError, StateError):
            room = _HEAP_BYTES + (os.stat(kernel).st_size if kernel is not None else 0)  # noqa: PTH116 - a text
            loaded = LoadedQemu(_find(program), room)


def drop_loaded() -> None:
    """End the QEMU that was started ahead, if there is one: this process has another use for none."""
    global loaded
    taken, loaded = loaded, None
    if taken is not None:
        taken.end()


def _refuse_taken_sockets(configuration: Configuration, name: str) -> None:
    """Raise StateError where somebody listens on a socket that the user's arguments name: QEMU would take it from them.

    A fork has the arguments of the machine that it was made from, which may run.
    """
    for path in qemu_command.own_sockets(configuration):
        try:
            found = connect_if_listening(path, seconds=1)
        except BlockingIOError:  # it is behind with accepting
            pass
        except OSError:  # QEMU says what is wrong with it
            continue
        else:
            if found is None:
                continue
            found.close()
        raise StateError(
            f"somebody listens on {path}, on which QEMU of machine {name!r} is to listen, as its arguments say; end that, or "
            "give a path without a directory, as in unix:monitor, which is another one for each machine"
        )


def _is_of_session(pid: int, leader: int) -> bool:
    try:
        return os.getsid(pid) == leader
    except ProcessLookupError:
        return False


def adopt(
    pid: int, ticks: int, name: str, directory: Path, ram_file: Path, *, is_tracked: bool, on_event: OnEvent | None
) -> QemuProcess:
    """Take over a machine whose supervisor is gone. Raise StateError where it does not answer."""
    drop_loaded()
    process = QemuProcess(pid, ticks, name, directory, ram_file, on_event=on_event, is_tracked=is_tracked)
    try:
        process.drop_leftovers()
        if is_tracked:
            process.meet_library()
            process.note_writes(again=True)
    except PermissionError as error:
        process.close()
        raise StateError(
            f"machine {name!r} runs, and its supervisor was killed; nobody can take it over from here, where a sandbox keeps "
            f"RAM from being read or written ({error}); run this outside, or end the machine with 'onionskin machine stop "
            "--force'"
        ) from error
    except BaseException:
        process.close()
        raise
    return process


def _empty_ram(directory: Path, length: int) -> Path:
    """Return a file of zeros for the RAM of a machine that boots."""
    return _zeros(directory / qemu_command.EMPTY_RAM, length)


def _stand_in(directory: Path, ram: Path) -> Path:
    """Return a file for QEMU to map, in whose place the library maps the RAM file.

    So a QEMU that the library is not in, by capabilities or a script, writes to a file that is nobody's.
    """
    return _zeros(directory / qemu_command.STAND_IN, ram.stat().st_size)


def _zeros(path: Path, length: int) -> Path:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, length)
    finally:
        os.close(descriptor)
    return path


def _copy(ram_file: Path, directory: Path) -> tuple[Path, int]:
    """Copy a RAM file to memory, for a machine that writes to it. Of a disk, the kernel would write it back all the time.

    Return the copy and its descriptor, as `orphans.make_copy`.
    """
    path = copy_of_ram(directory, os.getpid())
    drop_forgotten_copies()
    source = os.open(ram_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        _refuse_without_room(path.parent, size)
        target = make_copy(path)
        try:
            os.ftruncate(target, size)
            for start, end in data_ranges(source, 0, size):
                for at in range(start, end, 1 << 20):
                    write_all(target, read_all(source, min(1 << 20, end - at), at), at)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(target)
            raise
    finally:
        os.close(source)
    return path, target


def _refuse_without_room(directory: Path, length: int) -> None:
    """Raise StateError where RAM has no room: as the guest fills it, the kernel would kill the hypervisor (SIGBUS)."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < length:  # one without blocks has no limit
        raise StateError(
            f"{directory} has {format_size(free)} left, and the RAM of the machine takes up to {format_size(length)} there, "
            "since what is written to RAM cannot be noted here; make it larger (for a container: --shm-size), or give the "
            "machine less RAM"
        )


def _plugged_of(lists: list[list[dict[str, str]]]) -> list[str]:
    """Return the devices among the objects of `_LIST_DEVICES`."""
    found = [(one["name"], _kind_of_child(one["type"])) for children in lists for one in children]
    return sorted(f"{name} ({kind})" for name, kind in found if kind)


def _is_console_free(chardevs: list[dict[str, str]]) -> bool:
    """Whether nobody is connected to the console, among the answers to "query-chardev"."""
    consoles = [one for one in chardevs if one["label"] == qemu_command.CONSOLE]
    return any(one["filename"].startswith("disconnected:") for one in consoles)


def _kind_of_child(kind: str) -> str:
    """Return which kind of object a property of another one has, such as "virtio-rng-pci", or nothing: it has none."""
    return kind.removeprefix("child<").removesuffix(">") if kind.startswith("child<") else ""


def know(program: str) -> None:
    """Ask a QEMU what it is, if it was not asked yet: processes that are forked from this one know it then.

    Raises
    ------
    StateError
        It is not installed, or does not say it.
    """
    found = _find(program)
    _probe(found, os.stat(found).st_mtime_ns)  # noqa: PTH116 - a text


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise StateError(f"{program} is not installed, or is not in PATH; on Debian: apt-get install qemu-system-x86")
    return found


def _asked(program: str) -> tuple[str, str]:
    """Have a QEMU say what it is, on lines of JSON. Return them, and its errors.

    No process stays, also where the program is a script that starts it.
    """
    arguments = ("-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio")
    asked = [{"execute": one} for one in ("qmp_capabilities", "query-version", "query-machines", "quit")]
    return say([program, *arguments], "".join(map(json.dumps, asked)).encode(), PROBE_SECONDS)


@lru_cache(16)
def _probe(program: str, changed_ns: int) -> tuple[str, dict[str, str]]:
    """Return the version of a QEMU, and its types of machines: each name with the name that has a version."""
    said = ""
    try:
        answer, said = _asked(program)
        answers = [json.loads(line) for line in answer.splitlines()]
        greeting = next(one["QMP"]["version"]["qemu"] for one in answers if "QMP" in one)
        machines = next(one["return"] for one in answers if isinstance(one.get("return"), list))
    except (subprocess.TimeoutExpired, ValueError, StopIteration, OSError) as error:
        if isinstance(error, OSError) and error.errno in (*CANNOT_LOOK, EAGAIN):
            raise
        why = (said or str(error) * isinstance(error, OSError)).strip()[-_SAID_MAX:]
        raise StateError(
            f"{program} does not answer as QEMU does; is it one, and does it start?{f' It said: {why}' if why else ''}"
        ) from None
    version = ".".join(str(greeting[part]) for part in ("major", "minor", "micro"))
    types = {one["name"]: one["name"] for one in machines}
    return version, types | {one["alias"]: one["name"] for one in machines if one.get("alias")}
