"""What is served: volumes that are held, and snapshots that are opened when a client asks for them.

What must hold: a volume is held for as long as it is served, and flushed before it is given up; a view of a snapshot
is open only while somebody may be reading it, because it keeps files from being freed and a base from being merged
into; whoever changes the tree does so with no view open that the change would pull away. Names are looked up again
whenever a client asks for one, and a label follows its volume.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from onionskin.base.closing import call_all
from onionskin.errors import OnionskinError, StateError, VolumeNotFoundError
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.changed_blocks import ChangedBlocks
from onionskin.nbd.export_table import ExportTable
from onionskin.nbd.exported import ServedVolume, View, open_snapshot, snapshot_names_behind
from onionskin.operations import reclaim
from onionskin.operations.flush import compact_map_if_wanted, reclaim_freed
from onionskin.operations.volumes import rename_volume
from onionskin.store import Store

VIEW_IDLE_SECONDS = 30.0
IDLE_VIEWS_MAX = 16  # a client that lists all exports opens one after the other


class Exports:
    """The volumes and snapshots that clients can ask for.

    Parameters
    ----------
    nbd : NbdServer
        Asks for exports by name, and is given them.
    allow_revert : bool
        Whether `revert` works while clients are connected: they agreed that the disk may change under them.
    trust : bool
        Whether to open stores that another user owns.
    log : callable
        Takes a line.
    uris : callable
        Says where clients connect.
    stopping : threading.Event
        Nothing is opened any more once it is set.
    want_tidying : callable
        Is called when there is something for `tidy` to do.

    Attributes
    ----------
    table : ExportTable
        What there is now.
    """

    def __init__(
        self,
        nbd: NbdServer,
        *,
        allow_revert: bool,
        trust: bool,
        log: Callable[[str], None],
        uris: Callable[[], list[str]],
        stopping: threading.Event,
        want_tidying: Callable[[], None],
    ) -> None:
        self.allow_revert = allow_revert
        self.started = time.monotonic()
        self._nbd = nbd
        self._trust = trust
        self._log = log
        self._uris = uris
        self._stopping = stopping
        self._want_tidying = want_tidying
        self._stores: dict[Path, Store] = {}
        self._whole_stores: list[Store] = []
        self._said: set[str] = set()
        self.table = ExportTable(nbd, log)
        self._changed_blocks = ChangedBlocks(self.table, nbd, log)
        nbd.on_known_export = self._is_still_export
        nbd.on_known_context = self._changed_blocks.is_still
        nbd.on_unknown_export = self._find_export
        nbd.on_unknown_context = self._changed_blocks.find
        nbd.on_full_disk = self._make_room
        nbd.on_freed = lambda name: self._want_tidying()

    @property
    def uris(self) -> list[str]:
        """Where clients connect."""
        return self._uris()

    # ---- what is served ----

    def add_store(self, path: Path) -> None:
        """Serve all volumes of a store, also those that are made later.

        One that cannot be opened does not keep the others from being served: the log says why, and a client that asks for
        it makes the server try again.
        """
        store = self._store(path)
        failures: list[Exception] = []
        served = 0
        for row in store._opened.catalog.volumes_by_name():
            try:
                self._serve(store, row.name, is_new=True)
                served += 1
            except VolumeNotFoundError:
                continue  # deleted or renamed since the list was read: whoever asks for it finds it
            except (OnionskinError, OSError) as error:
                failures.append(error)
                self._log(f"volume {row.name!r} is not served: {error}")
        if failures and not served:
            raise failures[0]
        self._whole_stores.append(store)

    def add_volume(self, path: Path, name: str) -> None:
        """Serve a volume, and its snapshots."""
        self._serve(self._store(path), name, is_new=True)

    def add_snapshot(self, path: Path, name: str, snapshot: str) -> None:
        """Serve one snapshot; the volume is not held."""
        store = self._store(path)
        view, row = open_snapshot(store, store._opened.catalog.volume(name).id, snapshot)
        export = f"{name}@{snapshot}"
        try:
            with self.table.guard:
                if export in self.table.views:
                    raise ValueError(f"two snapshots are named {export!r}; serve one of them from a server of its own")
                self.table.add_view(export, View(view, row, None))
        except BaseException:
            view.close()
            raise

    def _store(self, path: Path) -> Store:
        key = path.resolve()
        if key not in self._stores:
            more: dict[str, bool] = {"trust": True} if self._trust else {}
            self._stores[key] = Store(path, create=False, **more)
        return self._stores[key]

    def _serve(self, store: Store, name: str, *, is_new: bool = False) -> ServedVolume:
        """Open a volume and export it, or give the one that another thread has exported meanwhile (not if `is_new`)."""
        with self.table.being_made(name):
            with self.table.guard:
                there = self.table.served.get(name)
                if there is not None and is_new:
                    raise ValueError(f"two volumes are named {name!r}; serve one of them from a server of its own")
                if there is not None:
                    return there
            served = ServedVolume(self, self._nbd, store.open(name), name, guard=self.table.guard, log=self._log)
            with self.table.guard:
                if not self._stopping.is_set():
                    self.table.served[name] = served
                    return served
            served.close()
            raise StateError("the server is stopping")

    def names(self) -> list[str]:
        """Name all that clients can ask for."""
        with self.table.guard:
            names = [name for name, view in self.table.views.items() if view.is_kept]
            served = list(self.table.served.items())
        for name, one in served:
            names += [name, *(f"{name}@{snapshot.name}" for snapshot in one.volume.snapshots)]
        return sorted(set(names))

    def set_default(self) -> None:
        """Have clients who name no export get the only one, where there is just one to choose."""
        if (only := self.table.only()) is not None:
            self._nbd.set_default(only)

    def rename(self, served: ServedVolume, new_name: str) -> None:
        """Give a volume another name, in the catalog and to clients that come from now on.

        Raises
        ------
        StateError
            The name is another export's, or an operation on the volume is under way.
        """
        with self.table.guard:
            if served.operations:
                raise StateError(f"an operation on {served.name!r} is under way; rename it when that has ended")
            if new_name in self.table.served and self.table.served[new_name] is not served:
                raise StateError(f"this server serves another volume {new_name!r}; choose another name")
            served.operations += 1
        try:
            rename_volume(served.opened.store, served.opened.row.id, new_name)
        finally:
            with self.table.guard:
                served.operations -= 1
        self.table.follow_names()

    def names_behind(self, after: str) -> Iterator[tuple[str, str]]:
        """Name all that clients can ask for behind an export, by volume and then by snapshot, with a description.

        A page of a volume's snapshots at a time: their names alone are read, and nothing is opened.
        """
        volume_name, _, snapshot = after.partition("@")
        self.table.follow_names()
        with self.table.guard:
            kept = sorted(name.partition("@")[::2] for name, view in self.table.views.items() if view.is_kept)
            volumes = {name: (one.volume.store, one.opened.row.id) for name, one in self.table.served.items()}
        for store in self._whole_stores:
            volumes = {row.name: (store, row.id) for row in store._opened.catalog.volumes()} | volumes
        for name in sorted({*volumes, *(volume for volume, _ in kept)}):
            if name < volume_name:
                continue
            last = snapshot if name == volume_name else ""
            if name in volumes:
                if name != volume_name:
                    yield name, f"volume {name}"
                names = snapshot_names_behind(*volumes[name], last)
            else:
                names = iter([one for volume, one in kept if volume == name and one > last])
            for one in names:
                yield f"{name}@{one}", f"snapshot {one} of {name}"

    def contexts_behind(self, export: str, after: str) -> Iterator[str]:
        """Name all metadata contexts of an export that clients can ask for, but those that need no snapshot."""
        return self._changed_blocks.names_behind(export, after)

    # ---- what the C server asks, from its threads ----

    def _is_still_export(self, name: str) -> bool:
        """Whether an export is what its label means now. The one that is given where none is named is what it is."""
        if not name:
            return True
        with self.table.guard:
            view, served = self.table.views.get(name), self.table.served.get(name)
            if view:
                view.last_used = time.monotonic()
        try:
            if served:
                return served.volume.name == name
            return view is None or view.meaning() == name
        except (OnionskinError, OSError) as error:
            self._log(f"export {name!r}: {error}")
            return False

    def _find_export(self, name: str) -> bool:
        """Open what a client asks for, if there is such a thing; True if the C server has it now."""
        try:
            return not self._stopping.is_set() and self._open_export(name)
        except (OnionskinError, OSError, ValueError) as error:
            self._log(f"export {name!r}: {error}")
            return False

    def _open_export(self, name: str) -> bool:
        self.table.follow_names()
        volume_name, at, snapshot = name.partition("@")
        with self.table.guard:
            view = self.table.views.get(name)
            served = self.table.served.get(volume_name)
        if view:  # followed its volume's name just now
            return self._is_still_export(name)
        if served and served.volume.name != volume_name:
            raise StateError(
                "the volume of that name has another one now; ask again when the operation on it has ended"
            )
        if served is None:
            for store in self._whole_stores:
                if store._opened.catalog.volume_named(volume_name):
                    served = self._serve(store, volume_name)
                    break
        if served is None or not at:
            return served is not None
        self._open_view(served, snapshot)
        return True

    def _open_view(self, served: ServedVolume, snapshot: str) -> None:
        """Open a snapshot of a served volume and export it, without the guard."""
        self._close_idle_views(keep=IDLE_VIEWS_MAX - 1)
        with self.table.being_made(f"{served.name}@{snapshot}"):
            with self.table.guard:
                if f"{served.name}@{snapshot}" in self.table.views:
                    return  # another client was faster
                served.refuse_barred(snapshot)
                served.views_changing += 1
            view = None
            try:
                volume, row = open_snapshot(served.volume.store, served.opened.row.id, snapshot)
                view = View(volume, row, served)
                with self.table.guard:
                    served.refuse_barred(snapshot)  # an operation that came meanwhile waits for us
                    if self._stopping.is_set():
                        raise StateError("the server is stopping")
                    self.table.add_view(f"{served.name}@{snapshot}", view)
            except FileExistsError:  # the volume was renamed meanwhile, and asked for by its new name
                if view:
                    view.volume.close()
            except BaseException:
                if view:
                    view.volume.close()
                raise
            finally:
                self.table.views_changed(served)

    # ---- views ----

    def clients_of(self, export: str) -> int:
        """Count the clients that have an export open."""
        return sum(connection.get("export") == export for connection in self._nbd.connections())

    def counters_of(self, served: ServedVolume) -> list[dict[str, Any]]:
        """Count what was asked of a volume, and of each of its snapshots that is open."""
        with self.table.guard:
            views = sorted(label for label, view in self.table.views.items() if view.is_of(served))
            return [
                {"export": export, "connections": self.clients_of(export), **self._nbd.counters(export)}
                for export in (served.name, *views)
            ]

    @contextmanager
    def without_views(self, served: ServedVolume, names: set[str] | None) -> Iterator[None]:
        """Have no view of these snapshots of a volume (None: of any) open meanwhile.

        Raises
        ------
        StateError
            A client is reading one.
        """
        with self.table.operation(served), served.barred(names):
            with self.table.changed:
                self.table.changed.wait_for(lambda: not served.views_changing)
                taken, busy = self.table.take_views(served, names)
            for view in taken:
                self._end_view(view)
            if busy:
                raise StateError(f"clients are reading {', '.join(sorted(busy))}; disconnect them first")
            try:
                yield
            finally:
                self._changed_blocks.forget(served, names or set())

    def _end_view(self, view: View) -> None:
        """Close a view that was taken away; what waited for its end is done by `tidy`. Without the guard."""
        try:
            view.volume.close()
        finally:
            if view.served:
                self.table.views_changed(view.served)
            self._want_tidying()

    @contextmanager
    def paused(self, served: ServedVolume) -> Iterator[None]:
        """Hold all requests for a volume back meanwhile: clients wait, and see no error."""
        with self.table.operation(served):
            self._nbd.pause(served.name)
            try:
                yield
            finally:
                self._nbd.resume(served.name)

    def _close_idle_views(self, *, keep: int) -> None:
        """Close views that nobody reads any more; the one that was used last goes last."""
        now = time.monotonic()
        in_use = {connection["export"] for connection in self._nbd.connections()}
        with self.table.guard:
            for label in in_use & self.table.views.keys():
                self.table.views[label].last_used = now
            idle = [one for one, view in self.table.views.items() if one not in in_use and not view.is_kept]
            idle.sort(key=lambda label: self.table.views[label].last_used, reverse=True)
            taken = [
                view
                for index, (label, view) in enumerate([(label, self.table.views[label]) for label in idle])
                if (index >= keep or now - view.last_used > VIEW_IDLE_SECONDS) and self.table.take_view(label)
            ]
        for view in taken:
            self._end_view(view)

    # ---- room, and what is tidied up ----

    def _make_room(self, name: str) -> bool:
        """Flush for a client whose own flush found the disk full, with the store's reserve given up for it meanwhile."""
        served = self.table.served.get(name)
        if served is None:
            return False
        try:
            served.volume.flush()
        except (OnionskinError, OSError) as error:
            self._say_once(f"{name}: {error}")
            return False
        return True

    def tidy(self) -> None:
        """Close idle views, free what clients' flushes freed, and set aside again what a full disk took.

        Whatever fails is said, and tried again later: neither the other volumes nor the server end for it.
        """
        with self.table.guard:
            served = list(self.table.served.values())
        steps: list[tuple[str, Callable[[], object]]] = [
            ("names", self.table.follow_names),
            ("views", lambda: self._close_idle_views(keep=IDLE_VIEWS_MAX)),
        ]
        for one in served:
            head = one.opened.to_write()
            steps += [(one.name, partial(reclaim_freed, head)), (one.name, partial(compact_map_if_wanted, head))]
        for store in list(self._stores.values()):
            opened, at = store._opened, str(store.path)
            steps += [(at, partial(reclaim.work_soon, opened)), (at, opened.reserve.make)]
        for what, step in steps:
            try:
                step()
            except (OnionskinError, OSError) as error:
                self._say_once(f"{what}: {error}")

    def _say_once(self, line: str) -> None:
        """Log a failure that would come again every few seconds."""
        if line not in self._said:
            self._said.add(line)
            self._log(line)

    # ---- the end: nothing is opened any more, and each of these looks at what there is when the server has stopped ----

    def close_controls(self) -> None:
        """Take no more requests of the control sockets. Operations that run go on."""
        call_all([served.control.close for served in self.table.all_served()])

    def end_volumes(self) -> None:
        """Flush all volumes and give them up."""
        call_all([served.end for served in self.table.served.values()])

    def close_views(self) -> None:
        """Close all snapshots that are open."""
        call_all([view.volume.close for view in self.table.views.values()])

    def close_stores(self) -> None:
        """Close the stores; what waited for a view that is closed now is freed, and wiped, before that."""
        while self._stores:
            _, store = self._stores.popitem()
            call_all([store.close, store._opened.finish_work, partial(reclaim.work_soon, store._opened)])
