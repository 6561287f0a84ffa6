"""Staged volumes: disks that an import or an applied stream makes. They have no name until all their data is durable.

What must hold: a staged volume appears in no list. It ends with one transaction, which gives it a name or makes it a
snapshot. A process that dies before that leaves a staged volume whose lock nobody holds. The next process that makes a
staged volume, or opens a volume for writing, drops it by its id.

The row of a staged volume is that of a volume, with a name that no volume can have.
"""

from collections.abc import Iterator
from contextlib import suppress

from onionskin.base.held import held
from onionskin.base.lazy import logger
from onionskin.base.naming import check_name
from onionskin.base.records import record
from onionskin.base.states import DATA
from onionskin.catalog import Catalog, SnapshotRow, VolumeRow, new_id
from onionskin.catalog.rows import STAGED_PREFIX
from onionskin.catalog.tree import Snapshot, describe_snapshot, nearest_snapshot, remove_unreachable_layers
from onionskin.errors import ChainError, FormatError, SnapshotExistsError, StateError
from onionskin.operations import ownership, reclaim, volumes
from onionskin.operations.flush import finish, flush
from onionskin.operations.reclaim import add_files_of, unlink_files_of
from onionskin.operations.seal import seal
from onionskin.operations.snapshots import is_changed_over
from onionskin.storage.chain import NewHead
from onionskin.storage.locks import VolumeLock
from onionskin.storage.open_head import OpenDisk, OpenHead
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)


@record
class StagedVolume:
    """A disk without a name. `stage` makes it.

    Attributes
    ----------
    head : OpenHead
        The open head that the data is written to.
    """

    head: OpenHead
    public_name: str | None
    stands_on: bytes | None  # the layer that the staged volume was cloned from

    def publish(self) -> None:
        """Make the data durable, and give the volume the name that `stage` was called with.

        Raises
        ------
        VolumeExistsError
            The name was taken meanwhile.
        """
        assert self.public_name is not None
        flush(self.head)
        with self.head.operation():
            volumes.rename_volume(self.head.store, self.head.row.id, self.public_name)

    def become_snapshot_of(self, volume: OpenHead, *, name: str, note: str, guid: bytes) -> Snapshot:
        """Make the staged volume the newest snapshot of a volume, in one transaction.

        The disk of the volume then reads as the staged volume. The head of the volume must be unchanged since the
        staged volume was cloned from it.

        Raises
        ------
        StateError, ChainError
            The volume's head was changed, or stands on another snapshot by now.
        SnapshotExistsError
            The volume has a snapshot of that name.
        """
        # Imported late: an import is staged, too, and puts nothing in the place of a disk.
        from onionskin.operations.restart import restart_on

        catalog = self.head.store.catalog
        taken: list[Snapshot] = []
        with self.head.operation():
            sealed = seal(self.head)

        def name_it() -> None:
            ownership.refuse_put_back(catalog, volume.row.id)
            if catalog.has_snapshot_named(volume.row.id, name):
                raise SnapshotExistsError(
                    f"volume {volume.name!r} already has a snapshot {name!r}; merge or discard it first"
                )
            created_ns = catalog.layer(self.head.head).created_ns
            row = SnapshotRow(volume.row.id, name, sealed.id, guid, created_ns, note, catalog.take_lock_byte())
            catalog.insert(row)
            taken.append(describe_snapshot(catalog, volume.row, row, sealed))

        with volume.operation(), _unchanged(volume, self.stands_on):
            restart_on(volume, sealed.id, name_it)
        return taken[0]


@held
def _unchanged(volume: OpenHead, stands_on: bytes | None) -> Iterator[None]:
    """Stop the writers of a disk that is about to be replaced, after checking that none of their data would be lost.

    At the end, they go on with the new disk, or with this one if it was not replaced.
    """
    flush(volume)
    path = volume.path
    _, frames, _ = path.log_state()
    _refuse_changed(volume, stands_on)
    is_frozen = True  # before it is: an interrupt may come when it was just frozen, and to thaw does no harm
    try:
        is_frozen = path.freeze(frames)
        if not is_frozen:
            raise StateError(f"volume {volume.name!r} was written to meanwhile; revert it, then apply the stream again")
        yield
    finally:
        if is_frozen:
            path.thaw()


def _refuse_changed(volume: OpenHead, stands_on: bytes | None) -> None:
    # Imported late: each opening imports this module, to drop what is dead.
    from onionskin.operations.copy import extents

    catalog = volume.store.catalog
    below = snapshot_below(catalog, volume.row, volume.head)
    if (below.layer if below else None) != stands_on:
        raise ChainError(f"volume {volume.name!r} stands on something else by now; apply the stream again")
    if is_changed_since(volume, below) if below else len(extents(volume).only(DATA)):
        raise StateError(f"volume {volume.name!r} was written to meanwhile; revert it, then apply the stream again")


def snapshot_below(catalog: Catalog, volume: VolumeRow, head: bytes) -> SnapshotRow | None:
    """Return the nearest snapshot of the volume that a head stands on.

    If the volume is a clone and has no such snapshot, return the nearest snapshot of any volume.
    """
    below = catalog.layer(head).parent
    own = nearest_snapshot(catalog, volume, below)
    if own or below is None:
        return own
    named = {row.layer: row for row in catalog.snapshots_in_chain(below)}
    return next((named[layer.id] for layer in reversed(catalog.chain(below)) if layer.id in named), None)


def is_changed_since(volume: OpenDisk, below: SnapshotRow) -> bool:
    """Whether anything was written, trimmed or resized since a snapshot that the disk stands on. This flushes first."""
    return is_changed_over(volume, lambda: {below.layer})


@held
def stage(
    store: OpenStore,
    name: str | None = None,
    *,
    size: int | None = None,
    block_size: int = 4096,
    wipe: str = "release",
    clone_of: bytes | None = None,
) -> Iterator[StagedVolume]:
    """Make a staged volume for the time of a with block. If it was not published by the end, it is dropped.

    Parameters
    ----------
    store : OpenStore
        The store to make it in.
    name : str, optional
        The name that `publish` gives the volume. If it is taken already, VolumeExistsError is raised.
    size, block_size, wipe
        These are as for `Store.create`. A clone may have another size than its layer, but has the layer's block size.
    clone_of : bytes, optional
        The id of the sealed layer that the disk is a clone of.
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
        _end(made.head)


def _make(
    store: OpenStore, name: str | None, size: int | None, block_size: int, wipe: str, clone_of: bytes | None
) -> StagedVolume:
    catalog, id = store.catalog, new_id()
    store.reserve.make()
    lock = VolumeLock(store.layout, id, name or "a staged volume")  # a row without this lock would seem to be dead

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
        row = VolumeRow(id, f"{STAGED_PREFIX}{id.hex()}", head.layer.id, head.layer.created_ns)
        catalog.insert(row)
        return row, head.layer.id

    try:
        row, layer = store.change(insert)
        store.reserve.retry(lock.make_file)
        opened = store.open_head(layer, id)
        head = OpenHead(store, row, opened, volume_lock=lock, finish=finish, free_waiting=reclaim.work_soon)
    except BaseException:
        lock.close()
        raise
    store.register(head)
    return StagedVolume(head, name, clone_of)


def _end(head: OpenHead) -> None:
    store = head.store
    row = store.catalog.volume_with_id(head.row.id)
    if row and not row.name.startswith(STAGED_PREFIX):
        head.close()
        return
    head.abandon()
    _drop(store, head.row.id)


def _drop(store: OpenStore, id: bytes) -> None:
    """Remove a staged volume by its id. It is not open in this store."""
    catalog = store.catalog

    def remove() -> None:
        row = catalog.volume_with_id(id)
        if row and row.name.startswith(STAGED_PREFIX):
            catalog.remove_volumes([id])
            add_files_of(catalog, [id])
            remove_unreachable_layers(catalog, row.head)

    store.change(remove)
    with suppress(OSError):  # the volume is dropped, and files that cannot be unlinked now stay pending
        unlink_files_of(store, [id])
    reclaim.work_soon(store)


def drop_dead(store: OpenStore) -> None:
    """Drop the staged volumes of processes that died.

    The name of one is made of its id. Any other name that begins so is damaged, and may be that of a volume.
    """
    for row in store.catalog.staged_volumes():
        if row.name != f"{STAGED_PREFIX}{row.id.hex()}":
            _report(store, row, "its name is none that a volume can have; restore the catalog from a copy of the store")
            continue
        try:
            lock = VolumeLock(store.layout, row.id, row.name)
            try:
                _drop(store, row.id)
            finally:
                lock.close()
        except StateError:  # a living process is writing it
            pass
        except FormatError as error:
            _report(store, row, str(error))


def _report(store: OpenStore, row: VolumeRow, why: str) -> None:
    """Log once that a volume stays that seems to have been left, and why."""
    if row.id not in store.reported_volumes:
        store.reported_volumes.add(row.id)
        _log.warning("%s: the volume %s (%r) is not dropped: %s", store.path, row.id.hex(), row.name, why)
