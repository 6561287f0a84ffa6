"""A store, the directory that holds volumes: this module opens, makes, clones and removes them.

What must hold: a writer of a volume holds its lock; a handle holds shared locks on all files that it can read before
it trusts the catalog; everything that is freed goes through `reclaim`. Nothing here touches block data.

Each method imports the modules that only it needs, because each verb of the command line opens a store, and few verbs
need more than one of these modules.
"""

import operator
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, timedelta, tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from onionskin.base.held import enter, held, held_together
from onionskin.base.keyed_locks import KeyedLocks
from onionskin.base.lazy import logger
from onionskin.base.limits import HEADER_BYTES, VOLUME_BYTES_MAX, WIPE_POLICIES
from onionskin.base.naming import check_name, named, plain_name, several
from onionskin.base.paths import FilePath
from onionskin.base.sizes import parse_size
from onionskin.catalog import (
    BaseRow,
    Defaults,
    MachineRow,
    VolumeRow,
    WorkRow,
    new_id,
)
from onionskin.catalog.tree import (
    Snapshot,
    find_snapshot,
    list_snapshots,
    unnamed_of,
)
from onionskin.errors import (
    ChainError,
    OnionskinError,
    StateError,
    VerifyError,
    VolumeNotFoundError,
)
from onionskin.storage.base_looks import is_device, looks_in
from onionskin.storage.chain import (
    NewHead,
    check_base,
    described_base,
    read_chain,
    refuse_half_merged,
    refuse_written_next,
    replace_spare,
    unfinished_base_merges,
)
from onionskin.storage.layout import Layout, bytes_in
from onionskin.storage.locks import (
    ReadersLock,
    SharedFile,
    VolumeLock,
    is_being_merged_into,
    is_for_a_moment,
    locked_to_remove,
    volume_holder,
)
from onionskin.storage.open_head import OpenHead, OpenView, Unwritten, is_unwritten
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from pathlib import Path

    import onionskin
    from onionskin.base.annotations import AnyPath, ExtentArray, OpenMode, WipePolicy
    from onionskin.catalog.rows import LayerRow
    from onionskin.operations import forks
    from onionskin.operations.chain_members import ChainLayer
    from onionskin.operations.check import Problem
    from onionskin.operations.fork_usage import ForkUsage
    from onionskin.operations.holds import Hold
    from onionskin.operations.layering import Layering
    from onionskin.operations.lineage import Ancestor
    from onionskin.operations.listing import TreeNode, VolumeInfo
    from onionskin.operations.machine_removal import Removed
    from onionskin.operations.machine_snapshots import MachineCut
    from onionskin.operations.machine_tree import MachineSnapshotInfo, Part
    from onionskin.operations.machine_usage import MachineUsage
    from onionskin.operations.machines import MachineInfo, Which
    from onionskin.operations.prune import Retention, Rules
    from onionskin.operations.seal import RemoteHead
    from onionskin.operations.store_info import StoreInfo
    from onionskin.operations.usage import Usage
    from onionskin.storage.shared_paths import OpenChain
    from onionskin.volume import Volume

_log = logger(__name__)

_CUT_WAIT_SECONDS = 1.0
_MOMENT_SECONDS = 1.0  # that somebody who only looks at a volume or a machine keeps others from it

Lock = TypeVar("Lock", VolumeLock, ReadersLock)


def _finish(head: OpenHead) -> None:
    from onionskin.operations.flush import finish  # imported late, with what it stands on

    finish(head)


def _work_soon(store: OpenStore) -> None:
    from onionskin.operations import reclaim

    reclaim.work_soon(store)


def _work_in_background(store: OpenStore) -> None:
    from onionskin.operations import reclaim

    reclaim.work_in_background(store)


class Store:
    """A directory that holds volumes.

    Parameters
    ----------
    path : path-like
        The directory.
    create : bool
        Whether to make a store if there is none. If this is false, VolumeNotFoundError is raised instead.
    trust : bool
        Whether to open a store that another user owns. The rows of such a store name files that are read and written
        with the rights of the user of this process.
    group : str or int, optional
        A group whose members may use the store that is made: its directories get mode 2770, and its files 0660,
        whatever the umask. With None, only the owner may use it, and the modes are 0700 and 0600. Members other than
        the owner open the store with `trust`. If the store exists already, it must belong to this group.

    Notes
    -----
    A store is a context manager. Any thread may call it, and other processes may have the same store open.
    After a fork, the child has to open the store again.

    A store is a collection of the names of its volumes: ``"web" in store``, ``for name in store``, ``len(store)``. Those
    that go with a machine are no part of it. Its truth value is true as long as it is open, even if it holds no volume.
    There is no ``store["web"]``: opening a volume takes a lock that has to be given back, and such an expression would keep
    the lock until the garbage collector runs. Use `open` in a with statement instead.

    A store is pickled as its path, even when it is closed. Unpickling it, for example in a child process, opens the
    store anew, and the new object has to be closed there. A `Volume` cannot be pickled.
    """

    def __init__(
        self,
        path: "AnyPath",
        *,
        create: bool = True,
        trust: bool = False,
        group: str | int | None = None,
    ) -> None:
        self._trust = trust
        self._opened: OpenStore = OpenStore(path, create=create, trust=trust, group=group, work=_work_in_background)
        self._cutting = KeyedLocks()

    @property
    def path(self) -> "Path":
        """The directory of the store as it was given, a `pathlib.Path`."""
        from pathlib import Path

        return Path(self._opened.path)

    @property
    def read_only(self) -> bool:
        """Whether the store can only be read. In that case every change of it raises OSError.

        A store can only be read if its file system is mounted read-only or is full to the last block, or if this user
        has no right to write to it.
        """
        return self._opened.read_only

    @property
    def unreachable_bytes(self) -> int:
        """The number of bytes that policy `zero` overwrote through this handle, but that may still be on the medium.

        The old contents stay on the medium if the file system does copy-on-write, or if other files share the blocks.
        The first time that this happens, it is logged too.
        """
        return self._opened.unwipeable_bytes

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._opened.closed else "read-only" if self.read_only else "open"
        return f"<Store {self._opened.path} {state}>"

    def __reduce__(self) -> "tuple[Callable[[str, bool], Store], tuple[str, bool]]":
        return _open_again, (str(self._opened.layout.root), self._trust)

    # ---- the names in it ----

    def __bool__(self) -> bool:
        return not self._opened.closed

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._opened.catalog.has_volume(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.catalog.volume_names())

    def __len__(self) -> int:
        return self._opened.catalog.volume_count()

    # ---- volumes ----

    def create(
        self,
        name: str,
        *,
        base: "AnyPath | None" = None,
        size: "int | str | None" = None,
        block_size: int | None = None,
        wipe: "WipePolicy | None" = None,
        digest: bool = False,
        base_format: "Literal['raw'] | None" = None,
    ) -> "Volume":
        """Make a volume and open it for writing.

        The volume is durable on return. So are the store's directories, if this is its first volume. Any thread may
        call it.

        Parameters
        ----------
        name : str
            At most 255 bytes, without '/', '@' and control characters.
        base : path-like, optional
            A raw image that the volume stands on: a file, or a block device. It must not change. A file is never written,
            except by `merge_into_base`, and a device never at all. A file that was written to by others is refused, since
            its time tells. A device is refused if its size changed, or what it holds in its first and its last MiB, at 64
            places between, and where its partitions begin. So a mount for writing, a new file system and a new partition
            table are noticed, and a write elsewhere is not: only `digest` tells, with `open(verify=True)`. Give a path that
            means the same device after a restart (`/dev/vg/lv`, `/dev/disk/by-id/...`), because links to a device are kept.
        size : int or str, optional
            The size, as a number of bytes or as a string such as "20G". It is needed if there is no base. If there is
            one, the size may be larger or smaller than the base.
        block_size : int, optional
            The unit of copy-on-write, in bytes: a power of two from 4096 to 2097152. By default that of the store, which
            is 4096 unless `set_defaults` changed it.
        wipe : {"release", "zero"}, optional
            Whether freed space is overwritten with zeros before it can be used again. By default as the store says, which
            is "release" unless `set_defaults` changed it.
        digest : bool
            Whether to take a SHA-256 of the base, which `open(verify=True)` compares.
        base_format : {"raw"}, optional
            Declare that the bytes of the base are the disk, even if they look like an image of another format.

        Returns
        -------
        Volume
            The volume, open for writing. Its head is empty, so the volume reads as the base, or as zeros.

        Raises
        ------
        VolumeExistsError
            The name is taken.
        ValueError
            A volume cannot have this name, size or block size.
        FormatError
            The base looks like an image of another format than raw, and `base_format` is not given.
        StateError
            The base is a block device that is mounted, or in use otherwise.
        OSError
            The base could not be read, or there is no space (ENOSPC). Then no volume was made.
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
        block_size: int | None,
        wipe: str | None,
        digest: bool,
        *,
        vouched: bool,
    ) -> "Volume":
        from onionskin.operations import properties

        block_size, wipe = _check_geometry(*properties.with_defaults(self._opened, block_size, wipe))
        size_bytes = None if size is None else _check_size(parse_size(size))
        if base is None:
            if size_bytes is None:
                raise ValueError("a volume without a base needs a size, such as '20G'")
            return self._make_volume(name, None, block_size, wipe, size_bytes)
        with self._base(FilePath(base), digest=digest, vouched=vouched) as below:
            if size_bytes is None and not below.size_bytes:
                raise ValueError(f"a volume has at least one byte: the base {base} is empty; give a size")
            return self._make_volume(name, below, block_size, wipe, size_bytes or _check_size(below.size_bytes))

    @contextmanager
    def _base(self, path: FilePath, *, digest: bool, vouched: bool) -> Iterator[BaseRow]:
        """Describe a base, and keep merges out of it. The base must not be a file of the store."""
        from onionskin.operations.export import refuse_own_files

        refuse_own_files(self._opened, path)
        with described_base(path, digest=digest, vouched=vouched) as base:
            refuse_own_files(self._opened, FilePath(base.path))  # the path may have led elsewhere before it was locked
            refuse_half_merged(self._opened.catalog, FilePath(base.path))
            yield base

    def _make_volume(
        self,
        name: str,
        base: BaseRow | None,
        block_size: int,
        wipe: str,
        size_bytes: int,
    ) -> "Volume":
        """Make a volume and open it. Its lock is held before anybody can see the volume. A failure leaves no volume."""
        from onionskin.operations import volumes

        self._opened.catalog.refuse_read_only()
        id = new_id()
        self._opened.reserve.make()
        lock = self._opened.reserve.retry(lambda: VolumeLock(self._opened.layout, id, name))
        try:
            head = NewHead.on(None, base=base, block_size=block_size, wipe=wipe, size_bytes=size_bytes)

            def insert() -> None:
                if base:
                    self._opened.catalog.insert(base)
                volumes.insert(self._opened, id, name, head)

            self._opened.change(insert)
        except BaseException:
            lock.close()
            raise
        return self._open_new(id, lock)

    def _open_new(self, id: bytes, lock: VolumeLock) -> "Volume":
        """Open a volume that was just made. If it cannot be opened, it is removed again, unless somebody has used it."""
        try:
            row = self._opened.catalog.volume_with_id(id)
            assert row is not None
            self._opened.reserve.retry(lock.make_file)
            return self._open_locked(row, lock, verify=False, found=False)
        except BaseException:
            lock.close()  # a handle that was opened has given the lock up already, so others may have the volume by now
            with suppress(OSError, OnionskinError):
                self._take_back(id)
            raise

    def _take_back(self, id: bytes) -> None:
        """Remove a volume that was just made, unless somebody has it open, or wrote to it or snapshotted it."""
        from onionskin.operations import volumes

        store = self._opened
        deadline = time.monotonic() + _MOMENT_SECONDS
        while row := store.catalog.volume_with_id(id):
            with held_together() as stack:
                if not volumes.lock_unless_for_a_moment(stack, store, {id: row.name}, deadline):
                    continue
                row = store.catalog.volume_that_is(id)
                if is_unwritten(store, id, store.catalog.layer(row.head)):
                    store.change(lambda: volumes.remove_volumes(store, [id], recursive=False))
                    volumes.unlink_files(store, [id])
                return

    def open(self, name: str, *, snapshot: str | None = None, verify: bool = False, mode: "OpenMode" = "w") -> "Volume":
        """Open a volume for writing, or a read-only view of one of its snapshots, or of its head.

        Any thread may call it. A process that died may have left data that was not flushed. Every opening of the head
        reads this data. If the head is opened for writing, its first flush makes the data durable.

        Parameters
        ----------
        name : str
            The volume.
        snapshot : str, optional
            Open a view of this snapshot. A snapshot may have any number of views.
        verify : bool
            Compare the SHA-256 of the base with the one that `create(digest=True)` took.
        mode : {"w", "r"}
            "r" opens a head read-only, which nobody may have open for writing. It writes, makes and frees nothing, but for
            what was dropped by other handles of this `Store` and waited for its end.
            Others may read the head too, but nobody can open it for writing meanwhile. With `snapshot`, the mode makes
            no difference.

        Returns
        -------
        Volume
            The open volume. The caller closes it, or the store's `close` does.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        StateError
            Another handle holds the volume. The message names its process id. Or it is the RAM of a machine, which only a
            start of the machine opens for writing.
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
        return self._open_to_write(name, verify)

    def _open_to_write(
        self, name: str, verify: bool = False, *, for_machine: bool = False, is_one_of_many: bool = False
    ) -> "Volume":
        """Open a volume for writing. The RAM of a machine is opened only for that, and is the lock of the machine.

        One of many, as a server opens them, shares the file of its lock with the others of this store.
        """
        from onionskin.operations import ownership

        row, lock = self._lock_volume(name, VolumeLock, self._opened.shared_file if is_one_of_many else None)
        try:
            if not for_machine:
                ownership.refuse_ram(self._opened.catalog, row.id)
            return self._open_locked(row, lock, verify=verify)
        except BaseException:
            lock.close()
            raise

    def _open_to_read(self, name: str, verify: bool) -> "Volume":
        """Open a head to read it, while nobody has it open for writing. This writes to no file."""

        from onionskin.operations import reclaim
        from onionskin.volume import Volume

        row, lock = self._lock_volume(name, ReadersLock)
        try:
            dirty = self._opened.layout.dirty_file(row.id)
            opened = self._opened.open_layer(row.head, writable=False, verify=verify, dirty=dirty)
            view = OpenView(self._opened, row, opened, read_lock=lock, free_waiting=reclaim.work_soon)
        except BaseException:
            lock.close()
            raise
        self._opened.register(view)
        return Volume(view, self)

    def _lock_volume(
        self, name: str, kind: "Callable[[Layout, bytes, str], Lock]", shared: SharedFile | None = None
    ) -> "tuple[VolumeRow, Lock]":
        """Look a volume up by its name, lock it, and return the lock and the volume's row as it is under the lock.

        Until the lock is held, the name may come to mean another volume: somebody may rename the volume, or delete it
        and make another one. Who holds it for a moment is waited for, as `expire` does that looks whether it may be dropped.
        """
        row = self._opened.catalog.volume(name)
        if kind is VolumeLock:
            self._opened.catalog.refuse_read_only()
        deadline = time.monotonic() + _MOMENT_SECONDS
        while True:
            id = row.id
            try:
                lock = self._opened.reserve.retry(lambda: kind(self._opened.layout, id, name))  # noqa: B023
            except StateError:
                if time.monotonic() > deadline or not is_for_a_moment(self._opened.layout, [id]):
                    raise
                time.sleep(0.01)
                row = self._opened.catalog.volume(name)
                continue
            try:
                row = self._opened.catalog.volume(name)
                if row.id == id:
                    if isinstance(lock, VolumeLock):
                        self._opened.catalog.refuse_moved()  # the lock was opened by its name
                        if not self._opened.layout.volume_lock(id).exists():
                            self._opened.catalog.sync_found()  # a crash must not undo the row and leave the file
                        self._opened.reserve.retry(partial(lock.make_file, shared))
                    return row, lock
            except BaseException:
                lock.close()
                raise
            lock.close()

    def _open_locked(self, row: VolumeRow, lock: VolumeLock, *, verify: bool, found: bool = True) -> "Volume":
        """Open the volume that is locked. After an error, the caller still has to close the lock.

        `found` is false for a volume that this handle has just made. The commit that made it has synced the catalog's
        log already, and with it all that was read from the log.
        """

        from onionskin.volume import Volume

        if found:
            self._opened.catalog.sync_found()
        head = None if verify else self._open_unwritten(row, lock)
        if head is None:
            opened = self._open_head(row, verify)
            head = OpenHead(self._opened, row, opened, volume_lock=lock, finish=_finish, free_waiting=_work_soon)
        self._opened.register(head)
        try:
            self._after_open(head)
        except BaseException:
            head.close()
            raise
        return Volume(head, self)

    def _open_unwritten(self, row: VolumeRow, lock: VolumeLock) -> OpenHead | None:
        """Open a fork that nothing was written to: it is read through the view of what it stands on, which is shared.

        Its own data path is opened when something is written (`OpenHead.begin_writing`). None: it is opened at once, as is
        a volume that stands on a snapshot of its own, since no other head is read through that view, and one for which an
        opening has something to do: to fold a layer below it, or to free blocks, also those that were written and lost; or
        to refuse a base that has changed since another one opened the view.
        """
        store = self._opened
        version = store.catalog.version()
        head = store.catalog.layer(row.head)
        below = head.parent
        if below is None or not is_unwritten(store, row.id, head) or store.catalog.staged_volumes():
            return None
        files = [store.layout.segment_path(segment.id) for segment in store.catalog.segments_of_layer(head.id)]
        if any(bytes_in(file) for file in files):
            return None  # a machine that went down left data there that no map names
        if not self._is_read_through(below, row.id):
            return None
        try:
            opened = store.views.take(below, lambda: store.open_layer(below))
        except (OSError, OnionskinError):
            return None  # whatever it is, the opening of the head meets it again, or it has gone
        use = [below]  # which the handle ends too, as soon as there is one
        try:
            # The rows were read before the view's files were locked, so they are compared again now.
            as_read = store.catalog.version() == version or store.catalog.layer(head.id) == head
            top = opened.chain.top
            as_read = as_read and (opened.users == 1 or self._is_on_its_base(opened))
            if as_read and (top.size_bytes, top.block_size) == (head.size_bytes, head.block_size):
                return self._unwritten_head(row, head, opened, lock, use)
        except BaseException:
            store.views.end(use)
            raise
        store.views.end(use)
        return None

    def _is_read_through(self, below: bytes, *volumes: bytes) -> bool:
        """Whether heads of these volumes on a sealed layer are read through its view, as that layer is now."""
        catalog = self._opened.catalog
        snapshot = catalog.snapshot_of_layer(below)
        return not (snapshot and snapshot.volume in volumes) and not any(
            layer.wipe == "zero" or catalog.only_child_of(layer.id) for layer in catalog.unnamed_in_chain(below)
        )

    def _unwritten_head(
        self, row: VolumeRow, head: "LayerRow", opened: "OpenChain", lock: VolumeLock, use: list[bytes]
    ) -> OpenHead:
        """Make the handle of a head that nothing was written to, from the view that it is read through.

        The handle ends that use of the view; it may have done so where this raises.
        """
        assert head.parent is not None
        how = Unwritten(head, head.parent, use, self._open_for_first_write, self._after_first_write)
        return OpenHead(
            self._opened, row, opened, volume_lock=lock, finish=_finish, free_waiting=_work_soon, unwritten=how
        )

    def _is_on_its_base(self, opened: "OpenChain") -> bool:
        """Whether the base of a view that was open already is the file that it should be, if the view has one."""
        if opened.chain.base is None:
            return True
        try:
            check_base(self._opened.catalog, opened.chain.base)
        except (OSError, OnionskinError):
            return False
        return True

    def _open_for_first_write(self, head: OpenHead) -> "OpenChain":
        self._opened.catalog.sync_found()
        row = self._opened.catalog.volume_with_id(head.row.id)
        if row is None or row.head != head.head:  # its lock kept all others from it
            raise StateError(f"the head of {head.row.name!r} was replaced under its lock; close it, and open it again")
        return self._open_head(row, verify=False)

    def _after_first_write(self, head: OpenHead) -> None:
        try:
            self._after_open(head)
        except (OSError, OnionskinError) as error:
            _log.warning("%r: work that was left over failed, and is left for the next opening: %s", head, error)

    def _open_head(self, row: VolumeRow, verify: bool) -> "OpenChain":
        from onionskin.operations import compact_segments

        if unfinished_base_merges(self._opened.catalog, row.head):
            _log.warning(
                "%s: a merge of %r into its base was begun and has not ended; the volume works, and its base does not by "
                "itself: end it with 'onionskin merge --into-base'",
                self.path,
                row.name,
            )
        self._opened.catalog.refuse_other_id(row)
        self._look_at_spare(row.head)
        dirty = self._opened.layout.dirty_file(row.id)
        for left in self._opened.layout.staged_dirty_files(row.id):
            with suppress(FileNotFoundError):
                os.unlink(left)  # noqa: PTH108 - a Path of each takes longer than unlinking it
        was_left = bytes_in(dirty) > 0
        compact_segments.compact_chain(self._opened, row.head, may_hold_unflushed=was_left)
        opened = self._opened.open_layer(row.head, writable=True, verify=verify, dirty=dirty)
        if was_left:
            opened.path.drop_stale()
        return opened

    def _look_at_spare(self, head: bytes) -> None:
        """Tidy the files that were made for the next head.

        If a snapshot failed at its commit, the head has two segments: the spare segment has blocks then, and the head's
        map names it. Otherwise the files were at most made beforehand. They are empty then, and are made again when
        they are needed.
        """

        from onionskin.operations import reclaim

        spare = self._opened.catalog.spare_of(head)
        refuse_written_next(self._opened.layout, spare.id)
        path = self._opened.layout.segment_file(spare.id)
        if bytes_in(path) > HEADER_BYTES:
            self._opened.change(lambda: replace_spare(self._opened.catalog, head))
            return
        for made in (path, self._opened.layout.map_file(spare.id)):
            descriptor = reclaim.open_to_free(made)
            if descriptor is not None:
                os.close(descriptor)
                made.unlink()

    def _open_view(self, name: str, snapshot: str, verify: bool) -> "Volume":
        """Open a view of a snapshot. If one is open already, share its data path, and only check the base again.

        The name is looked up again once the files are locked, because it may mean another snapshot by then.
        """

        from onionskin.operations import reclaim
        from onionskin.volume import Volume

        store = self._opened
        while True:
            row, layer = self._find_layer(name, snapshot)
            try:
                opened = store.views.take(layer, lambda: store.open_layer(layer, verify=verify))  # noqa: B023
            except OnionskinError:
                if self._find_layer(name, snapshot)[1] == layer:
                    raise
                continue
            use = [layer]
            try:
                if self._find_layer(name, snapshot)[1] != layer:
                    store.views.end(use)
                    continue
                if opened.chain.base and opened.users > 1:
                    check_base(self._opened.catalog, opened.chain.base, verify=verify)
                view = OpenView(store, row, opened, snapshot=snapshot, free_waiting=reclaim.work_soon)
            except BaseException:
                store.views.end(use)
                raise
            self._opened.register(view)
            return Volume(view, self)

    def _find_layer(self, name: str, snapshot: str) -> tuple[VolumeRow, bytes]:
        with self._opened.catalog.reading():
            row = self._opened.catalog.volume(name)
            return row, find_snapshot(self._opened.catalog, row, snapshot).layer

    def _after_open(self, head: OpenHead) -> None:
        """Do work that was left over: by a crash, because a reader was in the way, or for a layer that lost its name.

        Work that fails is left for the next time. It is no reason to refuse the volume.
        """
        from onionskin.operations import reclaim

        self._opened.reserve.make()
        with suppress(OSError, OnionskinError):
            if self._opened.catalog.staged_volumes():
                from onionskin.operations import staged_volumes

                staged_volumes.drop_dead(self._opened)
        if head.is_unwritten:  # the rest is for what it has of its own, and was found not to be needed below it
            with suppress(OSError, OnionskinError):
                reclaim.work_soon(self._opened)
            return
        if unnamed_of(self._opened.catalog, head.row.id):  # those that the head stands on are among them
            from onionskin.operations.fold import fold_unnamed_below

            with head.guard:  # other threads find the handle already
                if not head.closed:
                    fold_unnamed_below(head)
        with suppress(OSError, OnionskinError):
            if segments := self._segments_to_look_at(head):
                reclaim.reclaim_slots(self._opened, segments, head.wipe)
        with suppress(OSError, OnionskinError):
            reclaim.work_soon(self._opened)

    def _segments_to_look_at(self, head: OpenHead) -> list[bytes]:
        """Return the segments that a head has taken over, without those that seem to be another layer's."""
        rows = self._opened.catalog.sealed_segments_of(head.head)
        if not rows:
            return []
        unused = set(head.path.unused_segments())
        doubtful = [row for row in rows if row.id in unused]
        found = [row.id for row in rows if row.id not in unused]
        if doubtful:
            from onionskin.operations.segment_owners import without_others

            found += without_others(self._opened, doubtful)
        return found

    def snapshot_group(self, names: "Mapping[str, str | None]", note: str = "") -> dict[str, Snapshot]:
        """Take snapshots of several volumes at one instant: all or none. Durable on return.

        Of writes that follow each other, each begun after the one before was answered, no snapshot has a later one where
        another lacks an earlier one, whichever volumes they went to. Other threads may read and write meanwhile.

        Parameters
        ----------
        names : mapping of str to str or None
            What the snapshot of each volume is called; None: by the time, as `Volume.snapshot` does. A volume that is open
            in this store is cut as it is there, one that `onionskin serve` holds by its server, whichever servers those
            are; one that nobody holds is opened for this, and closed again.
        note : str
            Kept with each; at most 64 KiB.

        Returns
        -------
        dict of str to Snapshot
            What was taken, by volume.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of one of the names.
        SnapshotExistsError
            One of the snapshots' names is taken.
        StateError
            A process that serves nothing, or another handle of this one, holds one of the volumes: the error names it. Or a
            server does not answer in time: no snapshot was taken, all volumes go on.
        OSError
            ENOSPC: no snapshot was taken, all volumes go on.

        Examples
        --------
        >>> store.snapshot_group({"web": "before", "db": "before"})  # doctest: +SKIP
        """
        from onionskin.operations import group_snapshot

        return group_snapshot.take(
            self._opened, names, note, self._open_to_cut, self._find_served, self._snapshot_served
        )

    def _snapshot_served(
        self, rows: Mapping[str, VolumeRow], names: "Mapping[str, str | None]", note: str
    ) -> dict[str, Snapshot] | None:
        """Have the one server that holds these volumes take their snapshots; None if none serves them all."""
        import onionskin

        self._opened.catalog.refuse_read_only()
        return onionskin.snapshot_group_served(self, rows, names, note)

    def _open_to_cut(self, name: str) -> OpenHead:
        return self.open(name)._opened.to_write()

    def _find_served(self, holders: Mapping[str, int], stack: ExitStack) -> "Mapping[str, RemoteHead]":
        """Find the servers that hold volumes of a group."""
        import onionskin

        return onionskin.find_served_heads(self, holders, stack)

    def clone(self, name: str, snapshot: str, new_name: str | None = None, *, wipe: "WipePolicy | None" = None) -> None:
        """Make a volume whose head is an empty child of a snapshot: the fork of one. It has no snapshots of its own yet.

        Nothing is copied. The clone is durable on return. The origin may be open, here or elsewhere. Any thread may
        call it. ``clone("web@clean", "new")`` is ``clone("web", "clean", "new")``.

        Parameters
        ----------
        name : str
            The volume that has the snapshot; or both, as ``"volume@snapshot"``.
        snapshot : str
            The snapshot that the clone reads as at first. Left out if the first argument names it.
        new_name : str
            The clone's name: at most 255 bytes, without '/', '@' and control characters.
        wipe : {"release", "zero"}, optional
            The clone's policy. By default it is that of the origin. Data that the clone shares with an origin of policy
            `zero` keeps policy `zero`.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        VolumeExistsError
            The new name is taken.
        """
        from onionskin.operations import forks

        if new_name is None:
            name, at, behind = plain_name(name).partition("@")
            if not at:
                raise TypeError("a clone needs a snapshot and a new name: clone('web@clean', 'new')")
            snapshot, new_name = behind, snapshot
        forks.fork_snapshot(
            self._opened, forks.check_wanted(name, snapshot, [new_name], None, None, None, None, None, wipe)
        )

    def fork(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        names: "Sequence[str] | None" = None,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> list[str]:
        """Make volumes that begin as a snapshot, or as a disk is now. All of them are there on return, durably, or none is.

        Nothing is copied, and no file is made for a fork before it is opened. The source may be open. A disk as it is now has
        all that was written before the call; it is cut without a name, and what only the cut keeps goes with the last
        fork. Any thread may call it.

        Parameters
        ----------
        source : str
            ``"web@clean"``: a snapshot. ``"web"``: the disk as it is now. It may be open in this store, served by
            `onionskin serve`, or open nowhere.
        snapshot : str, optional
            The snapshot, where `source` is only the volume.
        names : sequence of str, optional
            What the forks are called.
        count : int, optional
            How many are made, with names by `pattern`; by default 1. At most 10,000.
        pattern : str, optional
            What their names look like, by default ``"{source}-{n}"``: ``{n}``, or ``{n:03}``, stands for numbers that go on
            from the greatest that any volume's name of that look has, from 1; ``{source}`` for the volume's name.
        idempotency_key : str, optional
            The same call again under this key, within a day, makes nothing and returns the same names, also after a crash,
            and also of forks that were dropped or renamed since.
        lifetime : str, int, float or datetime.timedelta, optional
            After this time `expire`, or a server of the store, may drop them: ``"90s"``, ``"15m"``, ``"2h"``, ``"7d"``,
            ``"2w"``, or seconds.
        labels : mapping of str to str, optional
            Labels of each fork, by which `volumes` finds them.
        wipe : {"release", "zero"}, optional
            The policy of the forks; by default that of the source.

        Returns
        -------
        list of str
            The names, in the order of `names` or of the numbers.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        VolumeExistsError
            A name is taken.
        StateError
            The disk as it is now was asked for, and another handle, which serves nothing, holds the volume; or the key was
            used for another call.
        ValueError
            The arguments do not say which forks to make.
        """
        from onionskin.operations import forks

        return self._fork(
            forks.check_wanted(source, snapshot, names, count, pattern, idempotency_key, lifetime, labels, wipe)
        )

    def fork_group(
        self,
        sources: "Mapping[str, str | None]",
        *,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> dict[str, list[str]]:
        """Make forks of several disks, such as those of one machine, with one number for those that belong together.

        All of them are there on return, durably, or none is. Disks as they are now are cut at one instant, as by
        `snapshot_group`. Any thread may call it.

        Parameters
        ----------
        sources : mapping of str to str or None
            The snapshot of each volume that its forks begin as; None: the disk as it is now. It may be open in this store,
            served by `onionskin serve`, or open nowhere. ``{"web@clean": None}`` is ``{"web": "clean"}``.
        count : int, optional
            How many are made of each disk; by default 1. At most 10,000 of all together.
        pattern, idempotency_key, lifetime, labels, wipe
            As for `fork`. The pattern needs ``{source}``, and the numbers go on from the greatest that a volume's name of
            any of these looks has.

        Returns
        -------
        dict of str to list of str
            The names by the keys of `sources`, in the order of the numbers: the first of each belong together.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        VolumeExistsError
            A name is taken.
        StateError
            As for `fork` and `snapshot_group`.
        ValueError
            The arguments do not say which forks to make.

        Examples
        --------
        >>> store.fork_group({"web": "clean", "db": "clean"}, count=2)  # doctest: +SKIP
        {'web': ['web-1', 'web-2'], 'db': ['db-1', 'db-2']}
        """
        from onionskin.operations import fork_group

        wanted = fork_group.check_group(sources, count, pattern, idempotency_key, lifetime, labels, wipe)
        self._opened.catalog.refuse_read_only()
        return fork_group.fork_group(self._opened, wanted, self._open_to_cut, self._find_served)

    def _fork(self, wanted: "forks.Wanted") -> list[str]:
        from onionskin.operations import forks

        if wanted.snapshot is not None:
            return forks.fork_snapshot(self._opened, wanted)
        self._opened.catalog.refuse_read_only()
        made = forks.made_before(self._opened, wanted)
        return self._fork_head(wanted) if made is None else made

    def _fork_head(self, wanted: "forks.Wanted") -> list[str]:
        """Fork a disk as it is now: in the handle that it has here, by its server, or in a handle that is opened for it."""
        from onionskin.operations import forks

        while True:
            handle = self._open_here(wanted.volume)
            if handle is None and (names := self._fork_served(wanted)) is not None:
                return names
            if handle is None:
                id = self._opened.catalog.volume(wanted.volume).id
                with self._cutting.holding(id):  # so that threads do not find the volume held by each other
                    handle = self._open_here(wanted.volume)
                    if handle is None:
                        return self._fork_closed(wanted)
            try:
                return forks.fork_head(handle, wanted)
            except StateError:
                if not handle.closed:
                    raise

    def _fork_served(self, wanted: "forks.Wanted") -> list[str] | None:
        """Have the server of a volume fork it as it is now; None if none holds it."""
        id = self._opened.catalog.volume(wanted.volume).id
        if volume_holder(self._opened.layout.volume_lock(id)) is None:
            return None  # the usual case, which costs no more
        import onionskin

        return onionskin.fork_served(self, wanted)

    def _open_here(self, name: str) -> OpenHead | None:
        """Return the handle by which a volume is open for writing in this store."""
        id = self._opened.catalog.volume(name).id
        for handle in self._opened.open_handles():
            if isinstance(handle, OpenHead) and handle.row.id == id and not handle.closed:
                return handle
        return None

    def _fork_closed(self, wanted: "forks.Wanted") -> list[str]:
        """Fork the disk of a volume that is not open here. One that was not written to since its last cut is not opened."""
        from onionskin.operations import forks

        locked = self._lock_to_cut(wanted)
        if not isinstance(locked, tuple):
            return locked
        row, lock = locked
        try:
            names = forks.fork_unwritten(self._opened, row, wanted)
            if names is None:
                with self._open_locked(row, lock, verify=False) as volume:
                    names = forks.fork_head(volume._opened.to_write(), wanted)
            return names
        finally:
            lock.close()

    def _lock_to_cut(self, wanted: "forks.Wanted") -> "tuple[VolumeRow, VolumeLock] | list[str]":
        """Lock a volume whose head is to be cut, or have it forked by a server that has opened it meanwhile.

        Another fork holds it for a moment only, and so does a server that does not listen yet: so it is asked for again.
        """
        deadline = time.monotonic() + _CUT_WAIT_SECONDS
        while True:
            try:
                return self._lock_volume(wanted.volume, VolumeLock)
            except StateError as error:
                if (names := self._fork_served(wanted)) is not None:
                    return names
                if time.monotonic() > deadline:
                    raise StateError(
                        f"{error}; what is held is forked as it is now by its holder alone, and this one serves nothing: "
                        f"fork it there, or fork one of its snapshots, as {wanted.volume}@SNAPSHOT"
                    ) from None
            time.sleep(0.01)

    @held
    def temporary(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        name: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> "Iterator[Volume]":
        """Fork a snapshot, or a disk as it is now, for a with block: the fork is open in it, and dropped behind it.

        What was written to it goes, with the snapshots that were taken of it. Where it was deleted in the block, it is
        gone; where it was renamed, it is dropped all the same. Any thread may call it.

        Parameters
        ----------
        source, snapshot
            As for `fork`.
        name : str, optional
            What the fork is called; by default ``"{source}-tmp-{n}"``.
        lifetime : str, int, float or datetime.timedelta, optional
            After this time `expire` may drop it where a crash kept it from being dropped.
        wipe : {"release", "zero"}, optional
            As for `fork`.

        Yields
        ------
        Volume
            Open for writing.

        Raises
        ------
        StateError
            At the end: a clone stands on a snapshot of it, or somebody holds one.
        """
        from dataclasses import replace

        from onionskin.operations import forks

        names = None if name is None else [name]
        pattern = "{source}-tmp-{n}" if name is None else None
        wanted = forks.check_wanted(source, snapshot, names, None, pattern, None, lifetime, None, wipe)
        id = new_id()  # by which it is found, since others may give its name to another volume
        process, volume = os.getpid(), None
        try:
            self._fork(replace(wanted, ids=(id,)))
            volume = self._open_by_id(id)
            yield volume
        finally:
            try:
                self._end_temporary(process, id, volume)
            except BaseException as error:
                if not isinstance(error, Exception):  # an interrupt, behind which the fork would stay
                    self._end_temporary(process, id, volume)
                raise

    def _end_temporary(self, process: int, id: bytes, volume: "Volume | None") -> None:
        """Close a temporary fork and drop it, in the process that made it: a child of os.fork() drops nothing of that."""
        from onionskin.operations import forks, reclaim, volumes

        if volume is not None:
            with suppress(OSError, OnionskinError):  # what it could not make durable goes anyway
                volume.close()
        if os.getpid() != process:
            return
        stood_on = volumes.delete_by_id(self._opened, id)
        reclaim.work_soon(self._opened)
        forks.fold_what_stays(self._opened, stood_on)

    def _open_by_id(self, id: bytes) -> "Volume":
        """Open a volume for writing, whatever it is called by then. Who holds it for a moment is waited for."""
        deadline = time.monotonic() + _CUT_WAIT_SECONDS
        while True:
            row = self._opened.catalog.volume_that_is(id)
            try:
                volume = self.open(row.name)
            except OnionskinError as error:
                if self._opened.catalog.volume_that_is(id).name != row.name:
                    continue  # it was renamed meanwhile, and the name is free, or another volume's
                if not isinstance(error, StateError) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            if volume._opened.row.id == id:
                return volume
            volume.close()

    def delete(self, *names: str, recursive: bool = False) -> int:
        """Remove volumes and their snapshots: all of those that are named, in one transaction, or none.

        The names are gone on return, durably, and with policy `zero` what only they used is overwritten. Files that
        another handle still reads are freed when that closes. Any thread may call it.

        Parameters
        ----------
        *names : str
            The volumes.
        recursive : bool
            Remove their snapshots too, where they have any.

        Returns
        -------
        int
            The bytes on the disk of the data that goes. With policy `release` some of it may still be going.

        Raises
        ------
        VolumeNotFoundError
            There is none of a name.
        StateError
            One is open, it has snapshots and `recursive` is not given, clones that stay stand on them, or somebody holds
            one (some are listed).
        """
        if not names:
            raise TypeError("delete needs the name of a volume")
        return self._delete(names, recursive=recursive)

    def _delete(self, names: Sequence[str], *, recursive: bool, agreed: Mapping[str, bytes] | None = None) -> int:
        """Remove volumes; with `agreed`, only while their names mean the volumes with these ids."""
        from onionskin.operations import forks, reclaim, volumes

        freed, stood_on = volumes.delete(self._opened, names, recursive=recursive, agreed=agreed)
        try:
            forks.fold_what_stays(self._opened, stood_on)  # before the background has work, for which it would wait
        finally:
            reclaim.work_soon(self._opened)
        return freed

    def expire(self, *, dry_run: bool = False) -> list[str]:
        """Drop the volumes and the machines whose lifetime is over, as `fork` and `fork_machine` gave it.

        One stays that is open or runs, that has a snapshot, or from which a clone or a fork was made that is there still;
        it goes with a later call. A server of the whole store does the same every few seconds, and nothing else does: no
        opening drops a volume. The clock is the one that tells the date. Any thread may call it.

        Parameters
        ----------
        dry_run : bool
            Change nothing, and return what would be dropped by one call. What stands on that goes with the next one.

        Returns
        -------
        list of str
            The names of those that were dropped, sorted. Where many go, each transaction takes some of them.
        """
        from onionskin.operations import expiry

        if dry_run:
            return sorted([*self._expired_machines(), *expiry.would_expire(self._opened)])
        self._opened.catalog.refuse_read_only()
        return sorted([*self._expire_machines(), *expiry.expire(self._opened)])

    def _expired_machines(self) -> list[str]:
        """Return the machines that `expire` would drop."""
        if not self._opened.catalog.has_machines():
            return []
        from onionskin.operations import machine_removal

        return machine_removal.would_expire(self._opened)

    def _expire_machines(self) -> list[str]:
        if not self._opened.catalog.has_machines():  # the usual case; then that code is not even imported
            return []
        from onionskin.operations import machine_removal

        if (self._opened.layout.root / "machines").is_dir():
            import onionskin

            onionskin.end_expired(self)
        names, removed = machine_removal.expire(self._opened, self._refuse_processes)
        for one in removed:
            self._clean_up_after(one)
        return names

    def lineage(self, name: str) -> "list[Ancestor]":
        """Return what a volume was cloned or forked from, and what that was, up to the first.

        Parameters
        ----------
        name : str
            The volume.

        Returns
        -------
        list of Ancestor
            The nearest first; empty for a volume that was made or imported. One that was dropped is in it.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        """
        from onionskin.operations import lineage as lineages

        return lineages.lineage(self._opened, name)

    def forks_of(self, source: str, snapshot: str | None = None) -> list[str]:
        """Return the names of the volumes that were cloned or forked from a snapshot, or from any state of a volume.

        Parameters
        ----------
        source : str
            ``"web@clean"``, or ``"web"``: from any of its snapshots, or from its disk.
        snapshot : str, optional
            The snapshot, where `source` is only the volume.

        Returns
        -------
        list of str
            The names as they are now, sorted. Those that are gone are left out, and so are forks of forks.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        """
        from onionskin.operations import forks
        from onionskin.operations import lineage as lineages

        return lineages.forks_of(self._opened, *forks.split_source(source, snapshot))

    def rename(self, name: str, new_name: str) -> None:
        """Give a volume another name. Handles that are open keep working.

        The new name is durable on return. Any thread may call it.

        Parameters
        ----------
        name : str
            The volume.
        new_name : str
            At most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of that name.
        VolumeExistsError
            The new name is taken.
        """

        from onionskin.operations import volumes

        volumes.rename(self._opened, name, new_name)

    def set_wipe(self, name: str, wipe: "WipePolicy") -> None:
        """Change what happens to the space that a volume frees.

        Durable on return. From "release" to "zero", that holds for all that the volume and its snapshots hold, and for slots
        in their files that wait to be freed; a whole file that waits by then, and what was given back before, is not
        overwritten any more. From "zero" to "release", it holds for
        what is freed of the disk itself; what snapshots hold by then stays "zero". Clones keep their own policies.

        Parameters
        ----------
        name : str
            A volume that is not open, here or elsewhere.
        wipe : {"release", "zero"}
            Whether freed space is overwritten with zeros before it can be used again.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        StateError
            The volume is held by another handle; its process id is named.
        ValueError
            It is no policy.
        """

        from onionskin.operations import properties

        _, wipe_policy = _check_geometry(4096, wipe)
        row, lock = self._lock_volume(name, VolumeLock)
        try:
            properties.set_wipe(self._opened, row, wipe_policy)
        finally:
            lock.close()

    def set_lifetime(self, name: str, lifetime: "str | float | timedelta | None") -> None:
        """Have a volume expire a time from now, whatever it had before, or never.

        Durable on return. From then on `expire`, and a server of the whole store, may drop it. Any thread may call it. The
        volume may be open, here or elsewhere.

        Parameters
        ----------
        name : str
            The volume. One that belongs to a machine goes with it, and is refused.
        lifetime : str, float, datetime.timedelta or None
            Such as "2h", or seconds, from now on. None: it stays.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        StateError
            It belongs to a machine.
        ValueError
            It is no time, or ends later than a store can note, in the year 2262.
        """
        from onionskin.base.durations import parse_duration
        from onionskin.operations import properties

        properties.set_lifetime(self._opened, name, None if lifetime is None else parse_duration(lifetime))

    def set_labels(self, name: str, labels: "Mapping[str, str | None]") -> dict[str, str]:
        """Put labels on a volume, and take labels from it.

        Durable on return. Any thread may call it. The volume may be open, here or elsewhere.

        Parameters
        ----------
        name : str
            The volume. One that belongs to a machine is refused.
        labels : mapping of str to str or None
            New values of labels. None takes one away, if it is there. Those that are not named stay.

        Returns
        -------
        dict of str to str
            All labels that the volume has then.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        StateError
            It belongs to a machine.
        ValueError
            It cannot be a label, or there would be too many.
        """
        from onionskin.operations import properties

        return properties.set_labels(self._opened, name, labels)

    def defaults(self) -> Defaults:
        """Return what a volume is made with for which nothing else is said.

        Returns
        -------
        Defaults
            Its wipe policy and its block size.
        """
        return self._opened.catalog.defaults()

    def set_defaults(self, *, wipe: "WipePolicy | None" = None, block_size: int | None = None) -> Defaults:
        """Change what volumes are made with from now on if nothing else is said, by `create` or by an import.

        Durable on return. The volumes that exist keep what they have, and clones and forks have the policy and the block
        size of what they come from. Any thread may call it.

        Parameters
        ----------
        wipe : {"release", "zero"}, optional
            Whether freed space is overwritten with zeros before it can be used again. With None, this stays as it is.
        block_size : int, optional
            The unit of copy-on-write, in bytes: a power of two from 4096 to 2097152. With None, this stays as it is.

        Returns
        -------
        Defaults
            All of them, as they are now.

        Raises
        ------
        ValueError
            It is no policy, or no block size.
        """
        from onionskin.operations import properties

        checked_size, checked_wipe = _check_geometry(
            4096 if block_size is None else block_size, "release" if wipe is None else wipe
        )
        return properties.set_defaults(
            self._opened, None if wipe is None else checked_wipe, None if block_size is None else checked_size
        )

    def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        """Give a snapshot another name. Open views, clones and holds of the snapshot stay as they are.

        The new name is durable on return. Any thread may call it. The volume may be open, here or elsewhere.

        Parameters
        ----------
        volume : str
            The volume that has the snapshot.
        old : str
            The current name of the snapshot.
        new : str
            The new name: at most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        SnapshotExistsError
            The new name is taken.
        """

        from onionskin.operations import snapshot_names

        snapshot_names.rename(self._opened, volume, old, new)

    def set_note(self, volume: str, snapshot: str, note: str) -> None:
        """Replace the note of a snapshot.

        The new note is durable on return. Any thread may call it. The volume may be open, here or elsewhere.

        Parameters
        ----------
        volume, snapshot : str
            The volume, and the snapshot whose note changes.
        note : str
            The new note, of at most 64 KiB. An empty string takes the note away.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        """

        from onionskin.operations import snapshot_names

        snapshot_names.set_note(self._opened, volume, snapshot, note)

    def hold(
        self,
        volume: str,
        snapshot: "str | Sequence[str]",
        holder: str,
        *,
        guid: "str | Sequence[str] | None" = None,
    ) -> None:
        """Hold a snapshot, so that neither it nor its volume can be removed.

        The snapshot cannot be discarded, merged or deleted before every holder has let it go. The name, the note and
        the data that was written after the snapshot may still change. The hold is durable on return. Any thread may
        call it. The volume may be open, here or elsewhere.

        Parameters
        ----------
        volume : str
            The volume.
        snapshot : str or sequence of str
            The snapshot to hold, or several of them. Then all are held in one transaction, or none is.
        holder : str
            A name for the user of the snapshot, which the error of a refused operation shows. It has at most 255 bytes,
            without '/', '@' and control characters.
        guid : str or sequence of str, optional
            The GUID that each of these snapshots must have, so that one that took a name meanwhile is not taken for it.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        StateError
            This holder holds the snapshot already. Or a snapshot has another GUID.
        ValueError
            The sequence is empty.
        """

        from onionskin.operations import holds

        holds.hold(self._opened, volume, several("snapshot", snapshot), holder, guid)

    def unhold(
        self,
        volume: str,
        snapshot: "str | Sequence[str]",
        holder: str,
        *,
        guid: "str | Sequence[str] | None" = None,
    ) -> None:
        """End a hold on a snapshot that `hold` began. This is durable on return. Any thread may call it.

        Parameters
        ----------
        volume : str
            The volume.
        snapshot : str or sequence of str
            The snapshot that is held, or several of them. Then all are let go in one transaction, or none is.
        holder : str
            The name that was given to `hold`.
        guid : str or sequence of str, optional
            The GUID that each of these snapshots must have, so that one that took a name meanwhile is not taken for it.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        StateError
            This holder does not hold the snapshot. The message names the holders. Or a snapshot has another GUID.
        ValueError
            The sequence is empty.
        """

        from onionskin.operations import holds

        holds.unhold(self._opened, volume, several("snapshot", snapshot), holder, guid)

    def holds(self, volume: str | None = None, snapshot: str | None = None) -> "list[Hold]":
        """Return the holds on a snapshot, on all snapshots of a volume, or on all of the store.

        Parameters
        ----------
        volume : str, optional
            The volume. With None, the holds on the snapshots of all volumes are returned.
        snapshot : str, optional
            One of its snapshots. With None, the holds on all of them are returned.

        Returns
        -------
        list of Hold
            The holds, by the name of the volume, in the order in which the snapshots were taken; those of one snapshot are
            in the order in which they began.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        """

        from onionskin.operations import holds

        if volume is None:
            if snapshot is not None:
                raise ValueError(f"{snapshot!r} is a snapshot of some volume, which is not named")
            return holds.holds_of_store(self._opened)
        return holds.holds(self._opened, volume, snapshot)

    def relocate(self, name: str, *, base: "AnyPath", trust: bool = False, verify: bool = False) -> None:
        """Record the path at which the base of a volume is now.

        Without `trust` and `verify`, a file must have the size and modification time that the base had, and a block device
        the size, and the bytes at the places that `create` names. The change applies to all volumes on the same base, and
        is durable on return. Volumes that are open keep using the file that they have open.

        Parameters
        ----------
        name : str
            A volume that stands on the base.
        base : path-like
            The file, or the block device, that is the base now. It must lie outside the store.
        trust : bool
            Trust the caller that it is the same image. The size is compared all the same.
        verify : bool
            Compare the file's SHA-256 with the one that `create(digest=True)` took.

        Raises
        ------
        ChainError
            The volume has no base, or the file is another image.
        VerifyError
            The file has another SHA-256.
        StateError
            A merge is writing the base, or one was begun and has not ended: that changes the size, the time and the
            contents of the base, so the caller has to say `trust` that it is the file that was moved, and no block device
            takes its place. Or `base` is a block device that is mounted, or in use otherwise.
        """
        from onionskin.operations.export import refuse_own_files

        refuse_own_files(self._opened, FilePath(base))
        with described_base(FilePath(base), digest=verify) as new:
            refuse_own_files(self._opened, FilePath(new.path))  # the path may have led elsewhere before it was locked
            self._opened.change(lambda: self._relocate(name, new, trust=trust, verify=verify))

    def _relocate(self, name: str, new: BaseRow, *, trust: bool, verify: bool) -> None:
        """Change the rows of a base. Inside a transaction."""
        catalog = self._opened.catalog
        row = catalog.volume(name)
        old = read_chain(catalog, row.head).base
        if old is None:
            raise ChainError(f"volume {name!r} has no base to relocate")
        if is_being_merged_into(FilePath(old.path)):
            raise StateError(f"a merge writes the base {old.path} just now; wait for it to end, or cancel it")
        refuse_half_merged(catalog, FilePath(new.path), above=read_chain(catalog, row.head))
        begun = unfinished_base_merges(catalog, row.head)
        if begun and is_device(new):
            raise StateError(
                f"a merge into the base {old.path} was begun and has not ended, and it goes on only in a file, which "
                f"{new.path} is not: end it there with 'onionskin merge --into-base'"
            )
        sizes = {old.size_bytes, *(catalog.layer(target).size_bytes for target in begun)}
        if new.size_bytes not in sizes:
            raise ChainError(
                f"{new.path} has {new.size_bytes} bytes and the base has {old.size_bytes}: it is another image; name "
                "the one that was moved"
            )
        if verify and old.digest is None:
            raise ChainError(
                f"no digest of the base {old.path} was taken when the volume was created, so {new.path} cannot be verified; "
                "compare it yourself, and say that you trust it if it is the same image"
            )
        is_other = new.digest != old.digest if verify else new.mtime_ns != old.mtime_ns and not trust
        if is_other:
            _refuse_other_image(old, new, half_merged=bool(begun), verify=verify)
        for other in catalog.bases_at(old.path):
            if looks_in(other) != looks_in(old):  # of another image that had this path at another time
                continue
            catalog.update(BaseRow, other.id, path=new.path, inode=new.inode, mtime_ns=new.mtime_ns)
        for work in catalog.base_merges():
            catalog.update(WorkRow, work.id, done_bytes=0)  # nothing says what was merged into the file at the new path

    def prune(
        self,
        volume: str,
        *,
        keep_last: int = 0,
        keep_hourly: int = 0,
        keep_daily: int = 0,
        keep_weekly: int = 0,
        keep_monthly: int = 0,
        keep_yearly: int = 0,
        keep_within: timedelta | None = None,
        zone: tzinfo = UTC,
        dry_run: bool = False,
    ) -> "list[Retention]":
        """Drop the names of a volume's snapshots that no rule keeps. The rules are those of restic.

        A snapshot is kept if at least one rule keeps it, or if it is held. `Volume.merge` drops each of the other
        names: the head, the clones and the snapshots that are kept read as before, and only data that none of them
        needs is freed. All are dropped in one transaction, or none is.

        Parameters
        ----------
        volume : str
            The volume. It may be open in this store. If it is not, it is opened for the time of the call.
        keep_last : int
            Keep this many of the newest snapshots. For this and the following rules, -1 means all, and 0 means no rule.
        keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly : int
            Of the last hours (days, weeks of ISO 8601, ...) that have snapshots, take this many, and keep the newest
            snapshot of each. If there are fewer of them, keep the oldest snapshot too.
        keep_within : datetime.timedelta, optional
            Keep all snapshots that are older than the newest one by at most this time. If the newest one has a time to
            come, because the clock was wrong, keep all that are older than now by at most this time.
            Where clocks are set back in between, by `zone`, what was taken at that time of day is kept too.
        zone : datetime.tzinfo
            The time zone that defines where an hour and a day end, such as ``zoneinfo.ZoneInfo("Europe/Berlin")``.
        dry_run : bool
            Drop nothing, and only return what would be dropped.

        Returns
        -------
        list of Retention
            One for each snapshot, in the order in which they were taken. Those that nothing keeps are dropped.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of that name.
        ValueError
            No rule is given, or a rule is not valid.
        StateError
            Another process holds the volume, or a snapshot was renamed meanwhile. No name was dropped.
        """

        from onionskin.operations import prune
        from onionskin.operations.prune import Rules

        rules = Rules(
            last=keep_last,
            hourly=keep_hourly,
            daily=keep_daily,
            weekly=keep_weekly,
            monthly=keep_monthly,
            yearly=keep_yearly,
            within=keep_within,
            zone=zone,
        )
        rules.check()
        found = [one for _, one in prune.planned(self._opened, lambda: self._opened.catalog.volume(volume), rules)]
        if dry_run or all(one.kept_by for one in found):
            return found
        handle = self._open_here(volume)
        if handle is not None:
            return self._prune(handle, rules)
        with self.open(volume) as opened:
            return self._prune(opened._opened.to_write(), rules)

    def _prune(self, head: OpenHead, rules: "Rules") -> "list[Retention]":
        from onionskin.operations import prune
        from onionskin.operations.snapshots import merge

        return prune.prune(
            self._opened,
            head.row,
            rules,
            lambda going: merge(head, [one.name for one in going], guids=[one.guid for one in going]),
        )

    # ---- machines ----

    def create_machine(
        self,
        name: str,
        *,
        disks: Sequence[str] = (),
        memory: "int | str",
        wipe: "WipePolicy | None" = None,
        **configuration: Any,
    ) -> "onionskin.Machine":
        """Make a machine of volumes. It has RAM of its own, which its snapshots keep, and is off.

        The volumes stay what they are, except that the machine alone puts them back, and that they are deleted and renamed
        only when it is gone. Durable on return.

        Parameters
        ----------
        name : str
            At most 251 bytes, without '/', '@' and control characters. Machines have names of their own, beside volumes.
        disks : sequence of str
            The volumes, in the order of the disks; at most 16. None of them is a disk of another machine.
        memory : int or str
            How much RAM it has, as a number of bytes or as a string such as "512M".
        wipe : {"release", "zero"}, optional
            The policy of its RAM. By default "zero" if a disk has it, else as the store says.
        **configuration
            What else it is made of: see `onionskin.MachineConfiguration`. Among them are `cpus`, `kernel`, `initrd`,
            `append`, and `qemu_args`, a sequence of further arguments.

        Returns
        -------
        Machine

        Raises
        ------
        MachineExistsError
            The name is taken.
        VolumeNotFoundError
            A disk is missing.
        VolumeExistsError
            A volume has the name that its RAM would have.
        StateError
            A disk belongs to another machine; or an argument of `qemu_args` would undo a snapshot.
        ValueError
            A machine cannot be so.
        """
        return self._machine_of(self._make_machine(name, disks, memory, wipe, configuration))

    def _make_machine(
        self,
        name: str,
        disks: Sequence[str],
        memory: "int | str",
        wipe: "WipePolicy | None",
        configuration: dict[str, Any],
    ) -> MachineRow:
        """Make a machine. The command line asks for no more, as a `Machine` takes long to import."""
        import onionskin
        from onionskin.operations import machines

        if "qemu_args" in configuration:
            configuration["qemu_args"] = tuple(configuration["qemu_args"])
        for file in ("kernel", "initrd"):
            if configuration.get(file) is not None:
                configuration[file] = str(FilePath(configuration[file]).absolute())
        wanted = onionskin.MachineConfiguration(memory_bytes=parse_size(memory), **configuration)
        onionskin.refuse_arguments(wanted)
        if wipe is not None:
            _check_geometry(4096, wipe)
        self._opened.catalog.refuse_read_only()
        return machines.create(
            self._opened,
            name,
            disks,
            configuration=wanted.to_json(),
            memory_bytes=wanted.memory_bytes,
            wipe=wipe,
        )

    def open_machine(self, name: str) -> "onionskin.Machine":
        """Return a machine, whether it runs or is off.

        Parameters
        ----------
        name : str
            The machine.

        Returns
        -------
        Machine

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        """
        from onionskin.operations import machines

        return self._machine_of(machines.find(self._opened.catalog, named("machine", name)))

    def machines(self, *, labels: "Mapping[str, str] | None" = None) -> "list[MachineInfo]":
        """Return all machines, or those that have some labels.

        Parameters
        ----------
        labels : mapping of str to str, optional
            Only machines that have all of these labels, with these values.

        Returns
        -------
        list of MachineInfo
            Sorted by name, from one state of the store. Nothing is locked or opened, and no machine is asked.
        """
        from onionskin.operations import machines

        return machines.list_machines(self._opened, labels or {})

    def machine_info(self, name: str) -> "MachineInfo":
        """Return what the store knows of one machine.

        Parameters
        ----------
        name : str
            The machine.

        Returns
        -------
        MachineInfo
            Nobody is asked, nothing is locked or opened.

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        """
        from onionskin.operations import machines

        return machines.machine_info(self._opened, named("machine", name))

    def machine_snapshots(self, name: str) -> "list[MachineSnapshotInfo]":
        """Return the snapshots of a machine, in the order in which they were taken.

        Parameters
        ----------
        name : str
            The machine.

        Returns
        -------
        list of MachineSnapshotInfo
            The oldest first.

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        """
        from onionskin.operations import machine_tree

        return machine_tree.list_snapshots(self._opened, named("machine", name))

    def machine_usage(self, name: str) -> "list[MachineUsage]":
        """Return what each snapshot of a machine holds, of its disks and of its RAM.

        Parameters
        ----------
        name : str
            The machine. It may run; only what is durable counts.

        Returns
        -------
        list of MachineUsage
            One entry for each snapshot, oldest first. The last one, whose snapshot is None, is what came after.

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        """
        from onionskin.operations import machine_usage

        return machine_usage.usage(self._opened, named("machine", name))

    def machine_lineage(self, name: str) -> "list[Ancestor]":
        """Return what a machine was forked from, and what that was, up to the first.

        Parameters
        ----------
        name : str
            The machine.

        Returns
        -------
        list of Ancestor
            The nearest first, by the names of the machines. One that was deleted is in it.

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        """
        from dataclasses import replace

        from onionskin.operations import lineage, machines

        about = machines.machine_info(self._opened, named("machine", name))
        found = lineage.lineage(self._opened, about.ram)
        return [replace(one, name=one.name.removesuffix(machines.RAM_SUFFIX)) for one in found]

    def fork_machine(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        names: "Sequence[str] | None" = None,
        count: int | None = None,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        labels: "Mapping[str, str] | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> list[str]:
        """Make machines that begin as a snapshot of a machine. All of them are there on return, durably, or none is.

        Nothing is copied, and none is started: the first start of each goes on from the RAM of the snapshot. Their disks and
        their RAM go with them.

        Parameters
        ----------
        source, snapshot
            ``"lab@ready"``, or the machine and its snapshot.
        names, count, pattern, idempotency_key, lifetime, labels, wipe
            As for `fork`, of machines instead of volumes. From its end of life on, `expire` drops a machine that is off.

        Returns
        -------
        list of str
            The names of the machines, in the order of `names` or of the numbers.

        Raises
        ------
        MachineNotFoundError, SnapshotNotFoundError
            There is none of that name.
        MachineExistsError, VolumeExistsError
            A name is taken, of a machine or of a volume that it would have.
        StateError
            The key was used for another call.
        ValueError
            The arguments do not say which machines to make.
        """
        from onionskin.operations import forks, machine_forks

        wanted = forks.check_wanted(source, snapshot, names, count, pattern, idempotency_key, lifetime, labels, wipe)
        return list(machine_forks.fork_machine(self._opened, wanted))

    def delete_machines(self, *names: str, recursive: bool = False) -> int:
        """Remove machines that are off, with their RAM and the disks of those that are forks: all of them, or none.

        Other disks stay as they are. Durable on return.

        Parameters
        ----------
        *names : str
            The machines.
        recursive : bool
            Remove their snapshots too, where they have any.

        Returns
        -------
        int
            The bytes on the disk of the data that goes.

        Raises
        ------
        MachineNotFoundError
            There is none of a name.
        StateError
            One runs, it has snapshots and `recursive` is not given, other machines were forked from it, or somebody holds
            a snapshot of a disk.
        """
        if not names:
            raise TypeError("delete_machines needs the name of a machine")
        return self._delete_machines([named("machine", name) for name in names], recursive=recursive)

    def rename_machine(self, name: str, new_name: str) -> None:
        """Give a machine that is off another name, and the volumes that go with it too. Durable on return.

        Parameters
        ----------
        name : str
            The machine.
        new_name : str
            At most 251 bytes, without '/', '@' and control characters.

        Raises
        ------
        MachineNotFoundError
            There is none of that name.
        MachineExistsError, VolumeExistsError
            The new name is taken, or that of one of its volumes.
        StateError
            It runs.
        """
        from onionskin.operations import machines

        machines.rename(self._opened, named("machine", name), new_name)

    def _machine_of(self, row: MachineRow) -> "onionskin.Machine":
        """Return a machine that was found, whatever it is called by now."""
        import onionskin

        return onionskin.Machine(self, row.name, row.id)

    def _delete_machines(
        self, names: "Sequence[Which]", *, recursive: bool, agreed: "Mapping[Which, bytes] | None" = None
    ) -> int:
        from onionskin.operations import machine_removal

        removed = machine_removal.delete(
            self._opened, names, self._refuse_processes, recursive=recursive, agreed=agreed
        )
        self._clean_up_after(removed)
        return removed.bytes_freed

    def _clean_up_after(self, removed: "Removed") -> None:
        """Fold what machines that are gone leave in the volumes that stay, and drop what they leave beside them."""
        from onionskin.operations import forks, reclaim

        try:
            forks.fold_what_stays(self._opened, removed.stood_on)
            self._tidy(removed.volumes)
            self._drop_leftovers(removed.machines)
        finally:
            reclaim.work_soon(self._opened)

    def _refuse_processes(self, gone: Sequence[MachineRow]) -> None:
        """Raise StateError where processes of machines are there that are to go."""
        if (self._opened.layout.root / "machines").is_dir():
            import onionskin

            onionskin.refuse_processes(self, gone)

    def _drop_leftovers(self, gone: Sequence[bytes] = ()) -> None:
        """Drop files that nobody needs without snapshots that were dropped, or without these machines."""
        root = self._opened.layout.root
        if (root / "ram").is_dir() or (root / "machines").is_dir():  # a store whose machines never ran has neither
            import onionskin

            onionskin.drop_leftovers(self, gone)

    # What a machine is called may mean another one by the time at which it is held: it is found once, and its id is used.

    def _snapshot_machine_off(self, which: "Which", snapshot: str | None, note: str = "") -> "MachineSnapshotInfo":
        """Take a snapshot of a machine that is off: of its disks and its configuration."""
        from onionskin.operations import machine_snapshots, machine_tree, machines

        machine = machines.find(self._opened.catalog, which)
        with machines.kept_off(self._opened, machine), self._cut_machine(machine.id) as cut:
            machine_snapshots.refuse_resuming(cut.machine)
            cut.check(snapshot)
            cut.seal()
            row = cut.commit(snapshot, note, mode="off", configuration=cut.machine.configuration)
        return machine_tree.snapshot_info(self._opened, machine.id, row.name)

    def _revert_machine(self, which: "Which", snapshot: str) -> None:
        """Put a machine that is off back to a snapshot, from whose RAM the next start goes on, if it has any."""
        from onionskin.operations import machine_tree, machines

        catalog = self._opened.catalog
        machine = machines.find(catalog, which)
        with self._open_ram(machine), held_together() as stack:
            machines.find_snapshot(catalog, machine, snapshot)
            for disk in machines.disks_of(catalog, machine).values():
                self._hold_to_put_back(disk, stack)  # so that what is in the way is found before anything is noted
            machine_tree.revert(self._opened, machine.id, snapshot, self._put_back, ram=True)

    def _hold_to_put_back(self, volume: str, stack: ExitStack) -> None:
        """Hold a disk that is to be put back, unless it is open here; one that is served has to be one that may change.

        Raises
        ------
        StateError
            Somebody else has it, or its server does not allow that it changes.
        """
        import onionskin

        if self._open_here(volume) is None and not onionskin.agrees_to_revert(self, volume):
            enter(stack, partial(self._open_to_write, volume, for_machine=True))

    def _put_machine_back_to_beginning(self, which: "Which") -> None:
        """Put a fork that is off back to the snapshot that it was made from, from whose RAM the next start goes on."""
        from onionskin.operations import machine_tree, machines

        catalog = self._opened.catalog
        machine = machines.find(catalog, which)
        with machines.kept_off(self._opened, machine):
            disks = machines.disks_of(catalog, machine)
            machine_tree.beginning_of_fork(catalog, machine)
            for disk in disks.values():  # what a process that died left unflushed belongs to the head that goes
                self._open_to_write(disk, for_machine=True).close()
            with locked_to_remove(self._opened.layout, disks):
                machine_tree.put_back_to_beginning(self._opened, machine.id, held=disks)
        self._tidy(list(disks.values()))
        self._drop_leftovers()

    def _forget_ram_of_machine(self, which: "Which") -> None:
        """Have the next start of a machine that is off boot from its disks. A revert that did not end is ended first."""
        from onionskin.operations import machines

        begins = machines.beginning(self._opened, which)
        if begins.is_reverting and begins.snapshot is not None:
            self._revert_machine(begins.machine.id, begins.snapshot.name)
        with machines.kept_off(self._opened, begins.machine):
            machines.forget_ram(self._opened, begins.machine.id)

    def _open_ram(self, machine: MachineRow) -> "Volume":
        """Open the RAM volume of a machine for writing, which keeps others from starting it."""
        held = self._hold_ram(machine)
        try:
            return held.open()
        except BaseException:
            held.close()
            raise

    def _hold_ram(self, machine: MachineRow) -> "HeldRam":
        """Keep others from starting a machine, by the lock of its RAM volume. To open the volume takes longer."""
        from onionskin.operations import machines

        deadline = time.monotonic() + _MOMENT_SECONDS
        while True:
            ram = self._opened.catalog.volume_with_id(machine.ram)
            if ram is None:
                raise VolumeNotFoundError(f"machine {machine.name!r} of {self.path} was deleted meanwhile")
            if machines.is_running(self._opened, machine):  # of two starts at once this is the other one
                raise StateError(machines.said_to_run(self._opened, machine))
            try:
                row, lock = self._lock_volume(ram.name, VolumeLock)
                if row.id == machine.ram:
                    return HeldRam(self, row, lock)
                lock.close()  # it was renamed meanwhile, and the name is another machine's
            except (StateError, VolumeNotFoundError):
                if machines.is_running(self._opened, machine):
                    raise StateError(machines.said_to_run(self._opened, machine)) from None
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)  # who looks for what a killed supervisor left holds it for a moment

    def _put_back(self, volume: str, snapshot: str, guid: str, machine: MachineRow) -> None:
        """Put a volume of a machine back to a snapshot, whoever holds it."""
        import onionskin
        from onionskin.operations import snapshots

        handle = self._open_here(volume)
        if handle is not None:
            snapshots.revert(handle, snapshot, guid=guid, for_machine=machine.id)
        elif not onionskin.revert_served(self, volume, snapshot, guid, machine.name):
            with self._open_to_write(volume, for_machine=True) as opened:
                snapshots.revert(opened._opened.to_write(), snapshot, guid=guid, for_machine=machine.id)

    def _put_back_together(self, parts: "Sequence[Part]", machine: MachineRow, snapshot: bytes) -> bool:
        """Put the disks of a machine back in one transaction, and note it there; False if no one process has them all."""
        import onionskin
        from onionskin.operations import machines, snapshots

        heads = {part: self._open_here(part.volume) for part in parts}
        if any(heads.values()):
            targets = [snapshots.Target(head, part.snapshot, part.guid) for part, head in heads.items() if head]
            if len(targets) < len(parts):
                return False
            catalog = self._opened.catalog
            snapshots.revert_together(
                targets,
                for_machine=machine.id,
                then=lambda: machines.write_reverting(catalog, machine.id, snapshot),
            )
            return True
        disks = {part.id: (part.snapshot, part.guid) for part in parts}
        return onionskin.revert_machine_served(self, parts[0].volume, disks, machine.id, snapshot)

    def _merge_machine_snapshots(
        self, which: "Which", snapshots: "str | Sequence[str]", ids: Collection[bytes] | None = None
    ) -> list[str]:
        """Drop snapshots of a machine, whether it runs or not, and keep all data. Returns their names."""
        from onionskin.operations import machine_tree

        dropped = machine_tree.merge(self._opened, which, several("snapshot", snapshots), ids)
        self._tidy(dropped.volumes)
        self._drop_leftovers()
        return dropped.snapshots

    def _discard_machine_snapshots(
        self, which: "Which", snapshots: "str | Sequence[str]", *, recursive: bool = False
    ) -> list[str]:
        """Drop snapshots of a machine and what was written after them. Returns their names.

        One that is off and stands on them reads as the lowest of them again; one that runs on them is refused.
        """
        from onionskin.operations import machine_tree, machines

        names = several("snapshot", snapshots)
        catalog = self._opened.catalog
        machine = machines.find(catalog, which)
        if machines.is_running(self._opened, machine):
            dropped = machine_tree.discard(self._opened, machine.id, names, recursive=recursive, held=None)
        else:
            changes = machine_tree.stands_on_any(self._opened, machine.id, names, recursive=recursive)
            disks = machines.disks_of(catalog, machine) if changes else {}
            with machines.kept_off(self._opened, machine), locked_to_remove(self._opened.layout, disks):
                dropped = machine_tree.discard(self._opened, machine.id, names, recursive=recursive, held=disks)
        self._tidy(dropped.volumes)
        self._drop_leftovers()
        return dropped.snapshots

    def _tidy(self, volumes: Sequence[str]) -> None:
        """Fold layers that lost their names, in volumes whoever holds them. What fails is left to their next opening."""
        import onionskin
        from onionskin.operations import reclaim
        from onionskin.operations.fold import fold_unnamed_below

        for name in volumes:
            try:
                handle = self._open_here(name)
                if handle is not None:
                    with handle.operation():
                        fold_unnamed_below(handle)
                elif not onionskin.tidy_served(self, name):
                    self._open_to_write(name, for_machine=True).close()
            except (OSError, OnionskinError) as error:
                _log.info("%s: layers of volume %r are left to its next opening: %s", self.path, name, error)
        reclaim.work_soon(self._opened)

    def _cut_machine(self, which: "Which") -> "AbstractContextManager[MachineCut]":
        """Begin a snapshot of a machine: see `machine_snapshots.cut_machine`."""
        from onionskin.operations import machine_snapshots

        return machine_snapshots.cut_machine(self._opened, which, self._open_to_cut, self._find_served)

    # ---- looking ----

    def volumes(
        self, *, labels: "Mapping[str, str] | None" = None, space: bool = True, owned: bool = False
    ) -> "list[VolumeInfo]":
        """Return all volumes, or those that have some labels.

        Parameters
        ----------
        labels : mapping of str to str, optional
            Only volumes that have all of these labels, with these values.
        space : bool
            Find out what each takes on the disk. That looks at the files of the store, and takes two seconds where a
            hundred thousand volumes have some; without it `used_bytes` and `written_bytes` are None.
        owned : bool
            Also those that go with a machine: its RAM, and the disks of a machine that is a fork.

        Returns
        -------
        list of VolumeInfo
            The volumes, sorted by name, from one state of the store. Nothing is locked or opened.
        """

        from onionskin.operations.listing import list_volumes

        return list_volumes(self._opened, labels or {}, space=space, owned=owned)

    def info(self, name: str) -> "VolumeInfo":
        """Return information about one volume, without opening it.

        Parameters
        ----------
        name : str
            The volume.

        Returns
        -------
        VolumeInfo
            The description of the volume. It includes the process that has the volume open for writing, if there is
            one.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of that name.
        """

        from onionskin.operations.listing import volume_info

        return volume_info(self._opened, name)

    def store_info(self) -> "StoreInfo":
        """Return what the store is as a whole: how much is in it, and what of that can be given back.

        Returns
        -------
        StoreInfo
            Found from the sizes of files and the rows of the catalog. Nothing is locked for long, opened or changed.
        """

        from onionskin.operations.store_info import store_info

        return store_info(self._opened)

    def chain(self, name: str, snapshot: str | None = None) -> "list[ChainLayer]":
        """Return what a volume, or a snapshot of it, stands on, with what each layer holds.

        Parameters
        ----------
        name : str
            The volume.
        snapshot : str, optional
            One of its snapshots; None: the head.

        Returns
        -------
        list of ChainLayer
            The head, or the layer of the snapshot, first; the base last, if there is one.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        """

        from onionskin.operations.chain_members import chain_of

        return chain_of(self._opened, name, snapshot)

    def snapshots(self, name: str) -> list[Snapshot]:
        """Return a volume's snapshots without opening it.

        Parameters
        ----------
        name : str
            The volume.

        Returns
        -------
        list of Snapshot
            The snapshots in the order in which they were taken, even if the clock was set back.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of that name.
        """
        return list_snapshots(self._opened.catalog, self._opened.catalog.volume(name))

    def tree(self) -> "list[TreeNode]":
        """Return the tree of all bases and layers.

        Returns
        -------
        list of TreeNode
            The bases, and the layers that stand on nothing. The `children` of a node are the layers that stand on it.
        """

        from onionskin.operations.listing import read_tree

        return read_tree(self._opened)

    def usage(self, name: str) -> "list[Usage]":
        """Return what each snapshot of a volume holds.

        Parameters
        ----------
        name : str
            The volume. It may be open; only the durable part of its head counts.

        Returns
        -------
        list of Usage
            One entry for each snapshot, in bytes, oldest first. The last entry, whose snapshot is None, is the head's.

        Raises
        ------
        VolumeNotFoundError
            There is no volume of that name.
        FormatError
            A block map is damaged or missing.
        """

        from onionskin.operations import usage as usages

        return usages.usage(self._opened, name)

    def usage_of_forks(self, source: str, snapshot: str | None = None) -> "list[ForkUsage]":
        """Return what each fork of a snapshot, or of any state of a volume, holds alone, and what all of them hold.

        Parameters
        ----------
        source : str
            ``"web@clean"``, or ``"web"``: of any of its snapshots, or of its disk. Forks that are open in this store, or that
            'onionskin serve' holds, are flushed first; of what others hold, only what is durable counts.
        snapshot : str, optional
            The snapshot, where `source` is only the volume.

        Returns
        -------
        list of ForkUsage
            One entry for each name that `forks_of` returns, in that order. The last entry, whose fork is None, is for all
            of them together. What several layers on one without a name hide of it is not counted.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        FormatError
            A block map is damaged or missing.
        """
        from onionskin.operations import fork_usage, forks

        volume, snapshot = forks.split_source(source, snapshot)
        if not self.read_only:
            self._flush_wherever_they_are(self.forks_of(volume, snapshot))
        return fork_usage.usage_of_forks(self._opened, volume, snapshot)

    def _flush_wherever_they_are(self, names: "Sequence[str]") -> None:
        """Make durable what was written to those volumes that are open here, or served."""
        import onionskin
        from onionskin.operations.flush import flush

        handles = {handle.row.id: handle for handle in self._opened.open_handles() if isinstance(handle, OpenHead)}
        for row in self._opened.catalog.volumes_named(names):
            handle = handles.get(row.id)
            if handle is not None:
                try:
                    flush(handle)
                except StateError:
                    if not (handle.closed or handle.reading_path.poisoned):
                        raise
            elif handle is None and volume_holder(self._opened.layout.volume_lock(row.id)) is not None:
                with suppress(VolumeNotFoundError):  # it is gone meanwhile
                    onionskin.flush_served(self, row.name)

    def bytes_freed_by_merge(self, volume: str, snapshots: "str | Sequence[str]") -> int | None:
        """Return how much data comes back if the names of snapshots are dropped together, as `Volume.merge` does.

        That is what nothing reads then. The volume may be open: its head counts as far as it is durable. What only clones
        hide that stand on one layer together is not counted.

        Parameters
        ----------
        volume : str
        snapshots : str or sequence of str
            Of that volume.

        Returns
        -------
        int or None
            In bytes; None where a block map is damaged, so that nobody knows.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        StateError
            Somebody holds one of them.
        ValueError
            The sequence is empty.
        """

        from onionskin.operations import losses

        return losses.of_merge(self._opened, volume, several("snapshot", snapshots)).bytes_freed

    def diff(self, name: str, a: str | None = None, b: str | None = None) -> "ExtentArray":
        """Return where two states of disks may differ. A state is a snapshot or a head, and they may be of two volumes.

        ``diff("web", "a", "b")`` compares two snapshots of a volume, and ``diff("web", "a")`` compares a snapshot with
        the head. ``diff("golden@clean", "test-1@done")`` compares snapshots of two volumes, ``diff("golden@clean",
        "test-1")`` compares a snapshot with the head of another volume, and ``diff("golden@clean")`` compares it with
        the head of its own volume.

        Parameters
        ----------
        name : str
            The volume, or the first state as ``"volume@snapshot"``.
        a, b : str, optional
            If `name` is a volume, these are the two snapshots, in any order. Each is the name of a snapshot of that
            volume, or any snapshot as ``"volume@snapshot"``. If `b` is None, the second state is the durable head.
            If `name` is the first state, `a` is the second state and `b` is not given. If `a` is None, the second
            state is the head of the volume of the first state.

        Returns
        -------
        array
            Extents (offset, length, state) in bytes, sorted and separate. The `state` says what the second disk has
            there: 0 HOLE, 1 DATA, 2 ZERO. Data that was written again with the same contents counts as different,
            because only maps are read. Two states may share neither a layer nor a base, for example after a flatten.
            They then differ wherever either of them or its base may hold data. If the second disk is longer than the
            first, it differs behind the end of the first wherever something was written.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        FormatError
            A block map is damaged or missing.
        ValueError
            The arguments do not name two states.
        """
        from onionskin.operations import differences

        return differences.diff(self._opened, name, a, b).array()

    def layering(self, name: str, snapshot: str | None = None) -> "Layering":
        """Return which layer each part of a snapshot, or of the durable part of the head, comes from.

        `Volume.layering` describes the result. A volume that is open, here or elsewhere, is not disturbed.

        Parameters
        ----------
        name : str
            The volume.
        snapshot : str, optional
            One of its snapshots. With None, the layering is that of the head.

        Returns
        -------
        Layering
            The extents with their depths, and the chain that the depths refer to.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is no volume or snapshot of that name.
        FormatError
            A block map is damaged or missing.
        """
        from onionskin.operations.layering import layer_table

        return layer_table(self._opened, name, snapshot).layering()

    def check(self, *, repair: bool = False) -> "list[Problem]":
        """Look for damage in the catalog and in all files that it names. Data blocks are not read.

        Parameters
        ----------
        repair : bool
            First remove the files that nothing names, and do the pending work. Damaged data is never repaired.

        Returns
        -------
        list of Problem
            The problems that were found. Each has a severity: "error" if data is at risk, and "notice" if work is left.
            The list is empty if all is well.

        Raises
        ------
        OSError
            A directory or the catalog cannot be read, or with `repair`, the store can only be read.
        """

        from onionskin.operations import check, reclaim, staged_volumes

        self._opened.finish_work()  # work that is under way in this process is no problem
        if repair:
            self._opened.catalog.refuse_read_only()
            staged_volumes.drop_dead(self._opened)
            reclaim.remove_orphans(self._opened)
            reclaim.do_work(self._opened)
        return check.check(self._opened)

    def finish_work(self) -> None:
        """Wait until the work that this `Store` does in its background has been done.

        Dropped data is freed or wiped there after the call that dropped it returned. What cannot be freed yet, because
        a view or another process still reads it, stays for later: `Store.check` lists it. Any thread may call this.
        """
        self._opened.finish_work()

    def close(self) -> None:
        """Close the store, and the volumes that are still open in it. Further calls do nothing.

        What was written to the volumes is durable on return. Any thread may call it: it waits for calls under way.

        Raises
        ------
        OSError
            What was written to one of the volumes could not be made durable. All are closed all the same.
        """
        self._opened.close()


class HeldRam:
    """The RAM volume of a machine that is locked, so that nobody else can start the machine until `close`."""

    def __init__(self, store: Store, row: VolumeRow, lock: VolumeLock) -> None:
        self._store, self._row, self._lock = store, row, lock
        self._volume: Volume | None = None

    def open(self) -> "Volume":
        """Open it for writing, if that was not done yet."""
        if self._volume is None:
            self._volume = self._store._open_locked(self._row, self._lock, verify=False)
        return self._volume

    def close(self) -> None:
        """Close the volume, if it was opened, and let others have it. Further calls do nothing."""
        (self._volume or self._lock).close()


def _open_again(path: str, trust: bool) -> Store:
    """Open the store that was pickled. It must still exist."""
    return Store(path, create=False, trust=trust)


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


__all__ = ["Store"]


def _refuse_other_image(old: BaseRow, new: BaseRow, *, half_merged: bool, verify: bool) -> None:
    if half_merged:
        raise StateError(
            f"a merge into the base {old.path} was begun and has not ended, so what it was before does not tell whether "
            f"{new.path} is the same file: say that you trust it if it is the one that was moved"
        )
    if verify:
        raise VerifyError(
            f"{new.path} does not have the SHA-256 of the base: it is another image; name the one that was moved"
        )
    if is_device(old) and is_device(new):
        raise ChainError(
            f"{new.path} holds other bytes than the base {old.path} did: it is another disk, or was written to; say that you "
            "trust it if it is the same image"
        )
    if is_device(old) or is_device(new):
        raise ChainError(
            f"one of {old.path} and {new.path} is a block device and the other a file, so only their bytes tell whether they "
            "are the same image: verify its digest, or compare them yourself, and say that you trust it"
        )
    raise ChainError(
        f"{new.path} was modified at another time than the base; say that you trust it if it is the same image"
    )
