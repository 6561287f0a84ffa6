"""A chain of layers, from the bottom to a head or a sealed layer: this module locks its files and opens its data path.

What must hold: the shared locks are taken before the catalog is read for the second time, and the catalog must then
still name the files that were locked. So nobody frees a file that an open data path reads.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from errno import ENODEV, ENOENT, ENOMEDIUM, ENOMEM, ENXIO
from typing import TYPE_CHECKING

from onionskin.base.files import CANNOT_LOOK, read_all
from onionskin.base.held import held
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.named_tuples import NamedTuple
from onionskin.base.naming import is_text
from onionskin.base.paths import FilePath
from onionskin.base.sizes import format_size
from onionskin.catalog import BaseRow, Catalog, LayerRow, SegmentRow, new_id, new_ids
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import ChainError, FormatError, StateError, VerifyError
from onionskin.exchange.device_nodes import identity_of, is_claimed, mount_point_of, share_bytes
from onionskin.storage.base_looks import digest_of, looks_in, looks_of, what_differs
from onionskin.storage.layout import Layout, bytes_in
from onionskin.storage.locks import BaseLock, ByteLocks

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath

LOCK_WAIT_SECONDS = 60.0
_CLAIM_WAIT_SECONDS = 1.0
_LARGE_BASE_BYTES = 1 << 30  # to map less fails only where memory is short
_FRAME = b"OFRM"  # what a frame of a map log begins with


class Chain(NamedTuple):
    """Layers, bottom first, with their segments, and the base below them."""

    layers: tuple[LayerRow, ...]
    segments: dict[bytes, list[SegmentRow]]
    base: BaseRow | None

    @property
    def top(self) -> LayerRow:
        """The layer at the top of the chain."""
        return self.layers[-1]

    @property
    def lock_bytes(self) -> set[int]:
        """The bytes of the lock file that stand for the chain's files."""
        maps = {layer.map_lock_byte for layer in self.layers}
        return maps.union(*({segment.lock_byte for segment in rows} for rows in self.segments.values()))

    @property
    def byte_of_segment(self) -> dict[bytes, int]:
        """The lock byte of each segment, by its id."""
        return {segment.id: segment.lock_byte for rows in self.segments.values() for segment in rows}


class ChainBusyError(StateError):
    """What another process has done, or does now, keeps a chain from being locked. It is no damage."""


def read_chain(catalog: Catalog, layer_id: bytes) -> Chain:
    """Read a chain from the catalog, in one state of it."""
    with catalog.reading():
        layers = catalog.chain(layer_id)
        if not layers:
            raise ChainBusyError("the layer is gone: another process changed the tree; try again")
        return Chain(tuple(layers), catalog.segments_of(layers), catalog.base_of(layers[0]))


def lock_chain(catalog: Catalog, layer_id: bytes, locks: ByteLocks) -> Chain:
    """Take shared locks on all files of a chain, and return the chain as it is under them.

    Raises
    ------
    StateError
        The layer is gone, or another process kept one of the files locked, to free slots in it, for
        `LOCK_WAIT_SECONDS`.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    held_before = locks.shared
    while True:
        version = catalog.version()
        chain = read_chain(catalog, layer_id)
        if locks.take_shared(chain.lock_bytes):
            if catalog.version() == version or read_chain(catalog, layer_id) == chain:
                return chain
            locks.keep_shared(held_before)
        elif time.monotonic() > deadline:
            raise ChainBusyError("files of the volume are being wiped by another process; try again when it is done")
        else:
            time.sleep(0.01)  # another process frees slots in one of the files; no event tells us when it is done


def lock_base(catalog: Catalog, chain: Chain, *, verify: bool = False) -> BaseLock | None:
    """Open and lock the base of a chain. Refuse a base that is not the file that the catalog describes.

    The checks look at the file that is locked. If a merge into the base began and did not end, the base has another
    size and time. Only a chain that has the layers which hide what the merge wrote may read the base then.
    """
    base = chain.base
    if base is None:
        return None
    half_merged = refuse_half_merged(catalog, FilePath(base.path), above=chain)
    try:
        lock = BaseLock(FilePath(base.path))
    except OSError as error:
        refuse_gone(base, error)
        raise
    try:
        _check_base(base, lock.descriptor, half_merged=half_merged, verify=verify)
        if not lock.is_at_its_path:
            raise ChainError(f"the base {base.path} was exchanged while it was opened: {_BASE_ADVICE}")
        lock.half_merged = looks_of(lock.descriptor) if half_merged else None
    except BaseException:
        lock.close()
        raise
    return lock


_BASE_ADVICE = "put it back, or name the right one with 'onionskin relocate'"


def refuse_gone(base: BaseRow, error: OSError) -> None:
    """Raise ChainError if an error of opening a base says that it is gone, or that its device or medium is."""
    if error.errno in (ENOENT, ENXIO, ENODEV, ENOMEDIUM):
        raise ChainError(f"the base {base.path} is gone: {_BASE_ADVICE}") from None


def check_base(catalog: Catalog, base: BaseRow, *, verify: bool = False) -> None:
    """Refuse a base that is not the file that the catalog describes, without locking it.

    The size and time of a base may differ if a merge into it began and did not end.
    """
    half_merged = bool(_merges_into(catalog, FilePath(base.path)))
    try:
        descriptor = os.open(base.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refuse_gone(base, error)
        raise
    try:
        _check_base(base, descriptor, half_merged=half_merged, verify=verify)
    finally:
        os.close(descriptor)


def _check_base(base: BaseRow, descriptor: int, *, half_merged: bool, verify: bool) -> None:
    looks = looks_of(descriptor)
    same = looks == looks_in(base) or (half_merged and looks[0] == base.inode)
    if not same:
        raise ChainError(
            f"the base {base.path} has changed since the volume was made ({what_differs(base)}): {_BASE_ADVICE} "
            "(--trust if its contents are the same)"
        )
    if not verify:
        return
    if half_merged:
        raise StateError(
            f"the base {base.path} cannot be verified before the merge into it has ended: end it with "
            "'onionskin merge --into-base'"
        )
    if base.digest is None:
        raise ChainError(f"no digest of the base {base.path} was taken: create volumes with a digest to verify them")
    if digest_of(descriptor) != base.digest:
        raise VerifyError(f"the base {base.path} does not have the SHA-256 that it had: {_BASE_ADVICE}")


def unfinished_base_merges(catalog: Catalog, head: bytes) -> list[bytes]:
    """Return the targets of unfinished merges into the base that are in the chain of a head. Few heads have any."""
    begun = catalog.base_merges()
    ids = {layer.id for layer in catalog.chain(head)} if begun else set()
    return [work.target for work in begun if work.target in ids]


def is_in_base_merge(catalog: Catalog, layers: Iterable[LayerRow]) -> bool:
    """Whether a merge into the base that has not ended reads one of these layers, which must therefore not change."""
    ids = {layer.id for layer in layers}
    return any(below.id in ids for work in catalog.base_merges() for below in catalog.chain(work.target))


def refuse_half_merged(catalog: Catalog, path: FilePath, *, above: Chain | None = None) -> bool:
    """Raise StateError if a merge into a base has not ended, because the base by itself is no disk then.

    The chain `above` may use the base if it has the layers up to which the merge goes: they hide what the merge wrote.
    Returns whether there is such a merge.
    """
    own = {layer.id for layer in above.layers} if above else set()
    begun = _merges_into(catalog, path)
    if any(target not in own for target in begun):
        raise StateError(
            f"a merge into the base {path} was begun and has not ended; end it from the volume that it was started from, "
            "with 'onionskin merge --into-base'"
        )
    return bool(begun)


def _merges_into(catalog: Catalog, path: FilePath) -> list[bytes]:
    """Return the targets of unfinished merges into the file at a path, even if their base has another path."""
    begun = []
    for work in catalog.base_merges():
        layers = catalog.chain(work.target)
        base = catalog.base_of(layers[0]) if layers else None
        if base and lead_to_same_bytes(FilePath(base.path), path):
            begun.append(work.target)
    return begun


def lead_to_same_bytes(a: FilePath, b: FilePath) -> bool:
    """Whether two paths lead to one file, through hard links, symlinks or mounts, or to devices that share its bytes.

    If one of the files is gone, the paths themselves are compared.

    Raises
    ------
    OSError
        One of them cannot be looked at, so it may be the other.
    """
    try:
        return a == b or share_bytes(identity_of(a.stat()), identity_of(b.stat()))
    except (FileNotFoundError, NotADirectoryError):
        return False


@held
def described_base(path: FilePath, *, digest: bool = False, vouched: bool = True) -> Iterator[BaseRow]:
    """Describe a raw image, a file or a block device, as it is now, and keep merges out of it during the with block.

    Unless the caller has `vouched` that the image is raw, it is refused if it has the magic bytes of another format.
    """
    path = _path_to_keep(path)
    if not path.is_file() and not path.is_block_device():
        raise ChainError(f"{path} is not a regular file, nor a block device: a base is a raw image")
    if not is_text(str(path)):  # a link with another name to it would be followed to this one
        raise ValueError(
            f"{path} cannot be a base: the catalog keeps its path, which is not text that UTF-8 can hold; give the file, and "
            "the directories that it is in, other names"
        )
    lock = BaseLock(path)
    try:
        if not vouched:
            from onionskin.exchange.image_formats import refuse_as_raw

            refuse_as_raw(lock.descriptor, path)
        refuse_used_device(lock.descriptor, path)
        looks = looks_of(lock.descriptor)
        taken = digest_of(lock.descriptor) if digest else None
        yield BaseRow(new_id(), str(path), *looks, taken)
    finally:
        lock.close()


def _path_to_keep(path: FilePath) -> FilePath:
    """Return the path that the catalog keeps of a base: without links, but for one that names a block device.

    Such a link (/dev/vg/lv, /dev/disk/by-id/...) leads to the same device after a restart, and the node that it leads to now
    may be that of another device then.
    """
    resolved = path.resolve(strict=True)
    if resolved.is_block_device():
        kept = at = _with_directory_resolved(path)
        while not at.startswith("/proc/"):  # a descriptor of this process, as /dev/stdin leads to
            if at == resolved:
                return kept
            at = _with_directory_resolved(at.parent / os.readlink(at))  # noqa: PTH115
    return resolved


def _with_directory_resolved(path: FilePath) -> FilePath:
    return FilePath(f"{path.absolute().parent.resolve(strict=True)}/{path.name}")


def refuse_used_device(descriptor: int, path: "str | os.PathLike[str]") -> None:
    """Refuse a block device that is mounted or in use otherwise, since it is written to by others. No file is refused.

    Another process may look at the same time in the same way, which claims the device for an instant.

    Raises
    ------
    StateError
        It is in use. The message says how, as far as the system tells.
    """
    found = os.fstat(descriptor)
    if not stat.S_ISBLK(found.st_mode):
        return
    deadline = time.monotonic() + _CLAIM_WAIT_SECONDS
    while is_claimed(descriptor):
        where = mount_point_of(found.st_rdev)
        if where is not None or time.monotonic() > deadline:
            how = (
                f"mounted at {where}"
                if where
                else "mounted, swapped to, part of another device, or claimed by a program"
            )
            raise StateError(
                f"{path} is in use ({how}), so others may write to it, and a base must not change: end that first, or take a "
                "copy or a snapshot of the device (lvcreate --snapshot) for the base"
            )
        time.sleep(0.01)  # no event tells us when a claim ends


def open_chain(
    layout: Layout, chain: Chain, *, writable: bool, base_lock: BaseLock | None = None, dirty: FilePath | None = None
) -> "DataPath":
    """Open the data path of a chain over the base that is locked.

    If `writable` is true, the top of the chain is a head, which keeps in `dirty` what is not flushed. Otherwise the
    chain is only read, including what a process that died left in `dirty`.
    """
    from onionskin.kernels._volume import DataPath  # imported late: verbs that only look read no data

    top = chain.top
    path = DataPath(
        block_size=top.block_size,
        size_bytes=top.size_bytes,
        segments_directory=str(layout.segments),
        layers_directory=str(layout.layers),
        wipe_zero=top.wipe == "zero",
        writable=writable,
    )
    try:
        if chain.base:
            assert base_lock is not None
            _set_base(path, chain.base, base_lock)
        maps = str(layout.layers)  # making a FilePath for each layer would take half of the time allowed for an opening
        for layer in chain.layers if top.sealed else chain.layers[:-1]:
            _add_layer(maps, path, layer, chain.segments[layer.id])
        if writable:
            _open_head(layout, path, top, chain.segments[top.id], dirty)
            path.free_own_slots()
        elif top.sealed:
            path.fold_layers()
        else:
            _open_head_to_read(layout, path, top, chain.segments[top.id], dirty)
    except BaseException:
        path.close()
        raise
    return path


def _set_base(path: "DataPath", base: BaseRow, lock: BaseLock) -> None:
    """Map a base. A merge may have made it shorter already; the layers of the merge hide the part that is missing."""
    try:
        path.set_base(lock.descriptor, base.size_bytes, allow_short=True)
    except OSError as error:
        if error.errno != ENOMEM or base.size_bytes < _LARGE_BASE_BYTES:
            raise
        # Addresses are short and no memory: each handle maps its base as a whole, however little of that is data.
        raise OSError(
            ENOMEM,
            f"a process has too few addresses to map the {format_size(base.size_bytes)} of the base once more (each disk and "
            "each snapshot that is open takes as many, and so does an export beside an open disk); close others, or open "
            "or export a snapshot in a process of its own, without a limit of addresses (ulimit -v)",
            base.path,
        ) from None


def _add_layer(maps: str, path: "DataPath", layer: LayerRow, segments: list[SegmentRow]) -> None:
    path.add_layer(
        map_path=f"{maps}/{layer.map_id.hex()}.map",
        map_id=layer.map_id,
        length=layer.map_length,
        frames=layer.map_frames,
        crc=layer.map_crc,
        segments=[(segment.id, segment.slots) for segment in segments],
    )


def _ids_of(layout: Layout, head: LayerRow, segments: list[SegmentRow], role: str) -> list[bytes]:
    """Return the ids of a head's segments with a role that at least one segment must have."""
    found = [segment.id for segment in segments if segment.role == role]
    if not found:
        raise damaged(layout.catalog, f"the head {head.id.hex()} has no {role} segment")
    return found


def _open_head(
    layout: Layout, path: "DataPath", head: LayerRow, segments: list[SegmentRow], dirty: FilePath | None
) -> None:
    own = _ids_of(layout, head, segments, "own")
    path.open_head(
        map_path=layout.map_path(head.map_id),
        map_id=head.map_id,
        inherited=[(segment.id, segment.slots) for segment in segments if segment.role == "sealed"],
        own=own[-1],
        more_own=own[:-1],
        spare=_ids_of(layout, head, segments, "spare")[0],
        known=(head.map_length, head.map_frames, head.map_crc),
        dirty_path=dirty,
    )


def _open_head_to_read(
    layout: Layout, path: "DataPath", head: LayerRow, segments: list[SegmentRow], dirty: FilePath | None
) -> None:
    own = [*_spare_with_blocks(layout, segments), *_ids_of(layout, head, segments, "own")]
    path.open_head_to_read(
        map_path=layout.map_path(head.map_id),
        map_id=head.map_id,
        inherited=[(segment.id, segment.slots) for segment in segments if segment.role == "sealed"],
        own=own[-1],
        more_own=own[:-1],
        known=(head.map_length, head.map_frames, head.map_crc),
        dirty_path=dirty,
    )


def _spare_with_blocks(layout: Layout, segments: list[SegmentRow]) -> list[bytes]:
    """Return the id of a head's spare segment if it has blocks, which an opening for writing makes one of the head's own.

    They were written beside a snapshot whose process was killed before its commit, and the records it left name them.
    """
    return [
        segment.id
        for segment in segments
        if segment.role == "spare" and bytes_in(layout.segment_path(segment.id)) > HEADER_BYTES
    ]


def refuse_written_next(layout: Layout, spare: bytes) -> None:
    """Raise FormatError where the map of a head's successor has a frame.

    It gets one only behind the commit that makes it a head, so the catalog is older than the files: to open the head for
    writing would free what was written since, and write over what may be a snapshot.
    """
    path = layout.map_file(spare)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in CANNOT_LOOK:
            raise
        return
    try:
        is_written = read_all(descriptor, len(_FRAME), HEADER_BYTES) == _FRAME
    finally:
        os.close(descriptor)
    if is_written:
        raise FormatError(
            f"{layout.catalog} is older than the files beside it: {path} is the map of a head that it does not have yet, "
            "and something was written there; nothing was changed. Put the catalog back that belongs to the files, with its "
            f"-wal, or the whole store from one copy; if there is none, remove {path}: what was written since is lost then"
        )


def replace_spare(catalog: Catalog, head: bytes) -> SegmentRow:
    """Make a head's spare segment one of its own, and add the row of a new spare. Inside a transaction."""
    row = catalog.spare_of(head)
    catalog.update(SegmentRow, row.id, role="own")
    catalog.add_work("map", row.id, row.lock_byte, "release")  # this map may have been made beforehand, and is empty
    spare = SegmentRow(new_id(), head, "spare", 0, catalog.take_lock_byte())
    catalog.insert(spare)
    return spare


class NewHead(NamedTuple):
    """The rows of a head that is about to be made. `insert` fills in the lock bytes."""

    layer: LayerRow
    own: bytes
    spare: bytes

    @classmethod
    def on(
        cls,
        parent: LayerRow | None,
        *,
        base: BaseRow | None,
        block_size: int,
        wipe: str,
        size_bytes: int,
        map_id: bytes | None = None,
    ) -> "NewHead":
        """Describe an empty head over `parent`, or over `base`, or over nothing."""
        layer = LayerRow(
            id=new_id(),
            parent=parent.id if parent else None,
            base=base.id if base and not parent else None,
            block_size=block_size,
            wipe=wipe,
            size_bytes=size_bytes,
            sealed=0,
            map_id=map_id or new_id(),
            map_lock_byte=0,
            map_length=0,
            map_frames=0,
            map_crc=0,
            created_ns=time.time_ns(),
        )
        return cls(layer, new_id(), new_id())

    def insert(self, catalog: Catalog) -> tuple[int, dict[int, bytes]]:
        """Write the rows, inside a transaction. Returns the map's lock byte, and the segments' ids by lock byte."""
        map_byte, own_byte, spare_byte = catalog.take_lock_bytes(3)
        insert_heads(catalog, [self], [map_byte, own_byte, spare_byte])
        return map_byte, {own_byte: self.own, spare_byte: self.spare}

    def chain(self, below: Chain) -> Chain:
        """Return the chain that ends in this head, before the head is in the catalog."""
        segments = dict(below.segments)
        segments[self.layer.id] = [
            SegmentRow(self.own, self.layer.id, "own", 0, 0),
            SegmentRow(self.spare, self.layer.id, "spare", 0, 0),
        ]
        return Chain((*below.layers, self.layer), segments, below.base)


def insert_copies(catalog: Catalog, head: LayerRow, count: int) -> list[bytes]:
    """Write the rows of empty heads, all as `head` is; returns the ids of their layers. Inside a transaction."""
    lock_bytes = catalog.take_lock_bytes(3 * count)
    layers, segments = new_ids(count), new_ids(2 * count)
    catalog.insert_copies(head, id=layers, map_id=new_ids(count), map_lock_byte=lock_bytes[:count])
    catalog.insert_copies(
        SegmentRow(segments[0], layers[0], "own", 0, 0),
        id=segments,
        layer=[id for id in layers for _ in range(2)],
        role=("own", "spare") * count,
        lock_byte=lock_bytes[count:],
    )
    return layers


def insert_heads(catalog: Catalog, heads: Sequence[NewHead], lock_bytes: Sequence[int] = ()) -> None:
    """Write the rows of heads, for which three lock bytes each may have been taken. Inside a transaction."""
    free = iter(lock_bytes or catalog.take_lock_bytes(3 * len(heads)))
    layers, segments = [], []
    for head in heads:
        layers.append(head.layer._replace(map_lock_byte=next(free)))
        segments.append(SegmentRow(head.own, head.layer.id, "own", 0, next(free)))
        segments.append(SegmentRow(head.spare, head.layer.id, "spare", 0, next(free)))
    catalog.insert_all(layers)
    catalog.insert_all(segments)
