"""The control socket of a volume that is being served: other processes work on the volume through it.

What must hold: only the user who runs the server, and root, can connect (the mode of the file says so, and SO_PEERCRED
is asked too). A request is bounded and checked against one table before anything is called. An operation is cancelled
when its caller goes away or asks for it. The other end raises the exception that the operation raised. While an
operation runs, its caller hears every few seconds that the server is alive, so that it need not wait for a process that
was stopped.

On a connection, the server greets first. Then requests and replies follow each other. `frames` describes the frames,
and `_ARGUMENTS` is the list of verbs. docs/design.md describes the protocol under "Live operations".
"""

import base64
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any, Protocol

from onionskin.base.forking import ForkableLock
from onionskin.base.modes import file_mode
from onionskin.base.naming import check_name, check_note, several, some_of
from onionskin.base.paths import FilePath
from onionskin.base.sockets import UnixListener, credentials_of, has_hung_up, may_be_read, may_be_written, may_connect
from onionskin.base.threads import SureThread
from onionskin.catalog import new_id
from onionskin.catalog.tree import Snapshot
from onionskin.control import acceptor, frames, groups
from onionskin.errors import OnionskinError, StateError
from onionskin.kernels._volume import ShortTurns
from onionskin.operations import forks, machines, snapshots
from onionskin.operations.fold import fold_unnamed_below
from onionskin.storage.open_head import OpenHead
from onionskin.volume import Volume

CONNECTIONS_MAX = 16
CHOOSING_MAX = 512  # callers of a socket of several volumes that have not said yet which they mean
CHOICE_SECONDS = 10
_GONE = "this process does not serve the volume any more; try again"
IDLE_SECONDS = 600
READ_BYTES_MAX = 1 << 20
ID_BYTES = 16
LOGGED_CHARACTERS = 200
EXTENTS_IN_FRAME = 20_000
SNAPSHOTS_IN_FRAME = 64
NOTES_IN_FRAME = 1 << 19  # characters, each of which is up to twelve bytes of JSON


class Served(Protocol):
    """A volume that is being served, as `nbd.exported` knows it."""

    @property
    def volume(self) -> Volume:
        """The volume, open for writing."""

    @property
    def allow_revert(self) -> bool:
        """Whether the disk may change under its clients."""

    def info(self) -> dict[str, Any]:
        """Describe the volume, and say where it is served."""

    def stats(self) -> dict[str, Any]:
        """Return counters and connections."""

    def rename(self, new_name: str, check: Callable[[], None]) -> None:
        """Give the volume another name, in the catalog and for clients. `check` is for the transaction."""

    def without_views(self, names: set[str] | None) -> AbstractContextManager[None]:
        """Keep views of these snapshots (None: of all) closed while the context is active."""

    def paused(self) -> AbstractContextManager[None]:
        """Hold all requests of clients back while the context is active."""


_listening_guard = ForkableLock()
_listening: "dict[str, ControlSocket]" = {}  # by their paths: a caller of a group talks with one for all volumes


def is_listening(path: FilePath) -> bool:
    """Whether this process listens on the control socket at a path, as it does for each volume that it serves."""
    with _listening_guard:
        return path.absolute() in _listening


class Cancelled(KeyboardInterrupt):
    """The caller disconnected, or cancelled the operation."""


class ControlSocket:
    """Listens on the control socket of one volume. Each connection has a thread.

    Parameters
    ----------
    path : FilePath
        The socket. One that a process which is gone has left there is replaced.
    served : Served
        The volume.
    log : callable
        Takes a line.
    is_shared : bool
        Whether the path may be one more name of a socket that other volumes of the store have too. Callers of another
        version may not know that, so what is served from the start has a socket of its own.
    listens : bool
        Whether it listens at once. Otherwise `listen_together` has it listen.
    """

    def __init__(
        self,
        path: FilePath,
        served: Served,
        log: Callable[[str], None],
        *,
        is_shared: bool = False,
        listens: bool = True,
    ) -> None:
        self._path = path.absolute()
        self._held: Served | None = served
        self._log = log
        self._owner = os.geteuid()
        self._guard = threading.Lock()
        self._sessions: dict[threading.Thread, socket.socket] = {}
        self._talking: set[_Session] = set()  # under the guard
        self._is_closed = False  # under the guard
        self._borrowed = 0  # under the guard: how many sessions of other sockets use the volume
        self._is_told = False  # under the guard: whether a thread says to their callers that this process lives
        with _listening_guard:
            _listening[self._path] = self
        self._listener: _Listener | _SharedListener | None = None
        try:
            if listens:
                self._listener = shared_listener(self._path, log) if is_shared else _Listener(self, self._path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take no more requests. Running operations go on. Idempotent."""
        with _listening_guard:
            if _listening.get(self._path) is self:
                del _listening[self._path]
        listener, self._listener = self._listener, None
        if listener:
            listener.leave(self._path)
        with self._guard:
            self._is_closed = True
            connections = list(self._sessions.values())
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    @property
    def is_connected(self) -> bool:
        """Whether a program is connected, or seals the volume as one of a group through another socket."""
        with self._guard:
            return bool(self._sessions or self._borrowed)

    @contextmanager
    def borrowed(self) -> Iterator[OpenHead]:
        """Give the head of the volume, for a session of another socket."""
        with self._guard:
            self._borrowed += 1
        try:
            yield self._served.volume._opened.to_write()
        finally:
            with self._guard:
                self._borrowed -= 1

    def paused(self) -> AbstractContextManager[None]:
        """Hold all requests of clients for the volume back while the context is active."""
        return self._served.paused()

    def join(self, seconds: float) -> None:
        """Wait until the operations that ran when it was closed have sent their replies."""
        with self._guard:
            threads = list(self._sessions)
        for thread in threads:
            thread.join(seconds)

    def let_go(self) -> None:
        """Hold the volume no longer, which is closed. It holds this, so else both stay until garbage is collected."""
        self._held = None

    @property
    def _served(self) -> Served:
        held = self._held
        if held is None:
            raise StateError(_GONE)
        return held

    def take(self, connection: socket.socket) -> None:
        """Serve a connection in a thread of its own, if there are not too many."""
        thread = SureThread(target=self._serve, args=(connection,), name="onionskin control", daemon=True)
        if self._let_in(thread, connection):
            self._start(thread, connection)

    def take_here(self, connection: socket.socket, first: "dict[str, Any] | None") -> None:
        """Serve a connection, in this thread; its first request may have come already."""
        if self._let_in(threading.current_thread(), connection):
            self._serve(connection, first)

    def _let_in(self, thread: threading.Thread, connection: socket.socket) -> bool:
        with self._guard:
            is_full, is_closed = len(self._sessions) >= CONNECTIONS_MAX, self._is_closed
            if not (is_full or is_closed):
                self._sessions[thread] = connection
        if is_closed:
            self._refuse(connection, _GONE)
        elif is_full:
            self._refuse(connection, f"the control socket has {CONNECTIONS_MAX} connections; try again later")
        return not (is_full or is_closed)

    def _start(self, thread: threading.Thread, connection: socket.socket) -> None:
        try:
            thread.start()
        except RuntimeError:  # the process may start no more threads, or has no memory: a later connection may succeed
            with self._guard:
                del self._sessions[thread]
            self._refuse(connection, "the server could start no thread for it; try again later")

    def _refuse(self, connection: socket.socket, why: str) -> None:
        _refuse(connection, why, self._log)

    def _serve(self, connection: socket.socket, first: "dict[str, Any] | None" = None) -> None:
        try:
            pid, uid, _ = credentials_of(connection)
            if not may_connect(uid, self._owner):
                self._refuse(connection, f"process {pid} of user {uid} may not use it, only user {self._owner} may")
                return
            if (served := self._held) is None:
                self._refuse(connection, _GONE)
                return
            connection.settimeout(IDLE_SECONDS)
            with connection:
                session = _Session(connection, served, self._log, f"process {pid} of user {uid}")
                with ShortTurns(), self._living(session):  # writers of the volume are not to wait for its work
                    session.run(first)
        except OSError:
            pass  # the other end disconnected, and its operation was cancelled
        finally:
            with self._guard:
                self._sessions.pop(threading.current_thread(), None)  # one that began too late is not there

    @contextmanager
    def _living(self, session: "_Session") -> Iterator[None]:
        """Tell the caller of a session regularly that this process lives, as long as an operation of it runs."""
        with self._guard:
            self._talking.add(session)
            begins, self._is_told = not self._is_told, True
        try:
            if begins:  # one thread for all: a caller of a group has many connections, each for a few milliseconds
                self._begin_to_tell()
            yield
        finally:
            with self._guard:
                self._talking.discard(session)

    def _begin_to_tell(self) -> None:
        try:
            SureThread(target=self._say_that_we_live, name="onionskin control", daemon=True).start()
        except RuntimeError:  # the next session tries again; without it, a caller gives a long operation up
            with self._guard:
                self._is_told = False

    def _say_that_we_live(self) -> None:
        wait = threading.Event()
        while True:
            wait.wait(frames.ALIVE_SECONDS)
            with self._guard:
                talking = list(self._talking)
                self._is_told = bool(talking)
            if not talking:
                return
            for session in talking:
                session.say_that_we_live()


def _refuse(connection: socket.socket, why: str, log: Callable[[str], None]) -> None:
    log(f"control: refused a connection: {why}")
    with connection, suppress(OSError):
        connection.settimeout(1)
        frames.send(connection, {"error": frames.pack_error(StateError(why))}, bytes_max=frames.REPLY_BYTES_MAX)


def _accepted(listener: UnixListener, log: Callable[[str], None]) -> "tuple[socket.socket | None, bool]":
    """Take a connection that waits, and say whether to go on: without descriptors or memory, it is taken a little later."""
    try:
        return listener.socket.accept()[0], True
    except BlockingIOError:
        return None, True  # whoever connected has gone
    except OSError as error:
        log(f"control: a connection could not be accepted: {os.strerror(error.errno or 0)}")
        return None, False


class _Listener:
    """The socket of one volume."""

    def __init__(self, control: ControlSocket, path: FilePath) -> None:
        self._control = control
        self._listener = UnixListener(path, mode=file_mode(path.parent))
        try:
            acceptor.of_process.add(self._listener.socket, self._accept)
        except BaseException:
            self._listener.close()
            raise

    def leave(self, path: FilePath) -> None:
        """Listen no more."""
        acceptor.of_process.remove(self._listener.socket)
        self._listener.close()

    def _accept(self) -> bool:
        connection, goes_on = _accepted(self._listener, self._control._log)
        if connection:
            self._control.take(connection)
        return goes_on


_sharing_guard = ForkableLock()
_shared: "dict[str, _SharedListener]" = {}  # by the directories in which their names are


def shared_listener(path: FilePath, log: Callable[[str], None]) -> "_SharedListener":
    """Listen at a path with the socket that this process has in its directory already, or with a new one.

    A new socket is a new inode: on an ext4 without a journal, that took half of the time in which a fork was opened.
    """
    with _sharing_guard:
        found = _shared.get(path.parent)
        if found and found.join(path):
            return found
        with suppress(FileNotFoundError):
            path.unlink()  # this process holds the volume, so the process that made the socket is gone
        _shared[path.parent] = made = _SharedListener(path, log)
        return made


def listen_together(controls: Sequence[ControlSocket]) -> list[ControlSocket]:
    """Have the sockets of volumes of one store listen, which do not yet, as names of the one that they share.

    Returns those that do not: something is in the way.
    """
    with _sharing_guard:
        found = _shared.get(controls[0]._path.parent) if controls else None
        joined = found.join_all([one._path for one in controls]) if found else set()
        for one in controls:
            if one._path in joined:
                one._listener = found
    failed = []
    for one in controls:
        if one._listener is None:
            try:
                one._listener = shared_listener(one._path, one._log)
            except (OnionskinError, OSError, RuntimeError) as error:
                one._log(f"control: {one._path}: {error}")
                failed.append(one)
    return failed


class _SharedListener:
    """One socket with a name for each of several volumes of a store. A caller says which of them it means.

    It listens until the last volume has left.
    """

    def __init__(self, path: FilePath, log: Callable[[str], None]) -> None:
        self._log = log
        self._owner = os.geteuid()
        self._process = os.getpid()
        self._directory = path.parent
        self._paths = {path}  # under the guard of those that share
        self._choosing = threading.BoundedSemaphore(CHOOSING_MAX)
        self._listener = UnixListener(path, mode=file_mode(path.parent))
        try:
            acceptor.of_process.add(self._listener.socket, self._accept)
        except BaseException:
            self._listener.close()
            raise

    def join(self, path: FilePath) -> bool:
        """Listen at one more path. False: that cannot be had here. The caller holds the guard."""
        if os.getpid() != self._process or not self._paths:  # the parent of a fork listens there, or nobody any more
            return False
        self._paths.add(path)  # first, so that whatever comes between leaves no name behind
        try:
            self._listener.add_name(path)
        except OSError:
            self._paths.discard(path)
            return False
        return True

    def join_all(self, paths: Sequence[FilePath]) -> set[FilePath]:
        """Listen at several more paths. Returns those at which it does, as `join` would. The caller holds the guard."""
        if os.getpid() != self._process or not self._paths:
            return set()
        self._paths.update(paths)  # first, as in `join`
        added: set[FilePath] = set()
        try:
            added = self._listener.add_names(paths)
        except OSError:
            pass
        finally:
            self._paths -= {*paths} - added
        return added

    def leave(self, path: FilePath) -> None:
        """Listen no more at a path."""
        with _sharing_guard:
            self._paths.discard(path)
            self._listener.remove_name(path)
            is_last = not self._paths
            if is_last and _shared.get(self._directory) is self:
                del _shared[self._directory]
        if is_last:
            acceptor.of_process.remove(self._listener.socket)
            self._listener.close()

    def _accept(self) -> bool:
        connection, goes_on = _accepted(self._listener, self._log)
        if connection is None:
            return goes_on
        if not self._choosing.acquire(blocking=False):
            _refuse(
                connection, f"{CHOOSING_MAX} callers have not said yet which volume they mean; try again", self._log
            )
            return True
        try:
            SureThread(target=self._serve, args=(connection,), name="onionskin control", daemon=True).start()
        except RuntimeError:  # the process may start no more threads, or has no memory: a later connection may succeed
            self._choosing.release()
            _refuse(connection, "the server could start no thread for it; try again later", self._log)
        return True

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                control, first = self._chosen(connection)
            except (OSError, OnionskinError):
                return  # the other end disconnected, or is no caller
            finally:
                self._choosing.release()
            if control:
                control.take_here(connection, first)

    def _chosen(self, connection: socket.socket) -> "tuple[ControlSocket | None, dict[str, Any] | None]":
        """Ask which volume is meant. Returns what serves it here, and the request that came before the answer, if one did."""
        pid, uid, _ = credentials_of(connection)
        if not may_connect(uid, self._owner):
            _refuse(connection, f"process {pid} of user {uid} may not use it, only user {self._owner} may", self._log)
            return None, None
        connection.settimeout(CHOICE_SECONDS)
        deadline = time.monotonic() + CHOICE_SECONDS  # one who sends a byte now and then takes the place of another
        greeting = {"onionskin": "control", "version": frames.SHARED_VERSION}
        frames.send(connection, greeting, bytes_max=frames.REPLY_BYTES_MAX)
        first: dict[str, Any] | None = None
        said = frames.receive(connection, bytes_max=frames.REQUEST_BYTES_MAX, deadline=deadline)
        if said is not None and "verb" in said:  # some callers ask at once, and wait for the greeting later
            first, said = said, frames.receive(connection, bytes_max=frames.REQUEST_BYTES_MAX, deadline=deadline)
        if said is None:
            return None, None
        control = _listening_in(self._directory, said.get("volume"))
        if control is None:
            _refuse(connection, _GONE, self._log)
        return control, first


def _listening_in(directory: FilePath, id: object) -> ControlSocket | None:
    """Return what listens in a directory for the volume with this id, in hex digits."""
    if not isinstance(id, str) or len(id) != 2 * ID_BYTES or id.strip("0123456789abcdef"):
        return None
    with _listening_guard:
        return _listening.get(directory / f"{id}.control")


class _Session:
    """One connection. Each public method is a verb, and returns a value that JSON can hold."""

    def __init__(self, connection: socket.socket, served: Served, log: Callable[[str], None], peer: str) -> None:
        self._connection = connection
        self._served = served
        self._log = log
        self._peer = peer
        self._sending = threading.Lock()
        self._is_busy = False  # while an operation runs, the caller is told regularly that the server is alive

    @property
    def _volume(self) -> Volume:
        return self._served.volume

    def run(self, first: "dict[str, Any] | None" = None) -> None:
        """Greet, and answer all requests, of which the first may have come before."""
        greeting = {"onionskin": "control", "version": frames.VERSION, "volume": self._volume.name}
        self._send(greeting | {"alive_seconds": frames.ALIVE_SECONDS})
        self._answer_all(first)

    def say_that_we_live(self) -> None:
        """Tell the caller that its operation goes on. Never wait for a caller that does not read."""
        if not self._sending.acquire(blocking=False):
            return  # it is told something else
        try:
            with suppress(OSError, ValueError):  # if the caller has gone, _answer_all notices it
                if self._is_busy and may_be_written(self._connection):
                    frames.send(self._connection, {"alive": True}, bytes_max=frames.REPLY_BYTES_MAX)
        finally:
            self._sending.release()

    def _answer_all(self, first: "dict[str, Any] | None") -> None:
        while True:
            try:
                request = first or frames.receive(self._connection, bytes_max=frames.REQUEST_BYTES_MAX)
                first = None
            except OnionskinError as error:  # it is not known where the next frame begins
                self._log(f"control: {self._peer}: {error}")
                self._send({"error": frames.pack_error(error)})
                return
            if request is None:
                return
            if "cancel" in request:  # it came too late, because the operation has ended
                continue
            self._is_busy = True
            reply = self._answer(request)
            self._is_busy = False
            try:
                self._send(reply)
            except ValueError as error:  # the reply is longer than a frame may be
                self._send({"error": frames.pack_error(error)})

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            verb, arguments = frames.checked_request(request)
            result = getattr(self, verb)(**arguments)
        except BaseException as error:
            packed = frames.pack_error(error)
            self._log(f"control: {self._peer}: {request.get('verb')}: {packed['class']}: {packed['message']}")
            return {"error": packed}
        if verb in _LOGGED:
            self._log_done(verb, *(value for name, value in arguments.items() if name not in _NOT_LOGGED))
        return {"result": result}

    def _log_done(self, verb: str, *what: object) -> None:
        self._log(f"control: {self._peer}: {' '.join([verb, *map(_in_brief, what)])}")

    def _be_silent(self, silent: bool) -> None:
        """Say no more that the server is alive, from the return on, or say it again."""
        with self._sending:
            self._is_busy = not silent

    def _send(self, value: dict[str, Any]) -> None:
        with self._sending:
            frames.send(self._connection, value, bytes_max=frames.REPLY_BYTES_MAX)

    def _report(self, done: int, total: int) -> None:
        """Tell the caller the progress, and check whether it cancelled the operation."""
        if may_be_read(self._connection):
            request = frames.receive(self._connection, bytes_max=frames.REQUEST_BYTES_MAX)
            if request is None and not has_hung_up(self._connection):
                raise StateError(f"the server of volume {self._volume.name!r} is ending, so it was given up")
            if request is None or "cancel" in request:
                raise Cancelled
        if may_be_written(self._connection):  # otherwise a caller that does not read would hold the operation up
            self._send({"progress": [done, total]})

    # ---- looking ----

    def info(self) -> dict[str, Any]:
        return self._served.info()

    def stats(self) -> dict[str, Any]:
        return self._served.stats()

    def snapshots(self) -> list[Any]:
        return self._without_parts(self._volume.snapshots)

    def _without_parts(self, taken: Sequence[Snapshot]) -> list[Any]:
        """Send what one frame may have no room for, and return the rest."""
        part: list[Any] = []
        room = NOTES_IN_FRAME
        for snapshot in taken:
            if len(part) == SNAPSHOTS_IN_FRAME or len(snapshot.note) > room:
                self._send({"part": part})
                part, room = [], NOTES_IN_FRAME
            part.append(frames.pack_snapshot(snapshot))
            room -= len(snapshot.note)
        return part

    def parent(self) -> Any:
        return frames.pack_snapshot(self._volume.parent)

    def head_changed(self) -> bool:
        return self._volume.head_changed

    def usage(self) -> list[Any]:
        return [asdict(usage) for usage in self._volume.usage()]

    def diff(self, a: str, b: str | None) -> list[Any]:
        extents = [extent[:3] for extent in self._volume._diff(a, b)]
        for first in range(0, len(extents), EXTENTS_IN_FRAME):
            self._send({"part": extents[first : first + EXTENTS_IN_FRAME]})
        return []

    def read(self, offset: int, length: int) -> str:
        if length > READ_BYTES_MAX:
            raise ValueError(f"at most {READ_BYTES_MAX} bytes are read at a time, not {length}")
        return base64.b64encode(self._volume.read(offset, length)).decode()

    # ---- bytes ----

    def trim(self, offset: int, length: int) -> None:
        self._volume.trim(offset, length)
        self._volume.flush()

    def zero(self, offset: int, length: int) -> None:
        self._volume.zero(offset, length)
        self._volume.flush()

    def flush(self) -> None:
        self._volume.flush()

    def resize(self, size_bytes: int) -> None:
        with self._volume._opened.guard:
            if size_bytes < self._volume.size_bytes:
                raise StateError(
                    f"volume {self._volume.name!r} is being served and its clients may write up to its end; stop the "
                    "server to shrink it"
                )
            self._volume.resize(size_bytes)

    # ---- the tree ----

    def snapshot(self, name: str | None, note: str, guid: str | None) -> Any:
        called = None if name is None else check_name("snapshot", name)
        drawn = new_id() if guid is None else bytes.fromhex(guid)
        if len(drawn) != ID_BYTES:
            raise ValueError("the GUID of the snapshot is none")
        disk = self._volume._opened.to_write(), called, drawn
        (taken,) = snapshots.take_together(disk[0].store, [disk], check_note(note), check=self._refuse_left)
        return frames.pack_snapshot(taken)

    def group(self, volumes: list[str]) -> dict[str, Any]:
        talk = groups.Talk(self._connection, self._send, self._be_silent)
        with closing(groups.Caller(self._connection)) as caller, ExitStack() as borrowed:
            heads = {id: borrowed.enter_context(served.borrowed()) for id in volumes if (served := self._beside(id))}
            return groups.seal_for_caller(talk, caller, heads)

    def snapshot_group(self, names: dict[str, str], guids: dict[str, str], note: str) -> list[Any] | None:
        """Name volumes as they are at one instant: of each, by its id, the name ("": the time) and the GUID of its snapshot.

        None: this process does not serve all of them.
        """
        if (
            not names
            or set(names) != set(guids)
            or any(len(bytes.fromhex(guid)) != ID_BYTES for guid in guids.values())
        ):
            raise ValueError("the snapshots of a group have a name and a GUID each")
        served = {id: found for id in names if (found := self._beside(id))}
        if len(served) < len(names):
            return None
        called = {id: check_name("snapshot", name) if name else None for id, name in names.items()}
        note = check_note(note)
        with ExitStack() as borrowed:
            heads = {id: borrowed.enter_context(one.borrowed()) for id, one in served.items()}
            taken = snapshots.take_together(
                self._volume._opened.store,
                [(head, called[id], bytes.fromhex(guids[id])) for id, head in heads.items()],
                note,
                within=snapshots.OPERATION_SECONDS,
                check=self._refuse_left,
            )
        called_now = [f"{head.name}@{one.name}" for head, one in zip(heads.values(), taken, strict=True)]
        self._log_done("snapshot_group", some_of(called_now), note)  # not all ids, of what may be hundreds of volumes
        return self._without_parts(taken)

    def _refuse_left(self) -> None:
        """Raise where the caller has hung up, or has said anything: then it does not wait for the outcome any more.

        In the transaction: a caller that gives up hangs up, and then looks for the outcome in a transaction of its own.
        """
        is_readable = may_be_read(self._connection)
        # What reads as ended where the caller has not hung up was ended here, by a server that takes no more requests.
        if has_hung_up(self._connection) or (is_readable and self._connection.recv(1, socket.MSG_PEEK)):
            raise StateError("the caller has gone away, or gave it up")

    def _beside(self, id: str) -> ControlSocket | None:
        """Return the control socket of a volume of this store, if this process serves that."""
        return _listening_in(self._volume._opened.store.layout.volumes, id)

    def fork(self, source: str, pattern: str, lifetime_ns: int | None, ids: list[str] | None, **how: Any) -> list[str]:
        names = how["names"]
        count, pattern_or_none = (how["count"], pattern) if names is None else (None, None)
        asked = forks.check_wanted(
            source, None, names, count, pattern_or_none, how["key"], None, how["labels"], how["wipe"]
        )
        drawn = None if ids is None else tuple(bytes.fromhex(id) for id in ids)
        if drawn is not None and [len(id) for id in drawn] != [ID_BYTES] * asked.count:
            raise ValueError("the ids of the forks are none")
        wanted = replace(asked, lifetime_ns=lifetime_ns, ids=drawn)
        return forks.fork_head(self._volume._opened.to_write(), wanted, self._refuse_left)

    def revert(self, name: str, guid: str | None, machine: str | None) -> None:
        self._refuse_unagreed("revert")
        head = self._volume._opened.to_write()
        for_machine = None if machine is None else machines.find(head.store.catalog, machine).id
        with self._served.paused():
            snapshots.revert(head, name, guid=guid, for_machine=for_machine, check=self._refuse_left)

    def revert_machine(self, machine: str, snapshot: str, names: dict[str, str], guids: dict[str, str]) -> bool:
        """Put the disks of a machine back in one transaction, each to a snapshot that has this name and this GUID.

        False: this process does not serve all of them.
        """
        self._refuse_unagreed("revert")
        if set(names) != set(guids):
            raise ValueError("the disks of a machine are put back to snapshots that have a name and a GUID each")
        for_machine, to = bytes.fromhex(machine), bytes.fromhex(snapshot)
        served = {id: found for id in sorted(names) if (found := self._beside(id))}
        if len(served) < len(names):
            return False
        catalog = self._volume._opened.store.catalog

        def note() -> None:
            self._refuse_left()
            machines.write_reverting(catalog, for_machine, to)

        with ExitStack() as stack:
            heads = {id: stack.enter_context(one.borrowed()) for id, one in served.items()}
            for one in served.values():
                stack.enter_context(one.paused())
            snapshots.revert_together(
                [snapshots.Target(head, names[id], guids[id]) for id, head in heads.items()],
                for_machine=for_machine,
                then=note,
            )
        return True

    def tidy(self) -> None:
        head = self._volume._opened.to_write()
        with head.operation():
            fold_unnamed_below(head)

    def discard(self, name: str | list[str], recursive: bool, guid: str | list[str] | None) -> None:
        names = several("snapshot", name)
        with self._volume._opened.guard:  # so that the tree does not change between these look-ups and the discard
            descendants = self._descendants(names)
            going = descendants if recursive else set(names)
            at = self._volume.parent
            reverts = at is not None and at.name in descendants
            if reverts:
                self._refuse_unagreed("discard of a snapshot that the disk stands on")
            with self._served.without_views(going), self._served.paused() if reverts else nullcontext():
                head = self._volume._opened.to_write()
                snapshots.discard(head, names, recursive=recursive, guids=guid, check=self._refuse_left)

    def merge(self, name: str | list[str], guid: str | list[str] | None) -> None:
        names = several("snapshot", name)
        with self._served.without_views(set(names)):
            snapshots.merge(self._volume._opened.to_write(), names, guids=guid, check=self._refuse_left)

    def rename(self, new_name: str) -> None:
        self._served.rename(new_name, self._refuse_left)

    def merge_into_base(self, upto: str | None, threads: int, bytes_per_second: int) -> None:
        with self._served.without_views(None):
            self._volume.merge_into_base(
                upto, progress=self._report, threads=threads, bytes_per_second=bytes_per_second
            )

    def _refuse_unagreed(self, what: str) -> None:
        if not self._served.allow_revert:
            raise StateError(
                f"{what}: the disk would change under the clients of {self._volume.name!r}; stop them and the server "
                "first, or serve with --allow-revert"
            )

    def _descendants(self, names: list[str]) -> set[str]:
        """Return the names of snapshots and of those that were taken after them on their branches."""
        parents = {snapshot.name: snapshot.parent for snapshot in self._volume.snapshots}
        found = set(names)
        apart: set[str] = set()  # what stands on none of them; each is looked at once, whatever stands on what
        for one in parents:
            line: list[str] = []
            at: str | None = one
            while at is not None and at not in found and at not in apart:
                line.append(at)
                at = parents.get(at)
            (found if at in found else apart).update(line)
        return found


def _in_brief(what: object) -> str:
    """Write an argument for the log: a list may have ten thousand ids, and a note 64 KiB."""
    text = str(what)
    return text if len(text) <= LOGGED_CHARACTERS else f"{text[:LOGGED_CHARACTERS]}..."


_NOT_LOGGED = {"ids", "guid"}  # arguments that say nothing to who reads the log
_LOGGED = {  # `snapshot_group` says itself what it did
    *(
        "snapshot",
        "revert",
        "revert_machine",
        "discard",
        "merge",
        "merge_into_base",
        "trim",
        "zero",
        "resize",
        "rename",
        "group",
        "fork",
        "tidy",
    ),
}
