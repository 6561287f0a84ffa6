"""The table of exports: each export under the label that clients ask for.

What must hold: the table and the C server have the same exports under the same labels. When a volume is renamed by any
process, its label follows, but not while an operation uses the label. The guard protects the table alone. It is never
held while something is opened, closed, read from a catalog or computed, because handshakes of clients wait for it.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from itertools import count

from onionskin.errors import StateError
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.exported import Exported, ServedVolume, View
from onionskin.storage.open_store import OpenStore


class ExportTable:
    """Served volumes and open views by their labels.

    Parameters
    ----------
    nbd : NbdServer
        The C server, which has the same exports.
    log : callable
        Takes a line.
    """

    def __init__(self, nbd: NbdServer, log: Callable[[str], None]) -> None:
        self._nbd = nbd
        self._log = log
        self.served: dict[str, ServedVolume] = {}
        self.views: dict[str, View] = {}
        self._moves = count()
        self._opening: set[str] = set()  # labels for which a thread is making an export
        # It protects the three above, and the fields of Exported and ServedVolume whose comments name it. It is never
        # held while something is opened, closed, read from a catalog or computed, because handshakes of clients wait
        # for it.
        self.guard = threading.RLock()
        self.changed = threading.Condition(self.guard)  # notified when an opening or a closing has ended

    @contextmanager
    def being_made(self, export: str) -> Iterator[None]:
        """Make this thread the only one that makes an export of that label. Other threads wait, without the guard."""
        with self.guard:
            self.changed.wait_for(lambda: export not in self._opening)
            self._opening.add(export)
        try:
            yield
        finally:
            self._made({export})

    @contextmanager
    def being_made_together(self, exports: Iterable[str]) -> Iterator[set[str]]:
        """Make this thread the only one that makes exports of those labels that are not there. Yields them.

        Labels for which another thread is making an export just now are not among them.
        """
        with self.guard:
            mine = set(exports) - self._opening - self.served.keys()
            self._opening |= mine
        try:
            yield mine
        finally:
            self._made(mine)

    @contextmanager
    def taken_away(self, served: Iterable[ServedVolume]) -> Iterator[list[ServedVolume]]:
        """Take those of the volumes away that nobody uses or is about to. Yields them, and the caller has to close them.

        Nobody makes an export of such a label before the end of the block.
        """
        taken: list[ServedVolume] = []
        try:
            with self.guard:
                for one in served:
                    with suppress(KeyError, StateError):  # the server is stopping, which closes it
                        if one.name not in self._opening and self.take_served(one):
                            taken.append(one)
                            self._opening.add(one.name)
            yield taken
        finally:
            self._made({one.name for one in taken})

    def _made(self, exports: set[str]) -> None:
        """Let other threads make exports of those labels."""
        with self.changed:
            self._opening -= exports
            self.changed.notify_all()

    def follow_names(self) -> None:
        """Give exports the labels that the catalogs say now, and take stale labels out of the way.

        The catalogs are read without the guard. While an operation uses an export, or its disk is replaced, it keeps its
        label.
        `Exports` makes sure that no client gets it by a wrong name meanwhile.
        """
        with self.guard:
            served, views = list(self.served.values()), list(self.views.values())
        names = _names_now(one for one in served if not one.is_fixed)
        meanings = {view: view.meaning() for view in views}
        with self.guard:
            wanted = {
                one.name: names[one]
                for one in names
                if self.served.get(one.name) is one and not (one.operations or one.switching)
            }
            self._relabel(wanted, self.served.keys(), self._move_volume)
            wanted = {}
            for label, view in self.views.items():
                if view in meanings and not view.operations:
                    # If the snapshot's name is gone or means another snapshot, the view gets a label that no client asks
                    # for. Its present clients keep it.
                    wanted[label] = meanings[view] or f"{label.partition('@@')[0]}@@{view.row.guid.hex()[:8]}"
            self._relabel(wanted, self.views.keys(), self._move_view)

    def _relabel(self, wanted: dict[str, str], labels: Set[str], move: Callable[[str, str], None]) -> None:
        """Give exports new labels. The caller holds the guard.

        Each export passes through a temporary label, so that exports can exchange theirs.
        """
        moves: dict[str, str] = {}
        left = {old: new for old, new in wanted.items() if old != new}
        while left != moves:  # an export that cannot move keeps its label, so another cannot move there
            moves, left = left, {}
            for old, new in moves.items():
                if new not in labels - moves.keys() and new not in left.values():
                    left[old] = new
        through = {old: f"{old.partition('@@')[0]}@@moving-{next(self._moves)}" for old in moves}
        for old in moves:
            move(old, through[old])
        for old, new in moves.items():
            # An export that is just being made may have the label by the name that its volume had. It is in the table soon,
            # and then both follow their names.
            with suppress(FileExistsError):
                move(through[old], new)

    def _move_volume(self, old: str, new: str) -> None:
        self._move_label(old, new, f"volume {new}")
        self.served[new] = served = self.served.pop(old)
        served.name = new
        if "@@" not in new:
            self._log(f"{old.partition('@@')[0]} is {new} now")

    def _move_view(self, old: str, new: str) -> None:
        self._move_label(old, new, f"snapshot {self.views[old].row.name}")
        self.views[new] = self.views.pop(old)

    def _move_label(self, old: str, new: str, description: str) -> None:
        with suppress(KeyError):  # the server has been stopped, and clients can ask for nothing any more
            self._nbd.rename_export(old, new, description=description)

    def only(self) -> str | None:
        """Return the label of the only export, or None if there is none or a choice. Clients that name none get it."""
        with self.guard:
            if len(self.served) == 1:
                return next(iter(self.served))
            kept = [name for name, view in self.views.items() if view.is_kept]
            return kept[0] if len(kept) == 1 and not self.served else None

    def add_view(self, export: str, view: View) -> None:
        """Export a view. The caller holds the guard."""
        volume_name, _, snapshot = export.partition("@")
        self._nbd.add_export(
            export, view.volume._path, read_only=True, description=f"snapshot {snapshot} of {volume_name}"
        )
        self.views[export] = view

    def views_changed(self, served: ServedVolume) -> None:
        """Note that the opening or the closing of a view of this volume has ended."""
        with self.guard:
            served.views_changing -= 1
            self.changed.notify_all()

    def exported(self, export: str) -> View | ServedVolume | None:
        """Return the volume or view behind an export; an empty name means the only export."""
        with self.guard:
            name = export or self.only() or ""
            return self.views.get(name) or self.served.get(name)

    def label_of(self, exported: Exported) -> str:
        """Return the label of an export, or "" if it is no longer in the table."""
        with self.guard:
            labels = [*self.served.items(), *self.views.items()]
        return next((label for label, one in labels if one is exported), "")

    @contextmanager
    def operation(self, exported: Exported) -> Iterator[None]:
        """Keep the label of an export from changing while an operation uses it."""
        with self.guard:
            exported.operations += 1
        try:
            yield
        finally:
            with self.guard:
                exported.operations -= 1

    def take_views(self, served: ServedVolume, names: set[str] | None) -> tuple[list[View], list[str]]:
        """Take away the views of a volume that no client uses. The caller holds the guard.

        Returns those views, and the labels of the views among `names` (None: all) that a client uses.
        """
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
        """Take a view away unless a client uses it or is about to. The caller holds the guard.

        If it returns true, the caller calls `views_changed` once the view is closed.
        """
        view = self.views[label]
        if view.operations or not self._nbd.remove_export(label, if_unused=True):
            return False
        del self.views[label]
        if view.served:
            view.served.views_changing += 1
        return True

    def take_served(self, served: ServedVolume) -> bool:
        """Take a volume away unless a client, a program on its control socket or an operation uses it or is about to."""
        with self.guard:
            is_there = self.served.get(served.name) is served
            is_used = served.operations or served.switching or served.views_changing or served.control.is_connected
            if not is_there or is_used:
                return False
            if not self._nbd.remove_export(served.name, if_unused=True):
                return False
            served.is_taken_away = True
            del self.served[served.name]
            return True

    def all_served(self) -> list[ServedVolume]:
        """Return the volumes that are served."""
        with self.guard:
            return list(self.served.values())


def _names_now(served: Iterable[ServedVolume]) -> dict[ServedVolume, str]:
    """Return the names of volumes now, by one question to each store: a server may have thousands of them."""
    of: defaultdict[OpenStore, list[ServedVolume]] = defaultdict(list)
    names = {}
    for one in served:
        if one.opened.closed:  # as the server ends, and its store may be closed too
            names[one] = one.opened.row.name
        else:
            of[one.opened.store].append(one)
    for store, volumes in of.items():
        found = {row.id: row.name for row in store.catalog.volumes_with_ids(one.opened.row.id for one in volumes)}
        names.update({one: found.get(one.opened.row.id, one.opened.row.name) for one in volumes})
    return names
