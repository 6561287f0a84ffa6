"""Snapshots of several volumes at one instant.

What must hold: all are named in one transaction, or none; each write that was answered before one that the cut leaves out
began is in the cut, whichever volumes they went to. A volume that nobody holds is opened for this, and closed again. One
that another process holds is cut by that process (`seal.RemoteHead`); where that cannot be asked, it is refused.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from onionskin.base.held import held, held_together
from onionskin.base.naming import check_name, check_note
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import VolumeRow, new_id
from onionskin.catalog.tree import Snapshot
from onionskin.errors import StateError
from onionskin.kernels._volume import ShortTurns
from onionskin.operations import snapshots
from onionskin.operations.seal import RemoteHead
from onionskin.storage.locks import volume_holder
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

Opener = Callable[[str], OpenHead]
Finder = Callable[[Mapping[str, int], ExitStack], Mapping[str, RemoteHead]]
OneServer = Callable[[Mapping[str, VolumeRow], Mapping[str, str | None], str], dict[str, Snapshot] | None]

_OPEN_SECONDS = 1.0  # for which somebody may hold a volume that is about to be given up


def take(
    store: OpenStore,
    names: Mapping[str, str | None],
    note: str,
    opener: Opener,
    finder: Finder,
    one_server: OneServer,
) -> dict[str, Snapshot]:
    """Take the snapshots. See `Store.snapshot_group`; `opener` and `finder` are as for `Heads`.

    `one_server` has the server that holds all volumes take their snapshots: so none of them is told of step by step. None:
    it has not all of them, or knows no groups, and nothing was taken.
    """
    if not isinstance(names, Mapping):
        raise TypeError(f"the volumes of a group come as a mapping, such as {{'web': 'before'}}, not {names!r}")
    names = {volume: None if name is None else check_name("snapshot", name) for volume, name in names.items()}
    note = check_note(note)
    rows = store.catalog.volumes_called(names)
    if _has_one_holder(store, rows) and (taken := one_server(rows, names, note)) is not None:
        return taken
    while names:
        with open_heads(store, names, opener, finder) as found:
            disks = [(found.heads[volume], name, new_id()) for volume, name in names.items()]
            try:
                return dict(zip(names, snapshots.take_together(store, disks, note), strict=True))
            except StateError:
                if not found.lost_one:
                    raise
    return {}


def _has_one_holder(store: OpenStore, rows: Mapping[str, VolumeRow]) -> bool:
    """Whether one process holds all of these volumes, by other handles than those of this store."""
    ids = {row.id for row in rows.values()}
    if len(ids) < len(rows) or any(
        handle.row.id in ids for handle in store.open_handles() if isinstance(handle, OpenHead) and not handle.closed
    ):
        return False
    process = 0
    for id in ids:
        holder = volume_holder(store.layout.volume_lock(id))
        if holder is None or not holder.pid or (process and holder.pid != process):
            return False
        process = holder.pid
    return bool(process)


@held
def open_heads(store: OpenStore, volumes: Iterable[str], opener: Opener, finder: Finder) -> Iterator["Heads"]:
    """Find or open the heads of volumes, for the time of the block.

    Those that nobody holds by their ids, so that of two groups that meet one gets all.
    """
    with ShortTurns(), held_together() as stack:  # the writers of all wait for the slowest of the processes
        heads = Heads(store, opener, finder, stack)
        heads.find({name: row.id for name, row in store.catalog.volumes_called(volumes).items()})
        yield heads


class Heads:
    """The heads of a group: those that are open in this store, that others hold, and that are opened meanwhile.

    Parameters
    ----------
    store : OpenStore
    opener : callable
        Opens a volume for writing.
    finder : callable
        Given volumes, each with the process that holds it, finds those whose process can be asked to seal them. The stack
        takes what leaves those processes alone again.
    stack : ExitStack
        Closes what was opened.
    """

    def __init__(self, store: OpenStore, opener: Opener, finder: Finder, stack: ExitStack) -> None:
        self._store = store
        self._opener = opener
        self._finder = finder
        self._stack = stack
        self.heads: dict[str, OpenHead | RemoteHead] = {}

    def find(self, ids: Mapping[str, bytes]) -> None:
        """Find the heads of volumes, by their names, or open them."""
        by_id: dict[bytes, str] = {}
        for volume, id in ids.items():
            if by_id.setdefault(id, volume) != volume:
                raise ValueError(f"volume {volume!r} was named twice, under two names; take its snapshots one by one")
        found: dict[str, OpenHead | RemoteHead] = {
            volume: head for volume, id in ids.items() if (head := self._open_here(id)) is not None
        }
        found |= self._served([volume for volume in ids if volume not in found], ids)
        for id, volume in sorted(by_id.items()):
            if volume not in found:
                found[volume] = self._open(volume, id)
        self.heads = {volume: found[volume] for volume in ids}

    def _served(self, volumes: Sequence[str], ids: Mapping[str, bytes]) -> Mapping[str, RemoteHead]:
        """Return those that servers hold, by their names."""
        lock_of = self._store.layout.volume_lock
        holders = {volume: holder.pid for volume in volumes if (holder := volume_holder(lock_of(ids[volume])))}
        return self._finder(holders, self._stack) if holders else {}

    def _open(self, volume: str, id: bytes) -> OpenHead | RemoteHead:
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            try:
                with DeferredInterrupt():
                    opened = self._opener(volume)
                    if opened.row.id == id:
                        self._stack.callback(opened.close)
                        return opened
                    opened.close()  # it may be another one of the group, under the name that it has by now
                break
            except StateError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)  # another group may hold it for a moment
            if (open_here := self._open_here(id)) is not None:
                return open_here
            if remote := self._served([volume], {volume: id}).get(volume):
                return remote
        raise StateError(f"volume {volume!r} was renamed meanwhile, and another one has its name; try again")

    def _open_here(self, id: bytes) -> OpenHead | None:
        for handle in self._store.open_handles():
            if isinstance(handle, OpenHead) and handle.row.id == id and not handle.closed:
                return handle
        return None

    @property
    def lost_one(self) -> bool:
        """Whether somebody closed one meanwhile: then it can be opened."""
        return any(isinstance(head, OpenHead) and head.closed for head in self.heads.values())
