"""A store: the directory that holds volumes. Opening, making, cloning and removing them; the work that is left.

What must hold: a writer of a volume holds its lock; a handle holds shared locks on all files that it can read before
it trusts the catalog; what is freed goes through `reclaim`. Nothing here touches block data.
"""

import logging
import operator
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from onionskin.base import forking
from onionskin.base.background import Background
from onionskin.base.fsync import sync_directory
from onionskin.base.limits import HEADER_BYTES, VOLUME_BYTES_MAX, WIPE_POLICIES
from onionskin.base.modes import group_id, is_shared, make_file, make_shared, refuse_other_group
from onionskin.base.naming import check_name, some_of
from onionskin.base.sizes import format_size, parse_size
from onionskin.catalog import (
    BaseRow,
    Catalog,
    PendingRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.read_only import can_be_written
from onionskin.catalog.tree import (
    Snapshot,
    descendants,
    find_snapshot,
    free_unneeded,
    list_snapshots,
    users_of,
)
from onionskin.errors import (
    ChainError,
    FormatError,
    OnionskinError,
    StateError,
    VerifyError,
    VolumeExistsError,
    VolumeNotFoundError,
)
from onionskin.operations import compact_segments, merge_into_base, reclaim, staged_volumes
from onionskin.operations import usage as usages
from onionskin.operations.listing import TreeNode, VolumeInfo, list_volumes, read_tree, volume_info
from onionskin.storage.chain import (
    Chain,
    NewHead,
    check_base,
    described_base,
    lock_base,
    lock_chain,
    open_chain,
    pending_base_merges,
    read_chain,
    refuse_half_merged,
    replace_spare,
)
from onionskin.storage.layout import DIRECTORIES, Layout
from onionskin.storage.locks import (
    STORE_BYTE,
    BaseLock,
    ByteLocks,
    ReadersLock,
    VolumeLock,
    is_being_merged_into,
    locked_directory,
)
from onionskin.storage.shared_paths import OpenChain, SealedViews
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.base.annotations import AnyPath, Extents, WipePolicy
    from onionskin.kernels._volume import DataPath
    from onionskin.operations.layering import Layering

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Lock = TypeVar("Lock", VolumeLock, ReadersLock)

RESERVE_BYTES = 8 << 20
CATALOG_ROOM_BYTES = 256 << 10
CATALOG_INDEX_BYTES = 48 << 10  # 32 KiB, and what the log and the names of both take


class Store:
    """A directory that holds volumes.

    Parameters
    ----------
    path : path-like
    create : bool
        Whether to make a store where there is none. False: VolumeNotFoundError is raised.
    trust : bool
        Whether to open a store that another user owns: its rows name files that are read and written with this user's rights.
    group : str or int, optional
        A group whose members may use the store that is made: its directories get mode 2770, and its files 0660, whatever
        the umask. None: nobody but the owner may, with 0700 and 0600. Members other than the owner open it with `trust`.
        Of a store that is there it must be the group.

    Attributes
    ----------
    read_only : bool
        Whether the store can only be read: its file system is mounted so or full to the last block, or its owner lets
        this user do no more. What changes it raises OSError then.
    unreachable_bytes : int
        Bytes that were overwritten through this handle with policy `zero`, and whose old contents may still be on the
        medium: on a copy-on-write file system, or where other files share the blocks. The first time it is logged too.

    Notes
    -----
    A context manager. Any thread may call it; another process may have the same store open. After a fork the child
    has to open the store again.
    """

    def __init__(
        self,
        path: "AnyPath",
        *,
        create: bool = True,
        trust: bool = False,
        group: str | int | None = None,
    ) -> None:
        self.path: Path = Path(path)
        self.layout: Layout = Layout(self.path.absolute())
        self._closed = False
        # Wiped through this handle with policy `zero`, and not reached by it: see `note_unreachable`.
        self.unreachable_bytes: int = 0
        # Ids of the pending work whose failure was logged.
        self.reported_work: set[int] = set()
        self._counting = threading.Lock()
        self._background = Background(self._work, "onionskin pending work")
        self._open: weakref.WeakSet[Volume] = weakref.WeakSet()
        self._open_guard = threading.Lock()
        self.views: SealedViews = SealedViews()
        if create and not self.layout.catalog.exists():
            self._make_directories(group)
        elif group is not None:
            refuse_other_group(self.layout.root, group)
        if not trust:
            refuse_foreign(self.layout)
        refuse_links(self.layout)
        self.read_only: bool = self.layout.catalog.exists() and not can_be_written(self.layout.catalog)
        self.catalog: Catalog = self._open_catalog(create)
        try:
            self.locks: ByteLocks = self.with_reserve(lambda: ByteLocks(self.layout.lock))
            self.locks.wait_shared(STORE_BYTE)
        except BaseException:
            self.catalog.close()
            raise
        forking.register(self)

    def _open_catalog(self, create: bool) -> Catalog:
        """Open the catalog; on a disk that is full to the last block, with no reserve left, to read it alone."""
        try:
            with self._room_is_kept():
                if not self.read_only:
                    self._make_room_for_catalog()
                return self.with_reserve(lambda: Catalog(self.layout.catalog, create=create, read_only=self.read_only))
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT) or not self.layout.catalog.exists():
                raise
        _log.warning("%s: the disk is full to the last block, so the store is opened to be read alone", self.path)
        self.read_only = True
        return Catalog(self.layout.catalog, create=False, read_only=True)

    def _make_directories(self, group: str | int | None) -> None:
        group = None if group is None else group_id(group)
        way = [self.layout.root, *self.layout.root.parents]
        found = next(index for index, directory in enumerate(way) if directory.exists())
        # From what is there already: one that crashed may have made it, and its name need not be durable.
        for directory in reversed(way[: found + 1]):
            is_root, was_there = directory == self.layout.root, directory.exists()
            directory.mkdir(exist_ok=True, mode=0o700 if is_root else 0o777)
            if group is not None and is_root:
                # One that was there is somebody's, with what is in it: its mode and its group are not changed in passing.
                (refuse_other_group if was_there else make_shared)(directory, group)
            with suppress(PermissionError):  # somebody else's directory, so not one that we made
                sync_directory(directory.parent)  # BARRIER: store name
        for name in DIRECTORIES:
            (self.layout.root / name).mkdir(exist_ok=True, mode=0o700)
            if is_shared(self.layout.root):
                make_shared(self.layout.root / name, self.layout.root.stat().st_gid)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self.path}>"

    # ---- volumes ----

    def create(
        self,
        name: str,
        *,
        base: "AnyPath | None" = None,
        size: "int | str | None" = None,
        block_size: int = 4096,
        wipe: "WipePolicy" = "release",
        digest: bool = False,
        base_format: "Literal['raw'] | None" = None,
    ) -> Volume:
        """Make a volume and open it for writing.

        The volume, and the store's directories where it is the first, are durable on return. Any thread may call it.

        Parameters
        ----------
        name : str
            At most 255 bytes, without '/', '@' and control characters.
        base : path-like, optional
            A raw image file to stand on. It is never written, except by `merge_into_base`, and must not change.
        size : int or str, optional
            Bytes, or such as "20G". Needed without a base; with one it may be larger or smaller than the base.
        block_size : int
            The unit of copy-on-write, in bytes: a power of two from 4096 to 2097152.
        wipe : {"release", "zero"}
            Whether freed space is overwritten with zeros before it can be used again.
        digest : bool
            Take a SHA-256 of the base, which `open(verify=True)` compares.
        base_format : {"raw"}, optional
            Say that the bytes of the base are the disk, also where they look like an image of another format.

        Returns
        -------
        Volume
            Open for writing; its head is empty, so that it reads as the base, or zero.

        Raises
        ------
        VolumeExistsError
            The name is taken.
        ValueError
            The name, the size or the block size is none that a volume can have.
        FormatError
            The base is an image of another format than raw, and `base_format` does not say otherwise.
        OSError
            The base could not be read, or ENOSPC. There is no volume then.
        """
        if base_format not in (None, "raw"):
            raise ValueError(f"{base_format!r} is no format of a base: it is raw; import an image of another format")
        name = check_name("volume", name)
        return self._create(name, base, size, block_size, wipe, digest, vouched=base_format is not None)

    def _create(
        self,
        name: str,
        base: "AnyPath | None",
        size: "int | str | None",
        block_size: int,
        wipe: str,
        digest: bool,
        *,
        vouched: bool,
    ) -> Volume:
        block_size, wipe = _check_geometry(block_size, wipe)
        size_bytes = None if size is None else _check_size(parse_size(size))
        if base is None:
            if size_bytes is None:
                raise ValueError("a volume without a base needs a size, such as '20G'")
            return self._make_volume(name, None, None, block_size, wipe, size_bytes)
        with self._base(Path(base), digest=digest, vouched=vouched) as below:
            if size_bytes is None and not below.size_bytes:
                raise ValueError(f"a volume has at least one byte: the base {base} is empty; give a size")
            return self._make_volume(name, None, below, block_size, wipe, size_bytes or _check_size(below.size_bytes))

    @contextmanager
    def _base(self, path: Path, *, digest: bool, vouched: bool) -> Iterator[BaseRow]:
        """Describe a base, which must be an image of its own, and keep it from being merged into."""
        if self.layout.holds(path):
            raise ChainError(
                f"{path} is a file of the store itself, which changes and goes: give an image outside of it"
            )
        with described_base(path, digest=digest, vouched=vouched) as base:
            refuse_half_merged(self.catalog, Path(base.path))
            yield base

    def _make_volume(
        self,
        name: str,
        source: "tuple[str, str] | None",
        base: BaseRow | None,
        block_size: int,
        wipe: str,
        size_bytes: int,
    ) -> Volume:
        """Make a volume and open it; the lock is held before anybody can see it, and a failure leaves none."""
        self.catalog.refuse_read_only()
        id = new_id()
        self.make_reserve()
        lock = self.with_reserve(lambda: VolumeLock(self.layout, id, name))
        try:
            head = NewHead.on(None, base=base, block_size=block_size, wipe=wipe, size_bytes=size_bytes)

            def insert() -> None:
                if base:
                    self.catalog.insert(base)
                self._insert_volume(id, name, head)

            self.change(insert)
        except BaseException:
            lock.close()
            raise
        return self._open_new(id, lock)

    def _open_new(self, id: bytes, lock: VolumeLock) -> Volume:
        """Open a volume that was just made; one that cannot be opened was not made."""
        try:
            row = self.catalog.volume_with_id(id)
            assert row is not None
            self.with_reserve(lock.make_file)
            return self._open_locked(row, lock, verify=False, found=False)
        except BaseException:
            with suppress(OSError, OnionskinError):
                self._drop_volume(id, recursive=True)
            lock.close()
            raise

    def _insert_volume(self, id: bytes, name: str, head: NewHead) -> None:
        self._refuse_taken(name)
        head.insert(self.catalog)
        self.catalog.insert(VolumeRow(id, name, head.layer.id, head.layer.created_ns))

    def _refuse_taken(self, name: str) -> None:
        if self.catalog.has(VolumeRow, "name = ?", name):
            raise VolumeExistsError(f"the store {self.path} already has a volume {name!r}; choose another name")

    def open(self, name: str, *, snapshot: str | None = None, verify: bool = False, mode: str = "w") -> Volume:
        """Open a volume for writing, or a read-only view of one of its snapshots, or of its head.

        Any thread may call it. What a process that died left unflushed is read by every opening of the head, and made
        durable by the first flush of one for writing.

        Parameters
        ----------
        name : str
            The volume.
        snapshot : str, optional
            Open a view of this snapshot; any number of handles may.
        verify : bool
            Compare the SHA-256 of the base with the one that `create(digest=True)` took.
        mode : {"w", "r"}
            "r" opens a head that nobody writes, read-only: nothing is written, made or freed by it, and nobody can open it
            for writing meanwhile; others may read it too. With `snapshot` it makes no difference.

        Returns
        -------
        Volume
            To be closed by the caller, or by the store's `close`.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        StateError
            The volume is held by another handle; its process id is named.
        ChainError
            The base is not the file that it was.
        VerifyError
            The base has another SHA-256.
        FormatError
            A file of the volume is damaged or missing.
        """
        if mode not in ("r", "w"):
            raise ValueError(f"a volume is opened with mode 'w' or 'r', not {mode!r}")
        if snapshot is not None:
            return self._open_view(name, snapshot, verify)
        if mode == "r":
            return self._open_to_read(name, verify)
        row, lock = self._lock_volume(name, VolumeLock)
        try:
            return self._open_locked(row, lock, verify=verify)
        except BaseException:
            lock.close()
            raise

    def _open_to_read(self, name: str, verify: bool) -> Volume:
        """Open a head that nobody writes. Nothing is written for it, in no file."""
        row, lock = self._lock_volume(name, ReadersLock)
        try:
            dirty = self.layout.dirty_file(row.id)
            opened = self._open_layer(row.head, writable=False, verify=verify, dirty=dirty)
            volume = Volume(self, row, opened, read_lock=lock)
        except BaseException:
            lock.close()
            raise
        self.note_open(volume)
        return volume

    def _lock_volume(self, name: str, kind: "Callable[[Layout, bytes, str], Lock]") -> "tuple[VolumeRow, Lock]":
        """Take a lock of the volume that has a name, and return it as it is under the lock.

        What a name means may change until the lock is held: somebody renames the volume, or deletes it and makes another.
        """
        row = self.catalog.volume(name)
        if kind is VolumeLock:
            self.catalog.refuse_read_only()
        while True:
            id = row.id
            lock = self.with_reserve(lambda: kind(self.layout, id, name))  # noqa: B023
            try:
                row = self.catalog.volume(name)
                if row.id == id:
                    if isinstance(lock, VolumeLock):
                        if not self.layout.volume_lock(id).exists():
                            self.catalog.sync_found()  # no file whose row a crash of the machine would undo
                        self.with_reserve(lock.make_file)
                    return row, lock
            except BaseException:
                lock.close()
                raise
            lock.close()

    def _open_locked(self, row: VolumeRow, lock: VolumeLock, *, verify: bool, found: bool = True) -> Volume:
        """Open the volume that is locked. On an error the lock stays the caller's.

        Not `found` is one that this handle has just made: its commit synced the log, and with it all that was read of it.
        """
        if found:
            self.catalog.sync_found()
        volume = self._open_head(row, lock, verify)
        self.note_open(volume)
        try:
            self._after_open(volume)
        except BaseException:
            volume.close()
            raise
        return volume

    def _open_head(self, row: VolumeRow, lock: VolumeLock, verify: bool) -> Volume:
        if pending_base_merges(self.catalog, row.head):
            _log.warning(
                "%s: a merge of %r into its base was begun and has not ended; the volume works, and its base does not by "
                "itself: end it with 'onionskin merge --into-base'",
                self.path,
                row.name,
            )
        self._look_at_spare(row.head)
        dirty = self.layout.dirty_file(row.id)
        for left in self.layout.dirty_drafts(row.id):
            left.unlink(missing_ok=True)
        compact_segments.gather_chain(self, row.head, may_hold_unflushed=dirty.exists() and dirty.stat().st_size > 0)
        opened = self._open_layer(row.head, writable=True, verify=verify, dirty=dirty)
        return Volume(self, row, opened, volume_lock=lock)

    def _look_at_spare(self, head: bytes) -> None:
        """Tidy what stands for the next head.

        A snapshot that failed at its commit left the head with two segments: the spare has blocks then, and is in the map.
        Else its files were at most made beforehand, are empty, and are made again when they are needed.
        """
        spare = self.catalog.spare_of(head)
        path = self.layout.segment_file(spare.id)
        if path.exists() and path.stat().st_size > HEADER_BYTES:
            self.change(lambda: replace_spare(self.catalog, head))
            return
        for made in (path, self.layout.map_file(spare.id)):
            descriptor = reclaim.open_to_free(made)
            if descriptor is not None:
                os.close(descriptor)
                made.unlink()

    def _open_view(self, name: str, snapshot: str, verify: bool) -> Volume:
        """Open a snapshot, or share what is open of it already: then only its base is looked at again.

        What the name means is asked again when the files are locked: it may have gone to another snapshot meanwhile.
        """
        while True:
            row, layer = self._find_layer(name, snapshot)
            try:
                opened = self.views.take(layer, lambda: self._open_layer(layer, writable=False, verify=verify))  # noqa: B023
            except OnionskinError:
                if self._find_layer(name, snapshot)[1] == layer:
                    raise
                continue
            try:
                if self._find_layer(name, snapshot)[1] != layer:
                    self.views.give_back(layer)
                    continue
                if opened.chain.base and opened.users > 1:
                    check_base(self.catalog, opened.chain.base, verify=verify)
                view = Volume(self, row, opened, snapshot=snapshot)
            except BaseException:
                self.views.give_back(layer)
                raise
            self.note_open(view)
            return view

    def _find_layer(self, name: str, snapshot: str) -> tuple[VolumeRow, bytes]:
        with self.catalog.reading():
            row = self.catalog.volume(name)
            return row, find_snapshot(self.catalog, row, snapshot).layer

    def open_layer(self, layer: bytes) -> OpenChain:
        """Open a sealed layer under locks of its own, which the caller closes with it."""
        return self._open_layer(layer, writable=False, verify=False)

    def open_head(self, layer: bytes, volume_id: bytes) -> OpenChain:
        """Open a head for the holder of its volume's lock."""
        self.catalog.sync_found()
        return self._open_layer(layer, writable=True, verify=False, dirty=self.layout.dirty_file(volume_id))

    def note_open(self, volume: Volume) -> None:
        """Put a handle on the list of those that are open here."""
        with self._open_guard:
            self._open.add(volume)

    def _open_layer(self, layer: bytes, *, writable: bool, verify: bool, dirty: Path | None = None) -> OpenChain:
        """Lock the files of a head or of a sealed layer, and open its data path."""
        locks = ByteLocks(self.layout.lock)
        base_lock = None
        try:
            chain, base_lock = self._lock_layer(layer, locks, verify)
            path = open_chain(self.layout, chain, writable=writable, base_lock=base_lock, dirty=dirty)
        except BaseException:
            locks.close()
            if base_lock:
                base_lock.close()
            raise
        return OpenChain(chain, path, locks, base_lock)

    def _lock_layer(self, layer: bytes, locks: ByteLocks, verify: bool) -> tuple[Chain, BaseLock | None]:
        """Lock a chain and its base; again where a merge into the base ended between the two."""
        while True:
            chain = lock_chain(self.catalog, layer, locks)
            try:
                return chain, lock_base(self.catalog, chain, verify=verify)
            except ChainError:
                if read_chain(self.catalog, layer).base == chain.base:
                    raise

    def _after_open(self, volume: Volume) -> None:
        """Do what was left: by a crash, by a reader that was in the way, by a layer that lost its name.

        What fails stays for the next time, and is no reason to refuse the volume.
        """
        self.make_reserve()
        with suppress(OSError, OnionskinError):
            staged_volumes.drop_dead(self)
        merge_into_base.fold_unnamed_below(volume)
        segments = [row.id for row in self.catalog.rows(SegmentRow, "layer = ? AND role = 'sealed'", volume.head)]
        with suppress(OSError, OnionskinError):
            if segments:
                self.scrub(segments, volume.wipe)
            self.work_soon()

    def clone(self, name: str, snapshot: str, new_name: str, *, wipe: "WipePolicy | None" = None) -> None:
        """Make a volume whose head is an empty child of a snapshot. It has no snapshots of its own yet.

        Nothing is copied. Durable on return. The origin may be open, here or elsewhere. Any thread may call it.

        Parameters
        ----------
        name : str
            The volume whose snapshot it is.
        snapshot : str
            What the clone reads at first.
        new_name : str
            The clone's name: at most 255 bytes, without '/', '@' and control characters.
        wipe : {"release", "zero"}, optional
            The clone's policy; by default that of the origin. What it shares with an origin of policy `zero` stays `zero`.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        VolumeExistsError
            The new name is taken.
        """
        new_name = check_name("volume", new_name)
        self.change(lambda: self._insert_clone(new_id(), name, snapshot, new_name, wipe))

    def _insert_clone(self, id: bytes, name: str, snapshot: str, new_name: str, wipe: str | None) -> None:
        source = self.catalog.volume(name)
        layer = self.catalog.layer(find_snapshot(self.catalog, source, snapshot).layer)
        block_size, policy = _check_geometry(layer.block_size, wipe or layer.wipe)
        head = NewHead.on(layer, base=None, block_size=block_size, wipe=policy, size_bytes=layer.size_bytes)
        self._insert_volume(id, new_name, head)

    def draft(
        self,
        name: str | None = None,
        *,
        size: int | None = None,
        block_size: int = 4096,
        wipe: str = "release",
        clone_of: bytes | None = None,
    ) -> "AbstractContextManager[staged_volumes.Draft]":
        """Make a disk that is no volume yet, in a with block: what is not published by its end is dropped.

        Parameters
        ----------
        name : str, optional
            What `publish` calls it; VolumeExistsError where it is taken already.
        size, block_size, wipe
            As for `create`; of a clone the size may differ from its layer's, and the block size is the layer's.
        clone_of : bytes, optional
            The id of the sealed layer that it begins as.
        """
        self.catalog.refuse_read_only()
        return staged_volumes.draft(self, name, size=size, block_size=block_size, wipe=wipe, clone_of=clone_of)

    def delete(self, name: str, *, recursive: bool = False) -> None:
        """Remove a volume and its snapshots.

        Its name is gone on return, durably, and with policy `zero` what only it used is overwritten. Files that another
        handle still reads are freed when that closes. Any thread may call it.

        Parameters
        ----------
        name : str
            The volume.
        recursive : bool
            Remove its snapshots too, where it has any.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        StateError
            It is open, it has snapshots and `recursive` is not given, or clones stand on them (some are listed).
        """
        dropped = False
        while not dropped:
            row, lock = self._lock_volume(name, VolumeLock)
            try:
                dropped = self._drop_volume(row.id, recursive=recursive, name=name)
            finally:
                lock.close()
        self.work_soon()

    def _drop_volume(self, id: bytes, *, recursive: bool, name: str | None = None) -> bool:
        """Remove the volume with this id, whose lock is held; with a name, only while the name means it.

        The lock keeps nobody from renaming the volume: what the name means is settled where the volume is removed. False
        if it means another one by now.
        """

        def remove() -> bool:
            if name is not None and self.catalog.volume(name).id != id:
                return False
            row = self.catalog.volume_with_id(id)
            if row is None:
                return True
            named = self.catalog.snapshots_of(id)
            self._refuse_delete(row, named, recursive)
            self.catalog.delete(SnapshotRow, "volume = ?", id)
            self.catalog.delete(VolumeRow, "id = ?", id)
            reclaim.add_files_of(self.catalog, id)
            for layer in (row.head, *(snapshot.layer for snapshot in named)):
                free_unneeded(self.catalog, layer)
            return True

        removed = self.change(remove)
        if removed:
            with suppress(OSError):  # it is removed, and what cannot be unlinked now stays pending
                reclaim.unlink_files_of(self, id)
        return removed

    def _refuse_delete(self, row: VolumeRow, named: list[SnapshotRow], recursive: bool) -> None:
        above = {snapshot.layer for snapshot in named}
        for snapshot in named:
            above |= descendants(self.catalog, snapshot.layer)
        users = users_of(self.catalog, above, besides=row.id)
        if users:
            raise StateError(
                f"volume {row.name!r} has snapshots that {some_of(users)} need; delete or flatten those first"
            )
        if named and not recursive:
            names = some_of(sorted(snapshot.name for snapshot in named))
            raise StateError(
                f"volume {row.name!r} has snapshots: {names}; ask for a recursive removal to remove them too"
            )

    def rename(self, name: str, new_name: str) -> None:
        """Give a volume another name. Handles that are open keep working.

        Durable on return. Any thread may call it.

        Parameters
        ----------
        name : str
            The volume.
        new_name : str
            At most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        VolumeExistsError
            The new name is taken.
        """
        new_name = check_name("volume", new_name)

        def change() -> None:
            row = self.catalog.volume(name)
            self._refuse_taken(new_name)
            self.catalog.update(VolumeRow, row.id, name=new_name)

        self.change(change)

    def rename_volume(self, id: bytes, new_name: str) -> None:
        """Give the volume with this id another name, whatever it is called now."""
        new_name = check_name("volume", new_name)

        def change() -> None:
            if self.catalog.volume_with_id(id) is None:
                raise VolumeNotFoundError(f"the volume {id.hex()} of {self.path} is gone")
            self._refuse_taken(new_name)
            self.catalog.update(VolumeRow, id, name=new_name)

        self.change(change)

    def relocate(self, name: str, *, base: "AnyPath", trust: bool = False, verify: bool = False) -> None:
        """Say where the base of a volume is now.

        Without `trust` and `verify` the file must have the size and modification time that the base had. All volumes on the
        same base move with it. Durable on return. Volumes that are open go on with the file that they have open.

        Parameters
        ----------
        name : str
            A volume that stands on the base.
        base : path-like
            The file that is the base now, outside of the store.
        trust : bool
            Take the caller's word that it is the same image; its size is compared all the same.
        verify : bool
            Compare its SHA-256 with the one that `create(digest=True)` took.

        Raises
        ------
        ChainError
            The volume has no base, or the file is another image.
        VerifyError
            The file has another SHA-256.
        StateError
            A merge writes the base just now.
        """
        with described_base(Path(base), digest=verify) as new:
            if self.layout.holds(Path(new.path)):
                raise ChainError(f"{new.path} is a file of the store itself: give an image outside of it")
            self.change(lambda: self._relocate(name, new, trust=trust, verify=verify))

    def _relocate(self, name: str, new: BaseRow, *, trust: bool, verify: bool) -> None:
        """Change the rows of a base. Inside a transaction."""
        catalog = self.catalog
        row = catalog.volume(name)
        old = read_chain(catalog, row.head).base
        if old is None:
            raise ChainError(f"volume {name!r} has no base to relocate")
        if is_being_merged_into(Path(old.path)):
            raise StateError(f"a merge writes the base {old.path} just now; wait for it to end, or cancel it")
        refuse_half_merged(catalog, Path(new.path), above=read_chain(catalog, row.head))
        if new.size_bytes != old.size_bytes:
            raise ChainError(
                f"{new.path} has {new.size_bytes} bytes and the base has {old.size_bytes}: it is another image"
            )
        if verify and old.digest is None:
            raise ChainError("no digest of the base was taken when the volume was created, so it cannot be verified")
        if verify and new.digest != old.digest:
            raise VerifyError(f"{new.path} does not have the SHA-256 of the base: it is another image")
        if not (verify or trust) and new.mtime_ns != old.mtime_ns:
            raise ChainError(
                f"{new.path} was modified at another time than the base; say that you trust it if it is the same image"
            )
        for other in catalog.rows(BaseRow, "path = ?", old.path):
            catalog.update(BaseRow, other.id, path=new.path, inode=new.inode, mtime_ns=new.mtime_ns)
        for work in catalog.base_merges():
            catalog.update(PendingRow, work.id, done_bytes=0)  # who knows what was merged into that file

    # ---- looking ----

    def volumes(self) -> list[VolumeInfo]:
        """Return all volumes.

        Returns
        -------
        list of VolumeInfo
            By name, from one state of the store. Nothing is locked or opened.
        """
        return list_volumes(self)

    def info(self, name: str) -> VolumeInfo:
        """Return what one volume is, without opening it.

        Parameters
        ----------
        name : str
            The volume.

        Returns
        -------
        VolumeInfo
            With the process that has it open for writing, if one has.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        """
        return volume_info(self, name)

    def snapshots(self, name: str) -> list[Snapshot]:
        """Return a volume's snapshots without opening it.

        Parameters
        ----------
        name : str
            The volume.

        Returns
        -------
        list of Snapshot
            In the order in which they were taken, whatever the clock did.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        """
        return list_snapshots(self.catalog, self.catalog.volume(name))

    def tree(self) -> list[TreeNode]:
        """Return what stands on what.

        Returns
        -------
        list of TreeNode
            The bases, and the layers that stand on nothing, each with what stands on it as `children`.
        """
        return read_tree(self)

    def usage(self, name: str) -> list[usages.Usage]:
        """Return what each snapshot of a volume holds.

        Parameters
        ----------
        name : str
            The volume. It may be open: its head counts as far as it is durable.

        Returns
        -------
        list of Usage
            One of each snapshot, in bytes, oldest first; the last one, with snapshot None, is the head's.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        FormatError
            A block map is damaged or missing.
        """
        return usages.usage(self, name)

    def diff(self, name: str, a: str, b: str | None = None) -> "Extents":
        """Return where two snapshots, or a snapshot and the head, may differ.

        Parameters
        ----------
        name : str
            The volume.
        a, b : str
            Snapshots, in any order; `b` None means the head as far as it is durable.

        Returns
        -------
        array
            Extents (offset, length, state) in bytes, sorted, apart from each other; `state` is what `b` has there: 0
            HOLE, 1 DATA, 2 ZERO. Data that was written again with the same contents counts as different.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        FormatError
            A block map is damaged or missing.
        """
        return usages.diff(self, name, a, b)

    def layering(self, name: str, snapshot: str | None = None) -> "Layering":
        """Return which layer each part of a snapshot, or of the head as it is durable, comes from.

        `Volume.layering` says what it holds. A volume that is open, here or elsewhere, is not disturbed.

        Parameters
        ----------
        name : str
            The volume.
        snapshot : str, optional
            One of its snapshots; None: the head.

        Returns
        -------
        Layering
            Extents with depths, and the chain that the depths count in.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        FormatError
            A block map is damaged or missing.
        """
        from onionskin.operations.layering import layering_of

        return layering_of(self, name, snapshot)

    def check(self, *, repair: bool = False) -> list[usages.Problem]:
        """Look for damage, in the catalog and in all files that it names; data blocks are not read.

        Parameters
        ----------
        repair : bool
            Remove files that nothing names, and do the work that is pending, first; data is never mended.

        Returns
        -------
        list of Problem
            What was found; each has a severity, "error" where data is at risk and "notice" where work is left. Empty where
            all is well.
        """
        self.finish_work()  # what is under way here is no problem
        if repair:
            self.catalog.refuse_read_only()
            staged_volumes.drop_dead(self)
            reclaim.remove_orphans(self)
            reclaim.do_pending(self)
        return usages.check(self)

    # ---- for the other modules of the package ----

    def open_volumes(self) -> list[Volume]:
        """Return the volumes and views that are open here."""
        with self._open_guard:
            return list(self._open)

    def change(self, change: "Callable[[], Result]") -> "Result":
        """Run a change as one transaction, again with the reserve given up where the disk is full.

        So a change may be run twice; of the first time nothing is in the catalog.
        """

        def once() -> "Result":
            with self.catalog.transaction():
                return change()

        return self.with_reserve(once)

    def path_of_head(self, layer: bytes) -> "DataPath | None":
        """Return the data path of the volume that is open here with this head."""
        for volume in self.open_volumes():
            if volume.writable and volume.head == layer:
                return volume.path
        return None

    def set_head(self, volume: VolumeRow, layer: bytes) -> None:
        """Make a layer a volume's head. Inside a transaction."""
        self.catalog.update(VolumeRow, volume.id, head=layer)

    def scrub(self, segments: Iterable[bytes], wipe: str) -> None:
        """Free the slots of segments that their owners' maps do not name."""
        found = list(segments)
        self.change(lambda: self.add_scrubs(found, wipe))
        self.work_soon()

    def add_scrubs(self, segments: Iterable[bytes], wipe: str) -> None:
        """Note that slots of these segments have to be freed. Inside a transaction."""
        rows = self.catalog.rows_in(SegmentRow, "id", set(segments))
        noted = self.catalog.rows_in(PendingRow, "target", [row.id for row in rows], "kind = 'scrub'")
        # One that is noted already may be done by now, for the map of before, and only not be forgotten yet.
        for work in noted:
            self.catalog.delete(PendingRow, "id = ?", work.id)
        zero = {work.target for work in noted if work.wipe == "zero"}
        zero_layers = {id for id in {row.layer for row in rows} if self.catalog.layer(id).wipe == "zero"}
        for row in rows:
            is_zero = wipe == "zero" or row.id in zero or row.layer in zero_layers
            self.catalog.add_pending("scrub", row.id, row.lock_byte, "zero" if is_zero else wipe)

    def work_soon(self) -> None:
        """Do pending work: policy `zero` before this returns, `release` in the background."""
        if not self.read_only and self.catalog.has(PendingRow, "kind != 'base-merge'"):
            reclaim.do_pending(self, policy="zero")
            self.wake()

    def wake(self) -> None:
        """Let the background look for work."""
        self._background.wake()

    def _work(self) -> None:
        """Do what waits for nobody. What fails stays in the catalog for the next open."""
        with suppress(OSError, OnionskinError):
            if self.catalog.has(PendingRow, "kind != 'base-merge' AND wipe = 'zero'"):
                reclaim.do_pending(self, policy="zero")
            reclaim.do_pending(self, policy="release")
        self.make_reserve()  # where it was given up, and what was freed makes room for it
        for volume in self.open_volumes():
            with suppress(OSError, OnionskinError):  # the next head makes its files itself then
                volume.prepare_if_wanted()

    def finish_work(self) -> None:
        """Wait for the background to be done."""
        self._background.finish()

    def note_unreachable(self, count: int) -> None:
        """Count bytes that a wipe overwrote and did not reach, and say so in the log, the first time."""
        with self._counting:
            first = count and not self.unreachable_bytes
            self.unreachable_bytes += count
        if first:
            _log.warning(
                "%s: a wipe overwrote %s whose old contents may still be on the medium, since the file system writes "
                "elsewhere or other files share the blocks; keep the store on ext4 or XFS, or encrypt the device",
                self.path,
                format_size(count),
            )

    def with_reserve(self, change: "Callable[[], Result]") -> "Result":
        """Run what frees space, or frees it later; where the disk is too full for it, give the reserve up and try again.

        Also where there is no reserve: somebody else may just have given it up.
        """
        try:
            return change()
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
        try:
            with self._room_is_kept():
                self._give_up_reserve()
                return change()
        finally:
            self.make_reserve()

    def _room_is_kept(self) -> "AbstractContextManager[bool]":
        """Keep everybody, in any process, from setting aside again what is given up for this one."""
        return locked_directory(self.layout.root, alone=False)

    def _make_room_for_catalog(self) -> None:
        """Give the reserve up before SQLite makes its index on a disk that is all but full.

        SQLite writes one byte of each page of the index and maps it. Where a block of the file system is smaller than a page
        the others have no block then, and with none left the first access to one of them is SIGBUS: no error could tell.
        It is tried whether there is room then, since a reserve may have had no blocks: where there is none the store is not
        opened.

        Raises
        ------
        OSError
            ENOSPC.
        """
        with suppress(FileNotFoundError, PermissionError):
            found = os.statvfs(self.layout.root)
            is_short = found.f_bavail * found.f_frsize < CATALOG_ROOM_BYTES and not found.f_flag & os.ST_RDONLY
            if is_short:
                self._give_up_reserve()
                self._try_room()

    def _try_room(self) -> None:
        try:
            descriptor = os.open(self.layout.root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, CATALOG_INDEX_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise OSError(error.errno, os.strerror(error.errno), str(self.layout.catalog)) from None

    def _give_up_reserve(self) -> None:
        """Free what is set aside for a full disk, if anything is. While the room is kept."""
        self.layout.reserve.unlink(missing_ok=True)

    def _has_reserve(self) -> bool:
        """Whether room is set aside: a copy of a store that keeps holes, or a kill, leaves a file without blocks."""
        try:
            found = self.layout.reserve.lstat()
        except FileNotFoundError:
            return False
        return found.st_size >= RESERVE_BYTES and found.st_blocks > 0

    def make_reserve(self) -> None:
        """Set space aside; a disk that has none left goes without, and so does one where somebody uses what was given up.

        Who does sets it aside again when he has done.
        """
        if self.read_only or self._has_reserve():
            return
        with suppress(OSError), locked_directory(self.layout.root, alone=True) as is_unused:
            if not is_unused:
                return
            self._give_up_reserve()
            descriptor = make_file(self.layout.reserve)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            except OSError:
                self.layout.reserve.unlink()
            finally:
                os.close(descriptor)

    def forget(self, volume: Volume) -> None:
        """Take a handle that closes off the list."""
        with self._open_guard:
            self._open.discard(volume)

    def close(self) -> None:
        """Close the store, and the volumes that are still open in it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:  # one volume whose flush fails does not keep the others open
            stack.callback(self.catalog.close)
            stack.callback(self.locks.close)
            stack.callback(self._background.end)
            for volume in self.open_volumes():
                stack.callback(volume.close)

    def after_fork(self) -> None:
        """In the child: nothing is done here again."""
        self._closed = True


def _check_geometry(block_size: int, wipe: str) -> tuple[int, str]:
    """Return a block size and a wipe policy as plain values, or refuse them."""
    if isinstance(block_size, bool):
        raise TypeError("a block size is a number of bytes, not a bool")
    block_size = operator.index(block_size)
    if block_size & (block_size - 1) or not 4096 <= block_size <= 2 << 20:
        raise ValueError(f"a block is a power of two from 4096 to 2097152 bytes, not {block_size}")
    if not isinstance(wipe, str) or str(wipe) not in WIPE_POLICIES:
        raise ValueError(f"the wipe policy is 'release' or 'zero', not {wipe!r}")
    return block_size, str(wipe)


def _check_size(size_bytes: int) -> int:
    if size_bytes < 1:
        raise ValueError("a volume has at least one byte; give a size")
    if size_bytes > VOLUME_BYTES_MAX:
        raise ValueError(f"a volume has at most {VOLUME_BYTES_MAX} bytes (64 TiB), not {size_bytes}")
    return size_bytes


def refuse_foreign(layout: Layout) -> None:
    """Refuse the store of another user: its rows name files that would be read and written with this user's rights."""
    try:
        owner = layout.root.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        raise StateError(
            f"the store {layout.root} belongs to user {owner}, and this is user {os.geteuid()}; a store can name any file "
            "as a base, so open it only if you trust that user (--trust on the command line, trust=True in Python)"
        )


def refuse_links(layout: Layout) -> None:
    """Refuse a store one of whose own files or directories is something else: a link leads out of the store."""
    for path in (*(layout.root / name for name in DIRECTORIES), *layout.files):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        wanted = stat.S_ISDIR(mode) if path.name in DIRECTORIES else stat.S_ISREG(mode)
        if not wanted:
            is_link = stat.S_ISLNK(mode)
            what = "a symbolic link" if is_link else "something else"
            kind = "directory" if path.name in DIRECTORIES else "regular file"
            raise (StateError if is_link else FormatError)(
                f"{path} is {what}, where a store has a {kind} of its own; look at what it is, and remove it"
            )


__all__ = ["Store", "TreeNode", "VolumeInfo"]
