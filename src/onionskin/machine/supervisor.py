"""The supervisor of a machine: the process that stays as long as the machine runs.

It holds the machine (its RAM volume, which is open for writing in one process at most), serves its disks by a process that it
starts again when that dies, runs the hypervisor, and listens on the machine's control socket.

    begin       hold the machine; take over what runs, or start: disks, hypervisor, state
    run         wait for the end of one of the processes, for signals, for what the hypervisor reports
    end         the disks are flushed and given up; nothing of the machine is left but its snapshots and its log

What must hold: of two starts at once, one has the machine, and the other says so. Before the guest may write, it is noted
that RAM which it began from is not loaded again. A machine that stands still does so because its user wants it, because a
disk of it has an error, or because it is between two states; `status` says which. A supervisor that was killed is followed
by another, which finds the processes by the record; what was under way then is given up, and the machine goes on.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin.base.lazy import logger
from onionskin.base.os_errors import words_of
from onionskin.base.sockets import has_hung_up
from onionskin.base.threads import Thread
from onionskin.base.waiting import within
from onionskin.control.client import is_stopped
from onionskin.errors import OnionskinError, StateError
from onionskin.machine import capture, disk_server, orphans, qemu, qemu_command, record, restore
from onionskin.machine.agent import kernel_of, tell_identity
from onionskin.machine.control import ControlServer
from onionskin.machine.disk_server import DiskServer
from onionskin.machine.entropy import doubt_about
from onionskin.machine.hypervisor import Configuration, Identity, Recorded
from onionskin.machine.monitor import MonitorError, MonitorTimeout
from onionskin.machine.qemu import QemuHypervisor, QemuProcess
from onionskin.machine.ram import GuestRam
from onionskin.machine.record import BEGINNING, DISKS_ALONE, ProcessId, Record
from onionskin.machine.running import Running, differing_pages
from onionskin.operations import machine_forks, machine_tree, machines

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onionskin.catalog import MachineRow
    from onionskin.store import HeldRam, Store
    from onionskin.volume import Volume

_log = logger(__name__)

QUIT_SECONDS = 10.0
STOP_SECONDS = 90.0  # that a guest has to shut down, where nobody says how long
POLL_SECONDS = 5.0
RESTART_SECONDS = 0.5
DYING_SECONDS = 10.0  # from a closed connection of a hypervisor to its end
GO_ON_TRIES, GO_ON_SECONDS = 3, 60.0  # so often a machine whose disk had an error goes on by itself
# After so long another thread of this process has its turn, instead of 5 ms: while one computes, the others wait for answers
# of the hypervisor and of the server of the disks, and the guest stands still for that.
SWITCH_SECONDS = 0.0005
_ENDED, _UNKNOWN = "ended", "unknown: "


class Supervisor:
    """A machine that runs, in this process.

    Parameters
    ----------
    store : Store
    name : str
        The machine.
    log : callable
        Takes a line.
    machine : bytes, optional
        The id of the machine, which may have another name by now.
    pool : socket, optional
        The other end is the pool's for which the machine waits, stopped before it goes on from its snapshot, until a fork
        takes it. When the pool closes it before that, the machine ends, and nothing of it is left.
    """

    def __init__(
        self,
        store: "Store",
        name: str,
        log: Callable[[str], None],
        *,
        machine: bytes | None = None,
        pool: socket.socket | None = None,
    ) -> None:
        self._id = machine
        self._pool = pool
        self._store = store
        self._name = name
        self._log = log
        self._ends = ExitStack()  # the last call is made first; if some fail, the rest are made too
        self._started = time.monotonic()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ends.callback(os.close, self._wake_reader)
        self._ends.callback(os.close, self._wake_writer)
        self._guard = threading.RLock()  # over the record, and what follows
        self._serving = threading.Lock()  # over the start of the server of the disks
        self._event: dict[str, Any] | None = None  # the last error of a disk
        self._tries: list[float] = []
        self._is_stopped = False  # the hypervisor reported that the machine stands still
        self._is_forced = False
        self._goes_back = False  # a revert is under way
        self._fault = ""  # why its disks are not served any more
        self._said_of_looking = ""  # what the log says already of why nothing could be seen
        self._untold: list[str] = []  # what a fork does not know of itself
        self._stopping: threading.Thread | None = None
        self._is_recorded = True  # whether the record is this supervisor's to remove
        self._ended = threading.Event()  # nothing of the machine is left
        self.record: Record
        self.running: Running
        self._process: QemuProcess
        self._server: DiskServer

    # ---- the begin ----

    def begin(self, *, paused: bool = False, only_from: str | None = None) -> None:
        """Start the machine, or take it over where it runs already. Its guest runs on return, unless it is `paused`.

        It begins wherever its next start does; with `only_from`, the id of a snapshot of it in hexadecimal, `BEGINNING` or
        `DISKS_ALONE`, only there: for whoever put it back, or gave up its RAM, and has not held it since.

        Raises
        ------
        StateError
            Another process runs it; or it cannot be started: nothing of it is left.
        """
        try:
            self._begin(paused, only_from)
        except BaseException:
            self.end()
            raise

    def _begin(self, paused: bool, only_from: str | None) -> None:
        _refuse_without_pidfd()
        row = self._row_to_run()
        held = self._store._hold_ram(row)
        self._ends.callback(lambda: (self.running.ram_volume if hasattr(self, "running") else held).close())
        self._id = row.id
        row = self._row_to_run()  # nobody renames it from here on, as it is held
        self._name = row.name
        self._directory = record.make_directory(self._store._opened.layout.root, row.id)
        self._ends.push(self._forget)
        record.drop_drafts(self._directory)  # who takes a machine over ends no orphans
        record.note_under_way(self._directory)
        found = Record.read(self._directory)
        disks = [one.name for one in machines.volumes_of(self._store._opened.catalog, row)[:-1]]
        is_there = found is not None and found.hypervisor is not None and found.hypervisor.is_alive
        if found is not None and not is_there and found.server is not None:
            found.server.end(disk_server.END_SECONDS)
        serving = found.server if found and is_there and found.server and found.server.is_alive else None
        labels = found.labels if found and is_there else disks if self._pool is not None else ()
        self._server = DiskServer(
            self._store.path, disks, self._directory, trust=self._store._trust, found=serving, labels=labels
        )
        with self._kept_served() as keep_served:
            if found is not None and is_there:
                self._take_over(found, held.open(), keep_served)
            else:
                orphans.end(self._directory, is_new=row.stands_on is None and row.resumes == machines.RESUMES)
                self._ends.callback(self._server.end)
                self._start(row.id, held, paused, only_from, keep_served)
        self._ends.callback(self.running.close)
        self.running.has_server = bool(self._server.uris)
        self._process.are_disks_served = self._are_disks_served
        self._listen()
        record.note_reachable(self._directory)

    def _row_to_run(self) -> "MachineRow":
        catalog = self._store._opened.catalog
        if self._id is None:
            return machines.find(catalog, self._name)
        row = catalog.machine_with_id(self._id)
        if row is None:
            raise StateError(f"machine {self._name!r} was deleted meanwhile, so it was not started")
        return row

    def _start(
        self, machine: bytes, held: "HeldRam", paused: bool, only_from: str | None, keep_served: Callable[[], None]
    ) -> None:
        store = self._store
        begins = machines.beginning(store._opened, self._name)
        if begins.is_reverting and begins.snapshot is not None:
            self._log(f"machine {self._name!r} was being put back to {begins.snapshot.name!r}; that is ended first")
            held.open()  # it is found where it is open, and put back there
            machine_tree.revert(store._opened, self._name, begins.snapshot.name, store._put_back, ram=True)
            begins = machines.beginning(store._opened, self._name)
        if only_from is not None:
            _refuse_elsewhere(begins, only_from)
        row = begins.machine
        configuration = self._configuration(row)
        hypervisor = QemuHypervisor(self._hear)
        now = hypervisor.check(configuration, len(self._server.uris))
        identity = Identity(mac_seed=machine.hex())
        with ExitStack() as stack:
            saved = prepared = None
            if begins.ram is not None:
                machines.refuse_written(store._opened, row)
                saved = restore.find_fit(store, row, None, now)
                now = replace(now, guest_kernel=saved.recorded.guest_kernel)  # that is in its RAM
            self._server.begin()  # it comes up meanwhile
            if saved is not None:
                prepared = stack.enter_context(restore.Prepared(store, saved))
            self._server.wait_listening()
            differ: list[NDArray[Any]] = []

            # The hypervisor takes longer to start than all of this, so it begins first.
            def beside_its_start() -> None:
                volume = held.open()
                if prepared is not None:
                    prepared.read_state()
                    saved = prepared.saved
                    differ.append(differing_pages(store, volume, saved.layer, saved.ram_bytes))
                keep_served()

            self._process = hypervisor.launch(
                configuration,
                name=self._name,
                directory=self._directory,
                ram_file=prepared.ram_file.path if prepared else None,
                disks=self._server.uris,
                state=prepared.state.path if prepared else None,
                identity=identity,
                beside_its_start=beside_its_start,
            )
            self._ends.callback(self._process.quit, QUIT_SECONDS)
            mapped = prepared.saved.layer if prepared and self._process.ram() is not None else None
            self.running = Running.attach(
                *(store, self._name, self._process, held.open(), configuration, now, identity, self._directory),
                mapped=mapped,
                plugged=self._process.started_with,
                differ=differ[-1] if differ and mapped is not None else None,
            )
            if prepared is not None:
                restore.settle(self.running, prepared.saved)
                self.running.is_frozen = prepared.saved.recorded.is_frozen
            self._begin_record(self._record_of(configuration, now, identity, mapped, paused))
            if self._pool is None:
                # From here on the guest may write: RAM that it began from is older than its disks.
                machines.note_running(store._opened, machine)
        (self._directory / record.ENDED).unlink(missing_ok=True)
        if self._pool is None and not paused:
            self._process.resume()
            self._note_what_is(is_standing=False)
            self._thaw_or_say_why_not()
            if mapped is None and isinstance(self.running.guest_ram, GuestRam):
                self.running.guest_ram.touch_rooms()  # while the guest boots: all that it writes is to be saved
            if begins.ram is not None and begins.snapshot is None:
                self._tell_fork(configuration, identity)

    def _tell_fork(self, configuration: Configuration, identity: Identity) -> None:
        """Tell a guest that goes on as a fork for the first time who it is, in the background."""

        def work() -> None:
            try:
                with self._process.agent() as agent:
                    mac = identity.mac(0) if configuration.network != "none" else None
                    self._untold += tell_identity(agent, hostname=self._name, mac=mac, clock_ns=time.time_ns())
                    if doubt := doubt_about(self.running.recorded.guest_kernel or kernel_of(agent)):
                        self._untold.append(f"its random numbers: {doubt}")
            except (OSError, OnionskinError) as error:
                self._untold += [
                    f"its clock, its host name and its addresses are those of the machine it was made from: {words_of(error)}"
                ]
            for line in self._untold:
                self._log(f"the guest was not told: {line}")

        Thread(target=work, name="onionskin agent", daemon=True).start()

    def _thaw(self) -> None:
        """Have the file systems of a guest thawed that goes on as they were frozen: no write of it would end."""
        if not self.running.is_frozen:
            return
        try:
            self._process.thaw()
        except (OSError, OnionskinError) as error:
            raise StateError(
                f"machine {self._name!r} runs with its file systems frozen, as the snapshot has them, and its agent did not "
                f"thaw them: {words_of(error)}; thaw them from inside, or revert it to another snapshot"
            ) from error
        self.running.is_frozen = False
        self._note_what_is(is_frozen=False)

    def _thaw_or_say_why_not(self) -> None:
        try:
            self._thaw()
        except StateError as error:
            self._untold.append(str(error))
            self._log(str(error))

    def _configuration(self, row: "MachineRow") -> Configuration:
        """Return what the machine is made of. A fork has no network, unless it says that it has."""
        configuration = Configuration.from_json(row.configuration)
        if configuration.is_isolated is None:
            origin = self._store._opened.catalog.lineage_of(row.ram)
            is_fork = origin is not None and origin.parent is not None  # each volume has a row, a fork names its origin
            configuration = replace(configuration, is_isolated=is_fork)
        return configuration

    def _record_of(
        self, configuration: Configuration, now: Recorded, identity: Identity, mapped: bytes | None, paused: bool
    ) -> Record:
        return Record(
            ProcessId.of(os.getpid()),
            ProcessId.of(self._process.pid),
            None,  # the server: see `_begin_record`
            configuration.to_json(),
            now.to_json(),
            identity.generation,
            identity.mac_seed,
            str(self._process.ram_file),
            self._process.ram() is not None,
            None if mapped is None else mapped.hex(),
            is_paused=paused or self._pool is not None,
            is_frozen=self.running.is_frozen,
            labels=self._server.labels,
            is_waiting=self._pool is not None,
            is_standing=self._pool is not None or not paused,
            plugged=self.running.plugged,
        )

    def _take_over(self, found: Record, volume: "Volume", keep_served: Callable[[], None]) -> None:
        """Go on with a machine whose supervisor was killed. Where that fails, its processes stay as they are recorded."""
        hypervisor = found.hypervisor
        assert hypervisor is not None
        self._is_recorded = False
        was_waiting = found.is_waiting
        if was_waiting:  # in a pool, and a fork has taken it since
            found = replace(found, is_paused=False, is_waiting=False, is_standing=True)
        self._log(f"the supervisor of machine {self._name!r} was killed; taking it over")
        if self._server.process is None:
            orphans.end_servers(self._directory)  # one was started, and its supervisor killed before it was recorded
            self._server.begin()
        keep_served()  # QEMU may wait for its disks, and then answers nothing
        self._process = qemu.adopt(
            *(hypervisor.pid, hypervisor.ticks, self._name, self._directory, Path(found.ram_file)),
            is_tracked=found.is_tracked,
            on_event=self._hear,
        )
        self._ends.callback(self._process.close)
        self.running = Running.attach(
            *(self._store, self._name, self._process, volume),
            *(Configuration.from_json(found.configuration), Recorded.from_json(found.recorded)),
            *(Identity(found.generation, found.mac_seed), self._directory),
            mapped=None if found.mapped is None else bytes.fromhex(found.mapped),
            plugged=found.plugged,
        )
        self.running.generation = found.told or found.generation
        self._is_recorded = True
        self._ends.callback(self._server.end)
        self._ends.callback(self._process.quit, QUIT_SECONDS)
        self.running.is_broken = found.is_reverting
        self.running.goes_on = found.is_reverting and found.is_standing and not found.is_paused
        self.running.is_frozen = found.is_frozen
        self._begin_record(replace(found, supervisor=ProcessId.of(os.getpid())))
        self._is_stopped = self._process.is_paused
        if self._is_stopped and found.is_standing and not (found.is_paused or found.is_reverting):
            self._log("it stood still in the middle of what its supervisor did; it goes on")
            self._process.resume()
            self._note_what_is(is_standing=False)
        elif self._is_stopped and not (found.is_paused or found.is_reverting):
            self._log(f"it stands still ({self._process.status}), and not for its supervisor; it stays so")
        if not self._process.is_paused:
            self._note_what_is(is_paused=False)  # its user let it go on, and it was not noted any more
            self._thaw_or_say_why_not()
        if was_waiting:
            self._tell_fork(self.running.configuration, self.running.identity)

    def _begin_record(self, what: Record) -> None:
        """Record a machine that begins, with the server that its disks have by now."""
        with self._guard:
            what = replace(what, server=self._server.process)
            what.write(self._directory)
            self.record = what

    def _note(self, **what: Any) -> None:
        """Note of the machine what has changed. Several threads do, each of something else.

        StateError: the store is not where it was. A copy in its place has a machine of its own in a directory of that name.
        """
        self._store._opened.catalog.refuse_moved()
        with self._guard:
            noted = replace(self.record, **what)
            noted.write(self._directory)
            self.record = noted

    def _note_what_is(self, **what: Any) -> None:
        """Note what has happened already. Where that cannot be written, the disk may be full, this process knows it."""
        with self._guard:
            try:
                self._note(**what)
            except (OSError, StateError) as error:
                self.record = replace(self.record, **what)
                self._log(f"{self._directory / record.RECORD} could not be written: {words_of(error)}")

    def _listen(self) -> None:
        verbs: dict[str, Callable[..., Any]] = {
            "status": self.status,
            "stop": self.stop,
            "pause": self.pause,
            "resume": self.resume,
            "snapshot": self.snapshot,
            "revert": self.revert,
            "tell": self.tell,
            "adopt": self.adopt,
        }
        verbs = {verb: self._unless_it_waits(verb, call) for verb, call in verbs.items()}
        self._control = ControlServer(
            self._directory / record.CONTROL,
            verbs,
            self._log,
            has_ended=lambda: self._process.wait(0) is not None,
            who_is_stopped=self._who_is_stopped,
        )
        self._ends.callback(self._control.close)

    def _who_is_stopped(self) -> str:
        """Name the hypervisor or the server of the disks where a signal stopped it: then the other one hangs, too."""
        server = self._server.process
        if server is not None and is_stopped(server.pid):
            return f"process {server.pid}, which serves the disks of machine {self._name!r}"
        if is_stopped(self._process.pid):
            return f"process {self._process.pid}, which is QEMU of machine {self._name!r}"
        return ""

    # ---- while it waits in a pool ----

    def _unless_it_waits(self, verb: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse a verb as long as the machine waits in a pool; but it can be ended."""

        def guarded(has_gone: Callable[[], None], **arguments: Any) -> Any:
            if self._pool is not None and verb not in ("status", "adopt"):
                if verb != "stop":
                    raise StateError(
                        f"machine {self._name!r} waits in a pool for a fork; use 'onionskin machine fork', which takes it"
                    )
                arguments["force"] = True
            return call(has_gone, **arguments)

        return guarded

    def adopt(self, has_gone: Callable[[], None]) -> None:
        """Be the fork that this machine is in the catalog now, and let its guest go on."""
        with self.running.guard:
            row = self.running.machine
            if self._pool is None or not machine_forks.is_taken(row):
                raise StateError(f"machine {self._name!r} does not wait in a pool for a fork that has taken it")
            self._name = self.running.name = self._process.name = row.name
            self._server.rename([one.name for one in machines.volumes_of(self._store._opened.catalog, row)[:-1]])
            self._note_what_is(is_paused=False, is_waiting=False)
            self._pool = None  # from here on it is left alone, whatever becomes of the pool
            self._process.resume()
            self._note_what_is(is_standing=False)
            self._thaw_or_say_why_not()
        self._log(f"a fork took it from the pool; it is machine {row.name!r}")
        self._tell_fork(self.running.configuration, self.running.identity)

    def _look_at_pool(self) -> None:
        """End a machine whose pool has gone; but one that a fork took, which was killed before it could say so, goes on."""
        if (pool := self._pool) is None or not has_hung_up(pool):
            return  # whoever has the guard may wait for the disks, whose server is started again behind this
        with self.running.guard:
            if self._pool is None:
                return
            if machine_forks.is_taken(self.running.machine):
                self.adopt(lambda: None)
                return
            self._is_forced = True
            self._process.quit(0)

    def _drop(self) -> None:
        """Leave nothing of a machine that waited in vain."""
        # It is not held any more, so another one may have its name.
        machine = self._store._opened.catalog.machine_with_id(self._id or b"")
        if machine is not None and not machine_forks.is_taken(machine):
            self._store._delete_machines([machine.name], recursive=False, agreed={machine.name: machine.id})

    # ---- while it runs ----

    def run(self) -> int:
        """Wait for the end of the machine, and tidy up. Return the exit status of the hypervisor."""
        try:
            while (status := self._look_around()) is None:
                pass
            self._report(status)
            return status
        finally:
            self.end()

    def _look_around(self) -> int | None:
        """Wait for news, and see to them. Return the exit status of the hypervisor where it has ended."""
        try:
            if (status := self._process.wait(0)) is not None:
                return status
            self._wait_for_news()
            if self._process.wait(0) is None:
                self._look_at_pool()
                self._look_at_server()
                self._look_at_connection()
                self._look_at_guest()
        except OSError as error:  # no descriptor or no memory is left to look with: the guest goes on, and is not ended
            self._log_once(
                f"what became of the machine's processes cannot be seen now, and is looked at again: {words_of(error)}"
            )
            time.sleep(RESTART_SECONDS)
        return None

    def _wait_for_news(self) -> None:
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        if (pool := self._pool) is not None:
            poll.register(pool, 0)  # its end is always told
        with ExitStack() as stack:
            for process in (self.record.hypervisor, self._server.process):
                if process is not None and (descriptor := _open_process(process)) is not None:
                    stack.callback(os.close, descriptor)
                    poll.register(descriptor, select.POLLIN)
            poll.poll(POLL_SECONDS * 1000)
        with suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)

    def wake(self) -> None:
        """Have `run` look around now."""
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_writer, b"x")

    def _hear(self, event: str, data: dict[str, Any]) -> None:
        """Hear an event of the hypervisor, in a thread of its connection, which must not be used here."""
        if event == "BLOCK_IO_ERROR":
            self._event = data
        elif event in ("STOP", "RESUME"):
            self._is_stopped = event == "STOP"
        else:
            return
        self.wake()

    @contextmanager
    def _kept_served(self) -> Iterator[Callable[[], None]]:
        """Give what waits until the disks are served, and has their server started again where it dies within the block.

        A hypervisor that waits for its disks answers nothing, and `run`, which sees to the server later, has not begun.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        thread = Thread(target=self._keep_served, args=(reader,), name="onionskin disks", daemon=True)

        def begin() -> None:
            with self._serving:
                self._server.wait_ready()
            if self._server.uris and thread.ident is None:
                thread.start()

        try:
            yield begin
        finally:
            os.close(writer)
            if thread.ident is not None:
                thread.join()
            os.close(reader)

    def _keep_served(self, over: int) -> None:
        """Start the server again where it dies, until the other end of a pipe is closed."""
        poll = select.poll()
        poll.register(over, 0)
        while not poll.poll(0) and not self._fault:
            try:
                self._wait_for_server(poll)
            except OSError as error:  # no descriptor or no memory is left to look with
                self._log(
                    f"what became of the server of the disks cannot be seen now, and is looked at again: {words_of(error)}"
                )
                poll.poll(RESTART_SECONDS * 1000)

    def _wait_for_server(self, poll: select.poll) -> None:
        """Wait until the server has ended, or what `poll` waits for. Start it again where it has ended."""
        process = self._server.process
        if process is None or (descriptor := _open_process(process)) is None:
            self._look_at_server()
            return
        poll.register(descriptor, select.POLLIN)
        try:
            poll.poll()
        finally:
            poll.unregister(descriptor)
            os.close(descriptor)

    def _look_at_server(self) -> None:
        self._server.reap()
        process = self._server.process
        if not self._server.uris or (process is not None and process.is_alive) or self._fault or self._stopping:
            return
        try:
            self._store._opened.catalog.refuse_moved()  # a copy in its place has disks of the same names
            self._log("the server of the disks ended; starting it again")
            with self._serving:
                self._server.restart()
        except (OSError, OnionskinError) as error:
            self._log_once(f"the disks are not served: {words_of(error)}")
            if self._server.is_given_up:
                self._fault = words_of(error)
            else:  # a revert may have a disk for a moment
                time.sleep(RESTART_SECONDS)
                self.wake()
            return
        with self._guard:
            if hasattr(self, "record"):  # else the machine begins, and it is not recorded yet
                self._note_what_is(server=self._server.process)

    def _look_at_connection(self) -> None:
        """Connect to the hypervisor again where the connection has ended, and it has not."""
        if not self._process.is_disconnected or not self.running.guard.acquire(blocking=False):
            return
        try:
            self._process.connect_again()
            self._is_stopped = self._process.is_paused  # events were lost
            self._log("the connection to the hypervisor had ended; it is there again")
        except (OSError, StateError) as error:
            why = f"the connection to the hypervisor has ended, and it takes no other one: {words_of(error)}"
            if self._process.wait(DYING_SECONDS) is None:  # else its end was the reason
                self._log_once(why)
        finally:
            self.running.guard.release()

    def _are_disks_served(self) -> bool:
        """Whether the hypervisor may wait for its disks: who serves them is at it, or is started again where it died."""
        return self._server.is_at_it and not self._fault and not self._stopping and not self._moved

    def _log_once(self, line: str) -> None:
        """Log what is found again and again, as long as it is the same."""
        if line != self._said_of_looking:
            self._said_of_looking = line
            self._log(line)

    def _look_at_guest(self) -> None:
        """Let a machine go on that the hypervisor stopped for an error of a disk, now that the disks are served.

        So does one that stands still for this supervisor alone: it did not answer when it was to go on.
        """
        if not self._is_stopped or self._fault or not self.running.guard.acquire(blocking=False):
            return  # it stands still for a moment, for whoever has the guard
        try:
            now = time.monotonic()
            self._tries = [one for one in self._tries if now - one < GO_ON_SECONDS]
            if self.record.is_paused or self.running.is_broken or len(self._tries) >= GO_ON_TRIES:
                return
            status = self._process.status
            if self.record.is_standing and status == "paused":
                self._log("it was to go on, and did not; it does now")
                self._process.resume()
                self._note_what_is(is_standing=False)
            if status == qemu.DISK_ERROR and not (self._event or {}).get("nospace"):
                self._tries.append(now)
                self._log("a disk had an error, and the machine was stopped; it goes on")
                if len(self._tries) == GO_ON_TRIES and self._server.uris:
                    self._log("the server of the disks is started again: where a sync failed, it writes nothing more")
                    self._server.end()
                    self.wake()
                self._process.resume()
        except MonitorError as error:
            self._log(str(error))
        finally:
            self.running.guard.release()

    def _report(self, status: int) -> None:
        """Say how the hypervisor ended, to the log and to who asks later."""
        said = "" if status == 0 or self._is_forced else self._process._said()
        if status == -signal.SIGBUS:  # it wrote nothing
            said = (
                "the kernel ended it (SIGBUS), as it does where the file below its RAM finds no room: is "
                f"{self._process.ram_file.parent} full?"
            )
        self._log(f"machine {self._name!r} ended with {status}{': ' + said if said else ''}")
        try:
            self._store._opened.catalog.refuse_moved()
            # Nobody has it any more, and on a full tmpfs its room is what this needs.
            (self._directory / qemu_command.EMPTY_RAM).unlink(missing_ok=True)
            record.write_json(
                self._directory / record.ENDED,
                {"status": status, "is_forced": self._is_forced, "at": time.time(), "said": said},
            )
        except (OSError, StateError) as error:
            self._log(
                f"{self._directory / record.ENDED} could not be written, so it will be said to be off: {words_of(error)}"
            )

    def end(self) -> None:
        """Give all up: the hypervisor, if it still runs; the disks, which are flushed; the machine."""
        if hasattr(self, "_directory") and not self._moved:
            record.note_under_way(self._directory)  # the disks are flushed now, which may take long
        try:
            self._ends.close()
        finally:
            self._ended.set()
            if hasattr(self, "_control"):
                self._control.join(QUIT_SECONDS)  # what waits for the end is answered
            if self._pool is not None:
                with suppress(OSError, OnionskinError):  # `expire` drops it later
                    self._drop()
            self._store.close()

    def _forget(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Remove what is noted of it, as long as the machine is held: behind that, another supervisor notes there."""
        if self._moved:
            return
        if error is None and self._is_recorded:
            sockets = qemu_command.SOCKETS if hasattr(self, "_process") and self._process.wait(0) is not None else ()
            for name in (record.RECORD, *sockets):  # of a hypervisor that was killed, and of the library in any
                (self._directory / name).unlink(missing_ok=True)
        record.note_reachable(self._directory)

    # ---- verbs: each is given a function that raises once its caller has gone ----

    def status(self, has_gone: Callable[[], None]) -> dict[str, Any]:
        """Describe the machine."""
        said = self._ask_status()
        row, one = self.running.machine, self.record
        server = self._server.process  # another thread may start it again
        return {
            "name": row.name,
            "state": self._state(said),
            "why": self._why(said),
            "hypervisor": said,
            "recorded": asdict(self.running.recorded),
            "pids": {
                "supervisor": os.getpid(),
                "hypervisor": self._process.pid,
                "server": server.pid if server else None,
            },
            "seconds": time.monotonic() - self._started,
            "is_paused": one.is_paused,
            "is_tracked": self.running.guest_ram.is_tracked,
            "generation": self.running.generation,
            "directory": str(self._directory),
            "console": str(self._directory / "console"),
            "unsaved_pages": self.running.guest_ram.unsaved_pages,
            "server_restarts": self._server.restarts,
            "untold": self._untold,
            "no_snapshot": self._blockers(said),
        }

    def _blockers(self, said: str) -> list[str]:
        """Return why the hypervisor would take no snapshot now: who looks hears it before they want one."""
        if said == _ENDED or said.startswith(_UNKNOWN):
            return []
        try:
            return self._process.snapshot_blockers()
        except MonitorError:  # it has ended since, or answers no more: the next look says so
            return []

    def _ask_status(self) -> str:
        """Return what the hypervisor says of itself, or why it says nothing."""
        try:
            return self._process.status
        except MonitorTimeout as error:
            return f"{_UNKNOWN}{error}"
        except MonitorError:  # one that was killed gives up its connection a moment before it has ended
            self.wake()  # where it has not, `run` connects again
            within(DYING_SECONDS, lambda: self._process.wait(0) is not None or not self._process.is_disconnected)
            if self._process.wait(0) is not None:
                return _ENDED
        try:
            return self._process.status
        except MonitorError as error:
            return f"{_UNKNOWN}{error}"

    @property
    def _moved(self) -> str:
        """Say that the store is not where it was opened; nothing where it is."""
        try:
            self._store._opened.catalog.refuse_moved()
        except (OSError, StateError) as error:
            return words_of(error)
        return ""

    def _state(self, said: str) -> str:
        if (
            said == _ENDED
            or self._fault
            or (self.running.is_broken and not self._goes_back)
            or said in ("internal-error", "guest-panicked", "shutdown")
        ):
            return "failed"
        return "running" if said == "running" else "paused"

    def _why(self, said: str) -> str:
        """Say why it does not run, if it does not."""
        if said == _ENDED:
            return "its hypervisor has just ended; start it again"
        if self._fault:
            return self._fault
        if self.running.is_broken:
            return (
                "it is being put back to a snapshot"
                if self._goes_back
                else "a revert of it failed half-way: revert it again, or stop it"
            )
        if said == qemu.DISK_ERROR:
            is_full = (self._event or {}).get("nospace")
            return f"a disk had an error{': no room is left in the store' if is_full else ''}; resume it when that is mended"
        if said == "running":
            return self._moved
        if said == "shutdown":
            return "its guest has shut down, and QEMU stays (-no-shutdown); revert it, or stop it"
        if said == "suspended":
            return "its guest sleeps (S3); 'onionskin machine resume' wakes it"
        return "its user paused it" if self.record.is_paused else f"the hypervisor says {said!r}"

    def pause(self, has_gone: Callable[[], None]) -> bool:
        """Have it stand still until it is resumed. Return whether it ran."""
        with self._turn(has_gone):
            ran = self._process.pause()
            try:
                self._note(is_paused=True)
            except BaseException:
                if ran:
                    self._process.resume()
                raise
            return ran

    def resume(self, has_gone: Callable[[], None]) -> None:
        """Let it go on."""
        with self._turn(has_gone):
            if self.running.is_broken:
                raise StateError(
                    f"machine {self._name!r} is between two states, since a revert of it failed; revert it again, or stop it"
                )
            self._process.resume()
            self._process.wake()
            self._tries.clear()
            self._note_what_is(is_paused=False)
            self._thaw()

    def stop(self, has_gone: Callable[[], None], timeout: float | None, force: bool) -> str:
        """End the machine: its guest is asked to shut down; with `force` it is ended at once. Return what happened.

        Raises
        ------
        StateError
            The guest did not shut down in time. It runs on.
        """
        if force:
            self._is_forced = True
            self._process.quit(QUIT_SECONDS if timeout is None else timeout)
        else:
            self._ask_to_shut_down(has_gone, STOP_SECONDS if timeout is None else timeout)
        self.wake()
        self._ended.wait()
        return "forced" if force else "shut down"

    def _ask_to_shut_down(self, has_gone: Callable[[], None], seconds: float) -> None:
        with self._turn(has_gone):
            if self.running.is_broken:
                raise StateError(f"machine {self._name!r} is between two states; end it with --force")
            if self._process.guest_has_ended:
                self._process.quit(QUIT_SECONDS)
                return
            if self._process.is_paused:  # a guest that stands still hears nothing
                self._process.resume()
                self._note_what_is(is_paused=False)
                self._thaw_or_say_why_not()
            self._process.wake()  # nor does one that sleeps
            self._process.power_down()
        deadline = time.monotonic() + seconds
        while self._process.wait(0.05) is None:
            has_gone()
            if self._is_stopped and self._guest_has_ended():  # with -no-shutdown the process stays
                self._process.quit(QUIT_SECONDS)
                return
            if time.monotonic() > deadline:
                raise StateError(
                    f"the guest of machine {self._name!r} did not shut down within {seconds:g} s, and runs on; shut it down "
                    "from inside, or end it with --force"
                )
            if self._is_stopped and self._lacks_room():
                raise StateError(
                    f"the guest of machine {self._name!r} did not shut down, and stands still: a disk had an error, as no "
                    "room is left in the store; make room and resume it, which shuts it down, or end it with --force"
                )

    def _guest_has_ended(self) -> bool:
        try:
            return self._process.guest_has_ended
        except MonitorError:  # the process is ending itself
            return False

    def _lacks_room(self) -> bool:
        """Whether it stands still until somebody makes room in the store and resumes it."""
        if not (self._event or {}).get("nospace"):
            return False
        try:
            return self._process.status == qemu.DISK_ERROR
        except MonitorError:  # it answers late, or is ending
            return False

    def stop_soon(self) -> None:
        """End the machine in the background, for a signal: its guest is asked, and it is ended when that takes too long."""

        def work() -> None:
            try:
                if self._pool is not None:
                    raise StateError("it waits in a pool, and its guest never ran")
                self._ask_to_shut_down(lambda: None, STOP_SECONDS)
            except (OSError, OnionskinError) as error:
                self._log(words_of(error))
                self._is_forced = True
                self._process.quit(QUIT_SECONDS)
            self.wake()

        if self._stopping is None:
            self._stopping = Thread(target=work, name="onionskin stop", daemon=True)
            self._stopping.start()

    def snapshot(
        self, has_gone: Callable[[], None], name: str | None, note: str, mode: str | None, freeze: bool
    ) -> dict[str, Any]:
        """Take a snapshot: see `capture.snapshot`."""
        with (
            self._turn(has_gone),
            self._held(),
            self._marked(is_frozen=freeze, is_standing=not self._process.is_paused),
        ):
            return asdict(capture.snapshot(self.running, name, note, mode, freeze=freeze, go_on=has_gone))

    def revert(self, has_gone: Callable[[], None], name: str) -> None:
        """Put the machine back to a snapshot, in place: see `restore.revert`."""
        with self._turn(has_gone), self._held():
            goes_on = self.running.goes_on if self.running.is_broken else self._would_go_on()
            self._note(is_reverting=True, is_standing=goes_on)
            stays = False
            self._goes_back = True
            try:
                # Before the guest goes on: one that did is not to be put back again because this process was killed then.
                with self._noting_back() as to_note:
                    restore.revert(self.running, name, stays=self.record.is_paused, to_note=to_note)
            except BaseException:
                # One that did not answer when it was to go on may be found stopped when it does.
                stays = goes_on and not self.running.is_broken and self._may_stand(for_us_alone=True)
                raise
            finally:
                self._goes_back = False
                is_broken = self.running.is_broken
                is_standing = stays or (is_broken and self.running.goes_on)
                self._note_what_is(is_reverting=is_broken, is_standing=is_standing, **self._of_guest())
            if self.running.is_frozen and not self._process.is_paused:  # it answers late while its guest begins to run
                self._thaw()

    @contextmanager
    def _noting_back(self) -> Iterator[Callable[[Recorded, bool], Callable[[], None]]]:
        """Give what writes beforehand what is noted when a machine is back, and returns what notes it then, at once."""
        with ExitStack() as drafts:

            def to_note(recorded: Recorded, is_frozen: bool) -> Callable[[], None]:
                what: dict[str, Any] = {
                    "recorded": recorded.to_json(), "told": self.running.generation, "is_frozen": is_frozen,
                    "is_reverting": False,
                }  # fmt: skip
                with self._guard:
                    before, noted = self.record, replace(self.record, **what)
                with suppress(OSError):
                    draft = noted.stage(self._directory)
                    drafts.callback(draft.drop)
                    return lambda: self._put(draft, before, noted, what)
                return lambda: self._note_what_is(**what)

            yield to_note

    def _put(self, draft: record.Staged, before: Record, noted: Record, what: dict[str, Any]) -> None:
        """Note what was written beforehand. Where something else was noted since, or it cannot be put there, write it now."""
        with self._guard:
            with suppress(OSError, StateError):
                self._store._opened.catalog.refuse_moved()
                if self.record is before:
                    draft.put()
                    self.record = noted
                    return
            self._note_what_is(**what)

    def _of_guest(self) -> dict[str, Any]:
        """Return what a record has of the guest that a revert put in the place of the one before."""
        running = self.running
        return {
            "recorded": running.recorded.to_json(),
            "told": running.generation,
            "is_frozen": running.is_frozen,
        }

    def tell(self, has_gone: Callable[[], None], hostname: str | None, clock: bool) -> list[str]:
        """Tell the guest, through its agent, who and when it is. Return what could not be done."""
        with self._process.agent() as agent:
            return tell_identity(agent, hostname=hostname, mac=None, clock_ns=time.time_ns() if clock else None)

    @contextmanager
    def _turn(self, has_gone: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody else does something to the machine. Whoever has given up meanwhile has nothing done to it."""
        with self.running.guard:
            has_gone()
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Die where the machine is not held any more behind the block: another supervisor takes it over, and holds it.

        Where its process has ended meanwhile, and so its memory cannot be reached, that is said.
        """
        try:
            yield
        except ProcessLookupError as error:
            raise StateError(
                f"QEMU of machine {self._name!r} has ended meanwhile, so this was not done; 'onionskin machine status' "
                "says how it ended"
            ) from error
        finally:
            if self.running.ram_volume.closed:
                self._log("the RAM volume could not be opened again; this supervisor ends, and the machine runs on")
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def _marked(self, *, is_frozen: bool, is_standing: bool) -> Iterator[None]:
        """Note for the time of the block that the guest's file systems may be frozen, or that it may stand still for it."""
        if not (is_frozen or is_standing):
            yield
            return
        before = self.record
        self._note(is_frozen=is_frozen or before.is_frozen, is_standing=is_standing or before.is_standing)
        stays = False
        try:
            yield
        except BaseException:
            stays = is_standing and self._may_stand()
            raise
        finally:
            is_standing = before.is_standing or stays
            self._note_what_is(is_frozen=self.running.is_frozen, is_standing=is_standing)

    def _would_go_on(self) -> bool:
        """Whether the machine goes on behind a revert: one that nobody stopped does, too."""
        return not self._process.is_paused or (not self.record.is_paused and self._process.has_stopped_itself)

    def _may_stand(self, *, for_us_alone: bool = False) -> bool:
        try:
            self._process.hear_all()  # a stop that took too long may still come: whoever does not answer now may stand then
            return self._process.is_paused and not (for_us_alone and self._process.has_stopped_itself)
        except MonitorError:  # it answers nothing, and may be found stopped when it does
            return True


def _refuse_without_pidfd() -> None:
    """Raise StateError where nobody can wait for the end of a process: the supervisor of a machine would end at once.

    So where none can be ended by what it was opened as: its number alone may be another one's by then.
    """
    call = "pidfd_open"
    try:
        descriptor = os.pidfd_open(os.getpid())
        try:
            call = "pidfd_send_signal"
            signal.pidfd_send_signal(descriptor, 0)  # of no signal, which only looks whether it may
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StateError(
            f"a machine wants a call of the kernel that is refused here ({call}: {error.strerror}); an older sandbox may "
            "not know it"
        ) from None


def _refuse_elsewhere(begins: machines.Beginning, only_from: str) -> None:
    """Raise StateError where the next start of a machine, which is held, is not from what it was put back to."""
    name, taken = begins.machine.name, begins.snapshot
    if only_from == DISKS_ALONE:
        if begins.ram is not None:
            raise StateError(
                f"machine {name!r} was put back meanwhile, so it would not boot; it was not started; try again"
            )
        return
    has_ram = begins.ram is not None or (taken is not None and taken.ram is None)
    if not has_ram or (BEGINNING if taken is None else taken.id.hex()) != only_from:
        raise StateError(
            f"machine {name!r} was put back, and before it was started somebody put it back to something else, gave up its "
            "RAM, or dropped the snapshot; it was not started; revert it again"
        )


def _open_process(process: ProcessId) -> int | None:
    """Open a process to wait for its end, or return None where it has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if process.is_alive:
        return descriptor
    os.close(descriptor)
    return None


def supervise(
    store: "Store",
    name: str,
    *,
    machine: bytes | None = None,
    paused: bool = False,
    only_from: str | None = None,
    log: Callable[[str], None],
    ready: Callable[[], None],
    pool: socket.socket | None = None,
) -> int:
    """Run a machine in this process, until it ends. `ready` is called once its guest runs. The store is closed.

    SIGTERM, SIGINT and SIGHUP have the guest shut down. With `pool`, the machine waits in a pool at first: see `Supervisor`.
    """
    with _short_turns_of_threads():
        return _supervise(Supervisor(store, name, log, machine=machine, pool=pool), paused, only_from, ready)


@contextmanager
def _short_turns_of_threads() -> Iterator[None]:
    """Have threads of this process take turns soon. It may be another program's, which has a machine in the foreground."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _supervise(supervisor: Supervisor, paused: bool, only_from: str | None, ready: Callable[[], None]) -> int:
    supervisor.begin(paused=paused, only_from=only_from)
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, lambda *_: supervisor.stop_soon())
        ready()
    except BaseException:
        supervisor.end()
        raise
    try:
        return supervisor.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
