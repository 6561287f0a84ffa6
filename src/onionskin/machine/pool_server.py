"""The process that holds a pool: `python -m onionskin.machine.pool_server`, as `pool.py` starts it.

    begin       load all that supervisors and servers of disks need, make the RAM file, ask the hypervisor what it is
    fill        make rows of machines in a process of its own, and fork a supervisor for each
    run         wait for forks that want machines, for machines that are ready or have ended, and for signals

What must hold: this process forks, so it has no other thread, and no store open. A supervisor whose pool has gone ends,
unless a fork has its machine; so whatever ends this process leaves no machine behind, and rows that are left have an end of
life. A pool that cannot have machines any more, because its snapshot is gone, ends.
"""

import fcntl
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin.base.os_errors import words_of
from onionskin.base.sockets import UnixListener, credentials_of, may_connect
from onionskin.base.waiting import within
from onionskin.control import frames
from onionskin.errors import MachineNotFoundError, OnionskinError, SnapshotNotFoundError, StateError
from onionskin.machine import daemon, fork
from onionskin.machine.pool import SOCKET_PREFIX, VERSION, MachinePool, socket_path
from onionskin.machine.record import SUPERVISOR_LOG, make_directory
from onionskin.nbd.systemd import notify
from onionskin.operations import machine_forks, machines

if TYPE_CHECKING:
    from onionskin.machine.ram_files import RamFile
    from onionskin.store import Store

# To fill up takes as much of the processors as the forks that were just taken need for their first steps.
QUIET_SECONDS = 1.0
AGAIN_SECONDS = 10.0  # after a machine could not be started
CLIENT_SECONDS = 5.0
ACCEPT_AGAIN_SECONDS = 0.2  # where no descriptor or no memory is left
END_SECONDS = 60.0
BEGIN_SECONDS = 10.0  # for which another pool that begins in the same directory is waited for
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(eq=False)
class Member:
    """A machine that waits.

    Attributes
    ----------
    id : bytes
    pid : int
        Its supervisor.
    pool : socket
        Its supervisor has the other end, and ends when this one is closed.
    started : int or None
        Where its supervisor says that it is ready, or why it is not; None: it is.
    """

    id: bytes
    pid: int
    pool: socket.socket
    started: int | None

    def let_go(self) -> None:
        """Close what leads to its supervisor. Further calls do nothing."""
        self.pool.close()
        if self.started is not None:
            os.close(self.started)
            self.started = None


def listen(directory: Path, snapshot: bytes) -> UnixListener:
    """Listen as the pool of a snapshot, or raise StateError where there is one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A socket gets its name by a rename, so of two that begin at once one would take the other's, which nobody could end.
        if not within(BEGIN_SECONDS, lambda: _lock_alone(descriptor)):
            raise StateError(
                f"another process has had {directory} alone for {BEGIN_SECONDS:g} s, to begin a pool too, or was stopped in "
                "it; try again when it has ended"
            )
        if MachinePool(directory, "", snapshot).is_there:
            raise StateError(
                "there is a pool of that snapshot already; end it first, with 'onionskin machine pool --stop'"
            )
        for left in directory.glob(f".{SOCKET_PREFIX}*"):  # by a pool that was killed before its socket had its name
            left.unlink(missing_ok=True)
        return UnixListener(socket_path(directory, snapshot))
    finally:
        os.close(descriptor)


def _lock_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Pool:
    """A pool, in this process.

    Parameters
    ----------
    what : dict
        As `pool.what_to_hold` makes it.
    writer : int, optional
        Who started it waits for an answer there, and for its end.
    """

    def __init__(self, what: dict[str, Any], writer: int | None) -> None:
        self._what = what
        self._writer = writer
        self._machine = bytes.fromhex(what["machine"])
        self._snapshot = bytes.fromhex(what["snapshot"])
        self._warm = int(what["warm"])
        self._root = Path(what["store"])
        self._members: list[Member] = []
        self._taken: dict[socket.socket, list[Member]] = {}  # by the connections by which they were taken
        self._gone: dict[int, Member] = {}  # by their supervisors, which run as those of forks, or are ending
        self._cleaning: set[int] = set()  # processes that clean up after machines
        self._waiting: list[socket.socket] = []  # who wants to know when all are ready
        self._stopping: list[socket.socket] = []  # who wants to know when it has ended
        self._is_ending = False
        self._home: tuple[int, int] | None = None  # the store's catalog; a copy in its place has another one
        self._due = 0.0
        self._failure = ""
        self._error: OSError | OnionskinError | None = None  # which that is
        self._held: RamFile | None = None
        self._listener: UnixListener | None = None
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    # ---- the begin ----

    def begin(self) -> None:
        """Load what supervisors need, listen, and start the first machines."""
        fork.load_servers()
        importlib.import_module("onionskin.machine.supervisor")
        directory = make_directory(self._root, self._machine)
        self._listener = listen(directory, self._snapshot)
        self._held = self._in_store(self._prepare)
        if threading.active_count() > 1:
            raise StateError("a library of this Python has started threads, and a pool forks; it cannot run here")
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._end_soon)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # `run` wakes up, and takes note
        self._fill()

    def _in_store(self, work: "Callable[[Store], Any]") -> Any:
        from onionskin.store import Store

        with Store(self._what["store"], create=False, trust=self._what["trust"]) as store:
            found = os.stat(store._opened.catalog.path)  # noqa: PTH116 - a text
            here = (found.st_dev, found.st_ino)
            self._home = self._home or here
            if here != self._home:
                raise StateError(
                    f"another store is at {self._what['store']} than that of the pool, which was moved: move it back, or end "
                    "the pool"
                )
            return work(store)

    def _prepare(self, store: "Store") -> "RamFile":
        """Make the RAM file that all of them map, and see that the snapshot runs here."""
        from onionskin.machine import restore
        from onionskin.machine.hypervisor import compare
        from onionskin.machine.qemu import QemuHypervisor
        from onionskin.machine.ram_files import RamFiles
        from onionskin.machine.running import source_of

        _, snapshot = self._names(store)
        row = machines.find(store._opened.catalog, self._machine)
        saved = restore.find_saved(store, row, snapshot)
        disks = store._opened.catalog.disks_of_machine(row.id)
        compare(saved.recorded, QemuHypervisor().check(saved.configuration, len(disks)))
        return RamFiles(store._opened).use(source_of(store, saved.volume, saved.layer, saved.ram_bytes))

    def _names(self, store: "Store") -> tuple[str, str]:
        """Return what machine and snapshot are called now."""
        catalog = store._opened.catalog
        with catalog.reading():
            machine = catalog.machine_with_id(self._machine)
            snapshot = catalog.machine_snapshot_with_id(self._snapshot)
        if machine is None:
            raise MachineNotFoundError("the machine of the pool was deleted")
        if snapshot is None:
            raise SnapshotNotFoundError("the snapshot of the pool was dropped")
        return machine.name, snapshot.name

    # ---- filling up ----

    def _fill(self) -> None:
        """Start as many machines as are missing."""
        missing = self._warm - len(self._members)
        try:
            made = self._make(missing)
        except (MachineNotFoundError, SnapshotNotFoundError) as error:
            daemon.log_line(f"the pool ends: {error}")
            self._failure, self._error = words_of(error), error
            self._is_ending = True
            return
        except (OSError, OnionskinError) as error:
            self._note_failure(error)
            return
        try:
            for name, id in made.items():
                self._start(name, bytes.fromhex(id))
        except OSError as error:  # no process could be forked; the rows that are left have an end of life
            self._note_failure(error)

    def _note_failure(self, error: BaseException) -> None:
        self._failure = words_of(error)
        self._error = error if isinstance(error, OSError | OnionskinError) else StateError(self._failure)
        self._due = time.monotonic() + AGAIN_SECONDS
        daemon.log_line(f"a machine of the pool could not be started: {self._failure}")
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            self._reply(connection, {"error": frames.pack_error(self._error)})

    def _make(self, count: int) -> dict[str, str]:
        """Make the rows of machines. Returns their ids by their names."""

        def make(store: "Store") -> dict[str, str]:
            made = machine_forks.make_waiting(store._opened, self._machine, *self._names(store), count)
            return {name: id.hex() for name, id in made.items()}

        return dict(self._in_child(make))

    def _in_child(self, work: "Callable[[Store], Any]") -> Any:
        """Return what is found in a process that may open the store, or raise its error."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        if (child := _forked(reader, writer)) == 0:
            try:
                self._forget()
                answer = {"found": self._in_store(work)}
            except BaseException as error:
                answer = {"error": frames.pack_error(error)}
            with suppress(BaseException):
                os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        try:
            answer = json.loads(daemon._read_all(reader) or b"{}")
        finally:
            os.close(reader)
            os.waitpid(child, 0)
        if "error" in answer:
            raise frames.unpack_error(answer["error"])
        if "found" not in answer:
            raise StateError("a process of the pool that looked into the store died")
        return answer["found"]

    def _start(self, name: str, id: bytes) -> None:
        """Fork the supervisor of a machine."""
        here, there = socket.socketpair()
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            pid = _forked(reader, writer)
        except BaseException:
            here.close()
            there.close()
            raise
        if pid == 0:
            status = 1
            try:
                here.close()
                os.close(reader)
                self._forget()
                log = make_directory(self._root, id) / SUPERVISOR_LOG
                status = fork._supervise(self._what | {"paused": True}, name, id, writer, str(log), [], pool=there)
            finally:
                os._exit(status)
        os.close(writer)
        there.close()
        self._members.append(Member(id, pid, here, reader))

    def _forget(self) -> None:
        """Close, in a process that was forked, all that is the pool's."""
        os.environ.pop("NOTIFY_SOCKET", None)  # that a server of disks is ready says nothing of the pool
        signal.set_wakeup_fd(-1)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for one in (*self._members, *(member for taken in self._taken.values() for member in taken)):
            one.let_go()
        for connection in (*self._taken, *self._waiting, *self._stopping):
            connection.close()
        if self._listener is not None:
            self._listener.socket.close()
        if self._held is not None:
            self._held.close()
        for descriptor in (self._wake_reader, self._wake_writer, *([] if self._writer is None else [self._writer])):
            os.close(descriptor)

    # ---- waiting ----

    def tell(self, value: dict[str, object]) -> None:
        """Answer who started it, once."""
        if self._writer is not None:
            daemon._answer(self._writer, value)
            self._writer = None

    def run(self) -> None:
        """Hold the pool until it is told to end. Who started it hears when all its machines are ready."""
        is_told = False
        while not self._is_ending:
            if not is_told and self._is_full:
                notify("READY=1")
                self.tell({"ready": True})
                is_told = True
            if not is_told and self._error is not None:
                raise self._error
            self._wait()
            if self._milliseconds_left() == 0 and not self._is_ending:
                self._fill()
        if not is_told and self._error is not None:
            raise self._error

    @property
    def _is_full(self) -> bool:
        return len(self._members) >= self._warm and all(one.started is None for one in self._members)

    def _wait(self) -> None:
        """Wait until something happens, and see to it."""
        assert self._listener is not None
        poll = select.poll()
        calls: dict[int, Callable[[], None]] = {}

        def on(descriptor: int, events: int, call: Callable[[], None]) -> None:
            poll.register(descriptor, events)
            calls[descriptor] = call

        on(self._listener.socket.fileno(), select.POLLIN, self._accept)
        on(self._wake_reader, select.POLLIN, self._drain)
        for member in self._members:
            on(member.pool.fileno(), 0, partial(self._lose, member))
            if member.started is not None:
                on(member.started, select.POLLIN, partial(self._hear, member))
        for connection in (*self._taken, *self._waiting):
            on(connection.fileno(), select.POLLIN, partial(self._let_go, connection))
        for descriptor, _ in poll.poll(self._milliseconds_left()):
            calls[descriptor]()
        self._reap()

    def _milliseconds_left(self) -> float | None:
        """Return how long it is until machines are to be started; None: none is missing, or not while forks begin."""
        if len(self._members) >= self._warm or self._taken:
            return None
        return max(0.0, self._due - time.monotonic()) * 1000

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)

    def _end_soon(self, *_: object) -> None:
        self._is_ending = True

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self._gone.pop(pid, None)
                self._cleaning.discard(pid)

    def _hear(self, member: Member) -> None:
        """Hear whether a machine is ready. Its supervisor says one thing, in one write, and closes."""
        if member not in self._members or member.started is None:
            return
        text = os.read(member.started, 1 << 16)
        os.close(member.started)
        member.started = None
        try:
            value = json.loads(text)
        except ValueError:
            value = {"error": frames.pack_error(StateError("its supervisor died; see its log"))}
        if "error" in value:
            self._drop(member)
            self._note_failure(frames.unpack_error(value["error"]))
        elif self._is_full:
            self._failure, self._error = "", None
            waiting, self._waiting = self._waiting, []
            for connection in waiting:
                self._reply(connection, {"result": None})

    def _lose(self, member: Member) -> None:
        """Note that a supervisor has ended."""
        if member not in self._members:
            return
        if member.started is not None:
            self._hear(member)
        if member in self._members:
            daemon.log_line("a machine of the pool has ended")
            self._drop(member)
            self._due = time.monotonic() + QUIET_SECONDS

    def _drop(self, member: Member) -> None:
        self._members.remove(member)
        member.let_go()
        self._clean_up_after(member)

    def _clean_up_after(self, member: Member) -> None:
        """End what a supervisor that was killed left, and drop its machine, in a process that may open the store."""

        def clean(store: "Store") -> None:
            row = store._opened.catalog.machine_with_id(member.id)
            if row is not None and not machine_forks.is_taken(row):
                store._machine_of(row).stop(force=True)
                store._delete_machines([row.name], recursive=False, agreed={row.name: row.id})

        stays = "what a machine of the pool left stays until it expires"
        try:
            pid = os.fork()
        except OSError as error:
            daemon.log_line(f"{stays}: {words_of(error)}")
            return
        if pid == 0:
            try:
                self._forget()
                self._in_store(clean)
            except BaseException as error:
                with suppress(BaseException):
                    daemon.log_line(f"{stays}: {words_of(error)}")
            os._exit(0)
        self._cleaning.add(pid)

    # ---- who asks ----

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.socket.accept()
        except OSError as error:
            daemon.log_line(f"a connection to the pool could not be accepted: {words_of(error)}")
            time.sleep(ACCEPT_AGAIN_SECONDS)  # it waits still, and nothing else would be done meanwhile but to try
            return
        try:
            _, uid, _ = credentials_of(connection)
            if not may_connect(uid, os.geteuid()):
                connection.close()
                return
            connection.settimeout(CLIENT_SECONDS)
            request = frames.receive(connection, bytes_max=frames.REQUEST_BYTES_MAX) or {}
            self._answer(connection, request)
        except (OSError, OnionskinError, ValueError, TypeError):
            connection.close()

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        verb = request.get("verb")
        if request.get("version") != VERSION:
            self._reply(
                connection,
                {"error": frames.pack_error(StateError("the pool is another version of onionskin; use the same"))},
            )
        elif verb == "take":
            self._take(connection, int(request.get("count", 0)))
        elif verb == "status":
            self._reply(connection, {"result": self._status()})
        elif verb == "wait" and self._is_full:
            self._reply(connection, {"result": None})
        elif verb == "wait":
            self._waiting.append(connection)
        elif verb == "stop":
            self._stopping.append(connection)
            self._is_ending = True
        else:
            raise ValueError(verb)

    def _take(self, connection: socket.socket, count: int) -> None:
        taken = [one for one in self._members if one.started is None][: max(0, count)]
        frames.send(connection, {"result": [one.id.hex() for one in taken]}, bytes_max=frames.REPLY_BYTES_MAX)
        self._members = [one for one in self._members if one not in taken]
        self._taken[connection] = taken

    def _let_go(self, connection: socket.socket) -> None:
        """Let go of what somebody took who has closed the connection: it is a fork's, or ends."""
        for member in self._taken.pop(connection, []):
            member.let_go()
            self._gone[member.pid] = member
        if connection in self._waiting:
            self._waiting.remove(connection)
        connection.close()
        if not self._taken:
            self._due = time.monotonic() + QUIET_SECONDS

    def _status(self) -> dict[str, Any]:
        ready = sum(one.started is None for one in self._members)
        return {
            "pid": os.getpid(),
            "warm": self._warm,
            "ready": ready,
            "starting": len(self._members) - ready,
            "failure": self._failure,
        }

    def _reply(self, connection: socket.socket, value: dict[str, Any]) -> None:
        with connection, suppress(OSError, ValueError):
            frames.send(connection, value, bytes_max=frames.REPLY_BYTES_MAX)

    # ---- the end ----

    def end(self) -> None:
        """Let go of all machines, and wait until they are gone."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._taken):
            self._let_go(connection)
        for member in self._members:
            member.let_go()
        self._gone |= {member.pid: member for member in self._members}
        self._reap()
        _wait_for_ends([*self._ending(), *self._cleaning])
        if self._held is not None:
            self._held.close()
        for connection in self._stopping:
            self._reply(connection, {"result": None})

    def _ending(self) -> list[int]:
        """Return the supervisors whose machines no fork has taken: those will end."""

        def look(store: "Store") -> list[int]:
            rows = {pid: store._opened.catalog.machine_with_id(one.id) for pid, one in self._gone.items()}
            return [pid for pid, row in rows.items() if row is None or not machine_forks.is_taken(row)]

        try:
            return list(self._in_child(look))
        except (OSError, OnionskinError) as error:
            daemon.log_line(f"it is not known which machines of the pool are ending: {words_of(error)}")
            return []


def _wait_for_ends(children: Iterable[int]) -> None:
    """Wait until these children have ended; one that hangs is left, and ends by itself when it goes on."""
    deadline = time.monotonic() + END_SECONDS
    for child in children:
        if not within(max(0.0, deadline - time.monotonic()), partial(_has_ended, child)):
            daemon.log_line(f"process {child}, which supervises a machine of the pool, does not end")


def _has_ended(child: int) -> bool:
    """Whether a child has ended. It takes no descriptor, of which none may be left."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _forked(reader: int, writer: int) -> int:
    """Fork, as os.fork. Where that fails, close a pipe that was made for the child."""
    try:
        return os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise


def main(text: str) -> int:
    """Be the process of a pool: the argument is what `pool.start` gives."""
    what = json.loads(text)
    writer = what.pop("writer", None)
    if writer is not None:
        if os.fork():
            os._exit(0)
        os.set_inheritable(writer, False)
        try:
            fork._write_to(what["log"])
        except OSError as error:
            daemon._answer(writer, {"error": frames.pack_error(error)})
            return 1
    pool = Pool(what, writer)
    try:
        pool.begin()
        pool.run()
    except (OSError, OnionskinError) as error:
        daemon.log_line(f"{type(error).__name__}: {words_of(error)}")
        pool.end()
        pool.tell({"error": frames.pack_error(error)})
        return 1
    notify("STOPPING=1")
    pool.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
