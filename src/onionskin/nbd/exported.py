"""What exports stand for: a volume that is held and served, or a view of one of its snapshots.

What must hold: what an export stands for is a volume's id, or one snapshot's row, and never a name; a view says by which
name clients ask for it now, and none where its own is gone or has come back for another snapshot; a snapshot that is being
merged or discarded is barred, and nobody opens a view of it.
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
from onionskin.nbd._nbd import NbdServer
from onionskin.store import Store
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

GRACE_SECONDS = 10.0
OPEN_TRIES = 10
LIST_PAGE = 256  # snapshots that are read from the catalog together


class Exported:
    """What an export stands for: an open volume or view, and the changed-since contexts that were computed for it."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.opened = volume._opened  # for what no program needs to know of a volume
        self.operations = 0  # that go by its label; with the table's guard
        self.contexts: dict[str, tuple[object, ...]] = {}  # by their names
        self.contexts_guard = threading.Lock()  # held while one is offered, forgotten, or the disk replaced
        self._switches = 0

    def snapshot_row(self, name: str) -> SnapshotRow | None:
        """Look up what a snapshot's name means now."""
        return self.opened.store.catalog.snapshot_named(self.opened.row.id, name)

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """Say what a context since that snapshot depends on: it holds while this stays the same. None: no such snapshot."""
        row = self.snapshot_row(since)
        return None if row is None else (row.guid, row.created_ns, self.volume.name, self._switches)


class View(Exported):
    """A snapshot that is exported, and which one it was when it was opened."""

    def __init__(self, volume: Volume, row: SnapshotRow, served: "ServedVolume | None") -> None:
        super().__init__(volume)
        self.row = row
        self.served = served
        self.is_kept = served is None  # it was asked for when the server started
        self.last_used = time.monotonic()

    def is_of(self, served: "ServedVolume") -> bool:
        """Whether it is a view of a snapshot of that volume."""
        return self.volume.store is served.volume.store and self.opened.row.id == served.opened.row.id

    def meaning(self) -> str | None:
        """Say by which name clients ask for it now; None where its own is gone, or another snapshot's."""
        volume = self.opened.store.catalog.volume_with_id(self.opened.row.id)
        row = self.snapshot_row(self.row.name)
        return f"{volume.name}@{row.name}" if volume and row and is_same(row, self.row) else None

    def context_key(self, since: str) -> tuple[object, ...] | None:
        """As for a volume; a view whose own name is gone has none."""
        return super().context_key(since) if self.meaning() else None

    def diff(self, since: str) -> Any:
        """Compare it with an older snapshot."""
        return self.volume.store.diff(self.volume.name, since, self.row.name)


class Serving(Protocol):
    """What a served volume is given by who serves it: its control socket's requests that are about more than itself."""

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""

    @property
    def started(self) -> float:
        """Since when it is served, by `time.monotonic`."""

    @property
    def uris(self) -> list[str]:
        """Where clients connect."""

    def rename(self, served: "ServedVolume", new_name: str) -> None:
        """Give a volume another name, in the catalog and to clients."""

    def counters_of(self, served: "ServedVolume") -> list[dict[str, Any]]:
        """Count what was asked of a volume and of its snapshots."""

    def paused(self, served: "ServedVolume") -> AbstractContextManager[None]:
        """Hold all requests for a volume back meanwhile."""

    def without_views(self, served: "ServedVolume", names: set[str] | None) -> AbstractContextManager[None]:
        """Have no view of these snapshots of a volume (None: of any) open meanwhile."""


class ServedVolume(Exported):
    """A volume that is held and exported, with its control socket.

    Parameters
    ----------
    serving : Serving
    nbd : NbdServer
        Gets an export for it.
    volume : Volume
        Is given up at the end, and where this fails.
    name : str
        The label that clients ask for.
    guard : context manager
        That of the table of exports.
    log : callable
        Takes a line.
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
    ) -> None:
        super().__init__(volume)
        self._serving = serving
        self._nbd = nbd
        self._guard = guard
        self._log = log
        self.name = name  # with the table's guard
        self.views_changing = 0  # views of it that are being opened or closed; with the table's guard
        self._bars: Counter[str | None] = Counter()  # snapshots that may not be opened; None: all
        try:
            nbd.add_export(name, volume._path, read_only=False, description=f"volume {name}")
            self.opened.follow(self._switch)
            path = self.opened.store.layout.volume_control(self.opened.row.id)
            with suppress(FileNotFoundError):
                path.unlink()  # we hold the volume: whoever made it is gone
            self.control = ControlSocket(path, self, log)
        except BaseException:
            with suppress(KeyError, StateError):
                nbd.remove_export(name)
            volume.close()
            raise

    def close(self) -> None:
        """Take it away from clients, and give it up."""
        self.control.close()
        with suppress(KeyError, StateError):
            self._nbd.remove_export(self.name)
        self.end()

    def end(self) -> None:
        """Give the volume up, and let those have their replies whose operations that cut off."""
        call_all([lambda: self.control.join(GRACE_SECONDS), self.volume.close])

    def diff(self, since: str) -> Any:
        """Compare it with a snapshot."""
        return self.volume.diff(since)

    @contextmanager
    def barred(self, names: set[str] | None) -> Iterator[None]:
        """Have no view of these snapshots (None: of any) opened meanwhile."""
        barred: set[str | None] = {None} if names is None else {*names}
        with self._guard:
            self._bars.update(barred)
        try:
            yield
        finally:
            with self._guard:
                self._bars.subtract(barred)

    def refuse_barred(self, snapshot: str) -> None:
        """Refuse to have a view of a snapshot opened that an operation is about. With the table's guard."""
        if self._bars[snapshot] or self._bars[None]:
            raise StateError("the snapshot is being merged or discarded")

    @property
    def allow_revert(self) -> bool:
        """Whether the clients agreed that the disk may change under them."""
        return self._serving.allow_revert

    def paused(self) -> Any:
        """Hold all requests of clients back meanwhile."""
        return self._serving.paused(self)

    def _switch(self, path: "DataPath") -> None:
        """After a revert: requests that come from now on go to the new data path; those under way have ended."""
        try:
            with self.contexts_guard:
                self._switches += 1
                self._nbd.replace_path(self.name, path)
        except (StateError, KeyError):  # the server is stopped, and uses no path any more
            self._log(f"{self.name}: changed its disk while the server was ending")

    def info(self) -> dict[str, Any]:
        """Say what it is and where it is served."""
        return {
            "name": self.name,
            "size_bytes": self.volume.size_bytes,
            "block_size": self.volume.block_size,
            "pid": os.getpid(),
            "uris": self._serving.uris,
            "allow_revert": self.allow_revert,
        }

    def stats(self) -> dict[str, Any]:
        """Give counters and connections."""
        return {
            "volume": self.name,
            "uptime_seconds": round(time.monotonic() - self._serving.started, 3),
            "memory_bytes": self.volume._path.memory_bytes,
            "poisoned": self.volume._path.poisoned,
            "counters": self._nbd.counters(),
            "exports": self._serving.counters_of(self),
            "connections": self._nbd.connections(),
        }

    def without_views(self, names: set[str] | None) -> Any:
        """Have no view of these snapshots (None: of any) open meanwhile."""
        return self._serving.without_views(self, names)

    def rename(self, new_name: str) -> None:
        """Give it another name."""
        self._serving.rename(self, new_name)


def open_snapshot(store: Store, volume_id: bytes, snapshot: str) -> tuple[Volume, SnapshotRow]:
    """Open a snapshot of the volume with this id, and say which one it is.

    A store opens by names, and somebody else may give them to others meanwhile: what was opened is what is wanted if the
    name meant the same before and after.
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
    """Whether two rows, read at different times, are of one snapshot. Its layer's id may change, and a name comes back."""
    return (one.volume, one.name, one.guid, one.created_ns) == (other.volume, other.name, other.guid, other.created_ns)


def snapshot_names_behind(store: Store, volume_id: bytes, last: str) -> Iterator[str]:
    """Name a volume's snapshots, in order, behind the last one."""
    while True:
        rows = store._opened.catalog.snapshots_named_after(volume_id, last, at_most=LIST_PAGE)
        for row in rows:
            yield row.name
        if len(rows) < LIST_PAGE:
            return
        last = rows[-1].name
