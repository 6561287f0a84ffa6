"""A disk that is being made: an import, a stream that is applied. It has no name until all of it is durable.

What must hold: a draft is listed nowhere, and its one end is a transaction that gives it a name, or makes it a snapshot. A
process that dies before that leaves a draft whose lock nobody holds: the next one to make a draft, or to open a volume
for writing, drops it, by its id.

The row of a draft is a volume's, under a name that no volume can have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from onionskin.base.naming import check_name
from onionskin.catalog import SnapshotRow, VolumeRow, new_id
from onionskin.catalog.rows import DRAFT_PREFIX
from onionskin.catalog.tree import Snapshot, describe_snapshot, free_unneeded, nearest_snapshot
from onionskin.errors import ChainError, SnapshotExistsError, StateError
from onionskin.operations import reclaim, volumes
from onionskin.operations.reclaim import add_files_of, unlink_files_of
from onionskin.storage.chain import NewHead
from onionskin.storage.locks import VolumeLock
from onionskin.storage.open_store import OpenStore
from onionskin.volume import Volume


class Draft(Volume):
    """A volume without a name. Made by `draft`."""

    public_name: str | None = None
    stands_on: bytes | None = None  # the layer that it was cloned from

    def publish(self) -> None:
        """Make what was written durable, and this a volume of the name that the draft was made for.

        Raises
        ------
        VolumeExistsError
            The name was taken meanwhile.
        """
        name = self.public_name
        assert name is not None
        self.flush()
        with self.operation():
            volumes.rename_volume(self.opened_store, self.row.id, name)

    def become_snapshot_of(self, volume: Volume, *, name: str, note: str, guid: bytes) -> Snapshot:
        """Make the draft the newest snapshot of a volume whose head is unchanged since the draft was cloned from it.

        The volume's disk reads as the draft then. All of it is one transaction.

        Raises
        ------
        StateError, ChainError
            The volume's head was changed, or stands on something else by now.
        SnapshotExistsError
            The volume has a snapshot of that name.
        """
        catalog = self.opened_store.catalog
        taken: list[Snapshot] = []
        with self.operation():
            sealed = self.seal(lambda: None, lambda sealed, head: None)

        def name_it() -> None:
            if catalog.has_snapshot_named(volume.row.id, name):
                raise SnapshotExistsError(
                    f"volume {volume.name!r} already has a snapshot {name!r}; merge or discard it first"
                )
            created_ns = catalog.layer(self.head).created_ns
            row = SnapshotRow(volume.row.id, name, sealed.id, guid, created_ns, note, catalog.take_lock_byte())
            catalog.insert(row)
            taken.append(describe_snapshot(catalog, volume.row, row, sealed))

        with volume.operation(), _unchanged(volume, self._refuse_changed):
            volume.restart_on(sealed.id, name_it)
        return taken[0]

    def _refuse_changed(self, volume: Volume) -> None:
        catalog = self.opened_store.catalog
        below = nearest_snapshot(catalog, volume.row, catalog.layer(volume.head).parent)
        if (below.layer if below else None) != self.stands_on:
            raise ChainError(f"volume {volume.name!r} stands on something else by now; apply the stream again")
        if volume.head_changed if below else any(int(state) == 1 for _, _, state in volume.extents()):
            raise StateError(f"volume {volume.name!r} was written to meanwhile; revert it, then apply the stream again")


@contextmanager
def _unchanged(volume: Volume, refuse_changed: Callable[[Volume], None]) -> Iterator[None]:
    """Hold the writers of a disk that is about to be replaced, once it is known that nothing of theirs would be lost.

    They go on with the new disk, or with this one where it was not replaced.
    """
    volume.flush()
    path = volume.path
    _, frames, _ = path.log_state()
    refuse_changed(volume)
    if not path.freeze(frames):
        raise StateError(f"volume {volume.name!r} was written to meanwhile; revert it, then apply the stream again")
    try:
        yield
    finally:
        path.thaw()


@contextmanager
def draft(
    store: OpenStore,
    name: str | None = None,
    *,
    size: int | None = None,
    block_size: int = 4096,
    wipe: str = "release",
    clone_of: bytes | None = None,
) -> Iterator[Draft]:
    """Make a disk that is no volume yet, in a with block: what is not published by its end is dropped.

    Parameters
    ----------
    store : OpenStore
    name : str, optional
        What `publish` calls it; VolumeExistsError where it is taken already.
    size, block_size, wipe
        As for `Store.create`; of a clone the size may differ from its layer's, and the block size is the layer's.
    clone_of : bytes, optional
        The id of the sealed layer that it begins as.
    """
    store.catalog.refuse_read_only()
    if name is not None:
        check_name("volume", name)
        volumes.refuse_taken(store, name)
    drop_dead(store)
    made = _make(store, name, size, block_size, wipe, clone_of)
    try:
        yield made
    finally:
        _end(made)


def _make(
    store: OpenStore, name: str | None, size: int | None, block_size: int, wipe: str, clone_of: bytes | None
) -> Draft:
    catalog, id = store.catalog, new_id()
    store.reserve.make()
    lock = VolumeLock(store.layout, id, name or "a draft")  # before there is a row that seems to be dead

    def insert() -> tuple[VolumeRow, bytes]:
        below = catalog.layer_with_id(clone_of)
        if clone_of and (below is None or not catalog.is_named(clone_of)):
            raise StateError("the snapshot to start from is gone: another process changed the tree; try again")
        head = NewHead.on(
            below,
            base=None,
            block_size=below.block_size if below else block_size,
            wipe=wipe,
            size_bytes=size if size is not None else below.size_bytes if below else 0,
        )
        head.insert(catalog)
        row = VolumeRow(id, f"{DRAFT_PREFIX}{id.hex()}", head.layer.id, head.layer.created_ns)
        catalog.insert(row)
        return row, head.layer.id

    try:
        row, layer = store.change(insert)
        store.reserve.retry(lock.make_file)
        made = Draft(store, row, store.open_head(layer, id), volume_lock=lock)
    except BaseException:
        lock.close()
        raise
    made.public_name, made.stands_on = name, clone_of
    store.register(made)
    return made


def _end(made: Draft) -> None:
    store = made.opened_store
    row = store.catalog.volume_with_id(made.row.id)
    if row and not row.name.startswith(DRAFT_PREFIX):
        made.close()
        return
    made.abandon()
    _drop(store, made.row.id)


def _drop(store: OpenStore, id: bytes) -> None:
    """Remove a draft, by its id. It is not open here."""
    catalog = store.catalog

    def remove() -> None:
        row = catalog.volume_with_id(id)
        if row and row.name.startswith(DRAFT_PREFIX):
            catalog.remove_volume(id)
            add_files_of(catalog, id)
            free_unneeded(catalog, row.head)

    store.change(remove)
    with suppress(OSError):  # it is dropped, and what cannot be unlinked now stays pending
        unlink_files_of(store, id)
    reclaim.work_soon(store)


def drop_dead(store: OpenStore) -> None:
    """Drop the drafts of processes that died."""
    for row in store.catalog.draft_volumes():
        with suppress(StateError):  # it is being written
            lock = VolumeLock(store.layout, row.id, row.name)
            try:
                _drop(store, row.id)
            finally:
                lock.close()
