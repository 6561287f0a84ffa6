"""The served volumes, and the snapshots that the server opens when a client asks for them.

What must hold: a volume is held for as long as it is served, and it is flushed before it is given up. One that was opened
for a client, as forks are, is given up when nobody has used it for a while, or when descriptors run out. A view of a
snapshot is open only while a client may be reading it, because an open view keeps files from being freed and a base
from being merged into. An operation that changes the tree runs only while no view is open that the change would
invalidate. A name is looked up again whenever a client asks for it, and a label follows its volume.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE, ENFILE, ESHUTDOWN
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from onionskin.base.closing import call_all
from onionskin.base.paths import FilePath
from onionskin.catalog import VolumeRow
from onionskin.control.server import is_listening, listen_together
from onionskin.errors import OnionskinError, StateError, VolumeNotFoundError
from onionskin.nbd import own_process
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.changed_blocks import ChangedBlocks
from onionskin.nbd.export_table import ExportTable
from onionskin.nbd.exported import (
    OPEN_TRIES,
    ServedVolume,
    View,
    open_snapshot,
    raise_unless_missing,
    snapshot_names_behind,
)
from onionskin.nbd.opening import open_beside, open_to_serve, stands_beside
from onionskin.operations import expiry, reclaim
from onionskin.operations.flush import compact_map_if_wanted, reclaim_freed
from onionskin.operations.volumes import rename_volume
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.base.annotations import AnyPath

Result = TypeVar("Result")

VIEW_IDLE_SECONDS = 30.0
NAME_WAIT_SECONDS = 0.05  # a volume that is renamed or has just been opened is in the table soon
TOGETHER_MAX = 128  # of very many, the others have the next turn
IDLE_VIEWS_MAX = 16  # a client that lists all exports opens one after the other
LEFT_AT_THE_START = 0.5  # of the descriptors, for clients and for what is written
LEFT_FOR_WORK = 0.25  # what is open already needs more of them at times, and its flush must not fail for want of one
IDLE_SECONDS = 30.0  # after which a volume that was opened for a client is closed


class Exports:
    """The volumes and snapshots that clients can ask for.

    Parameters
    ----------
    nbd : NbdServer
        The server that asks for exports by name and receives them.
    allow_revert : bool
        Whether `revert` works while clients are connected: they agreed that the disk may change under them.
    trust : bool
        Whether to open stores that another user owns.
    log : callable
        Takes a line.
    uris : callable
        Returns the addresses that clients connect to.
    stopping : threading.Event
        Nothing is opened any more once it is set.
    want_tidying : callable
        It is called when there is something for `tidy` to do.
    listed_bitmap : str, optional
        As for `Server`.
    expire : bool
        Whether volumes of whole stores are dropped when their lifetime is over.

    Attributes
    ----------
    table : ExportTable
        The present exports.
    is_short_of_descriptors : bool
        Whether a client could not be accepted for want of a descriptor, since volumes were last given up.
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
        listed_bitmap: str | None = None,
        expire: bool = True,
    ) -> None:
        self.allow_revert = allow_revert
        self._expire = expire
        self.started = time.monotonic()
        self._nbd = nbd
        self._trust = trust
        self._log = log
        self._uris = uris
        self._stopping = stopping
        self._want_tidying = want_tidying
        self._stores: dict[FilePath, Store] = {}
        self._whole_stores: list[Store] = []
        self._said: set[str] = set()
        self.is_short_of_descriptors = False
        self._latest = ""  # the label of what was opened last for a client: what others want may stand beside it
        self.table = ExportTable(nbd, log)
        self._changed_blocks = ChangedBlocks(self.table, nbd, log, listed_bitmap=listed_bitmap)
        nbd.on_known_export = self._is_still_export
        nbd.on_known_context = self._changed_blocks.is_still
        nbd.on_unknown_export = self._find_export
        nbd.on_unknown_context = self._changed_blocks.find
        nbd.on_full_disk = self._make_room
        nbd.on_freed = lambda name: self._want_tidying()
        nbd.on_first_write = self._begin_writing
        nbd.on_written = self._expect_snapshot

    @property
    def uris(self) -> list[str]:
        """The addresses that clients connect to."""
        return self._uris()

    @property
    def has_whole_stores(self) -> bool:
        """Whether volumes of a store are served that were not there at the start, such as forks."""
        return bool(self._whole_stores)

    # ---- what is served ----

    def add_store(self, path: "AnyPath") -> None:
        """Serve all volumes of a store, including those that are created later.

        A volume that cannot be opened does not keep the others from being served. The log says why it cannot be opened,
        and the server tries again when a client asks for it. So it does with those for which half of its descriptors, which
        clients need too, are not enough.
        """
        store = self._store(path)
        failures: list[Exception] = []
        served = 0
        with_machines = store._opened.catalog.owned_volumes()
        for row in store._opened.catalog.volumes_by_name():
            if row.id in with_machines:
                continue
            if own_process.share_of_descriptors_left() < LEFT_AT_THE_START:
                self._log(f"{store.path}: volumes that come after {row.name!r} are opened when clients ask for them")
                break
            try:
                self._serve(store, row.name, is_new=True)
                served += 1
            except VolumeNotFoundError:
                continue  # it was deleted or renamed since the list was read; a client finds it by its new name
            except (OnionskinError, OSError) as error:
                failures.append(error)
                self._log(f"volume {row.name!r} is not served: {error}")
        if failures and not served:
            raise failures[0]
        self._whole_stores.append(store)

    def add_volume(self, path: "AnyPath", name: str, label: str | None = None) -> None:
        """Serve a volume, and its snapshots: under its name, or under a label that stays when it is renamed."""
        self._serve(self._store(path), name, label=label, is_new=True)

    def add_snapshot(self, path: "AnyPath", name: str, snapshot: str) -> None:
        """Serve one snapshot, without holding its volume."""
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

    def _store(self, path: "AnyPath") -> Store:
        key = FilePath(path).resolve()
        if key not in self._stores:
            more: dict[str, bool] = {"trust": True} if self._trust else {}
            self._stores[key] = Store(path, create=False, **more)
        return self._stores[key]

    def _serve(self, store: Store, name: str, *, label: str | None = None, is_new: bool = False) -> ServedVolume:
        """Open a volume and export it. If another thread exported it meanwhile, return that one (not if `is_new`)."""
        called = name if label is None else label
        with self.table.being_made(called):
            with self.table.guard:
                there = self.table.served.get(called)
                if there is not None and is_new:
                    raise ValueError(f"two volumes are named {called!r}; serve one of them from a server of its own")
                if there is not None:
                    return there
            volume = open_to_serve(store, name, is_one_of_many=not is_new)
            return self._offer(volume, called, is_fixed=label is not None, is_found=not is_new)

    def _offer(self, volume: Volume, called: str, *, is_fixed: bool = False, is_found: bool = False) -> ServedVolume:
        """Export an open volume, which is closed if that fails. The caller is the one that makes this label."""
        served = ServedVolume(
            *(self, self._nbd, volume, called),
            guard=self.table.guard,
            log=self._log,
            is_fixed=is_fixed,
            is_found=is_found,
        )
        with self.table.guard:
            if not self._stopping.is_set():
                self.table.served[called] = served
                return served
        served.close()
        raise StateError("the server is stopping")

    def _offer_together(self, volumes: dict[str, Volume]) -> list[str]:
        """Export open volumes of one store, of which the caller makes the labels. Returns those that are served.

        The others are closed.
        """
        made: dict[str, ServedVolume] = {}
        closing: dict[str, Callable[[], None]] = {called: volume.close for called, volume in volumes.items()}
        try:
            for called, volume in volumes.items():
                del closing[called]  # it is closed where it cannot be served
                with suppress(OnionskinError, OSError):  # its client is told in its turn
                    made[called] = ServedVolume(
                        *(self, self._nbd, volume, called),
                        guard=self.table.guard,
                        log=self._log,
                        is_found=True,
                        listens=False,
                    )
                    closing[called] = made[called].close
            unheard = listen_together([served.control for served in made.values()])
            with self.table.guard:
                for called, served in made.items():
                    if not (self._stopping.is_set() or served.control in unheard):
                        self.table.served[called] = served
                        del closing[called]
        finally:
            call_all(list(closing.values()))
        return [called for called in made if called not in closing]

    def names(self) -> list[str]:
        """Return the names of all exports that clients can ask for."""
        with self.table.guard:
            names = [name for name, view in self.table.views.items() if view.is_kept]
            served = list(self.table.served.items())
        for name, one in served:
            names += [name, *(f"{name}@{snapshot.name}" for snapshot in one.volume.snapshots)]
        return sorted(set(names))

    def set_default(self) -> None:
        """If there is only one export, give it to clients that name none."""
        with self.table.guard:
            if (only := self.table.only()) is not None:
                self._nbd.set_default(only)

    def rename(self, served: ServedVolume, new_name: str, check: Callable[[], None] = lambda: None) -> None:
        """Give a volume another name, in the catalog and to clients that come from now on. `check` is for the transaction.

        Raises
        ------
        StateError
            Another export has the name, or an operation on the volume is under way.
        """
        with self.table.guard:
            if served.operations:
                raise StateError(f"an operation on {served.name!r} is under way; rename it when that has ended")
            if new_name in self.table.served and self.table.served[new_name] is not served:
                raise StateError(f"this server serves another volume {new_name!r}; choose another name")
            served.operations += 1
        try:
            rename_volume(served.opened.store, served.opened.row.id, new_name, check)
        finally:
            with self.table.guard:
                served.operations -= 1
        self.table.follow_names()

    def names_behind(self, after: str) -> Iterator[tuple[str, str]]:
        """Yield the exports that come after `after`, by volume and then by snapshot, each with a description.

        Only the names of the snapshots are read, a page at a time, and nothing is opened.
        """
        volume_name, _, snapshot = after.partition("@")
        self.table.follow_names()
        with self.table.guard:
            kept = sorted(name.partition("@")[::2] for name, view in self.table.views.items() if view.is_kept)
            volumes = {
                name: (one.volume.store, one.opened.row.id)
                for name, one in self.table.served.items()
                if one.is_fixed or "@@" not in name  # on its way to its new name
            }
        for store in self._whole_stores:
            hidden = store._opened.catalog.owned_volumes()
            rows = (row for row in store._opened.catalog.volumes() if row.id not in hidden)
            volumes = {row.name: (store, row.id) for row in rows} | volumes
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
        """Yield the names of an export's metadata contexts after `after`, without those that need no snapshot."""
        return self._changed_blocks.names_behind(export, after)

    # ---- callbacks of the C server, in its threads ----

    def _is_still_export(self, name: str) -> bool:
        """Return whether an export is what its label means now. This always holds for the default export (no name).

        One that is not in the table is just being made or taken away: its name may have been looked up before this client
        asked.
        """
        if not name:
            return True
        with self.table.guard:
            view, served = self.table.views.get(name), self.table.served.get(name)
            for used in filter(None, (view, served)):
                used.last_used = time.monotonic()
        try:
            if served:
                return served.is_fixed or served.volume.name == name
            return view is not None and view.meaning() == name
        except (OnionskinError, OSError) as error:
            self._log(f"export {name!r}: {error}")
            return False

    def _find_export(self, name: str) -> bool:
        """Open the export that a client asks for, if it exists; return whether the C server has it now.

        Where it is not known whether it exists, or it cannot be opened, this raises OSError or StateError, and the client is
        told so: one that hears that there is none may make another in its place.
        """
        if self._stopping.is_set():
            raise OSError(ESHUTDOWN, "the server is stopping")
        try:
            if own_process.share_of_descriptors_left() < LEFT_FOR_WORK:
                self._give_up_idle(is_short=True)
            if self._open_beside(name):
                return True
            if not self._with_descriptors(partial(self._open_export, name)):
                return False
            self._open_beside()
            return True
        except (OnionskinError, OSError, ValueError) as error:
            self._log(f"export {name!r}: {error}")
            raise_unless_missing(error)
            return False

    def _open_export(self, name: str) -> bool:
        volume_name, at, snapshot = name.partition("@")
        if not self._is_new(name):
            self.table.follow_names()
        with self.table.guard:
            view = self.table.views.get(name)
            served = self.table.served.get(volume_name)
        if view:  # follow_names has just updated its label
            return self._is_still_export(name)
        if served and not served.is_fixed and served.volume.name != volume_name:
            raise StateError(f"volume {volume_name!r} is being renamed; ask again when the operation on it has ended")
        if served is None:
            served = self._open_volume(volume_name)
        if served is None or not at:
            return served is not None
        self._open_view(served, snapshot)
        return True

    def _open_volume(self, name: str) -> ServedVolume | None:
        """Serve the volume of the first whole store that has this name, if one does.

        Another thread may be making an export of that name, for a client that asked before the volume was renamed. That one
        gets its new label then, and the volume that has the name now is served.
        """
        for _ in range(OPEN_TRIES):
            store = next((one for one in self._whole_stores if one._opened.catalog.volume_named(name)), None)
            if store is None:
                return None
            served = self._serve(store, name)
            if served.is_fixed or served.volume.name == name:
                self._latest = name
                return served
            self.table.follow_names()
        raise StateError(f"volume {name!r} is renamed again and again; ask again when its name stays")

    def _open_beside(self, name: str = "") -> bool:
        """Open what clients wait for, where those are forks of the same snapshot as the one that was opened last.

        Returns whether the fork `name` was opened so. What cannot be opened so is opened in the turn of its client, which
        says what is wrong.
        """
        asked, until = (
            self._nbd.asked()
        )  # before the catalog is: who asks later may mean another volume by the same name
        wanted = [one for one in (name, *asked) if one and "@" not in one][:TOGETHER_MAX]
        with self.table.guard:
            first = self.table.served.get(self._latest)
        if not wanted or first is None or first.volume.store not in self._whole_stores[:1]:
            return False  # of stores that have volumes of the same name, the first is meant
        if name and not stands_beside(first.volume, name):
            return False
        served: set[str] = set()

        def serve(volumes: dict[str, Volume]) -> None:
            offered = self._offer_together(volumes)
            self._nbd.found(offered, until)
            served.update(offered)
            if self._stopping.is_set():
                raise StateError("the server is stopping")

        with suppress(OnionskinError, OSError, ValueError), self.table.being_made_together(wanted) as mine:
            open_beside(first.volume, mine, serve)
        return name in served

    def _is_new(self, name: str) -> bool:
        """Whether this is the name of a volume that no export stands for, under whatever label.

        To follow all names takes a look into a catalog for each export. A new fork needs none of that.
        """
        with self.table.guard:
            known = name in self.table.served or "@" in name
        if known:
            return False
        for store in list(self._stores.values()):
            row = store._opened.catalog.volume_named(name)
            if row and is_listening(store._opened.layout.volume_control(row.id)):
                return False  # it is served here by another name
        return True

    def _open_view(self, served: ServedVolume, snapshot: str) -> None:
        """Open a snapshot of a served volume and export it. The caller does not hold the guard."""
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
                    served.refuse_barred(snapshot)  # an operation that began meanwhile waits for this thread
                    if self._stopping.is_set():
                        raise StateError("the server is stopping")
                    self.table.add_view(f"{served.name}@{snapshot}", view)
            except FileExistsError:  # the volume was renamed meanwhile, and a client asked for it by its new name
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
        """Return the number of clients that have an export open."""
        return sum(connection.get("export") == export for connection in self._nbd.connections())

    def counters_of(self, served: ServedVolume) -> list[dict[str, Any]]:
        """Return the counters of a volume's export, and of the export of each of its open snapshots."""
        with self.table.guard:
            views = sorted(label for label, view in self.table.views.items() if view.is_of(served))
            served.refuse_taken_away()
            with served.while_exported():
                return [
                    {"export": export, "connections": self.clients_of(export), **self._nbd.counters(export)}
                    for export in (served.name, *views)
                ]

    @contextmanager
    def without_views(self, served: ServedVolume, names: set[str] | None) -> Iterator[None]:
        """Keep views of these snapshots of a volume (None: of all) closed while the context is active.

        Raises
        ------
        StateError
            A client is reading such a view.
        """
        with self.table.operation(served), served.barred(names):
            with self.table.guard:
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
        """Close a view that was taken away. The caller does not hold the guard.

        `tidy` does the pending work that waited for the view to be closed.
        """
        try:
            view.volume.close()
        finally:
            if view.served:
                self.table.views_changed(view.served)
            self._want_tidying()

    @contextmanager
    def paused(self, served: ServedVolume) -> Iterator[None]:
        """Hold all requests for a volume back while the context is active. Clients wait, and see no error."""
        with self.table.operation(served):
            served.refuse_taken_away()
            with served.while_exported():
                self._nbd.pause(served.name)
            try:
                yield
            finally:
                with suppress(KeyError):  # the server was stopped meanwhile, which lets all requests go on
                    self._nbd.resume(served.name)

    def _close_idle_views(self, *, keep: int) -> None:
        """Close views that no client reads any more, except the `keep` that were used last and not long ago."""
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

    # ---- room on the disk, and tidying ----

    def _give_up_idle(self, *, is_short: bool = False) -> int:
        """Close volumes of whole stores that were opened for a client, and that nobody has used for a while.

        Where descriptors are short, all go that nobody uses just now. Who asks for one meanwhile waits, and has it opened
        again. Returns how many were closed.
        """
        now = time.monotonic()
        self.is_short_of_descriptors = False
        in_use = {connection["export"] for connection in self._nbd.connections()}
        with self.table.guard:
            for label in in_use & self.table.served.keys():
                self.table.served[label].last_used = now
            found = list(self.table.served.values())
        for one in found:
            if one.control.is_connected:
                one.last_used = now
        idle = [one for one in found if is_short or (one.is_found and now - one.last_used > IDLE_SECONDS)]
        with self.table.taken_away([one for one in idle if one.volume.store in self._whole_stores]) as taken:
            call_all([partial(self._give_up, one) for one in taken])
        return len(taken)

    def _with_descriptors(self, call: Callable[[], Result]) -> Result:
        """Make a call that opens files; again, where no descriptor was left, if volumes that nobody uses can be closed."""
        try:
            return call()
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE) or not self._give_up_idle(is_short=True):
                raise
        return call()

    def _begin_writing(self, name: str) -> None:
        """Open the head of a fork before the first request that needs it. The request is answered with what is raised.

        The C server asks again where nothing was done: the export may have got another name, or be in no table yet.
        """
        with self.table.guard:
            self.table.changed.wait_for(lambda: name in self.table.served, timeout=NAME_WAIT_SECONDS)
            served = self.table.served.get(name)
        if served is None:
            return
        try:
            self._with_descriptors(served.begin_writing)
        except (OnionskinError, OSError) as error:
            self._log(f"{name}: could not be opened to be written: {error}")
            if isinstance(error, OSError | StateError):
                raise
            raise StateError(str(error)) from error  # others are taken for a fault of this function

    def _expect_snapshot(self, name: str) -> None:
        """Have the files of a volume's next head made, since a client begins to write to it.

        Not those of a volume that is served since a client asked for it: a fork, of which there are many, and which is
        dropped more often than it has a snapshot. One that has got another name meanwhile goes without.
        """
        with self.table.guard:
            served = self.table.served.get(name)
        if served is not None and not served.is_found:
            served.opened.to_write().expect_seal()

    def _make_room(self, name: str) -> bool:
        """Flush a volume again after a client's flush found the disk full; this flush may use the store's reserve.

        The C server asks again where the export has got another name meanwhile.
        """
        with self.table.guard:
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
        """Close idle views, reclaim the slots that clients' flushes freed, and set a used reserve aside again.

        Volumes whose lifetime is over go last.
        A step that fails is logged and tried again later. It ends neither the server nor the service of other volumes.
        """
        with self.table.guard:
            served = list(self.table.served.values())
        steps: list[tuple[str, Callable[[], object]]] = [
            ("names", self.table.follow_names),
            ("views", lambda: self._close_idle_views(keep=IDLE_VIEWS_MAX)),
            ("volumes", lambda: self._give_up_idle(is_short=self.is_short_of_descriptors)),
        ]
        for one in served:
            head = one.opened.to_write()
            steps += [(one.name, partial(reclaim_freed, head)), (one.name, partial(compact_map_if_wanted, head))]
        for store in list(self._stores.values()):
            opened, at = store._opened, str(store.path)
            steps += [(at, partial(reclaim.work_soon, opened)), (at, opened.reserve.make)]
        if self._expire:
            steps += [(str(store.path), partial(self._drop_expired, store)) for store in self._whole_stores]
        for what, step in steps:
            try:
                step()
            except (OnionskinError, OSError) as error:
                self._say_once(f"{what}: {error}")

    def _drop_expired(self, store: Store) -> None:
        """Drop the volumes of a whole store whose lifetime is over. If any went, look again soon."""
        if store.read_only:
            return
        for name in store._expire_machines():
            self._log(f"machine {name}: dropped, because its lifetime is over")
        for rows in expiry.due(store._opened):
            if self._stopping.is_set():
                return
            gone = self._drop_due(store, rows)
            for name in gone:
                self._log(f"{name}: dropped, because its lifetime is over")
            if gone:
                self._want_tidying()
                return

    def _drop_due(self, store: Store, rows: Iterable[VolumeRow]) -> list[str]:
        """Drop expired volumes in one transaction, also those that are served here and that no client has.

        Who asks for one meanwhile waits, and is told then that it is gone. If it may not go after all, it is opened again
        when a client asks for it.
        """
        due = {row.id: row for row in rows}
        served = [one for one in self.table.all_served() if one.volume.store is store and one.opened.row.id in due]
        with self.table.taken_away(served) as taken:
            call_all([partial(self._give_up, one) for one in taken])
            kept = {one.opened.row.id for one in served} - {one.opened.row.id for one in taken}
            return expiry.drop(store._opened, [row for id, row in due.items() if id not in kept])

    def _give_up(self, served: ServedVolume) -> None:
        try:
            served.give_up()
        except (OnionskinError, OSError) as error:  # what it could not make durable goes anyway
            self._log(f"{served.name}: {error}")

    def _say_once(self, line: str) -> None:
        """Log a failure once, because the same failure may happen every few seconds."""
        if line not in self._said:
            self._said.add(line)
            self._log(line)

    # ---- the end: nothing is opened any more when these are called ----

    def close_controls(self) -> None:
        """Take no more requests on the control sockets. Running operations go on."""
        call_all([served.control.close for served in self.table.all_served()])

    def end_volumes(self) -> None:
        """Flush all volumes and close them."""
        call_all([served.end for served in self.table.served.values()])

    def close_views(self) -> None:
        """Close all open snapshots."""
        call_all([view.volume.close for view in self.table.views.values()])

    def close_stores(self) -> None:
        """Close the stores. Before that, do the pending work that waited for a view to be closed."""
        while self._stores:
            _, store = self._stores.popitem()
            call_all([store.close, store.finish_work, partial(reclaim.work_soon, store._opened)])
