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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EMFILE
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin.base.sockets import is_local, peer_of, uri_of
from onionskin.catalog import SnapshotRow, VolumeRow
from onionskin.catalog.tree import find_snapshot
from onionskin.control.server import ControlSocket
from onionskin.errors import OnionskinError, SnapshotNotFoundError, StateError, VolumeNotFoundError
from onionskin.nbd import tls
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.tls import Terms
from onionskin.operations import reclaim
from onionskin.operations.volumes import rename_volume
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

TIDY_SECONDS = 5.0
VIEW_IDLE_SECONDS = 30.0
IDLE_VIEWS_MAX = 16  # a client that lists all exports opens one after the other
GRACE_SECONDS = 10.0
CARRY_SECONDS = 2.0
GIVE_WAY_SECONDS = 1.0
OPEN_TRIES = 10
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
    trust : bool
        Whether to open stores that another user owns.

    Notes
    -----
    What an export stands for is a volume's id, and a snapshot's row; the name that clients ask for is only its label. Names
    are looked up again whenever a client asks for one, and a label follows its volume.
    """

    def __init__(self, *, limits: Limits, allow_revert: bool, log: Log, trust: bool = False) -> None:
        self.allow_revert = allow_revert
        self.log = log
        self.started = time.monotonic()
        self.listeners: list[Listener] = []
        self._limits = limits
        self._trust = trust
        self._stores: dict[Path, Store] = {}
        self._whole_stores: list[Store] = []
        self._served: dict[str, ServedVolume] = {}
        self._views: dict[str, _View] = {}
        self._opening: set[str] = set()  # labels that a thread is making an export for
        # The three above, and what ServedVolume says of it. Never held while something is opened, closed, read from a
        # catalog or computed: handshakes of clients wait for it.
        self.guard = threading.RLock()
        self._changed = threading.Condition(self.guard)
        self._carriers: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._tidying = threading.Event()  # set when there is something to tidy up now
        self._said: set[str] = set()
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
        self.nbd.on_known_export = self._is_still_export
        self.nbd.on_known_context = self._is_still_context
        self.nbd.on_unknown_export = self._find_export
        self.nbd.on_unknown_context = self._find_context
        self.nbd.on_full_disk = self._make_room
        self.nbd.on_freed = lambda name: self._tidying.set()

    # ---- what is served ----

    def add_store(self, path: Path) -> None:
        """Serve all volumes of a store, also those that are made later.

        One that cannot be opened does not keep the others from being served: the log says why, and a client that asks for
        it makes the server try again.
        """
        store = self._store(path)
        failures: list[Exception] = []
        served = 0
        for row in store._opened.catalog.rows(VolumeRow, "1 ORDER BY name"):
            try:
                self._serve(store, row.name, is_new=True)
                served += 1
            except VolumeNotFoundError:
                continue  # deleted or renamed since the list was read: whoever asks for it finds it
            except (OnionskinError, OSError) as error:
                failures.append(error)
                self.log(f"volume {row.name!r} is not served: {error}")
        if failures and not served:
            raise failures[0]
        self._whole_stores.append(store)

    def add_volume(self, path: Path, name: str) -> None:
        """Serve a volume, and its snapshots."""
        self._serve(self._store(path), name, is_new=True)

    def add_snapshot(self, path: Path, name: str, snapshot: str) -> None:
        """Serve one snapshot; the volume is not held."""
        store = self._store(path)
        view, row = _open_snapshot(store, store._opened.catalog.volume(name).id, snapshot)
        export = f"{name}@{snapshot}"
        try:
            with self.guard:
                if export in self._views:
                    raise ValueError(f"two snapshots are named {export!r}; serve one of them from a server of its own")
                self._add_view(export, _View(view, row, None))
        except BaseException:
            view.close()
            raise

    def _store(self, path: Path) -> Store:
        key = path.resolve()
        if key not in self._stores:
            more: dict[str, bool] = {"trust": True} if self._trust else {}
            self._stores[key] = Store(path, create=False, **more)
        return self._stores[key]

    def _serve(self, store: Store, name: str, *, is_new: bool = False) -> "ServedVolume":
        """Open a volume and export it, or give the one that another thread has exported meanwhile (not if `is_new`)."""
        with self._being_made(name):
            with self.guard:
                there = self._served.get(name)
                if there is not None and is_new:
                    raise ValueError(f"two volumes are named {name!r}; serve one of them from a server of its own")
                if there is not None:
                    return there
            served = ServedVolume(self, store.open(name), name)
            with self.guard:
                if not self._stopping.is_set():
                    self._served[name] = served
                    return served
            served.close()
            raise StateError("the server is stopping")

    @contextmanager
    def _being_made(self, export: str) -> Iterator[None]:
        """Be the only thread that makes an export of that label. Others wait for it, without the guard."""
        with self._changed:
            self._changed.wait_for(lambda: export not in self._opening)
            self._opening.add(export)
        try:
            yield
        finally:
            with self._changed:
                self._opening.discard(export)
                self._changed.notify_all()

    def export_names(self) -> list[str]:
        """Name all that clients can ask for."""
        with self.guard:
            names = [name for name, view in self._views.items() if view.is_kept]
            served = list(self._served.items())
        for name, one in served:
            names += [name, *(f"{name}@{snapshot.name}" for snapshot in one.volume.snapshots)]
        return sorted(set(names))

    def rename(self, served: "ServedVolume", new_name: str) -> None:
        """Give a volume another name, in the catalog and to clients that come from now on.

        Raises
        ------
        StateError
            The name is another export's, or an operation on the volume is under way.
        """
        with self.guard:
            if served.operations:
                raise StateError(f"an operation on {served.name!r} is under way; rename it when that has ended")
            if new_name in self._served and self._served[new_name] is not served:
                raise StateError(f"this server serves another volume {new_name!r}; choose another name")
            served.operations += 1
        try:
            rename_volume(served.volume.opened_store, served.volume.row.id, new_name)
        finally:
            with self.guard:
                served.operations -= 1
        self._follow_names()

    def _follow_names(self) -> None:
        """Give exports the names that their volumes have now, whoever renamed them; and take stale ones out of the way.

        The catalogs are read without the guard. An export whose volume is just being worked on keeps its label until that
        has ended, since the operation goes by it; `_is_still_export` sees to it that nobody gets it by a wrong name.
        """
        with self.guard:
            served, views = list(self._served.values()), list(self._views.values())
        names = {one: one.volume.name for one in served}
        meanings = {view: view.meaning() for view in views}
        with self.guard:
            wanted = {
                one.name: names[one] for one in served if self._served.get(one.name) is one and not one.operations
            }
            self._relabel(wanted)
            labels = {view: label for label, view in self._views.items()}
            for view, meant in meanings.items():
                label = labels.get(view)
                if label is None or view.operations:
                    continue
                # A snapshot whose name went, and may have come back for another: its clients keep it, others do not find it.
                new = meant or f"{label.partition('@@')[0]}@@{view.row.guid.hex()[:8]}"
                if new not in self._views:
                    self.nbd.rename_export(label, new, description=f"snapshot {view.row.name}")
                    self._views[new] = self._views.pop(label)

    def _relabel(self, wanted: dict[str, str]) -> None:
        """Give served volumes new labels; two that changed theirs for each other's go by way of a third. With the guard."""
        moves: dict[str, str] = {}
        left = {old: new for old, new in wanted.items() if old != new}
        while left != moves:  # one that cannot move keeps others from its place
            moves, left = left, {}
            for old, new in moves.items():
                if new not in self._served.keys() - moves.keys() and new not in left.values():
                    left[old] = new
        for old in moves:
            self._move_label(old, f"{old}@@moving")
        for old, new in moves.items():
            self._move_label(f"{old}@@moving", new)
            self.log(f"{old} is {new} now")

    def _move_label(self, old: str, new: str) -> None:
        self.nbd.rename_export(old, new, description=f"volume {new}")
        self._served[new] = self._served.pop(old)
        self._served[new].name = new

    def _list_exports(self, after: str) -> Iterator[tuple[str, str]]:
        """Name all that clients can ask for behind an export, by volume and then by snapshot, with a description.

        A page of a volume's snapshots at a time: their names alone are read, and nothing is opened.
        """
        volume_name, _, snapshot = after.partition("@")
        self._follow_names()
        with self.guard:
            kept = sorted(name.partition("@")[::2] for name, view in self._views.items() if view.is_kept)
            volumes = {name: (one.volume.store, one.volume.row.id) for name, one in self._served.items()}
        for store in self._whole_stores:
            volumes = {row.name: (store, row.id) for row in store._opened.catalog.rows(VolumeRow)} | volumes
        for name in sorted({*volumes, *(volume for volume, _ in kept)}):
            if name < volume_name:
                continue
            last = snapshot if name == volume_name else ""
            if name in volumes:
                if name != volume_name:
                    yield name, f"volume {name}"
                names = _names_behind(*volumes[name], last)
            else:
                names = iter([one for volume, one in kept if volume == name and one > last])
            for one in names:
                yield f"{name}@{one}", f"snapshot {one} of {name}"

    def only_export(self) -> str | None:
        """Give the export that clients get who name none, where there is just one to choose."""
        with self.guard:
            if len(self._served) == 1:
                return next(iter(self._served))
            kept = [name for name, view in self._views.items() if view.is_kept]
            return kept[0] if len(kept) == 1 and not self._served else None

    # ---- what the C server asks, from its threads ----

    def _is_still_export(self, name: str) -> bool:
        """Whether an export is what its label means now. The one that is given where none is named is what it is."""
        if not name:
            return True
        with self.guard:
            view, served = self._views.get(name), self._served.get(name)
            if view:
                view.last_used = time.monotonic()
        try:
            if served:
                return served.volume.name == name
            return view is None or view.meaning() == name
        except (OnionskinError, OSError) as error:
            self.log(f"export {name!r}: {error}")
            return False

    def _find_export(self, name: str) -> bool:
        """Open what a client asks for, if there is such a thing; True if the C server has it now."""
        try:
            return not self._stopping.is_set() and self._open_export(name)
        except (OnionskinError, OSError, ValueError) as error:
            self.log(f"export {name!r}: {error}")
            return False

    def _open_export(self, name: str) -> bool:
        self._follow_names()
        volume_name, at, snapshot = name.partition("@")
        with self.guard:
            view = self._views.get(name)
            served = self._served.get(volume_name)
        if view:  # followed its volume's name just now
            return self._is_still_export(name)
        if served and served.volume.name != volume_name:
            raise StateError(
                "the volume of that name has another one now; ask again when the operation on it has ended"
            )
        if served is None:
            for store in self._whole_stores:
                if store._opened.catalog.row(VolumeRow, "name = ?", volume_name):
                    served = self._serve(store, volume_name)
                    break
        if served is None or not at:
            return served is not None
        self._open_view(served, snapshot)
        return True

    def _open_view(self, served: "ServedVolume", snapshot: str) -> None:
        """Open a snapshot of a served volume and export it, without the guard."""
        self._close_idle_views(keep=IDLE_VIEWS_MAX - 1)
        with self._being_made(f"{served.name}@{snapshot}"):
            with self.guard:
                if f"{served.name}@{snapshot}" in self._views:
                    return  # another client was faster
                served.refuse_barred(snapshot)
                served.views_changing += 1
            view = None
            try:
                volume, row = _open_snapshot(served.volume.store, served.volume.row.id, snapshot)
                view = _View(volume, row, served)
                with self.guard:
                    served.refuse_barred(snapshot)  # an operation that came meanwhile waits for us
                    if self._stopping.is_set():
                        raise StateError("the server is stopping")
                    self._add_view(f"{served.name}@{snapshot}", view)
            except FileExistsError:  # the volume was renamed meanwhile, and asked for by its new name
                if view:
                    view.volume.close()
            except BaseException:
                if view:
                    view.volume.close()
                raise
            finally:
                self._views_changed(served)

    def _add_view(self, export: str, view: "_View") -> None:
        """Export a view. With the guard."""
        volume_name, _, snapshot = export.partition("@")
        self.nbd.add_export(
            export, view.volume.path, read_only=True, description=f"snapshot {snapshot} of {volume_name}"
        )
        self._views[export] = view

    def _views_changed(self, served: "ServedVolume") -> None:
        with self._changed:
            served.views_changing -= 1
            self._changed.notify_all()

    # ---- changed blocks ----

    def _exported(self, export: str) -> "_View | ServedVolume | None":
        with self.guard:
            name = export or self.only_export() or ""
            return self._views.get(name) or self._served.get(name)

    def _is_still_context(self, export: str, context: str) -> bool:
        """Whether a context was computed since the snapshot that its name means now, and on the disk as it is.

        So is one whose snapshot is gone: it says that everything changed.
        """
        since = context.removeprefix(CONTEXT_PREFIX)
        try:
            exported = self._exported(export)
            if exported is None:
                return False
            key = exported.context_key(since)
            if key is None:
                self._forget(exported, {since})
                return True
            with exported.contexts_guard:
                return exported.contexts.get(since) == key
        except (OnionskinError, OSError) as error:
            self.log(f"context {context!r} of {export!r}: {error}")
            return False

    def _find_context(self, export: str, context: str) -> bool:
        """Work out what changed since a snapshot, for the metadata context of that name.

        Without a lock while it is computed. Before it is offered it is looked at again whether the names still mean what
        they meant, and whether the disk is still the one that was compared.
        """
        since = context.removeprefix(CONTEXT_PREFIX)
        try:
            exported = self._exported(export)
            if exported is None:
                return False
            key = exported.context_key(since)
            if key is None:
                raise SnapshotNotFoundError(f"there is no snapshot {since!r}")
            # What is written from here on counts as changed.
            mark = self.nbd.change_mark(exported.name) if isinstance(exported, ServedVolume) else None
            runs = _joined(exported.diff(since))
            with self._operation(exported), exported.contexts_guard:
                if exported.context_key(since) != key:
                    raise StateError("the snapshots, or the disk, changed meanwhile; ask again")
                self.nbd.set_changed_since(self._label_of(exported), context, runs, mark=mark)
                exported.contexts[since] = key
            return True
        except (OnionskinError, OSError, ValueError, KeyError) as error:
            self.log(f"context {context!r} of {export!r}: {error}")
            return False

    def _forget_contexts(self, served: "ServedVolume", names: set[str]) -> None:
        """A snapshot's name went, and may come back for another disk: all counts as changed since it, till then."""
        with self.guard:
            exported = [served, *(view for view in self._views.values() if view.is_of(served))]
        for one in exported:
            self._forget(one, names)

    def _forget(self, exported: "_Exported", names: set[str]) -> None:
        with self._operation(exported), exported.contexts_guard:
            for since in names & exported.contexts.keys():
                del exported.contexts[since]
                if (size_bytes := exported.volume.size_bytes) and (label := self._label_of(exported)):
                    self.nbd.set_changed_since(label, CONTEXT_PREFIX + since, [(0, size_bytes)])

    # ---- views ----

    def _label_of(self, exported: "_Exported") -> str:
        """Give the label of an export; empty where it is none any more."""
        with self.guard:
            labels = [*self._served.items(), *self._views.items()]
        return next((label for label, one in labels if one is exported), "")

    def clients_of(self, export: str) -> int:
        """Count the clients that have an export open."""
        return sum(connection.get("export") == export for connection in self.nbd.connections())

    def counters_of(self, served: "ServedVolume") -> list[dict[str, Any]]:
        """Count what was asked of a volume, and of each of its snapshots that is open."""
        with self.guard:
            views = sorted(label for label, view in self._views.items() if view.is_of(served))
            return [
                {"export": export, "connections": self.clients_of(export), **self.nbd.counters(export)}
                for export in (served.name, *views)
            ]

    @contextmanager
    def _operation(self, exported: "_Exported") -> Iterator[None]:
        """Hold off what would change the label of an export, by which an operation goes."""
        with self.guard:
            exported.operations += 1
        try:
            yield
        finally:
            with self.guard:
                exported.operations -= 1

    @contextmanager
    def without_views(self, served: "ServedVolume", names: set[str] | None) -> Iterator[None]:
        """Have no view of these snapshots of a volume (None: of any) open meanwhile.

        Raises
        ------
        StateError
            A client is reading one.
        """
        with self._operation(served), served.barred(names):
            with self._changed:
                self._changed.wait_for(lambda: not served.views_changing)
                taken, busy = self._take_views(served, names)
            for view in taken:
                self._end_view(view)
            if busy:
                raise StateError(f"clients are reading {', '.join(sorted(busy))}; disconnect them first")
            try:
                yield
            finally:
                self._forget_contexts(served, names or set())

    def _take_views(self, served: "ServedVolume", names: set[str] | None) -> "tuple[list[_View], list[str]]":
        """Take the views of a volume away that no client has, and name those among `names` that one has. With the guard."""
        taken, busy = [], []
        for label, view in list(self._views.items()):
            if not view.is_of(served):
                continue
            view.served = served
            if self._take_view(label):
                taken.append(view)
            elif names is None or view.row.name in names:
                busy.append(label)
        return taken, busy

    def _take_view(self, label: str) -> bool:
        """Take a view away, if no client has it or is coming to it; `_end_view` has to follow. With the guard."""
        view = self._views[label]
        if view.operations or not self.nbd.remove_export(label, if_unused=True):
            return False
        del self._views[label]
        if view.served:
            view.served.views_changing += 1
        return True

    def _end_view(self, view: "_View") -> None:
        """Close a view that was taken away; what waited for its end is done by `_tidy`. Without the guard."""
        try:
            view.volume.close()
        finally:
            if view.served:
                self._views_changed(view.served)
            self._tidying.set()

    @contextmanager
    def paused(self, served: "ServedVolume") -> Iterator[None]:
        """Hold all requests for a volume back meanwhile: clients wait, and see no error."""
        with self._operation(served):
            self.nbd.pause(served.name)
            try:
                yield
            finally:
                self.nbd.resume(served.name)

    def _close_idle_views(self, *, keep: int) -> None:
        """Close views that nobody reads any more; the one that was used last goes last."""
        now = time.monotonic()
        in_use = {connection["export"] for connection in self.nbd.connections()}
        with self.guard:
            for label in in_use & self._views.keys():
                self._views[label].last_used = now
            idle = [one for one, view in self._views.items() if one not in in_use and not view.is_kept]
            idle.sort(key=lambda label: self._views[label].last_used, reverse=True)
            taken = [
                view
                for index, (label, view) in enumerate([(label, self._views[label]) for label in idle])
                if (index >= keep or now - view.last_used > VIEW_IDLE_SECONDS) and self._take_view(label)
            ]
        for view in taken:
            self._end_view(view)

    def _make_room(self, name: str) -> bool:
        """Flush for a client whose own flush found the disk full, with the store's reserve given up for it meanwhile."""
        served = self._served.get(name)
        if served is None:
            return False
        try:
            served.volume.flush()
        except (OnionskinError, OSError) as error:
            self.say_once(f"{name}: {error}")
            return False
        return True

    def _tidy(self) -> None:
        """Close idle views, free what clients' flushes freed, and set aside again what a full disk took.

        Whatever fails is said, and tried again later: neither the other volumes nor the server end for it.
        """
        with self.guard:
            served = list(self._served.values())
        steps: list[tuple[str, Callable[[], object]]] = [
            ("names", self._follow_names),
            ("views", lambda: self._close_idle_views(keep=IDLE_VIEWS_MAX)),
        ]
        for one in served:
            steps += [(one.name, one.volume.scrub_freed), (one.name, one.volume.compact_if_wanted)]
        for store in list(self._stores.values()):
            opened, at = store._opened, str(store.path)
            steps += [(at, partial(reclaim.work_soon, opened)), (at, opened.reserve.make)]
        for what, step in steps:
            try:
                step()
            except (OnionskinError, OSError) as error:
                self.say_once(f"{what}: {error}")

    def say_once(self, line: str) -> None:
        """Log a failure that would come again every few seconds."""
        if line not in self._said:
            self._said.add(line)
            self.log(line)

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
        with ExitStack() as stack:  # from the last to the first; all of it is done, whatever fails
            stack.callback(self._close_stores)
            # Nothing is opened any more: each of these looks at what there is when the server has stopped.
            stack.callback(lambda: _call_all([view.volume.close for view in self._views.values()]))
            stack.callback(lambda: _call_all([served.end for served in self._served.values()]))
            stack.callback(self._join_carriers)
            stack.callback(self._log_events)
            stack.callback(self.nbd.stop, grace_seconds=GRACE_SECONDS)
            stack.callback(lambda: _call_all([served.control.close for served in self._all_served()]))
            for listener in self.listeners:
                stack.callback(listener.close)
        self._wake.close()
        self._waker.close()

    def _all_served(self) -> "list[ServedVolume]":
        with self.guard:
            return list(self._served.values())

    def _close_stores(self) -> None:
        """Close the stores; what waited for a view that is closed now is freed, and wiped, before that."""
        while self._stores:
            _, store = self._stores.popitem()
            _call_all([store.close, store._opened.finish_work, partial(reclaim.work_soon, store._opened)])

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
                with self.guard:
                    self._carriers.discard(threading.current_thread())

        carrier = threading.Thread(target=carry, name=f"onionskin tls {peer}", daemon=True)
        with self.guard:
            self._carriers.add(carrier)
            self._handshakes[carrier] = connection.dup()  # `accept` takes the other one over
        carrier.start()

    def _tls_place(self) -> bool:
        """Take a place for a client with TLS; the oldest that is still in its handshake gives way."""
        if self._tls_places.acquire(blocking=False):
            return True
        with self.guard:
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
            with self.guard:
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
        with self.guard:
            carriers = list(self._carriers)
        for carrier in carriers:
            carrier.join(max(0.0, deadline - time.monotonic()))


def _call_all(calls: "Sequence[Callable[[], object]]") -> None:
    """Make all calls, the last one first, whatever fails; the first failure is raised."""
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call)


def _open_snapshot(store: Store, volume_id: bytes, snapshot: str) -> tuple[Volume, SnapshotRow]:
    """Open a snapshot of the volume with this id, and say which one it is.

    A store opens by names, and somebody else may give them to others meanwhile: what was opened is what is wanted if the
    name meant the same before and after.
    """
    for _ in range(OPEN_TRIES):
        volume = store._opened.catalog.row(VolumeRow, "id = ?", volume_id)
        if volume is None:
            raise VolumeNotFoundError("the volume was deleted meanwhile")
        before = find_snapshot(store._opened.catalog, volume, snapshot)
        view = store.open(volume.name, snapshot=snapshot)
        try:
            after = store._opened.catalog.row(SnapshotRow, "volume = ? AND name = ?", volume_id, snapshot)
            if view.row.id == volume_id and after is not None and _is_same(before, after):
                return view, after
        except BaseException:
            view.close()
            raise
        view.close()
    raise StateError(f"snapshot {snapshot!r} is being dropped and taken again; try again")


def _is_same(one: SnapshotRow, other: SnapshotRow) -> bool:
    """Whether two rows, read at different times, are of one snapshot. Its layer's id may change, and a name comes back."""
    return (one.volume, one.name, one.guid, one.created_ns) == (other.volume, other.name, other.guid, other.created_ns)


def _names_behind(store: Store, volume_id: bytes, last: str) -> Iterator[str]:
    """Name a volume's snapshots, in order, behind the last one."""
    while True:
        rows = store._opened.catalog.rows(
            SnapshotRow, f"volume = ? AND name > ? ORDER BY name LIMIT {LIST_PAGE}", volume_id, last
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


class _Exported:
    """What an export stands for: an open volume or view, and the changed-since contexts that were computed for it."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.operations = 0  # that go by its label; with the server's guard
        self.contexts: dict[str, tuple[object, ...]] = {}  # by the name of the snapshot since which
        self.contexts_guard = threading.Lock()  # held while one is offered, forgotten, or the disk replaced
        self._switches = 0

    def snapshot_row(self, name: str) -> SnapshotRow | None:
        """Look up what a snapshot's name means now."""
        return self.volume.opened_store.catalog.row(SnapshotRow, "volume = ? AND name = ?", self.volume.row.id, name)

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """Say what a context since that snapshot depends on: it holds while this stays the same. None: no such snapshot."""
        row = self.snapshot_row(since)
        return None if row is None else (row.guid, row.created_ns, self.volume.name, self._switches)


class _View(_Exported):
    """A snapshot that is exported, and which one it was when it was opened."""

    def __init__(self, volume: Volume, row: SnapshotRow, served: "ServedVolume | None") -> None:
        super().__init__(volume)
        self.row = row
        self.served = served
        self.is_kept = served is None  # it was asked for when the server started
        self.last_used = time.monotonic()

    def is_of(self, served: "ServedVolume") -> bool:
        """Whether it is a view of a snapshot of that volume."""
        return self.volume.store is served.volume.store and self.volume.row.id == served.volume.row.id

    def meaning(self) -> str | None:
        """Say by which name clients ask for it now; None where its own is gone, or another snapshot's."""
        volume = self.volume.opened_store.catalog.row(VolumeRow, "id = ?", self.volume.row.id)
        row = self.snapshot_row(self.row.name)
        return f"{volume.name}@{row.name}" if volume and row and _is_same(row, self.row) else None

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """As for a volume; a view whose own name is gone has none."""
        return super().context_key(since) if self.meaning() else None

    def diff(self, since: str) -> Any:
        """Compare it with an older snapshot."""
        return self.volume.store.diff(self.volume.name, since, self.row.name)


class ServedVolume(_Exported):
    """A volume that is held and exported, with its control socket."""

    def __init__(self, server: Server, volume: Volume, name: str) -> None:
        super().__init__(volume)
        self.server = server
        self.name = name  # the label that clients ask for; with the server's guard
        self.views_changing = 0  # views of it that are being opened or closed; with the server's guard
        self._bars: Counter[str | None] = Counter()  # snapshots that may not be opened; None: all
        try:
            server.nbd.add_export(name, volume.path, read_only=False, description=f"volume {name}")
            volume.on_switch = self._switch
            path = volume.opened_store.layout.volume_control(volume.row.id)
            with suppress(FileNotFoundError):
                path.unlink()  # we hold the volume: whoever made it is gone
            self.control = ControlSocket(path, self, server.log)
        except BaseException:
            with suppress(KeyError, StateError):
                server.nbd.remove_export(name)
            volume.close()
            raise

    def close(self) -> None:
        """Take it away from clients, and give it up."""
        self.control.close()
        with suppress(KeyError, StateError):
            self.server.nbd.remove_export(self.name)
        self.end()

    def end(self) -> None:
        """Give the volume up, and let those have their replies whose operations that cut off."""
        _call_all([lambda: self.control.join(GRACE_SECONDS), self.volume.close])

    def diff(self, since: str) -> Any:
        """Compare it with a snapshot."""
        return self.volume.diff(since)

    @contextmanager
    def barred(self, names: set[str] | None) -> Iterator[None]:
        """Have no view of these snapshots (None: of any) opened meanwhile."""
        barred: set[str | None] = {None} if names is None else {*names}
        with self.server.guard:
            self._bars.update(barred)
        try:
            yield
        finally:
            with self.server.guard:
                self._bars.subtract(barred)

    def refuse_barred(self, snapshot: str) -> None:
        """Refuse to have a view of a snapshot opened that an operation is about. With the server's guard."""
        if self._bars[snapshot] or self._bars[None]:
            raise StateError("the snapshot is being merged or discarded")

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""
        return self.server.allow_revert

    def paused(self) -> Any:
        """Hold all requests of clients back meanwhile."""
        return self.server.paused(self)

    def _switch(self, path: "DataPath") -> None:
        """After a revert: requests that come from now on go to the new data path; those under way have ended."""
        try:
            with self.contexts_guard:
                self._switches += 1
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
            "exports": self.server.counters_of(self),
            "connections": self.server.nbd.connections(),
        }

    def without_views(self, names: set[str] | None) -> Any:
        """Have no view of these snapshots (None: of any) open meanwhile."""
        return self.server.without_views(self, names)

    def rename(self, new_name: str) -> None:
        """Give it another name."""
        self.server.rename(self, new_name)
