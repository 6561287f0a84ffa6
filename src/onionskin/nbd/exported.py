"""The object behind an export: a volume that is held and served, or a view of a snapshot.

What must hold: an export stands for a volume's id or for one snapshot's row, never for a name. A view tells by which
name clients ask for it now; it has no name if its own is gone or means another snapshot now. While a snapshot is merged
or discarded it is barred: no view of it is opened.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from onionskin.base.closing import call_all
from onionskin.catalog import SnapshotRow
from onionskin.catalog.tree import find_snapshot
from onionskin.control.server import ControlSocket
from onionskin.errors import StateError, VolumeNotFoundError
from onionskin.kernels._extents import Extents
from onionskin.nbd._nbd import NbdServer
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

GRACE_SECONDS = 10.0
OPEN_TRIES = 10
_GONE = "this process does not serve the volume any more; try again"
LIST_PAGE = 256  # snapshots that are read from the catalog together


class Exported:
    """The open volume or view behind an export, and the changed-since contexts that were computed for it."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.opened = volume._opened  # the parts of a volume that are not in its public interface
        self.last_used = time.monotonic()
        self.operations = 0  # the number of operations that use its label; under the table's guard
        self.contexts: dict[str, tuple[object, ...]] = {}  # the key of each context, by the context's name
        self.contexts_guard = threading.Lock()  # held while a context is offered or forgotten, or the disk is replaced
        self._switches = 0

    def snapshot_row(self, name: str) -> SnapshotRow | None:
        """Look up what a snapshot's name means now."""
        return self.opened.store.catalog.snapshot_named(self.opened.row.id, name)

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """Return what a context since that snapshot depends on, or None if there is no such snapshot.

        The context holds while this value stays the same.
        """
        row = self.snapshot_row(since)
        return None if row is None else (row.guid, row.created_ns, self.volume.name, self._switches)


class View(Exported):
    """An exported snapshot, with the row that it had when it was opened."""

    def __init__(self, volume: Volume, row: SnapshotRow, served: "ServedVolume | None") -> None:
        super().__init__(volume)
        self.row = row
        self.served = served
        self.is_kept = served is None  # the server was started with it

    def is_of(self, served: "ServedVolume") -> bool:
        """Return whether it is a view of a snapshot of that volume."""
        return self.volume.store is served.volume.store and self.opened.row.id == served.opened.row.id

    def meaning(self) -> str | None:
        """Return the name by which clients ask for it now, or None if its name is gone or means another snapshot."""
        volume = self.opened.store.catalog.volume_with_id(self.opened.row.id)
        row = self.snapshot_row(self.row.name)
        if volume is None or row is None or not is_same(row, self.row):
            return None
        return f"{self.served.name if self.served and self.served.is_fixed else volume.name}@{row.name}"

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """Return the same as for a volume, but None if the view's own name is gone."""
        return super().context_key(since) if self.meaning() else None

    def diff(self, since: str) -> Extents:
        """Compare it with an older snapshot."""
        return self.volume._diff(since, self.row.name)


class Serving(Protocol):
    """The requests of a control socket that concern more than the volume itself. `Exports` implements them."""

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""

    @property
    def started(self) -> float:
        """The start of the service, by `time.monotonic`."""

    @property
    def uris(self) -> list[str]:
        """Where clients connect."""

    def rename(self, served: "ServedVolume", new_name: str, check: Callable[[], None] = lambda: None) -> None:
        """Give a volume another name, in the catalog and to clients."""

    def counters_of(self, served: "ServedVolume") -> list[dict[str, Any]]:
        """Return the counters of a volume's export and of the exports of its snapshots."""

    def paused(self, served: "ServedVolume") -> AbstractContextManager[None]:
        """Hold all requests for a volume back while the context is active."""

    def without_views(self, served: "ServedVolume", names: set[str] | None) -> AbstractContextManager[None]:
        """Keep views of these snapshots (None: of all) closed while the context is active."""


class ServedVolume(Exported):
    """A volume that is held and exported, with its control socket.

    Parameters
    ----------
    serving : Serving
    nbd : NbdServer
        The server that gets an export for the volume.
    volume : Volume
        The volume. It is closed at the end, and also if this call fails.
    name : str
        The label that clients ask for.
    guard : context manager
        The guard of the table of exports.
    log : callable
        Takes a line.
    is_fixed : bool
        Whether the label stays, whatever the volume is called.
    is_found : bool
        Whether it is served since a client asked for it. A server has many of those, and they share what they can.
    listens : bool
        As for its `ControlSocket`.
    """

    def __init__(
        self,
        serving: Serving,
        nbd: NbdServer,
        volume: Volume,
        name: str,
        *,
        guard: AbstractContextManager[object],
        log: Callable[[str], None],
        is_fixed: bool = False,
        is_found: bool = False,
        listens: bool = True,
    ) -> None:
        super().__init__(volume)
        self.is_fixed = is_fixed
        self.is_found = is_found
        self._serving = serving
        self._nbd = nbd
        self._guard = guard
        self._log = log
        self.name = name  # under the table's guard
        self._is_refused = False  # the export of that name is another volume's
        self.is_taken_away = False  # so that of its label may be another volume's; under the table's guard
        self.switching = 0  # how many threads are giving the C server another data path for it; under the table's guard
        self.views_changing = 0  # the number of its views that are being opened or closed; under the table's guard
        self._bars: Counter[str | None] = Counter()  # snapshots of which no view may be opened; None: all
        try:
            self._export()
            path = self.opened.store.layout.volume_control(self.opened.row.id)
            if not is_found:  # else what is there is replaced as one that a process has left which is gone
                with suppress(FileNotFoundError):
                    path.unlink()  # this process holds the volume, so the process that made the socket is gone
            self.control = ControlSocket(path, self, log, is_shared=is_found, listens=listens)
        except BaseException:
            if not self._is_refused:
                with suppress(KeyError, StateError):
                    nbd.remove_export(name)
            volume.close()
            raise

    def _export(self) -> None:
        """Offer the volume. One that nothing was written to is read through the view of what it stands on.

        The name of a client is looked up once it is offered, so it is followed before. The head is not opened between the
        questions, also not by a thread that found its handle in the store.
        """
        with self.opened.guard:
            self.opened.follow(self._switch)
            try:
                self._nbd.add_export(
                    self.name,
                    self.opened.reading_path,
                    read_only=False,
                    unwritten=self.opened.is_unwritten,
                    description=f"volume {self.name}",
                )
            except FileExistsError:  # another volume was given the name meanwhile, and goes on with its clients
                self._is_refused = True
                raise

    def begin_writing(self) -> None:
        """Open the head, before the first request that needs it."""
        self.opened.begin_writing()

    def close(self) -> None:
        """Take the volume away from clients, and close it."""
        self.control.close()
        with suppress(KeyError, StateError):
            self._nbd.remove_export(self.name)
        self.end()

    def give_up(self) -> None:
        """Close a volume that was taken away from clients already."""
        self.control.close()
        self.end()

    def end(self) -> None:
        """Close the volume, then wait for the control socket to send the replies of operations that this cut off."""
        call_all([lambda: self.control.join(GRACE_SECONDS), self.volume.close, self.control.let_go])

    def refuse_taken_away(self) -> None:
        """Raise StateError if clients cannot ask for it any more: what is done to its label is done to another export.

        A program may have come to its control socket just before that was closed. One whose `operations` count, or under
        the table's guard, it is not taken away behind this.
        """
        with self._guard:
            if self.is_taken_away:
                raise StateError(_GONE)

    @contextmanager
    def while_exported(self) -> Iterator[None]:
        """Say so in the terms of a caller where the C server does not have it, because that was stopped."""
        try:
            yield
        except KeyError:
            raise StateError(_GONE) from None

    def diff(self, since: str) -> Extents:
        """Compare it with a snapshot."""
        return self.volume._diff(since)

    @contextmanager
    def barred(self, names: set[str] | None) -> Iterator[None]:
        """Let no view of these snapshots (None: of any) be opened while the context is active."""
        barred: set[str | None] = {None} if names is None else {*names}
        with self._guard:
            self._bars.update(barred)
        try:
            yield
        finally:
            with self._guard:
                self._bars.subtract(barred)

    def refuse_barred(self, snapshot: str) -> None:
        """Raise StateError if an operation bars views of this snapshot. The caller holds the table's guard."""
        if self._bars[snapshot] or self._bars[None]:
            raise StateError("the snapshot is being merged or discarded")

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""
        return self._serving.allow_revert

    def paused(self) -> Any:
        """Hold all requests of clients back while the context is active."""
        return self._serving.paused(self)

    def _switch(self, path: "DataPath") -> None:
        """Send later requests to the new data path, after a revert or before a first write.

        No request is under way in the old one. The label stays the same meanwhile: by another one the C server would find
        nothing, or even another volume.
        """
        with self._guard:
            if self._is_refused or self.is_taken_away:
                return
            self.switching += 1
        try:
            with self.contexts_guard:
                self._switches += 1
                self._nbd.replace_path(self.name, path)
        except (StateError, KeyError):  # the server was stopped and uses no data path any more
            if not path.closed:  # else the volume was closed before its first write, which changes nothing
                self._log(f"{self.name}: changed its disk while the server was ending")
        finally:
            with self._guard:
                self.switching -= 1

    @property
    def called(self) -> str:
        """The name of the volume, as the label has it or, where that is fixed, the catalog."""
        return self.volume.name if self.is_fixed else self.name

    def info(self) -> dict[str, Any]:
        """Describe the volume, and say where it is served."""
        return {
            "name": self.called,
            "size_bytes": self.volume.size_bytes,
            "block_size": self.volume.block_size,
            "pid": os.getpid(),
            "uris": self._serving.uris,
            "allow_revert": self.allow_revert,
        }

    def stats(self) -> dict[str, Any]:
        """Return counters and connections."""
        return {
            "volume": self.called,
            "uptime_seconds": round(time.monotonic() - self._serving.started, 3),
            "memory_bytes": self.volume._path.memory_bytes,
            "poisoned": self.volume._path.poisoned,
            "counters": self._nbd.counters(),
            "exports": self._serving.counters_of(self),
            "connections": self._nbd.connections(),
        }

    def without_views(self, names: set[str] | None) -> Any:
        """Keep views of these snapshots (None: of all) closed while the context is active."""
        return self._serving.without_views(self, names)

    def rename(self, new_name: str, check: Callable[[], None] = lambda: None) -> None:
        """Give the volume another name. `check` is called in the transaction, and raises where that is not to be."""
        self._serving.rename(self, new_name, check)


def raise_unless_missing(error: Exception) -> None:
    """Raise an error as one that the C server takes, unless it says that something is not there."""
    if isinstance(error, LookupError):  # a volume, a snapshot or an export that is not there
        return
    if isinstance(error, OSError | StateError):
        raise error
    raise StateError(str(error)) from error


def open_snapshot(store: Store, volume_id: bytes, snapshot: str) -> tuple[Volume, SnapshotRow]:
    """Open a snapshot of the volume with this id, and return it with its row.

    A store opens by name, and another process may give the names to other volumes and snapshots meanwhile. The right
    snapshot was opened if the names meant the same before and after.
    """
    for _ in range(OPEN_TRIES):
        volume = store._opened.catalog.volume_with_id(volume_id)
        if volume is None:
            raise VolumeNotFoundError("the volume was deleted meanwhile")
        before = find_snapshot(store._opened.catalog, volume, snapshot)
        view = store.open(volume.name, snapshot=snapshot)
        try:
            after = store._opened.catalog.snapshot_named(volume_id, snapshot)
            if view._opened.row.id == volume_id and after is not None and is_same(before, after):
                return view, after
        except BaseException:
            view.close()
            raise
        view.close()
    raise StateError(f"snapshot {snapshot!r} is being dropped and taken again; try again")


def is_same(one: SnapshotRow, other: SnapshotRow) -> bool:
    """Return whether two rows, read at different times, describe the same snapshot.

    The layer's id is not compared because it may change. The name alone proves nothing because it may be used again.
    """
    return (one.volume, one.name, one.guid, one.created_ns) == (other.volume, other.name, other.guid, other.created_ns)


def snapshot_names_behind(store: Store, volume_id: bytes, last: str) -> Iterator[str]:
    """Yield the names of a volume's snapshots, in order, that come after `last`."""
    while True:
        rows = store._opened.catalog.snapshots_named_after(volume_id, last, at_most=LIST_PAGE)
        for row in rows:
            yield row.name
        if len(rows) < LIST_PAGE:
            return
        last = rows[-1].name
