"""A volume that another process serves, used through its control socket.

`LiveVolume` has the methods of `onionskin.Volume` that work on a served volume, and they raise the same errors. It has
no methods for operations that it cannot do (write, flatten, apply).

A server reports every few seconds that an operation goes on. If a server says nothing for WORD_SECONDS, a warning says
which process is waited for. If it says nothing for SILENCE_SECONDS, it was stopped or hangs, and the caller gets a StateError
that names its process.
"""

import base64
import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin.base import forking
from onionskin.base.lazy import logger
from onionskin.base.naming import several
from onionskin.base.progress import Progress
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.sockets import connect_if_listening, credentials_of
from onionskin.catalog import VolumeRow, new_id
from onionskin.catalog.tree import Snapshot
from onionskin.control import frames
from onionskin.errors import FormatError, StateError
from onionskin.kernels._extents import Extents
from onionskin.operations.usage import Usage
from onionskin.storage.locks import volume_holder
from onionskin.storage.open_store import OpenStore
from onionskin.store import Store

if TYPE_CHECKING:
    from onionskin.base.annotations import ExtentArray
    from onionskin.control.lost_answers import Outcome
    from onionskin.operations.forks import Wanted


_log = logger(__name__)
_PROCESSES, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def connect(store: "str | PathLike[str] | Store", name: str) -> "LiveVolume":
    """Connect to a volume that `onionskin serve` holds.

    Parameters
    ----------
    store : path-like, or Store
        The store that the volume is in.
    name : str
        The volume.

    Returns
    -------
    LiveVolume
        To be closed by the caller.

    Raises
    ------
    VolumeNotFoundError
        The store has no volume of that name.
    StateError
        No process serves the volume; open it instead.
    """
    if isinstance(store, Store):
        found = find(store, name)
    else:
        with Store(store, create=False) as opened:
            found = find(opened, name)
    if found is None:
        raise StateError(f"nobody serves volume {name!r}; open it, or start 'onionskin serve'")
    return found


def find(store: Store, name: str) -> "LiveVolume | None":
    """Connect to the server of a volume, or return None if no server holds it."""
    catalog = store._opened.catalog
    while True:
        row = catalog.volume(name)
        connection = reach(store._opened, row, name)
        if connection is None:
            return None
        live = LiveVolume(connection, name, row.id, store._opened)
        try:
            # The path and the server belong to the volume's id; the name may mean another volume by now.
            is_same = catalog.volume(name).id == row.id
        except BaseException:
            live.close()
            raise
        if is_same:
            return live
        live.close()


def reach(store: OpenStore, row: VolumeRow, name: str) -> socket.socket | None:
    """Connect to the control socket of a volume, or return None if no server listens there."""
    holder = volume_holder(store.layout.volume_lock(row.id))
    if holder is None:
        return None
    try:
        # None: it is held by a process that does not serve it.
        return connect_if_listening(store.layout.volume_control(row.id), seconds=frames.SILENCE_SECONDS)
    except BlockingIOError:
        raise StateError(_silent(name, holder.pid)) from None


def flush_served(store: Store, name: str) -> None:
    """Make durable what was written to a volume, if a server holds it."""
    live = find(store, name)
    if live is not None:
        with live:
            live.flush()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped: by a signal (SIGSTOP, SIGTSTP), a debugger or its cgroup; false where nothing says so."""
    try:
        state = (_PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t") or is_frozen(pid)


def is_frozen(pid: int) -> bool:
    """Whether the cgroup of a process is frozen, as that of a container that is paused; false where nothing says so."""
    try:
        lines = (_PROCESSES / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return False
    return any(_is_frozen_in(*line.split(":", 2)[1:]) for line in lines)


def _is_frozen_in(controllers: str, path: str) -> bool:
    """Whether a cgroup is frozen, as a line of /proc/PID/cgroup has it; of the second version it has no controllers."""
    group = path.strip("/")
    if not controllers:
        found = [_said(_CGROUPS / mount / group / "cgroup.events") for mount in ("", "unified")]
        return any("frozen 1" in text.splitlines() for text in found)
    state = _said(_CGROUPS / "freezer" / group / "freezer.state").strip() if "freezer" in controllers.split(",") else ""
    return state in ("FROZEN", "FREEZING")


def _said(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def what_lets_it_go_on(pid: int) -> str:
    """Return what lets a process go on that is stopped."""
    return "thawing its cgroup" if is_frozen(pid) else "kill -CONT"


def say_whom_one_waits_for(connection: socket.socket, pid: int, what_it_does: str) -> None:
    """Wait for the first byte of a reply, and log a warning if it takes long."""
    arrives = select.poll()
    arrives.register(connection, select.POLLIN)
    if connection.gettimeout() is not None and not arrives.poll(frames.WORD_SECONDS * 1000):
        _log.warning(
            "waiting for process %s, which %s: it is %s (at most %.0f s)",
            pid,
            what_it_does,
            f"stopped; {what_lets_it_go_on(pid)} lets it go on"
            if is_stopped(pid)
            else "silent, and may hang on its disk",
            connection.gettimeout(),
        )


def _silent(name: str, pid: int, seconds: float | None = None) -> str:
    who = f"process {pid}" if pid else "the process"
    waited = seconds or frames.SILENCE_SECONDS
    return (
        f"{who}, which serves volume {name!r}, has not answered for {waited:.0f} s; it was stopped (then let "
        f"it go on: {what_lets_it_go_on(pid)}), or its disk hangs"
    )


class LiveVolume:
    """A volume in another process. A context manager. Any thread may call it; calls run one after the other.

    Each method raises what the other process raises. It raises StateError if that process goes away or does not answer,
    after `close`, and in the child of a fork, where the program connects again.
    """

    def __init__(
        self, connection: socket.socket, name: str, id: bytes, store: OpenStore, *, greet: bool = True
    ) -> None:
        """Take a connection; where `greet` is false, the caller waits for the greeting later, with `_greeted`."""
        self.name: str = name
        self._store = store  # the caller may have closed it by now
        self._id = id
        self._connection = connection
        self._guard = threading.Lock()
        self._pid = credentials_of(connection)[0]
        self._process_here = os.getpid()
        connection.settimeout(frames.SILENCE_SECONDS)
        try:
            if greet:
                self._greeted()
        except BaseException:
            connection.close()
            raise

    def _greeted(self, deadline: float | None = None) -> None:
        """Wait for the greeting of the server, and refuse one that speaks another protocol."""
        greeting = self._receive(deadline)
        if greeting.get("onionskin") == "control" and greeting.get("version") == frames.SHARED_VERSION:
            self._request({"volume": self._id.hex()})
            greeting = self._receive(deadline)
        if "error" in greeting:
            raise frames.unpack_error(greeting["error"])
        if greeting.get("onionskin") != "control" or greeting.get("version") != frames.VERSION:
            raise StateError(
                f"the server of volume {self.name!r} speaks another version of the control protocol; use the same "
                "onionskin at both ends"
            )
        if "alive_seconds" not in greeting:  # an older server, which is silent while it works
            self._connection.settimeout(None)

    def __repr__(self) -> str:
        state = "closed" if self._connection.fileno() < 0 else f"served by process {self._pid}"
        return f"<LiveVolume {self.name} {state}>"

    def __enter__(self) -> "LiveVolume":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the volume goes on being served. Idempotent."""
        self._connection.close()

    def _hang_up(self) -> None:
        """End the connection for both ends, also where a forked child has it too."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    # ---- calls ----

    def _call(self, verb: str, *, progress: Progress | None = None, **arguments: Any) -> Any:
        request = frames.request(verb, arguments)
        parts: list[Any] = []
        with self._guard:
            self._refuse_unusable()
            try:
                self._request(request)
            except ValueError:  # it is too long, so nothing of it was sent
                raise
            except BaseException:  # a part of it may have been sent, or all
                self._hang_up()
                raise
            while True:
                try:
                    reply = self._receive()
                    if "progress" in reply and progress:
                        progress(*reply["progress"])
                except BaseException:
                    self._cancel()
                    raise
                if "part" in reply:
                    parts += reply["part"]
                elif "error" in reply:
                    raise frames.unpack_error(reply["error"])
                elif "result" in reply:
                    return parts + reply["result"] if isinstance(reply["result"], list) else reply["result"]

    def _change(self, verb: str, outcome: "Outcome", names: "str | Sequence[str]", **arguments: Any) -> None:
        """Have the volume changed. Where the answer does not come, the outcome is looked for.

        To ask again for what was done may do harm: a second revert would drop what was written behind the first one.
        """
        from onionskin.control import lost_answers  # imported late, with what it stands on

        self._refuse_unusable()
        before = lost_answers.before(self._store, self._id, [names] if isinstance(names, str) else names)
        try:
            self._call(verb, **arguments)
        except Exception as error:
            if self._connection.fileno() >= 0:  # it was answered
                raise
            with DeferredInterrupt():
                is_done = lost_answers.is_done(self._store, before, outcome, arguments.get("new_name"), error)
            if not is_done:
                raise
            _log.warning("%s of %s was done; what was heard instead: %s", verb, self.name, error)

    def _refuse_unusable(self) -> None:
        """Raise StateError if the connection was closed, or is that of the parent, which would get the answers."""
        if os.getpid() != self._process_here:
            raise forking.forked_error(f"the connection to volume {self.name!r}")
        if self._connection.fileno() < 0:
            raise StateError(f"the connection to volume {self.name!r} is closed; connect again")

    def _request(self, request: dict[str, Any]) -> None:
        try:
            frames.send(self._connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
        except TimeoutError:
            raise StateError(_silent(self.name, self._pid, self._connection.gettimeout())) from None
        except (BrokenPipeError, ConnectionResetError):
            raise StateError(f"the server of volume {self.name!r} went away; its log says why") from None

    def _cancel(self) -> None:
        """Cancel the operation, wait until it has ended, and close the connection, so that the volume is free."""
        with suppress(OSError, FormatError, StateError, KeyboardInterrupt):
            frames.send(self._connection, {"cancel": True}, bytes_max=frames.REQUEST_BYTES_MAX)
            while not self._receive().keys() & {"result", "error"}:
                pass
        self._hang_up()

    def _receive(self, deadline: float | None = None) -> dict[str, Any]:
        """Wait for one frame; `deadline`, by the monotonic clock, is for all of it."""
        began = time.monotonic()
        say_whom_one_waits_for(self._connection, self._pid, f"serves volume {self.name!r}")
        try:
            reply = frames.receive(self._connection, bytes_max=frames.REPLY_BYTES_MAX, deadline=deadline)
        except TimeoutError:
            seconds = self._connection.gettimeout() if deadline is None else deadline - began
            raise StateError(_silent(self.name, self._pid, seconds)) from None
        if reply is None:
            raise StateError(f"the server of volume {self.name!r} went away; its log says why")
        return reply

    # ---- looking ----

    @property
    def size_bytes(self) -> int:
        """Size of the disk in bytes."""
        return int(self.info()["size_bytes"])

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write, in bytes."""
        return int(self.info()["block_size"])

    @property
    def snapshots(self) -> list[Snapshot]:
        """The volume's snapshots, oldest first."""
        return [frames.unpack_snapshot(value) for value in self._call("snapshots")]

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot that the disk stands on."""
        value = self._call("parent")
        return None if value is None else frames.unpack_snapshot(value)

    @property
    def head_changed(self) -> bool:
        """Whether anything was written, trimmed or resized since `parent`."""
        return bool(self._call("head_changed"))

    def info(self) -> dict[str, Any]:
        """Describe the volume, and where and how it is served.

        Returns
        -------
        dict
            As `onionskin info --json` shows it.
        """
        return dict(self._call("info"))

    def stats(self) -> dict[str, Any]:
        """Return the server's counters and its clients.

        Returns
        -------
        dict
            As `onionskin stats --json` shows it. Counters only grow while the server runs.
        """
        return dict(self._call("stats"))

    def usage(self) -> list[Usage]:
        """Return how much each snapshot holds, and how much its discard or merge would free.

        Returns
        -------
        list of Usage
            As for `Store.usage`.
        """
        return [Usage(**value) for value in self._call("usage")]

    def diff(self, a: str, b: str | None = None) -> "ExtentArray":
        """Return the extents in which two snapshots, or a snapshot and the head, may differ.

        Parameters
        ----------
        a, b : str
            Snapshots, in any order; `b` None means the head, which is flushed first.

        Returns
        -------
        array
            Extents (offset, length, state), as for `Store.diff`.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        """
        return self._diff(a, b).array()

    def _diff(self, a: str, b: str | None = None) -> Extents:
        return Extents.of((offset, length, state, 0, 0) for offset, length, state in self._call("diff", a=a, b=b))

    def read(self, offset: int, length: int) -> bytes:
        """Return a range as bytes.

        Parameters
        ----------
        offset, length : int
            Bytes; `length` is at most 1 MiB, and the range ends within the disk.

        Returns
        -------
        bytes
            Exactly `length` of them.

        Raises
        ------
        ValueError
            The range is too long, or passes the end of the volume.
        """
        return base64.b64decode(self._call("read", offset=offset, length=length))

    # ---- changing ----

    def trim(self, offset: int, length: int) -> None:
        """Free a range, which reads zero from now on. Durable on return.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        """
        self._call("trim", offset=offset, length=length)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read zero. Durable on return.

        Parameters
        ----------
        offset, length : int
            Bytes; they need no alignment.

        Raises
        ------
        ValueError
            The range passes the end of the volume.
        """
        self._call("zero", offset=offset, length=length)

    def flush(self) -> None:
        """Make everything durable that any client wrote before the call.

        Raises
        ------
        OSError
            As for `Volume.flush`: with ENOSPC nothing changed; any other failure of a sync poisons the volume there.
        """
        self._call("flush")

    def resize(self, size: "int | str", *, force: bool = False) -> None:
        """Grow the disk; its clients see the new size when they connect again. Durable on return.

        Parameters
        ----------
        size : int or str
            Bytes, or such as "20G".
        force : bool
            It has no effect here, because a disk that is served does not shrink.

        Raises
        ------
        StateError
            It would shrink.
        """
        from onionskin.base.sizes import parse_size

        self._call("resize", size_bytes=parse_size(size))

    def snapshot(self, name: str | None = None, note: str = "") -> Snapshot:
        """Name the disk as it is now, with all acknowledged writes of all clients and no later ones.

        Durable on return. Clients go on meanwhile.

        Parameters
        ----------
        name : str, optional
            At most 255 bytes, without '/', '@' and control characters. By default the time in UTC, as for
            `Volume.snapshot`.
        note : str
            Kept with it; at most 64 KiB.

        Returns
        -------
        Snapshot
            The snapshot that was taken, with the name that it got.

        Raises
        ------
        SnapshotExistsError
            The name is taken.
        StateError
            The server went away or does not answer. No snapshot was taken, or the message says that this is not known. One
            that was taken is returned, though the answer did not come.
        """
        self._refuse_unusable()
        guid = new_id()
        try:
            try:
                taken = self._call("snapshot", name=name, note=note, guid=guid.hex())
            except ValueError as error:
                if "takes exactly these arguments" not in str(error):
                    raise
                # An older server draws the GUID itself, so it cannot be looked for.
                taken = self._call("snapshot", name=name, note=note, guid=None)
        except (ValueError, TypeError):  # nothing was asked for, or all of it was refused
            raise
        except BaseException as error:
            from onionskin.control.lost_answers import taken_though_unheard  # imported late: this is seldom

            has_ended = self._connection.fileno() >= 0  # else it was hung up on, as its answer did not come
            with DeferredInterrupt():
                found = taken_though_unheard(self._store, self._id, guid, error, has_ended=has_ended)
            if found is None:
                raise
            _log.warning("%s@%s was taken; what was heard instead: %s", self.name, found.name, error)
            return found
        return frames.unpack_snapshot(taken)

    def _fork(self, wanted: "Wanted") -> list[str]:
        """Fork the disk as it is now: see `Store.fork`."""
        return list(
            self._call(
                "fork",
                source=wanted.volume,
                names=None if wanted.names is None else list(wanted.names),
                count=wanted.count,
                pattern=wanted.pattern.text,
                key=wanted.key,
                lifetime_ns=wanted.lifetime_ns,
                labels=dict(wanted.labels),
                wipe=wanted.wipe,
                ids=None if wanted.ids is None else [id.hex() for id in wanted.ids],
            )
        )

    def revert(self, name: str, *, guid: str | None = None) -> None:
        """Make the disk read as a snapshot again, if the server allows it. Durable on return.

        Parameters
        ----------
        name : str
            A snapshot of this volume.
        guid : str, optional
            As for `Volume.revert`.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            The snapshot has another GUID. The server was not started to allow it, or clients are connected.
        """
        self._change("revert", "reverted", [name], name=name, guid=guid)

    def _revert_for_machine(self, name: str, guid: str, machine: str) -> None:
        """Make the disk of a machine read as a snapshot again, as a part of putting the machine back."""
        self._change("revert", "reverted", [name], name=name, guid=guid, machine=machine)

    def _revert_machine(self, machine: bytes, snapshot: bytes, disks: Mapping[bytes, tuple[str, str]]) -> bool:
        """Put all disks of a machine back in one transaction; False if its server does not hold all of them."""
        names = {id.hex(): name for id, (name, _) in disks.items()}
        guids = {id.hex(): guid for id, (_, guid) in disks.items()}
        return bool(
            self._call("revert_machine", machine=machine.hex(), snapshot=snapshot.hex(), names=names, guids=guids)
        )

    def _tidy(self) -> None:
        """Fold layers that lost their names, which somebody else dropped."""
        self._call("tidy")

    def discard(
        self, name: "str | Sequence[str]", *, recursive: bool = False, guid: "str | Sequence[str] | None" = None
    ) -> None:
        """Drop a snapshot and all that was written after it. Durable on return.

        If the disk stands on the snapshot, it changes as with `revert`.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all are dropped in one transaction, or none is.
        recursive : bool
            Drop the snapshots that were taken after them too.
        guid : str or sequence of str, optional
            As for `Volume.discard`.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            As for `Volume.discard`; or the disk would change under clients, and the server does not allow that.
        """
        names, guids = _one_or_several(name), _one_or_several_guids(guid)
        self._change("discard", "dropped", names, name=names, recursive=recursive, guid=guids)

    def merge(self, name: "str | Sequence[str]", *, guid: "str | Sequence[str] | None" = None) -> None:
        """Drop a snapshot's name and keep all data. Durable on return. Clients go on meanwhile.

        Parameters
        ----------
        name : str or sequence of str
            A snapshot of this volume, or several: then all names are dropped in one transaction, or none is.
        guid : str or sequence of str, optional
            As for `Volume.merge`.

        Raises
        ------
        SnapshotNotFoundError
            There is none of that name.
        StateError
            Somebody holds one of them, or a client reads one.
        """
        names, guids = _one_or_several(name), _one_or_several_guids(guid)
        self._change("merge", "dropped", names, name=names, guid=guids)

    def rename(self, new_name: str) -> None:
        """Give the volume another name: connected clients go on, later clients ask for the new name.

        Parameters
        ----------
        new_name : str
            At most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeExistsError
            The new name is taken.
        """
        self._change("rename", "renamed", [], new_name=new_name)
        self.name = new_name

    def merge_into_base(
        self,
        upto: str | None = None,
        *,
        progress: Progress | None = None,
        threads: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        """Fold the layers up to a snapshot, or the whole volume, into the base file; clients read and write meanwhile.

        An exception of `progress`, and Ctrl-C, cancel it. It goes on when it is called again. Durable on return.

        Parameters
        ----------
        upto : str, optional
            A snapshot of this volume; None: all durable data of the disk.
        progress : callable, optional
            Called from time to time with the bytes done and the total.
        threads : int
            The number of threads that copy; 0 lets the server choose.
        bytes_per_second : int
            The largest number of bytes to write in a second; 0: no limit.

        Raises
        ------
        StateError
            Another volume or snapshot needs the base as it is. Or the base is a block device.
        ChainError
            The base is not the file that it was.
        OSError
            The base could not be written; the data merged so far stays hidden behind the layers.
        """
        self._call("merge_into_base", progress=progress, upto=upto, threads=threads, bytes_per_second=bytes_per_second)


__all__ = ["LiveVolume", "connect", "find"]


def _one_or_several_guids(guid: "str | Sequence[str] | None") -> str | list[str] | None:
    return guid if guid is None or isinstance(guid, str) else list(guid)


def _one_or_several(name: "str | Sequence[str]") -> str | list[str]:
    """Return one name by itself, as a server of any version takes it."""
    names = several("snapshot", name)
    return names[0] if len(names) == 1 else names
