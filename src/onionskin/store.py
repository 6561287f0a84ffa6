"""A store: the directory that holds volumes. Opening, making, cloning and removing them.

What must hold: a writer of a volume holds its lock; a handle holds shared locks on all files that it can read before
it trusts the catalog; what is freed goes through `reclaim`. Nothing here touches block data.
"""

import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from onionskin.base.limits import HEADER_BYTES, VOLUME_BYTES_MAX, WIPE_POLICIES
from onionskin.base.naming import check_name
from onionskin.base.sizes import parse_size
from onionskin.catalog import (
    BaseRow,
    VolumeRow,
    WorkRow,
    new_id,
)
from onionskin.catalog.tree import (
    Snapshot,
    find_snapshot,
    list_snapshots,
)
from onionskin.errors import (
    ChainError,
    OnionskinError,
    StateError,
    VerifyError,
)
from onionskin.operations import (
    compact_segments,
    expiry,
    forks,
    group_snapshot,
    holds,
    prune,
    reclaim,
    snapshot_names,
    staged_volumes,
    volumes,
)
from onionskin.operations import lineage as lineages
from onionskin.operations import usage as usages
from onionskin.operations.flush import finish
from onionskin.operations.fold import fold_unnamed_below
from onionskin.operations.listing import TreeNode, VolumeInfo, list_volumes, read_tree, volume_info
from onionskin.operations.prune import Retention, Rules, retained
from onionskin.storage.chain import (
    NewHead,
    check_base,
    described_base,
    read_chain,
    refuse_half_merged,
    replace_spare,
    unfinished_base_merges,
)
from onionskin.storage.layout import Layout
from onionskin.storage.locks import (
    ReadersLock,
    VolumeLock,
    is_being_merged_into,
)
from onionskin.storage.open_head import OpenHead, OpenView
from onionskin.storage.open_store import OpenStore
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin.base.annotations import AnyPath, Extents, WipePolicy
    from onionskin.operations.layering import Layering

_log = logging.getLogger(__name__)

_CUT_WAIT_SECONDS = 1.0

Lock = TypeVar("Lock", VolumeLock, ReadersLock)


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
    path : pathlib.Path
        The directory, as it was given.

    Notes
    -----
    A context manager. Any thread may call it; another process may have the same store open. After a fork the child
    has to open the store again.

    It is a collection of the names of its volumes: ``"web" in store``, ``for name in store``, ``len(store)``. It is true
    as long as it is open, also where it holds no volume. There is no ``store["web"]``: opening a volume takes a lock that
    somebody has to give back, and an expression that does so behind the reader's back would keep it until the garbage
    collector comes by. `open` says what it does, and belongs into a with statement.

    It pickles as its path, also when it is closed: what is unpickled, in a child process too, is a store that was opened
    anew, and that is to be closed there. A `Volume` cannot be pickled.
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
        self._opened: OpenStore = OpenStore(
            path, create=create, trust=trust, group=group, work=reclaim.work_in_background
        )
        self.path: Path = self._opened.path
        self._cutting = threading.Lock()

    @property
    def read_only(self) -> bool:
        """Whether the store can only be read. Each change of it raises OSError then.

        Its file system is mounted so or full to the last block, or its owner lets this user do no more.
        """
        return self._opened.read_only

    @property
    def unreachable_bytes(self) -> int:
        """Bytes that were overwritten through this handle with policy `zero`, and may still be on the medium.

        The old contents are where the file system is a copy-on-write one, or where other files share the blocks. The first
        time it is logged too.
        """
        return self._opened.unwipeable_bytes

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._opened.closed else "read-only" if self.read_only else "open"
        return f"<Store {self.path} {state}>"

    def __reduce__(self) -> "tuple[Callable[[str, bool], Store], tuple[str, bool]]":
        return _open_again, (str(self._opened.layout.root), self._trust)

    # ---- the names in it ----

    def __bool__(self) -> bool:
        return not self._opened.closed

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._opened.catalog.has_volume(str(name))

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
            return self._make_volume(name, None, block_size, wipe, size_bytes)
        with self._base(Path(base), digest=digest, vouched=vouched) as below:
            if size_bytes is None and not below.size_bytes:
                raise ValueError(f"a volume has at least one byte: the base {base} is empty; give a size")
            return self._make_volume(name, below, block_size, wipe, size_bytes or _check_size(below.size_bytes))

    @contextmanager
    def _base(self, path: Path, *, digest: bool, vouched: bool) -> Iterator[BaseRow]:
        """Describe a base, which must be an image of its own, and keep it from being merged into."""
        if self._opened.layout.holds(path):
            raise ChainError(
                f"{path} is a file of the store itself, which changes and goes: give an image outside of it"
            )
        with described_base(path, digest=digest, vouched=vouched) as base:
            refuse_half_merged(self._opened.catalog, Path(base.path))
            yield base

    def _make_volume(
        self,
        name: str,
        base: BaseRow | None,
        block_size: int,
        wipe: str,
        size_bytes: int,
    ) -> Volume:
        """Make a volume and open it; the lock is held before anybody can see it, and a failure leaves none."""
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

    def _open_new(self, id: bytes, lock: VolumeLock) -> Volume:
        """Open a volume that was just made; one that cannot be opened was not made."""
        try:
            row = self._opened.catalog.volume_with_id(id)
            assert row is not None
            self._opened.reserve.retry(lock.make_file)
            return self._open_locked(row, lock, verify=False, found=False)
        except BaseException:
            with suppress(OSError, OnionskinError):
                self._opened.change(lambda: volumes.remove_volumes(self._opened, [id], recursive=True))
                volumes.unlink_files(self._opened, [id])
            lock.close()
            raise

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
            dirty = self._opened.layout.dirty_file(row.id)
            opened = self._opened.open_layer(row.head, writable=False, verify=verify, dirty=dirty)
            view = OpenView(self._opened, row, opened, read_lock=lock, free_waiting=reclaim.work_soon)
        except BaseException:
            lock.close()
            raise
        self._opened.register(view)
        return Volume(view, self)

    def _lock_volume(self, name: str, kind: "Callable[[Layout, bytes, str], Lock]") -> "tuple[VolumeRow, Lock]":
        """Take a lock of the volume that has a name, and return it as it is under the lock.

        What a name means may change until the lock is held: somebody renames the volume, or deletes it and makes another.
        """
        row = self._opened.catalog.volume(name)
        if kind is VolumeLock:
            self._opened.catalog.refuse_read_only()
        while True:
            id = row.id
            lock = self._opened.reserve.retry(lambda: kind(self._opened.layout, id, name))  # noqa: B023
            try:
                row = self._opened.catalog.volume(name)
                if row.id == id:
                    if isinstance(lock, VolumeLock):
                        if not self._opened.layout.volume_lock(id).exists():
                            self._opened.catalog.sync_found()  # no file whose row a crash of the machine would undo
                        self._opened.reserve.retry(lock.make_file)
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
            self._opened.catalog.sync_found()
        head = self._open_head(row, lock, verify)
        self._opened.register(head)
        try:
            self._after_open(head)
        except BaseException:
            head.close()
            raise
        return Volume(head, self)

    def _open_head(self, row: VolumeRow, lock: VolumeLock, verify: bool) -> OpenHead:
        if unfinished_base_merges(self._opened.catalog, row.head):
            _log.warning(
                "%s: a merge of %r into its base was begun and has not ended; the volume works, and its base does not by "
                "itself: end it with 'onionskin merge --into-base'",
                self.path,
                row.name,
            )
        self._look_at_spare(row.head)
        dirty = self._opened.layout.dirty_file(row.id)
        for left in self._opened.layout.staged_dirty_files(row.id):
            left.unlink(missing_ok=True)
        compact_segments.compact_chain(
            self._opened, row.head, may_hold_unflushed=dirty.exists() and dirty.stat().st_size > 0
        )
        opened = self._opened.open_layer(row.head, writable=True, verify=verify, dirty=dirty)
        return OpenHead(self._opened, row, opened, volume_lock=lock, finish=finish)

    def _look_at_spare(self, head: bytes) -> None:
        """Tidy what stands for the next head.

        A snapshot that failed at its commit left the head with two segments: the spare has blocks then, and is in the map.
        Else its files were at most made beforehand, are empty, and are made again when they are needed.
        """
        spare = self._opened.catalog.spare_of(head)
        path = self._opened.layout.segment_file(spare.id)
        if path.exists() and path.stat().st_size > HEADER_BYTES:
            self._opened.change(lambda: replace_spare(self._opened.catalog, head))
            return
        for made in (path, self._opened.layout.map_file(spare.id)):
            descriptor = reclaim.open_to_free(made)
            if descriptor is not None:
                os.close(descriptor)
                made.unlink()

    def _open_view(self, name: str, snapshot: str, verify: bool) -> Volume:
        """Open a snapshot, or share what is open of it already: then only its base is looked at again.

        What the name means is asked again when the files are locked: it may have gone to another snapshot meanwhile.
        """
        store = self._opened
        while True:
            row, layer = self._find_layer(name, snapshot)
            try:
                opened = store.views.take(layer, lambda: store.open_layer(layer, verify=verify))  # noqa: B023
            except OnionskinError:
                if self._find_layer(name, snapshot)[1] == layer:
                    raise
                continue
            try:
                if self._find_layer(name, snapshot)[1] != layer:
                    self._opened.views.give_back(layer)
                    continue
                if opened.chain.base and opened.users > 1:
                    check_base(self._opened.catalog, opened.chain.base, verify=verify)
                view = OpenView(store, row, opened, snapshot=snapshot, free_waiting=reclaim.work_soon)
            except BaseException:
                self._opened.views.give_back(layer)
                raise
            self._opened.register(view)
            return Volume(view, self)

    def _find_layer(self, name: str, snapshot: str) -> tuple[VolumeRow, bytes]:
        with self._opened.catalog.reading():
            row = self._opened.catalog.volume(name)
            return row, find_snapshot(self._opened.catalog, row, snapshot).layer

    def _after_open(self, head: OpenHead) -> None:
        """Do what was left: by a crash, by a reader that was in the way, by a layer that lost its name.

        What fails stays for the next time, and is no reason to refuse the volume.
        """
        self._opened.reserve.make()
        with suppress(OSError, OnionskinError):
            staged_volumes.drop_dead(self._opened)
        fold_unnamed_below(head)
        segments = [row.id for row in self._opened.catalog.sealed_segments_of(head.head)]
        with suppress(OSError, OnionskinError):
            if segments:
                reclaim.reclaim_slots(self._opened, segments, head.wipe)
            reclaim.work_soon(self._opened)

    def snapshot_group(self, names: "Mapping[str, str | None]", note: str = "") -> dict[str, Snapshot]:
        """Take snapshots of several volumes at one instant: all or none. Durable on return.

        Of writes that follow each other, each begun after the one before was answered, no snapshot has a later one where
        another lacks an earlier one, whichever volumes they went to. Other threads may read and write meanwhile.

        Parameters
        ----------
        names : mapping of str to str or None
            What the snapshot of each volume is called; None: by the time, as `Volume.snapshot` does. A volume that is open
            in this store is cut as it is there; one that nobody holds is opened for this, and closed again.
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
            Another process, or another handle of this one, holds one of the volumes: the error names it.
        OSError
            ENOSPC: no snapshot was taken, all volumes go on.

        Examples
        --------
        >>> store.snapshot_group({"web": "before", "db": "before"})  # doctest: +SKIP
        """
        return group_snapshot.take(self._opened, names, note, lambda name: self.open(name)._opened.to_write())

    def clone(self, name: str, snapshot: str, new_name: str | None = None, *, wipe: "WipePolicy | None" = None) -> None:
        """Make a volume whose head is an empty child of a snapshot: the fork of one. It has no snapshots of its own yet.

        Nothing is copied. Durable on return. The origin may be open, here or elsewhere. Any thread may call it.
        ``clone("web@clean", "new")`` is ``clone("web", "clean", "new")``.

        Parameters
        ----------
        name : str
            The volume whose snapshot it is; or both, as ``"volume@snapshot"``.
        snapshot : str
            What the clone reads at first. Left out where the first argument names it.
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
        if new_name is None:
            name, at, behind = str(name).partition("@")
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
            ``"web@clean"``: a snapshot. ``"web"``: the disk as it is now. It may be open in this store, or nowhere.
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
            The same call again under this key, within a day, makes nothing and returns the same names, also after a crash.
        lifetime : str, int, float or datetime.timedelta, optional
            After this time `expire` may drop them: ``"90s"``, ``"15m"``, ``"2h"``, ``"7d"``, ``"2w"``, or seconds.
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
            The disk as it is now was asked for, and another handle holds the volume; or the key was used for another call.
        ValueError
            The arguments do not say which forks to make.
        """
        wanted = forks.check_wanted(source, snapshot, names, count, pattern, idempotency_key, lifetime, labels, wipe)
        if wanted.snapshot is not None:
            return forks.fork_snapshot(self._opened, wanted)
        self._opened.catalog.refuse_read_only()
        made = forks.made_before(self._opened, wanted)
        return self._fork_head(wanted) if made is None else made

    def _fork_head(self, wanted: forks.Wanted) -> list[str]:
        """Fork a disk as it is now, in the handle that it has here, or in one that is opened for it."""
        while True:
            handle = self._open_here(wanted.volume)
            if handle is None:
                with self._cutting:  # so that threads do not find the volume held by each other
                    handle = self._open_here(wanted.volume)
                    if handle is None:
                        return self._fork_closed(wanted)
            try:
                return forks.fork_head(handle, wanted)
            except StateError:
                if not handle.closed:
                    raise

    def _open_here(self, name: str) -> OpenHead | None:
        """Return the handle by which a volume is open for writing in this store."""
        id = self._opened.catalog.volume(name).id
        for handle in self._opened.open_handles():
            if isinstance(handle, OpenHead) and handle.row.id == id and not handle.closed:
                return handle
        return None

    def _fork_closed(self, wanted: forks.Wanted) -> list[str]:
        """Fork the disk of a volume that is not open here. One that was not written to since its last cut is not opened."""
        row, lock = self._lock_to_cut(wanted.volume)
        try:
            names = forks.fork_unwritten(self._opened, row, wanted)
            if names is None:
                with self._open_locked(row, lock, verify=False) as volume:
                    names = forks.fork_head(volume._opened.to_write(), wanted)
            return names
        finally:
            lock.close()

    def _lock_to_cut(self, name: str) -> tuple[VolumeRow, VolumeLock]:
        """Lock a volume whose head is to be cut; another fork holds it for a moment only, so it is asked for again.

        A volume that a server holds is to be cut by way of its control socket: this is where that belongs.
        """
        deadline = time.monotonic() + _CUT_WAIT_SECONDS
        while True:
            try:
                return self._lock_volume(name, VolumeLock)
            except StateError as error:
                if time.monotonic() > deadline:
                    raise StateError(
                        f"{error}; what is held is forked as it is now by its holder alone: fork it there, or fork one of "
                        f"its snapshots, as {name}@SNAPSHOT"
                    ) from None
            time.sleep(0.01)

    @contextmanager
    def temporary(
        self,
        source: str,
        snapshot: str | None = None,
        *,
        name: str | None = None,
        lifetime: "str | float | timedelta | None" = None,
        wipe: "WipePolicy | None" = None,
    ) -> Iterator[Volume]:
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
        (made,) = self.fork(
            source,
            snapshot,
            names=None if name is None else [name],
            pattern="{source}-tmp-{n}" if name is None else None,
            lifetime=lifetime,
            wipe=wipe,
        )
        id = self._opened.catalog.volume(made).id
        try:
            with self.open(made) as volume:
                try:
                    yield volume
                finally:
                    with suppress(OSError, OnionskinError):  # what it could not make durable goes anyway
                        volume.close()
        finally:
            row = self._opened.catalog.volume_with_id(id)
            if row:
                self.delete(row.name, recursive=True)

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
        freed, stood_on = volumes.delete(self._opened, names, recursive=recursive)
        reclaim.work_soon(self._opened)
        forks.fold_what_stays(self._opened, stood_on)
        return freed

    def expire(self) -> list[str]:
        """Drop the volumes whose lifetime is over, as `fork` gave it.

        One stays that is open, that has a snapshot, or from which a clone or a fork was made that is there still; it goes
        with a later call. Nothing else drops a volume: no opening does. The clock is the one that tells the date. Any
        thread may call it.

        Returns
        -------
        list of str
            The names of those that were dropped, sorted. Where many go, each transaction takes some of them.
        """
        names, stood_on = expiry.expire(self._opened)
        if names:
            reclaim.work_soon(self._opened)
            forks.fold_what_stays(self._opened, stood_on)
        return names

    def lineage(self, name: str) -> list[lineages.Ancestor]:
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
        return lineages.forks_of(self._opened, *forks.split_source(source, snapshot))

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
        volumes.rename(self._opened, name, new_name)

    def rename_snapshot(self, volume: str, old: str, new: str) -> None:
        """Give a snapshot another name. Views of it that are open, clones and holds go on.

        Durable on return. Any thread may call it; the volume may be open, here or elsewhere.

        Parameters
        ----------
        volume : str
            Whose snapshot it is.
        old : str
            What it is called.
        new : str
            What it shall be called: at most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        SnapshotExistsError
            The new name is taken.
        """
        snapshot_names.rename(self._opened, volume, old, new)

    def set_note(self, volume: str, snapshot: str, note: str) -> None:
        """Put another note in the place of a snapshot's.

        Durable on return. Any thread may call it; the volume may be open, here or elsewhere.

        Parameters
        ----------
        volume, snapshot : str
            The snapshot.
        note : str
            At most 64 KiB; "" takes the note away.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        """
        snapshot_names.set_note(self._opened, volume, snapshot, note)

    def hold(self, volume: str, snapshot: str, holder: str) -> None:
        """Keep a snapshot: it is not discarded, merged or deleted before all who hold it let it go, and nor is its volume.

        Durable on return. Any thread may call it; the volume may be open, here or elsewhere. A name, a note and what was
        written after it may change all the same.

        Parameters
        ----------
        volume, snapshot : str
            The snapshot.
        holder : str
            Who needs it, as whoever is refused reads it: at most 255 bytes, without '/', '@' and control characters.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        StateError
            This holder holds it already.
        """
        holds.hold(self._opened, volume, snapshot, holder)

    def unhold(self, volume: str, snapshot: str, holder: str) -> None:
        """Let a snapshot go that `hold` keeps. Durable on return. Any thread may call it.

        Parameters
        ----------
        volume, snapshot : str
            The snapshot.
        holder : str
            Who held it.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        StateError
            This holder does not hold it; those who do are named.
        """
        holds.unhold(self._opened, volume, snapshot, holder)

    def holds(self, volume: str, snapshot: str | None = None) -> list[holds.Hold]:
        """Return who holds a snapshot, or any snapshot of a volume.

        Parameters
        ----------
        volume : str
        snapshot : str, optional
            None: all of them.

        Returns
        -------
        list of Hold
            In the order in which the snapshots were taken, and each was held.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        """
        return holds.holds(self._opened, volume, snapshot)

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
            if self._opened.layout.holds(Path(new.path)):
                raise ChainError(f"{new.path} is a file of the store itself: give an image outside of it")
            self._opened.change(lambda: self._relocate(name, new, trust=trust, verify=verify))

    def _relocate(self, name: str, new: BaseRow, *, trust: bool, verify: bool) -> None:
        """Change the rows of a base. Inside a transaction."""
        catalog = self._opened.catalog
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
        for other in catalog.bases_at(old.path):
            catalog.update(BaseRow, other.id, path=new.path, inode=new.inode, mtime_ns=new.mtime_ns)
        for work in catalog.base_merges():
            catalog.update(WorkRow, work.id, done_bytes=0)  # who knows what was merged into that file

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
    ) -> list[Retention]:
        """Drop the names of a volume's snapshots that no rule keeps. The rules are restic's; one that keeps is enough.

        A name is dropped by `Volume.merge`: the head, clones and the snapshots that are kept read as before, and only data
        that none of them needs goes. Each is durable before the next begins: after an error those before it are dropped.

        Parameters
        ----------
        volume : str
            The volume. It may be open in this store, and is opened for the time where it is not.
        keep_last : int
            Keep so many of the newest. Here and below -1 is all, and 0 is no rule.
        keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly : int
            Of the last so many hours (days, weeks of ISO 8601, ...) that have snapshots, keep the newest of each; while there
            are fewer of them, the oldest snapshot too.
        keep_within : datetime.timedelta, optional
            Keep all that are at most so much older than the newest.
        zone : datetime.tzinfo
            The time zone whose clock says where an hour and a day end, such as ``zoneinfo.ZoneInfo("Europe/Berlin")``.
        dry_run : bool
            Drop nothing, and only say what would be.

        Returns
        -------
        list of Retention
            One for each snapshot, in the order of taking; those that nothing kept are dropped. What somebody holds
            is kept.

        Raises
        ------
        VolumeNotFoundError
            There is none of that name.
        ValueError
            No rule is given, or one that cannot be.
        StateError
            The volume is held by another process, or somebody took hold of a snapshot meanwhile.
        """
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
        held = {hold.snapshot for hold in self.holds(volume)}
        if dry_run:
            return retained(self.snapshots(volume), rules, held=held)
        handle = self._open_here(volume)
        if handle is not None:
            return prune.prune(handle, rules, held)
        with self.open(volume) as opened:
            return prune.prune(opened._opened.to_write(), rules, held)

    # ---- looking ----

    def volumes(self, *, labels: "Mapping[str, str] | None" = None) -> list[VolumeInfo]:
        """Return all volumes, or those that have some labels.

        Parameters
        ----------
        labels : mapping of str to str, optional
            Only volumes that have all of these labels, with these values.

        Returns
        -------
        list of VolumeInfo
            By name, from one state of the store. Nothing is locked or opened.
        """
        return list_volumes(self._opened, labels or {})

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
        return volume_info(self._opened, name)

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
        return list_snapshots(self._opened.catalog, self._opened.catalog.volume(name))

    def tree(self) -> list[TreeNode]:
        """Return what stands on what.

        Returns
        -------
        list of TreeNode
            The bases, and the layers that stand on nothing, each with what stands on it as `children`.
        """
        return read_tree(self._opened)

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
        return usages.usage(self._opened, name)

    def diff(self, name: str, a: str | None = None, b: str | None = None) -> "Extents":
        """Return where two states of disks may differ: snapshots or a head, of one volume or across clones.

        ``diff("web", "a", "b")`` compares two snapshots of a volume, ``diff("web", "a")`` one with the head, and
        ``diff("golden@clean", "test-1@done")``, ``diff("golden@clean", "test-1")``, ``diff("golden@clean")`` name both.

        Parameters
        ----------
        name : str
            The volume; or the first state, as ``"volume@snapshot"``.
        a, b : str, optional
            Snapshots, in any order, of that volume, or of any as ``"volume@snapshot"``; `b` None means the head as far as
            it is durable. Behind a first state there is only `a`: the second one; None means the head of the first's volume.

        Returns
        -------
        array
            Extents (offset, length, state) in bytes, sorted, apart from each other; `state` is what the second has
            there: 0 HOLE, 1 DATA, 2 ZERO. Data that was written again with the same contents counts as different. Of two
            that share neither a layer nor a base, as behind a flatten, that is all that either holds or its base may
            hold: only maps are read. A second disk that is longer differs behind the end of the first
            where something was written there.

        Raises
        ------
        VolumeNotFoundError, SnapshotNotFoundError
            There is none of that name.
        FormatError
            A block map is damaged or missing.
        ValueError
            The arguments do not name two states.
        """
        return usages.diff(self._opened, name, a, b)

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

        return layering_of(self._opened, name, snapshot)

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
        self._opened.finish_work()  # what is under way here is no problem
        if repair:
            self._opened.catalog.refuse_read_only()
            staged_volumes.drop_dead(self._opened)
            reclaim.remove_orphans(self._opened)
            reclaim.do_work(self._opened)
        return usages.check(self._opened)

    def close(self) -> None:
        """Close the store, and the volumes that are still open in it. Idempotent."""
        self._opened.close()


def _open_again(path: str, trust: bool) -> Store:
    """Open the store that was pickled; it must be there still."""
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


__all__ = ["Store", "TreeNode", "VolumeInfo"]
