"""The server: it owns volumes, listens, and hands each client to the C server.

What must hold: a volume is held for as long as it is served, and flushed before it is given up; a view of a snapshot
is open only while somebody may be reading it, because it keeps files from being freed and a base from being merged
into; whoever changes the tree does so with no view open that the change would pull away.

Threads: the C server has its own; here are one that accepts, one for each client with TLS, those of the control
sockets, and the main thread, which tidies up every few seconds and waits for the end.
"""

import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EMFILE
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin._nbd import NbdServer
from onionskin.catalog import SnapshotRow, VolumeRow
from onionskin.errors import OnionskinError, StateError
from onionskin.nbd import tls
from onionskin.nbd.control import ControlSocket
from onionskin.nbd.sockets import is_local, peer_of, uri_of
from onionskin.nbd.tls import Terms
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin._volume import DataPath

TIDY_SECONDS = 5.0
VIEW_IDLE_SECONDS = 30.0
IDLE_VIEWS_MAX = 16  # a client that lists all exports opens one after the other
GRACE_SECONDS = 10.0
CARRY_SECONDS = 2.0
GIVE_WAY_SECONDS = 1.0
LIST_PAGE = 256  # snapshots that are read from the catalog together
CONTEXT_PREFIX = "onionskin:changed-since:"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take: connections in all, bytes of one client that are under way, seconds without a request."""

    connections_max: int = 64
    bytes_in_flight_max: int = 64 << 20
    idle_seconds: int = 0
    request_bytes_max: int = 32 << 20


@dataclass(slots=True)
class Listener:
    """A listening socket; path is that of a Unix socket that we made."""

    socket: socket.socket
    path: Path | None = None
    tls: Terms | None = None
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def uri(self) -> str:
        """Where clients connect."""
        return uri_of(self.socket, self.path, tls=self.tls is not None)


class Server:
    """Serves volumes and snapshots until `stop` is called.

    Parameters
    ----------
    limits : Limits
    allow_revert : bool
        Whether `revert` works while clients are connected: they agreed that the disk may change under them.
    log : callable
        Takes a line.
    """

    def __init__(self, *, limits: Limits, allow_revert: bool, log: Log) -> None:
        self.allow_revert = allow_revert
        self.log = log
        self.started = time.monotonic()
        self.listeners: list[Listener] = []
        self._limits = limits
        self._stores: dict[Path, Store] = {}
        self._whole_stores: list[Store] = []
        self._served: dict[str, ServedVolume] = {}
        self._views: dict[str, _View] = {}
        self._barred: set[str] = set()
        self._contexts: set[tuple[str, str]] = set()  # export, snapshot
        self._operations: Counter[str] = Counter()  # by volume; they go by its name, so that stays meanwhile
        self._guard = threading.RLock()  # the five above; never held while an operation runs
        self._carriers: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._tidying = threading.Event()  # set when there is something to tidy up now
        self._wake, self._waker = socket.socketpair()
        self._tls_places = threading.BoundedSemaphore(limits.connections_max)
        self._handshakes: dict[threading.Thread, socket.socket] = {}  # that are not done, oldest first; with the guard
        self.nbd = NbdServer(
            connections_max=limits.connections_max,
            bytes_in_flight_max=limits.bytes_in_flight_max,
            idle_seconds=limits.idle_seconds,
            request_bytes_max=limits.request_bytes_max,
            list_exports=self._list_exports,
        )
        self.nbd.on_unknown_export = self._find_export
        self.nbd.on_unknown_context = self._find_context
        self.nbd.on_full_disk = self._make_room
        self.nbd.on_freed = lambda name: self._tidying.set()

    # ---- what is served ----

    def add_store(self, path: Path) -> None:
        """Serve all volumes of a store, also those that are made later."""
        store = self._store(path)
        for about in store.volumes():
            self._add(store, about.name)
        self._whole_stores.append(store)

    def add_volume(self, path: Path, name: str) -> None:
        """Serve a volume, and its snapshots."""
        self._add(self._store(path), name)

    def add_snapshot(self, path: Path, name: str, snapshot: str) -> None:
        """Serve one snapshot; the volume is not held."""
        store = self._store(path)
        with self._guard:
            self._open_view(store, name, snapshot, is_kept=True)

    def _store(self, path: Path) -> Store:
        key = path.resolve()
        if key not in self._stores:
            self._stores[key] = Store(path, create=False)
        return self._stores[key]

    def _add(self, store: Store, name: str) -> "ServedVolume":
        with self._guard:
            if name in self._served:
                raise ValueError(f"two volumes are named {name!r}; serve one of them from a server of its own")
            served = ServedVolume(self, store.open(name))
            self._served[name] = served
        return served

    def export_names(self) -> list[str]:
        """Name all that clients can ask for."""
        with self._guard:
            names = [name for name, view in self._views.items() if view.is_kept]
            for name, served in self._served.items():
                names += [name, *(f"{name}@{snapshot.name}" for snapshot in served.volume.snapshots)]
        return sorted(set(names))

    def rename(self, served: "ServedVolume", new_name: str) -> None:
        """Give a volume another name, in the catalog and to clients that come from now on.

        Raises
        ------
        StateError
            The name is another export's, or an operation that goes by the old one is under way.
        """
        with self._guard:
            if self._operations[served.name]:
                raise StateError(f"an operation on {served.name!r} is under way; rename it when that has ended")
            if new_name in self._served and self._served[new_name] is not served:
                raise StateError(f"this server serves another volume {new_name!r}; choose another name")
            served.volume.store.rename(served.name, new_name)
            self._follow_names()

    def _follow_names(self) -> None:
        """Export under their present names what was renamed, here or by whoever has the store open. With the guard."""
        for old, served in list(self._served.items()):
            new = served.volume.name
            if new == old or self._operations[old] or new in self._served:  # the last: renamed itself, and next in line
                continue
            self.nbd.rename_export(old, new, description=f"volume {new}")
            self._served[new] = self._served.pop(old)
            served.name = new
            self._contexts = {(new if export == old else export, since) for export, since in self._contexts}
            self.log(f"{old} is {new} now")
        for old, view in list(self._views.items()):
            volume_name, (former, _, snapshot) = view.volume.name, old.partition("@")
            new = f"{volume_name}@{snapshot}"
            if new != old and not self._operations[former] and new not in self._views:
                self.nbd.rename_export(old, new, description=f"snapshot {snapshot} of {volume_name}")
                self._views[new] = self._views.pop(old)
                self._contexts = {(new if export == old else export, since) for export, since in self._contexts}

    @contextmanager
    def _operation(self, volume_name: str) -> Iterator[None]:
        with self._guard:
            self._operations[volume_name] += 1
        try:
            yield
        finally:
            with self._guard:
                self._operations[volume_name] -= 1

    def _list_exports(self, after: str) -> Iterator[tuple[str, str]]:
        """Name all that clients can ask for behind an export, by volume and then by snapshot, with a description.

        A page of a volume's snapshots at a time: their names alone are read, and nothing is opened.
        """
        volume_name, _, snapshot = after.partition("@")
        with self._guard:
            self._follow_names()
            kept = sorted(name.partition("@")[::2] for name, view in self._views.items() if view.is_kept)
            stores = {name: served.volume.store for name, served in self._served.items()}
        for store in self._whole_stores:
            stores |= {row.name: store for row in store.catalog.rows(VolumeRow) if row.name not in stores}
        for name in sorted({*stores, *(volume for volume, _ in kept)}):
            if name < volume_name:
                continue
            last = snapshot if name == volume_name else ""
            if name in stores:
                if name != volume_name:
                    yield name, f"volume {name}"
                names = _names_behind(stores[name], name, last)
            else:
                names = iter([one for volume, one in kept if volume == name and one > last])
            for one in names:
                yield f"{name}@{one}", f"snapshot {one} of {name}"

    def only_export(self) -> str | None:
        """Give the export that clients get who name none, where there is just one to choose."""
        if len(self._served) == 1:
            return next(iter(self._served))
        kept = [name for name, view in self._views.items() if view.is_kept]
        return kept[0] if len(kept) == 1 and not self._served else None

    # ---- what the C server asks, from its threads ----

    def _find_export(self, name: str) -> bool:
        """Open what a client asks for, if there is such a thing; True if the C server has it now."""
        try:
            return self._open_export(name)
        except (OnionskinError, OSError, ValueError) as error:
            self.log(f"export {name!r}: {error}")
            return False

    def _open_export(self, name: str) -> bool:
        with self._guard:
            volume_name, at, snapshot = name.partition("@")
            self._follow_names()
            if name in self._views:
                self._views[name].last_used = time.monotonic()
                return True
            served = self._served.get(volume_name)
            if served is None:
                for store in self._whole_stores:
                    if store.catalog.row(VolumeRow, "name = ?", volume_name):
                        served = self._add(store, volume_name)
                        break
            if served is None or not at or self._stopping.is_set():
                return served is not None
            if name in self._barred:
                raise StateError("the snapshot is being merged or discarded")
            self._open_view(served.volume.store, volume_name, snapshot, is_kept=False)
            return True

    def _open_view(self, store: Store, name: str, snapshot: str, *, is_kept: bool) -> None:
        self._close_idle_views(keep=IDLE_VIEWS_MAX - 1)
        view = store.open(name, snapshot=snapshot)
        export = f"{name}@{snapshot}"
        try:
            self.nbd.add_export(export, view.path, read_only=True, description=f"snapshot {snapshot} of {name}")
        except BaseException:
            view.close()
            raise
        self._views[export] = _View(view, is_kept)

    def _find_context(self, export: str, context: str) -> bool:
        """Work out what changed since a snapshot, for the metadata context of that name."""
        name, _, snapshot = (export or self.only_export() or "").partition("@")
        since = context.removeprefix(CONTEXT_PREFIX)
        try:
            with self._guard:
                served = self._served.get(name)
                view = self._views.get(f"{name}@{snapshot}")
                if snapshot and view is not None:
                    extents = view.volume.store.diff(name, since, snapshot)
                    self.nbd.set_changed_since(f"{name}@{snapshot}", context, _joined(extents))
                elif served is not None and not snapshot:
                    mark = self.nbd.change_mark(name)  # what is written from here on counts as changed
                    self.nbd.set_changed_since(name, context, _joined(served.volume.diff(since)), mark=mark)
                else:
                    return False
                self._contexts.add((f"{name}@{snapshot}" if snapshot else name, since))
            return True
        except (OnionskinError, OSError, ValueError, KeyError) as error:
            self.log(f"context {context!r} of {export!r}: {error}")
            return False

    def _forget_contexts(self, volume_name: str, names: set[str]) -> None:
        """A snapshot's name goes, and may come back for another disk: all counts as changed since it, till then."""
        for export, since in list(self._contexts):
            if since in names and export.partition("@")[0] == volume_name:
                self._contexts.discard((export, since))
                view, served = self._views.get(export), self._served.get(export)
                volume = view.volume if view else served.volume if served else None
                if volume is not None and volume.size_bytes:
                    self.nbd.set_changed_since(export, CONTEXT_PREFIX + since, [(0, volume.size_bytes)])

    # ---- views ----

    def clients_of(self, export: str) -> int:
        """Count the clients that have an export open."""
        return sum(connection.get("export") == export for connection in self.nbd.connections())

    def counters_of(self, volume_name: str) -> list[dict[str, Any]]:
        """Count what was asked of a volume, and of each of its snapshots that is open."""
        with self._guard:
            exports = [volume_name, *sorted(one for one in self._views if one.startswith(f"{volume_name}@"))]
            return [
                {"export": export, "connections": self.clients_of(export), **self.nbd.counters(export)}
                for export in exports
            ]

    @contextmanager
    def without_views(self, volume_name: str, names: set[str] | None) -> Iterator[None]:
        """Have no view of these snapshots of a volume (None: of any) open meanwhile.

        Raises
        ------
        StateError
            A client is reading one.
        """
        with self._operation(volume_name), self._without_views(volume_name, names):
            yield

    @contextmanager
    def _without_views(self, volume_name: str, names: set[str] | None) -> Iterator[None]:
        with self._guard:
            opened = {export for export in self._views if export.startswith(f"{volume_name}@")}
            exports = opened if names is None else {f"{volume_name}@{name}" for name in names}
            busy = {export for export in opened if self.clients_of(export)}
            if busy & exports:
                raise StateError(f"clients are reading {', '.join(sorted(busy & exports))}; disconnect them first")
            for export in opened - busy:
                self._close_view(export)
            self._barred |= exports
        try:
            yield
        finally:
            with self._guard:
                self._barred -= exports
                self._forget_contexts(volume_name, names or set())

    @contextmanager
    def paused(self, volume_name: str) -> Iterator[None]:
        """Hold all requests for a volume back meanwhile: clients wait, and see no error."""
        with self._operation(volume_name):
            self.nbd.pause(volume_name)
            try:
                yield
            finally:
                self.nbd.resume(volume_name)

    def _close_view(self, export: str) -> None:
        view = self._views.pop(export, None)
        if view:
            self._contexts = {one for one in self._contexts if one[0] != export}
            self.nbd.remove_export(export)
            view.volume.close()

    def _close_idle_views(self, *, keep: int) -> None:
        """Close views that nobody reads any more; the one that was used last goes last."""
        now = time.monotonic()
        in_use = {connection["export"] for connection in self.nbd.connections()}
        for export in in_use & self._views.keys():
            self._views[export].last_used = now
        idle = [one for one, view in self._views.items() if one not in in_use and not view.is_kept]
        idle.sort(key=lambda export: self._views[export].last_used, reverse=True)
        for index, export in enumerate(idle):
            if index >= keep or now - self._views[export].last_used > VIEW_IDLE_SECONDS:
                self._close_view(export)

    def _make_room(self, name: str) -> bool:
        """Give up a store's reserve for a client's flush, as `Volume.flush` does; it is set aside again soon after."""
        served = self._served.get(name)
        if served is None or not served.volume.store.give_up_reserve():
            return False
        self._tidying.set()
        return True

    def _tidy(self) -> None:
        """Close idle views, free what clients' flushes freed, and set aside again what a full disk took."""
        with self._guard:
            self._follow_names()
            self._close_idle_views(keep=IDLE_VIEWS_MAX)
            served = list(self._served.values())
        for one in served:
            try:
                one.volume.scrub_freed()
                one.volume.compact_if_wanted()
                one.volume.store.work_soon()
                one.volume.store.make_reserve()
            except (OnionskinError, OSError) as error:
                one.say_once(f"{one.name}: {error}")

    # ---- listening ----

    def listen(self, listeners: list[Listener], *, anybody: bool = False) -> None:
        """Take sockets to listen on; TCP that others than this machine reach wants TLS, and clients that show who they are.

        Unless `anybody` says that all may come in who speak TLS.
        """
        self.listeners += listeners  # and with them what is refused: `close` closes them all
        for listener in listeners:
            may_come = listener.tls is not None and (listener.tls.knows_clients or anybody)
            if not is_local(listener.socket) and not may_come:
                raise StateError(
                    f"{listener.uri} can be reached from other machines: give --tls-certificate, --tls-key and "
                    "--tls-ca, or --tls-psk, or listen on 127.0.0.1 or on a Unix socket"
                )
            listener.socket.setblocking(False)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop` is called; `ready` is called when clients can connect. Flushes all volumes at the end."""
        accepting = threading.Thread(target=self._accept, name="onionskin accept", daemon=True)
        try:
            accepting.start()
            ready()
            while not self._stopping.is_set():
                self._tidying.clear()
                self._tidy()
                self._tidying.wait(TIDY_SECONDS)
        finally:
            self._stopping.set()
            self._waker.send(b"x")
            accepting.join()
            self.close()

    def stop(self) -> None:
        """End `run`. May be called by any thread and by a signal handler."""
        self._stopping.set()
        self._tidying.set()

    def close(self) -> None:
        """Let clients finish what they are at, then flush and give all volumes up. Idempotent."""
        self._stopping.set()
        with ExitStack() as stack:  # all of it is done, whatever fails; the first failure is raised
            for store in self._stores.values():
                stack.callback(store.close)
            for view in self._views.values():
                stack.callback(view.volume.close)
            for served in self._served.values():
                stack.callback(served.control.join, GRACE_SECONDS)
                stack.callback(served.volume.close)
            stack.callback(self._join_carriers)
            stack.callback(self._log_events)
            stack.callback(self.nbd.stop, grace_seconds=GRACE_SECONDS)
            for served in self._served.values():
                stack.callback(served.control.close)
            for listener in self.listeners:
                stack.callback(listener.close)
        self._wake.close()
        self._waker.close()

    def _accept(self) -> None:
        by_descriptor = {listener.socket.fileno(): listener for listener in self.listeners}
        poll = select.poll()
        for descriptor in (*by_descriptor, self._wake.fileno(), self.nbd.event_fd):
            poll.register(descriptor, select.POLLIN)
        while not self._stopping.is_set():
            for descriptor, _ in poll.poll():
                if descriptor in by_descriptor:
                    self._take(by_descriptor[descriptor])
                elif descriptor == self.nbd.event_fd:
                    self._log_events()

    def _log_events(self) -> None:
        for line in self.nbd.events():
            self.log(line)

    def _take(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptors are left, or no memory: that passes, and must not spin
            self.log(f"a client could not be accepted: {os.strerror(error.errno or 0)}")
            self._stopping.wait(0.2)
            return
        try:
            connection.setblocking(True)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = peer_of(connection)
        except OSError:  # it went away again
            connection.close()
            return
        try:
            if listener.tls is None:
                self.serve(connection, peer)
            else:
                self._serve_tls(connection, peer, listener.tls)
        except (OnionskinError, OSError) as error:
            self.log(f"{peer}: refused: {error}")
            connection.close()

    def serve(self, connection: socket.socket, peer: str, *, is_tls: bool = False) -> None:
        """Hand a connected stream socket to the C server."""
        try:
            self.nbd.serve(connection.detach(), peer, tls=is_tls)  # which closes it, also where it fails
        except OSError as error:
            if error.errno == EMFILE:
                full = f"{self._limits.connections_max} clients are connected; raise --connections to let more in"
                raise StateError(full) from None
            raise

    def serve_one(self, connection: socket.socket) -> None:
        """Serve one client, and return when it has gone, or `stop` was called. The caller closes the server."""
        watched = connection.dup()
        self.serve(connection, "stdin")
        poll = select.poll()
        poll.register(watched.fileno(), select.POLLRDHUP)
        while not self._stopping.is_set() and not poll.poll(200):
            pass
        watched.close()

    def _serve_tls(self, connection: socket.socket, peer: str, terms: Terms) -> None:
        if not self._tls_place():
            self.log(f"{peer}: refused: {self._limits.connections_max} clients are connected")
            connection.close()
            return

        def carry() -> None:
            try:
                self._carry(connection, peer, terms)
            except tls.Refused as refusal:
                self.log(f"{peer}: refused: {refusal}")
            except (OnionskinError, OSError) as error:
                self.log(f"{peer}: {error}")
            finally:
                self._tls_places.release()
                with self._guard:
                    self._carriers.discard(threading.current_thread())

        carrier = threading.Thread(target=carry, name=f"onionskin tls {peer}", daemon=True)
        with self._guard:
            self._carriers.add(carrier)
            self._handshakes[carrier] = connection.dup()  # `accept` takes the other one over
        carrier.start()

    def _tls_place(self) -> bool:
        """Take a place for a client with TLS; the oldest that is still in its handshake gives way."""
        if self._tls_places.acquire(blocking=False):
            return True
        with self._guard:
            oldest = next(iter(self._handshakes.values()), None)
            if oldest is None:
                return False
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        return self._tls_places.acquire(timeout=GIVE_WAY_SECONDS)

    def _carry(self, connection: socket.socket, peer: str, terms: Terms) -> None:
        try:
            outer = tls.accept(connection, terms)
        finally:
            with self._guard:
                self._handshakes.pop(threading.current_thread()).close()
        name = tls.owner(outer)
        inner, for_server = socket.socketpair()
        try:
            self.serve(for_server, f"{peer} ({outer.version()}{f', {name!r}' if name else ''})", is_tls=True)
        except BaseException:
            inner.close()
            outer.close()
            raise
        tls.pump(outer, inner)

    def _join_carriers(self) -> None:
        """Let the last replies of the C server out to clients with TLS; who is still in a handshake gets none."""
        deadline = time.monotonic() + CARRY_SECONDS
        with self._guard:
            carriers = list(self._carriers)
        for carrier in carriers:
            carrier.join(max(0.0, deadline - time.monotonic()))


def _names_behind(store: Store, volume_name: str, last: str) -> Iterator[str]:
    """Name a volume's snapshots, in order, behind the last one."""
    volume = store.catalog.row(VolumeRow, "name = ?", volume_name)
    while volume:
        rows = store.catalog.rows(
            SnapshotRow, f"volume = ? AND name > ? ORDER BY name LIMIT {LIST_PAGE}", volume.id, last
        )
        for row in rows:
            yield row.name
        if len(rows) < LIST_PAGE:
            return
        last = rows[-1].name


def _joined(extents: Any) -> list[tuple[int, int]]:
    """Make (offset, length) of extents, those that touch joined."""
    found: list[tuple[int, int]] = []
    for offset, length, _ in extents.tolist():
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


@dataclass(slots=True)
class _View:
    volume: Volume
    is_kept: bool
    last_used: float = field(default_factory=time.monotonic)


class ServedVolume:
    """A volume that is held and exported, with its control socket."""

    def __init__(self, server: Server, volume: Volume) -> None:
        self.server = server
        self.volume = volume
        self.name = volume.name  # that clients ask for
        self._said: set[str] = set()
        try:
            server.nbd.add_export(self.name, volume.path, read_only=False, description=f"volume {self.name}")
            volume.on_switch = self._switch
            path = volume.store.layout.volume_control(volume.row.id)
            with suppress(FileNotFoundError):
                path.unlink()  # we hold the volume: whoever made it is gone
            self.control = ControlSocket(path, self, server.log)
        except BaseException:
            volume.close()
            raise

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""
        return self.server.allow_revert

    def paused(self) -> Any:
        """Hold all requests of clients back meanwhile."""
        return self.server.paused(self.name)

    def _switch(self, path: "DataPath") -> None:
        """After a revert: requests that come from now on go to the new data path; those under way have ended."""
        try:
            self.server.nbd.replace_path(self.name, path)
        except (StateError, KeyError):  # the server is stopped, and uses no path any more
            self.server.log(f"{self.name}: changed its disk while the server was ending")

    def info(self) -> dict[str, Any]:
        """Say what it is and where it is served."""
        return {
            "name": self.name,
            "size_bytes": self.volume.size_bytes,
            "block_size": self.volume.block_size,
            "pid": os.getpid(),
            "uris": [listener.uri for listener in self.server.listeners],
            "allow_revert": self.allow_revert,
        }

    def stats(self) -> dict[str, Any]:
        """Give counters and connections."""
        return {
            "volume": self.name,
            "uptime_seconds": round(time.monotonic() - self.server.started, 3),
            "memory_bytes": self.volume.path.memory_bytes,
            "poisoned": self.volume.path.poisoned,
            "counters": self.server.nbd.counters(),
            "exports": self.server.counters_of(self.name),
            "connections": self.server.nbd.connections(),
        }

    def without_views(self, names: set[str] | None) -> Any:
        """Have no view of these snapshots (None: of any) open meanwhile."""
        return self.server.without_views(self.name, names)

    def rename(self, new_name: str) -> None:
        """Give it another name."""
        self.server.rename(self, new_name)

    def say_once(self, line: str) -> None:
        """Log a failure that would come again every few seconds."""
        if line not in self._said:
            self._said.add(line)
            self.server.log(line)
