"""A store: the directory that holds volumes. Opening, making, cloning and removing them; the work that is left.

What must hold: a writer of a volume holds its lock; a handle holds shared locks on all files that it can read before
it trusts the catalog; what is freed goes through `pending`. Nothing here touches block data.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onionskin import forks, gathering, merging, pending
from onionskin import usage as usages
from onionskin.background import Background
from onionskin.barriers import sync_directory
from onionskin.catalog import (
    SIZE_BYTES_MAX,
    BaseRow,
    Catalog,
    LayerRow,
    PendingRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.chain import (
    NewHead,
    base_row,
    check_base,
    digest_of,
    lock_base,
    lock_chain,
    open_chain,
    read_chain,
    refuse_half_merged,
    replace_spare,
)
from onionskin.errors import ChainError, OnionskinError, StateError, VerifyError, VolumeExistsError
from onionskin.layout import DIRECTORIES, Layout
from onionskin.locks import STORE_BYTE, ByteLocks, VolumeLock, volume_holder
from onionskin.names import check_name
from onionskin.sizes import format_size, parse_size
from onionskin.snapshots import (
    Snapshot,
    descendants,
    find_snapshot,
    free_unneeded,
    list_snapshots,
    users_of,
    when,
)
from onionskin.views import OpenChain, SealedViews
from onionskin.volume import Volume

if TYPE_CHECKING:
    from onionskin._volume import DataPath
    from onionskin.layering import Layering

_log = logging.getLogger(__name__)

RESERVE_BYTES = 8 << 20
WIPE_POLICIES = ("release", "zero")


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """What a volume is. base is None for a volume over nothing; holder is the process that has it open for writing."""

    name: str
    size_bytes: int
    block_size: int
    wipe: str
    base: str | None
    created: datetime
    snapshots: int
    holder: int | None


@dataclass(slots=True)
class TreeNode:
    """A node of the tree of a store: kind is `base`, `snapshot`, `layer` (without a name) or `head`."""

    kind: str
    name: str
    size_bytes: int
    created: datetime | None
    note: str = ""
    bytes_held: int = 0
    children: list["TreeNode"] = field(default_factory=list)


class Store:
    """A directory that holds volumes.

    Parameters
    ----------
    path : path-like
    create : bool
        Whether to make a store where there is none. False: VolumeNotFoundError is raised.

    Attributes
    ----------
    unreachable_bytes : int
        Bytes that were overwritten through this handle with policy `zero`, and whose old contents may still be on the
        medium: on a copy-on-write file system, or where other files share the blocks. The first time it is logged too.

    Notes
    -----
    A context manager. Any thread may call it; another process may have the same store open. After a fork the child
    has to open the store again.
    """

    def __init__(self, path: "str | os.PathLike[str]", *, create: bool = True) -> None:
        self.path: Path = Path(path)
        self.layout: Layout = Layout(self.path.absolute())
        self._closed = False
        # Wiped through this handle with policy `zero`, and not reached by it: see `note_unreachable`.
        self.unreachable_bytes: int = 0
        self._counting = threading.Lock()
        self._background = Background(self._work, "onionskin pending work")
        # Held by whoever makes files that no row names yet, and by the sweep that removes such files.
        self.unnamed_files: threading.RLock = threading.RLock()
        self._open: weakref.WeakSet[Volume] = weakref.WeakSet()
        self.views: SealedViews = SealedViews()
        if create and not self.layout.catalog.exists():
            self._make_directories()
        self.catalog: Catalog = Catalog(self.layout.catalog, create=create)
        try:
            self.locks: ByteLocks = ByteLocks(self.layout.lock)
            self.locks.wait_shared(STORE_BYTE)
        except BaseException:
            self.catalog.close()
            raise
        forks.register(self)

    def _make_directories(self) -> None:
        way = [self.layout.root, *self.layout.root.parents]
        found = next(index for index, directory in enumerate(way) if directory.exists())
        # From what is there already: one that crashed may have made it, and its name need not be durable.
        for directory in reversed(way[: found + 1]):
            directory.mkdir(exist_ok=True)
            with suppress(PermissionError):  # somebody else's directory, so not one that we made
                sync_directory(directory.parent)  # BARRIER: store name
        for name in DIRECTORIES:
            (self.layout.root / name).mkdir(exist_ok=True)

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
        base: "str | os.PathLike[str] | None" = None,
        size: "int | str | None" = None,
        block_size: int = 4096,
        wipe: str = "release",
        digest: bool = False,
    ) -> Volume:
        """Make a volume and open it for writing.

        Parameters
        ----------
        name : str
        base : path-like, optional
            A raw image file to stand on. It is never written, except by `merge_into_base`, and must not change.
        size : int or str, optional
            Bytes, or such as "20G". Needed without a base; with one it may be larger or smaller than the base.
        block_size : int
            The unit of copy-on-write: a power of two from 4096 to 2097152.
        wipe : {"release", "zero"}
            Whether freed space is overwritten with zeros before it can be used again.
        digest : bool
            Take a SHA-256 of the base, which `open(verify=True)` compares.

        Raises
        ------
        VolumeExistsError
            The name is taken.
        """
        check_name("volume", name)
        _check_geometry(block_size, wipe)
        below = self._base_row(Path(base), digest=digest) if base is not None else None
        if size is None and below is None:
            raise ValueError("a volume without a base needs a size, such as '20G'")
        size_bytes = parse_size(size) if size is not None else below.size_bytes if below else 0
        if size_bytes < 1:
            raise ValueError(
                f"a volume has at least one byte{f': the base {base} is empty' if below else ''}; give a size"
            )
        if size_bytes > SIZE_BYTES_MAX:
            raise ValueError(f"a volume has at most {SIZE_BYTES_MAX} bytes (64 TiB), not {size_bytes}")
        self.make_reserve()
        head = NewHead.on(None, base=below, block_size=block_size, wipe=wipe, size_bytes=size_bytes)
        with self.catalog.transaction():
            if below:
                self.catalog.insert(below)
            self._insert_volume(name, head)
        return self.open(name)

    def _base_row(self, path: Path, *, digest: bool = False) -> BaseRow:
        """Describe a base, which must be an image of its own."""
        if self.layout.holds(path):
            raise ChainError(
                f"{path} is a file of the store itself, which changes and goes: give an image outside of it"
            )
        refuse_half_merged(self.catalog, str(path.resolve()))
        return base_row(path, digest=digest_of(path) if digest else None)

    def _insert_volume(self, name: str, head: NewHead) -> None:
        if self.catalog.row(VolumeRow, "name = ?", name):
            raise VolumeExistsError(f"the store {self.path} already has a volume {name!r}; choose another name")
        head.insert(self.catalog)
        self.catalog.insert(VolumeRow(new_id(), name, head.layer.id, head.layer.created_ns))

    def open(self, name: str, *, snapshot: str | None = None, verify: bool = False) -> Volume:
        """Open a volume for writing, or a read-only view of one of its snapshots.

        Raises
        ------
        StateError
            The volume is held by another handle; its process id is named.
        ChainError
            The base is not the file that it was.
        FormatError
            A file of the volume is damaged or missing.
        """
        row = self.catalog.volume(name)
        if snapshot is not None:
            return self._open_view(row, snapshot, verify)
        lock = VolumeLock(self.layout.volume_lock(row.id), name)
        try:
            self.catalog.sync_found()
            volume = self._open_head(self.catalog.volume(name), lock, verify)
        except BaseException:
            lock.close()
            raise
        self._open.add(volume)
        try:
            self._after_open(volume)
        except BaseException:
            volume.close()
            raise
        return volume

    def _open_head(self, row: VolumeRow, lock: VolumeLock, verify: bool) -> Volume:
        for work in self.catalog.rows(PendingRow, "kind = 'base-merge'"):
            if work.target in {layer.id for layer in self.catalog.chain(row.head)}:
                merging.resume_base_merge(self, work.target)
        self._look_at_spare(row.head)
        gathering.gather_chain(self, row.head)
        dirty = self.layout.dirty_file(row.id)
        opened = self._open_layer(row.head, writable=True, verify=verify, dirty=dirty)
        return Volume(self, row, opened, volume_lock=lock)

    def _look_at_spare(self, head: bytes) -> None:
        """Tidy what stands for the next head.

        A snapshot that failed at its commit left the head with two segments: the spare has blocks then, and is in the map.
        Else its files were at most made beforehand, are empty, and are made again when they are needed.
        """
        (spare,) = self.catalog.rows(SegmentRow, "layer = ? AND role = 'spare'", head)
        path = self.layout.segment_file(spare.id)
        if path.exists() and path.stat().st_size > pending.HEADER_BYTES:
            self.with_reserve(lambda: self.in_transaction(lambda: replace_spare(self.catalog, head)))
        else:
            path.unlink(missing_ok=True)
            self.layout.map_file(spare.id).unlink(missing_ok=True)

    def _open_view(self, row: VolumeRow, snapshot: str, verify: bool) -> Volume:
        """Open a snapshot, or share what is open of it already: then only its base is looked at again."""
        layer = find_snapshot(self.catalog, row, snapshot).layer
        opened = self.views.take(layer, lambda: self._open_layer(layer, writable=False, verify=verify))
        try:
            if opened.chain.base and opened.users > 1:
                check_base(self.catalog, opened.chain.base, verify=verify)
            view = Volume(self, row, opened, snapshot=snapshot)
        except BaseException:
            self.views.give_back(layer)
            raise
        self._open.add(view)
        return view

    def _open_layer(self, layer: bytes, *, writable: bool, verify: bool, dirty: Path | None = None) -> OpenChain:
        """Lock the files of a head or of a sealed layer, and open its data path."""
        locks = ByteLocks(self.layout.lock)
        base_lock = None
        try:
            chain = lock_chain(self.catalog, layer, locks)
            if chain.base:
                base_lock = lock_base(chain.base)
                check_base(self.catalog, chain.base, verify=verify)
            path = open_chain(self.layout, chain, writable=writable, dirty=dirty)
        except BaseException:
            locks.close()
            if base_lock:
                base_lock.close()
            raise
        return OpenChain(chain, path, locks, base_lock)

    def _after_open(self, volume: Volume) -> None:
        """Do what was left: by a crash, by a reader that was in the way, by a layer that lost its name."""
        self.make_reserve()
        pending.sweep_orphans(self)
        merging.fold_unnamed_below(volume)
        segments = [row.id for row in self.catalog.rows(SegmentRow, "layer = ? AND role = 'sealed'", volume.head)]
        with suppress(OSError):  # what fails stays pending, and is no reason to refuse the volume
            if segments:
                self.scrub(segments, volume.wipe)
            self.work_soon()

    def clone(self, name: str, snapshot: str, new_name: str, *, wipe: str | None = None) -> None:
        """Make a volume whose head is an empty child of a snapshot. It has no snapshots of its own yet."""
        check_name("volume", new_name)
        with self.catalog.transaction():
            source = self.catalog.volume(name)
            layer = self.catalog.layer(find_snapshot(self.catalog, source, snapshot).layer)
            policy = wipe or layer.wipe
            _check_geometry(layer.block_size, policy)
            head = NewHead.on(layer, base=None, block_size=layer.block_size, wipe=policy, size_bytes=layer.size_bytes)
            self._insert_volume(new_name, head)

    def delete(self, name: str, *, recursive: bool = False) -> None:
        """Remove a volume and its snapshots.

        Raises
        ------
        StateError
            It is open, it has snapshots and `recursive` is not given, or clones stand on them (listed).
        """
        row = self.catalog.volume(name)
        lock = VolumeLock(self.layout.volume_lock(row.id), name)
        try:
            named = self.catalog.rows(SnapshotRow, "volume = ?", row.id)
            self._refuse_delete(row, named, recursive)

            def remove() -> None:
                self.catalog.delete(SnapshotRow, "volume = ?", row.id)
                self.catalog.delete(VolumeRow, "id = ?", row.id)
                for id in (row.head, *(snapshot.layer for snapshot in named)):
                    free_unneeded(self.catalog, id)

            self.with_reserve(lambda: self.in_transaction(remove))
            self.layout.dirty_file(row.id).unlink(missing_ok=True)
            self.layout.volume_lock(row.id).unlink(missing_ok=True)
        finally:
            lock.close()
        self.work_soon()

    def _refuse_delete(self, row: VolumeRow, named: list[SnapshotRow], recursive: bool) -> None:
        above = {snapshot.layer for snapshot in named}
        for snapshot in named:
            above |= descendants(self.catalog, snapshot.layer)
        users = users_of(self.catalog, above, besides=row.id)
        if users:
            raise StateError(
                f"volume {row.name!r} has snapshots that {', '.join(users)} need; delete or flatten those first"
            )
        if named and not recursive:
            names = ", ".join(sorted(snapshot.name for snapshot in named))
            raise StateError(f"volume {row.name!r} has snapshots: {names}; pass recursive to remove them too")

    def rename(self, name: str, new_name: str) -> None:
        """Give a volume another name. Handles that are open keep working."""
        check_name("volume", new_name)
        with self.catalog.transaction():
            row = self.catalog.volume(name)
            if self.catalog.row(VolumeRow, "name = ?", new_name):
                raise VolumeExistsError(f"the store {self.path} already has a volume {new_name!r}; choose another name")
            self.catalog.update(VolumeRow, row.id, name=new_name)

    def relocate(self, name: str, *, base: "str | os.PathLike[str]", trust: bool = False, verify: bool = False) -> None:
        """Say where the base of a volume is now.

        Without `trust` and `verify` the file must have the size and modification time that the base had; `verify`
        compares its SHA-256, `trust` takes the caller's word. All volumes on the same base move with it.
        """
        row = self.catalog.volume(name)
        chain = read_chain(self.catalog, row.head)
        if chain.base is None:
            raise ChainError(f"volume {name!r} has no base to relocate")
        old, new = chain.base, self._base_row(Path(base))
        if new.size_bytes != old.size_bytes:
            raise ChainError(
                f"{new.path} has {new.size_bytes} bytes and the base has {old.size_bytes}: it is another image"
            )
        if verify and old.digest is None:
            raise ChainError("no digest of the base was taken by create(digest=True); relocate with trust instead")
        if verify and digest_of(Path(new.path)) != old.digest:
            raise VerifyError(f"{new.path} does not have the SHA-256 of the base: it is another image")
        if not (verify or trust) and new.mtime_ns != old.mtime_ns:
            raise ChainError(
                f"{new.path} was modified at another time than the base; pass trust if it is the same image"
            )
        with self.catalog.transaction():
            for other in self.catalog.rows(BaseRow, "path = ?", old.path):
                self.catalog.update(BaseRow, other.id, path=new.path, inode=new.inode, mtime_ns=new.mtime_ns)
            for work in self.catalog.rows(PendingRow, "kind = 'base-merge' AND done_bytes"):
                self.catalog.update(PendingRow, work.id, done_bytes=0)  # who knows what was merged into that file

    # ---- looking ----

    def volumes(self) -> list[VolumeInfo]:
        """Return all volumes, by name."""
        with self.catalog.reading():
            return [self._info(row) for row in self.catalog.rows(VolumeRow, "1 ORDER BY name")]

    def info(self, name: str) -> VolumeInfo:
        """Return one volume."""
        with self.catalog.reading():
            return self._info(self.catalog.volume(name))

    def _info(self, row: VolumeRow) -> VolumeInfo:
        chain = read_chain(self.catalog, row.head)
        holder = volume_holder(self.layout.volume_lock(row.id))
        return VolumeInfo(
            name=row.name,
            size_bytes=chain.top.size_bytes,
            block_size=chain.top.block_size,
            wipe=chain.top.wipe,
            base=chain.base.path if chain.base else None,
            created=when(row.created_ns),
            snapshots=len(self.catalog.rows(SnapshotRow, "volume = ?", row.id)),
            holder=holder.pid if holder else None,
        )

    def snapshots(self, name: str) -> list[Snapshot]:
        """Return a volume's snapshots, oldest first, without opening it."""
        return list_snapshots(self.catalog, self.catalog.volume(name))

    def tree(self) -> list[TreeNode]:
        """Return the bases and the roots that stand on nothing, each with what stands on it."""
        with self.catalog.reading():
            layers = self.catalog.rows(LayerRow, "1 ORDER BY created_ns")
            volumes = {row.id: row for row in self.catalog.rows(VolumeRow)}
            names = {row.layer: row for row in self.catalog.rows(SnapshotRow)}
            bases = self.catalog.rows(BaseRow, "1 ORDER BY path")
            held = {row.id: 0 for row in layers}
            for segment in self.catalog.rows(SegmentRow):
                held[segment.layer] += self._bytes_of(segment)
        heads = {row.head: row.name for row in volumes.values()}
        nodes = {layer.id: _node(layer, names, heads, volumes, held[layer.id]) for layer in layers}
        roots = [TreeNode("base", base.path, base.size_bytes, None) for base in bases]
        by_base = {base.id: root for base, root in zip(bases, roots, strict=True)}
        for layer in layers:
            if layer.parent:
                nodes[layer.parent].children.append(nodes[layer.id])
            elif layer.base:
                by_base[layer.base].children.append(nodes[layer.id])
            else:
                roots.append(nodes[layer.id])
        return roots

    def _bytes_of(self, segment: SegmentRow) -> int:
        try:
            return self.layout.segment_file(segment.id).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def usage(self, name: str) -> list[usages.Usage]:
        """Return what each snapshot of a volume holds; the head's entry, with snapshot None, is the last."""
        return usages.usage(self, name)

    def diff(self, name: str, a: str, b: str | None = None) -> Any:
        """Return the extents (offset, length, state) in which `b` (None: the head) may differ from `a`."""
        return usages.diff(self, name, a, b)

    def layering(self, name: str, snapshot: str | None = None) -> "Layering":
        """Return which layer each part of a snapshot, or of the head as it is durable, comes from; without opening it.

        `Volume.layering` says what it holds. A volume that is open, here or elsewhere, is not disturbed.
        """
        from onionskin.layering import layering_of

        return layering_of(self, name, snapshot)

    def check(self, *, repair: bool = False) -> list[usages.Problem]:
        """Look for damage. `repair` removes files that nothing names and does pending work first; it mends no data."""
        self.finish_work()  # what is under way here is no problem
        if repair:
            pending.sweep_orphans(self)
            pending.do_pending(self)
        return usages.check(self)

    # ---- for the other modules of the package ----

    def open_volumes(self) -> list[Volume]:
        """Return the volumes and views that are open here."""
        return list(self._open)

    def path_of_head(self, layer: bytes) -> "DataPath | None":
        """Return the data path of the volume that is open here with this head."""
        for volume in self.open_volumes():
            if volume.writable and volume.head == layer:
                return volume.path
        return None

    def set_head(self, volume: VolumeRow, layer: bytes) -> None:
        """Make a layer a volume's head. Inside a transaction."""
        self.catalog.update(VolumeRow, volume.id, head=layer)

    def in_transaction(self, change: Callable[[], object]) -> None:
        """Run a change as one transaction."""
        with self.catalog.transaction():
            change()

    def scrub(self, segments: Iterable[bytes], wipe: str) -> None:
        """Free the slots of segments that their owners' maps do not name."""
        found = list(segments)
        self.with_reserve(lambda: self.in_transaction(lambda: self.add_scrubs(found, wipe)))
        self.work_soon()

    def add_scrubs(self, segments: Iterable[bytes], wipe: str) -> None:
        """Note that slots of these segments have to be freed. Inside a transaction."""
        for id in segments:
            row = self.catalog.row(SegmentRow, "id = ?", id)
            if row and not self.catalog.row(PendingRow, "kind = 'scrub' AND target = ?", id):
                self.catalog.add_pending("scrub", id, row.lock_byte, wipe)

    def work_soon(self) -> None:
        """Do pending work: policy `zero` before this returns, `release` in the background."""
        if self.catalog.rows(PendingRow, "kind != 'base-merge' LIMIT 1"):
            pending.do_pending(self, policy="zero")
            self.wake()

    def wake(self) -> None:
        """Let the background look for work."""
        self._background.wake()

    def _work(self) -> None:
        """Do what waits for nobody. What fails stays in the catalog for the next open."""
        with suppress(OSError, OnionskinError):
            pending.do_pending(self, policy="release")
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

    def with_reserve(self, change: Callable[[], object]) -> None:
        """Run a change that frees space; where the disk is too full for it, give the reserve up and try again."""
        try:
            change()
        except OSError as error:
            if error.errno != ENOSPC or not self.give_up_reserve():
                raise
            change()
            self.make_reserve()

    def give_up_reserve(self) -> bool:
        """Free what is set aside for a full disk; False where there was nothing. `make_reserve` sets it aside again."""
        try:
            self.layout.reserve.unlink()
        except FileNotFoundError:
            return False
        return True

    def make_reserve(self) -> None:
        """Set space aside; a disk that has none left goes without."""
        if self.layout.reserve.exists():
            return
        with suppress(OSError):
            descriptor = os.open(self.layout.reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            except OSError:
                self.layout.reserve.unlink()
            finally:
                os.close(descriptor)

    def forget(self, volume: Volume) -> None:
        """Take a handle that closes off the list."""
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


def _check_geometry(block_size: int, wipe: str) -> None:
    if block_size & (block_size - 1) or not 4096 <= block_size <= 2 << 20:
        raise ValueError(f"a block is a power of two from 4096 to 2097152 bytes, not {block_size}")
    if wipe not in WIPE_POLICIES:
        raise ValueError(f"the wipe policy is 'release' or 'zero', not {wipe!r}")


def _node(
    layer: LayerRow,
    names: dict[bytes, SnapshotRow],
    heads: dict[bytes, str],
    volumes: dict[bytes, VolumeRow],
    held: int,
) -> TreeNode:
    created = when(layer.created_ns)
    if layer.id in heads:
        return TreeNode("head", heads[layer.id], layer.size_bytes, created, "", held)
    if layer.id in names:
        row = names[layer.id]
        name = f"{volumes[row.volume].name}@{row.name}"
        return TreeNode("snapshot", name, layer.size_bytes, when(row.created_ns), row.note, held)
    return TreeNode("layer", layer.id.hex()[:8], layer.size_bytes, created, "", held)
