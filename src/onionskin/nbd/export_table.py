"""Which exports there are, each by the label that clients ask for.

What must hold: the table and the C server have the same exports, by the same labels; a label follows its volume, whoever
renamed it, but not while an operation goes by it; the guard is held for the table alone, and never while something is
opened, closed, read from a catalog or computed, because handshakes of clients wait for it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.exported import Exported, ServedVolume, View


class ExportTable:
    """Served volumes and open views by their labels.

    Parameters
    ----------
    nbd : NbdServer
        Has the same exports.
    log : callable
        Takes a line.
    """

    def __init__(self, nbd: NbdServer, log: Callable[[str], None]) -> None:
        self._nbd = nbd
        self._log = log
        self.served: dict[str, ServedVolume] = {}
        self.views: dict[str, View] = {}
        self._opening: set[str] = set()  # labels that a thread is making an export for
        # For the three above, and what ServedVolume says of it. Never held while something is opened, closed, read from a
        # catalog or computed: handshakes of clients wait for it.
        self.guard = threading.RLock()
        self.changed = threading.Condition(self.guard)  # what is being opened or closed has been

    @contextmanager
    def being_made(self, export: str) -> Iterator[None]:
        """Be the only thread that makes an export of that label. Others wait for it, without the guard."""
        with self.changed:
            self.changed.wait_for(lambda: export not in self._opening)
            self._opening.add(export)
        try:
            yield
        finally:
            with self.changed:
                self._opening.discard(export)
                self.changed.notify_all()

    def follow_names(self) -> None:
        """Give exports the names that their volumes have now, whoever renamed them; and take stale ones out of the way.

        The catalogs are read without the guard. An export whose volume is just being worked on keeps its label until that
        has ended, since the operation goes by it; `Exports` sees to it that nobody gets it by a wrong name.
        """
        with self.guard:
            served, views = list(self.served.values()), list(self.views.values())
        names = {one: one.volume.name for one in served}
        meanings = {view: view.meaning() for view in views}
        with self.guard:
            wanted = {one.name: names[one] for one in served if self.served.get(one.name) is one and not one.operations}
            self._relabel(wanted)
            labels = {view: label for label, view in self.views.items()}
            for view, meant in meanings.items():
                label = labels.get(view)
                if label is None or view.operations:
                    continue
                # A snapshot whose name went, and may have come back for another: its clients keep it, others do not find it.
                new = meant or f"{label.partition('@@')[0]}@@{view.row.guid.hex()[:8]}"
                if new not in self.views:
                    self._nbd.rename_export(label, new, description=f"snapshot {view.row.name}")
                    self.views[new] = self.views.pop(label)

    def _relabel(self, wanted: dict[str, str]) -> None:
        """Give served volumes new labels; two that changed theirs for each other's go by way of a third. With the guard."""
        moves: dict[str, str] = {}
        left = {old: new for old, new in wanted.items() if old != new}
        while left != moves:  # one that cannot move keeps others from its place
            moves, left = left, {}
            for old, new in moves.items():
                if new not in self.served.keys() - moves.keys() and new not in left.values():
                    left[old] = new
        for old in moves:
            self._move_label(old, f"{old}@@moving")
        for old, new in moves.items():
            self._move_label(f"{old}@@moving", new)
            self._log(f"{old} is {new} now")

    def _move_label(self, old: str, new: str) -> None:
        self._nbd.rename_export(old, new, description=f"volume {new}")
        self.served[new] = self.served.pop(old)
        self.served[new].name = new

    def only(self) -> str | None:
        """Give the export that clients get who name none, where there is just one to choose."""
        with self.guard:
            if len(self.served) == 1:
                return next(iter(self.served))
            kept = [name for name, view in self.views.items() if view.is_kept]
            return kept[0] if len(kept) == 1 and not self.served else None

    def add_view(self, export: str, view: View) -> None:
        """Export a view. With the guard."""
        volume_name, _, snapshot = export.partition("@")
        self._nbd.add_export(
            export, view.volume._path, read_only=True, description=f"snapshot {snapshot} of {volume_name}"
        )
        self.views[export] = view

    def views_changed(self, served: ServedVolume) -> None:
        """A view of a volume that was being opened or closed has been."""
        with self.changed:
            served.views_changing -= 1
            self.changed.notify_all()

    def exported(self, export: str) -> View | ServedVolume | None:
        """Give what an export stands for; that without a name is the only one."""
        with self.guard:
            name = export or self.only() or ""
            return self.views.get(name) or self.served.get(name)

    def label_of(self, exported: Exported) -> str:
        """Give the label of an export; empty where it is none any more."""
        with self.guard:
            labels = [*self.served.items(), *self.views.items()]
        return next((label for label, one in labels if one is exported), "")

    @contextmanager
    def operation(self, exported: Exported) -> Iterator[None]:
        """Hold off what would change the label of an export, by which an operation goes."""
        with self.guard:
            exported.operations += 1
        try:
            yield
        finally:
            with self.guard:
                exported.operations -= 1

    def take_views(self, served: ServedVolume, names: set[str] | None) -> tuple[list[View], list[str]]:
        """Take the views of a volume away that no client has, and name those among `names` that one has. With the guard."""
        taken, busy = [], []
        for label, view in list(self.views.items()):
            if not view.is_of(served):
                continue
            view.served = served
            if self.take_view(label):
                taken.append(view)
            elif names is None or view.row.name in names:
                busy.append(label)
        return taken, busy

    def take_view(self, label: str) -> bool:
        """Take a view away, if no client has it or is coming to it; `views_changed` has to follow. With the guard."""
        view = self.views[label]
        if view.operations or not self._nbd.remove_export(label, if_unused=True):
            return False
        del self.views[label]
        if view.served:
            view.served.views_changing += 1
        return True

    def all_served(self) -> list[ServedVolume]:
        """List the volumes that are served."""
        with self.guard:
            return list(self.served.values())
