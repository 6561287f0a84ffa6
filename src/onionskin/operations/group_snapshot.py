"""Snapshots of several volumes at one instant.

What must hold: all are named in one transaction, or none; each write that was answered before one that the cut leaves out
began is in the cut, whichever volumes they went to. A volume that nobody holds is opened for this, and closed again.

A volume that another process holds is refused, with the name of the process. The cut of such volumes would be asked of
their holders in the stages that `seal` goes through here; `_Held` is where they would come in.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from onionskin.base.naming import check_name, check_note
from onionskin.catalog import new_id
from onionskin.catalog.tree import Snapshot
from onionskin.errors import StateError
from onionskin.operations import snapshots
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

Opener = Callable[[str], OpenHead]


def take(store: OpenStore, names: Mapping[str, str | None], note: str, opener: Opener) -> dict[str, Snapshot]:
    """Take the snapshots. See `Store.snapshot_group`; `opener` opens a volume for writing."""
    if not isinstance(names, Mapping):
        raise TypeError(f"the volumes of a group come as a mapping, such as {{'web': 'before'}}, not {names!r}")
    names = {volume: None if name is None else check_name("snapshot", name) for volume, name in names.items()}
    note = check_note(note)
    while names:
        with ExitStack() as stack:
            held = _Held(store, opener, stack)
            # By their ids, so that of two groups that meet one gets all.
            for volume, id in sorted(((name, store.catalog.volume(name).id) for name in names), key=lambda at: at[1]):
                held.add(volume, id)
            disks = [(held.heads[volume], name, new_id()) for volume, name in names.items()]
            try:
                return dict(zip(names, snapshots.take_together(disks, note), strict=True))
            except StateError:
                if not held.lost_one:
                    raise
    return {}


class _Held:
    """The heads of a group: those that are open in this store, and those that are opened for the time of `stack`."""

    def __init__(self, store: OpenStore, opener: Opener, stack: ExitStack) -> None:
        self._store = store
        self._opener = opener
        self._stack = stack
        self.heads: dict[str, OpenHead] = {}

    def add(self, volume: str, id: bytes) -> None:
        """Find the head of a volume, or open it."""
        head = self._open_here(id)
        if head is None:
            head = self._opener(volume)
            self._stack.callback(head.close)
        if head in self.heads.values():
            raise ValueError(f"volume {volume!r} was named twice, under two names; take its snapshots one by one")
        self.heads[volume] = head

    def _open_here(self, id: bytes) -> OpenHead | None:
        for handle in self._store.open_handles():
            if isinstance(handle, OpenHead) and handle.row.id == id and not handle.closed:
                return handle
        return None

    @property
    def lost_one(self) -> bool:
        """Whether somebody closed one meanwhile: then it can be opened."""
        return any(head.closed for head in self.heads.values())
