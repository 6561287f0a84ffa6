"""What changed since a snapshot, which clients ask for as a metadata context of an export.

Each has two names with one meaning: ours, and that of a dirty bitmap of QEMU's, for clients that know QEMU only.

What must hold: a context is offered for what the names mean now and for the disk as it is, else it is worked out again; it
is computed without a lock, and looked at again before it is offered; since a snapshot whose name went all counts as
changed.
"""

from collections.abc import Callable, Iterator
from typing import Any

from onionskin.errors import OnionskinError, SnapshotNotFoundError, StateError
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.export_table import ExportTable
from onionskin.nbd.exported import Exported, ServedVolume, View, snapshot_names_behind

DIRTY_BITMAP = "qemu:dirty-bitmap:"
PREFIXES = ("onionskin:changed-since:", DIRTY_BITMAP)  # in the order in which contexts are listed


class ChangedBlocks:
    """The changed-since contexts of the exports of a table.

    Parameters
    ----------
    table : ExportTable
    nbd : NbdServer
        Asks for them, and is given them.
    log : callable
        Takes a line.
    listed_bitmap : str, optional
        The one snapshot whose dirty bitmap is listed. Some clients of QEMU's take the bitmap that is there, and none if
        there are several. Any snapshot can be asked for by its name all the same.
    """

    def __init__(
        self, table: ExportTable, nbd: NbdServer, log: Callable[[str], None], *, listed_bitmap: str | None = None
    ) -> None:
        self._listed_bitmap = listed_bitmap
        self._table = table
        self._nbd = nbd
        self._log = log

    def is_still(self, export: str, context: str) -> bool:
        """Whether a context was computed since the snapshot that its name means now, and on the disk as it is.

        So is one whose snapshot is gone: it says that everything changed.
        """
        since = _snapshot_of(context)
        try:
            exported = self._table.exported(export)
            if exported is None:
                return False
            key = exported.context_key(since)
            if key is None:
                self._forget(exported, {since})
                return True
            with exported.contexts_guard:
                return exported.contexts.get(context) == key
        except (OnionskinError, OSError) as error:
            self._log(f"context {context!r} of {export!r}: {error}")
            return False

    def find(self, export: str, context: str) -> bool:
        """Work out what changed since a snapshot, for the metadata context of that name.

        Without a lock while it is computed. Before it is offered it is looked at again whether the names still mean what
        they meant, and whether the disk is still the one that was compared.
        """
        since = _snapshot_of(context)
        try:
            exported = self._table.exported(export)
            if exported is None:
                return False
            key = exported.context_key(since)
            if key is None:
                raise SnapshotNotFoundError(f"there is no snapshot {since!r}")
            # What is written from here on counts as changed.
            mark = self._nbd.change_mark(exported.name) if isinstance(exported, ServedVolume) else None
            runs = _joined(exported.diff(since))
            with self._table.operation(exported), exported.contexts_guard:
                if exported.context_key(since) != key:
                    raise StateError("the snapshots, or the disk, changed meanwhile; ask again")
                self._nbd.set_changed_since(self._table.label_of(exported), context, runs, mark=mark)
                exported.contexts[context] = key
            return True
        except (OnionskinError, OSError, ValueError, KeyError) as error:
            self._log(f"context {context!r} of {export!r}: {error}")
            return False

    def names_behind(self, export: str, after: str) -> Iterator[str]:
        """Name the contexts that a client can ask for of an export, in order, behind one of them; "" is before all."""
        exported = self._table.exported(export)
        if exported is None:
            return
        itself = exported.row.name if isinstance(exported, View) else None
        behind = next((at for at, prefix in enumerate(PREFIXES) if after.startswith(prefix)), 0)
        last = _snapshot_of(after) if after else ""
        for prefix in PREFIXES[behind:]:
            for name in snapshot_names_behind(exported.volume.store, exported.opened.row.id, last):
                if name != itself and (prefix != DIRTY_BITMAP or self._listed_bitmap in (None, name)):
                    yield prefix + name
            last = ""

    def forget(self, served: ServedVolume, names: set[str]) -> None:
        """A snapshot's name went, and may come back for another disk: all counts as changed since it, till then."""
        with self._table.guard:
            exported = [served, *(view for view in self._table.views.values() if view.is_of(served))]
        for one in exported:
            self._forget(one, names)

    def _forget(self, exported: Exported, names: set[str]) -> None:
        with self._table.operation(exported), exported.contexts_guard:
            for context in [context for context in exported.contexts if _snapshot_of(context) in names]:
                del exported.contexts[context]
                if (size_bytes := exported.volume.size_bytes) and (label := self._table.label_of(exported)):
                    self._nbd.set_changed_since(label, context, [(0, size_bytes)])


def _snapshot_of(context: str) -> str:
    """Give the name of the snapshot in the name of a context."""
    return next(context.removeprefix(prefix) for prefix in PREFIXES if context.startswith(prefix))


def _joined(extents: Any) -> list[tuple[int, int]]:
    """Make (offset, length) of extents, those that touch joined."""
    found: list[tuple[int, int]] = []
    for offset, length, _ in extents.tolist():
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found
