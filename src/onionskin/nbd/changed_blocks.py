"""Metadata contexts that tell an NBD client which blocks changed since a snapshot.

Each context has two names with one meaning: the project's own, and the name of a QEMU dirty bitmap for clients that
know only QEMU.

What must hold: a context is offered only if the names still mean what they meant when it was computed and the disk is
still the one that was compared; otherwise it is computed again. It is computed without a lock, and the names and the
disk are checked again before it is offered. If the name of its snapshot is gone, the context says that everything
changed.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

from onionskin.errors import OnionskinError, SnapshotNotFoundError, StateError
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.export_table import ExportTable
from onionskin.nbd.exported import Exported, ServedVolume, View, raise_unless_missing, snapshot_names_behind

DIRTY_BITMAP = "qemu:dirty-bitmap:"
PREFIXES = ("onionskin:changed-since:", DIRTY_BITMAP)  # in the order in which contexts are listed


class ChangedBlocks:
    """The changed-since contexts of the exports of a table.

    Parameters
    ----------
    table : ExportTable
    nbd : NbdServer
        The server that asks for the contexts and receives them.
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
        """Return whether a context still holds: its name means the same snapshot, and the disk was not replaced.

        A context whose snapshot is gone is made to say that everything changed, and then holds.
        """
        with suppress(OnionskinError, OSError):
            return self._ask(self._is_still, export, context)
        return False  # it is looked for again, which says what is wrong

    def find(self, export: str, context: str) -> bool:
        """Compute the metadata context of that name and offer it; return whether the server has it now.

        No lock is held during the computation. Before the context is offered, the names and the disk are checked again:
        the names must mean what they meant, and the disk must be the one that was compared.
        """
        return self._ask(self._find, export, context)

    def _ask(self, answer: Callable[[View | ServedVolume, str, str], bool], export: str, context: str) -> bool:
        """Answer for an export and the snapshot that a context names; log an error. False: there is no such thing."""
        try:
            exported = self._table.exported(export)
            return exported is not None and answer(exported, context, _snapshot_of(context))
        except (OnionskinError, OSError, ValueError, KeyError) as error:
            self._log(f"context {context!r} of {export!r}: {error}")
            raise_unless_missing(error)
            return False

    def _is_still(self, exported: View | ServedVolume, context: str, since: str) -> bool:
        key = exported.context_key(since)
        if key is None:
            self._forget(exported, {since})
            return True
        with exported.contexts_guard:
            return exported.contexts.get(context) == key

    def _find(self, exported: View | ServedVolume, context: str, since: str) -> bool:
        exported.opened.begin_writing()  # to open a fork's head later replaces the disk: then everything would count
        key = exported.context_key(since)
        if key is None:
            raise SnapshotNotFoundError(f"there is no snapshot {since!r}")
        # The server counts everything that is written after this mark as changed.
        mark = self._mark(exported) if isinstance(exported, ServedVolume) else None
        runs = [(offset, length) for offset, length, *_ in exported.diff(since).ranges()]
        with self._table.operation(exported), exported.contexts_guard:
            if exported.context_key(since) != key:
                raise StateError("the snapshots, or the disk, changed meanwhile; ask again")
            self._nbd.set_changed_since(self._table.label_of(exported), context, runs, mark=mark)
            exported.contexts[context] = key
        return True

    def _mark(self, served: ServedVolume) -> int:
        with self._table.operation(served):  # by its label, the mark could be another volume's
            return self._nbd.change_mark(served.name)

    def names_behind(self, export: str, after: str) -> Iterator[str]:
        """Yield, in order, the names of an export's contexts that come after `after`; "" comes before all of them."""
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
        """Make the contexts of these snapshots say that everything changed, because the names may be used again."""
        with self._table.guard:
            exported = [served, *(view for view in self._table.views.values() if view.is_of(served))]
        for one in exported:
            self._forget(one, names)

    def _forget(self, exported: Exported, names: set[str]) -> None:
        with self._table.operation(exported), exported.contexts_guard:
            for context in [context for context in exported.contexts if _snapshot_of(context) in names]:
                del exported.contexts[context]
                if (size_bytes := exported.volume.size_bytes) and (label := self._table.label_of(exported)):
                    with suppress(KeyError):  # the server was stopped, and nobody can ask for it any more
                        self._nbd.set_changed_since(label, context, [(0, size_bytes)])


def _snapshot_of(context: str) -> str:
    """Return the name of the snapshot that the name of a context contains."""
    return next(context.removeprefix(prefix) for prefix in PREFIXES if context.startswith(prefix))
