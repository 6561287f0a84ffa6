"""A chain of layers, from the bottom to a head or a sealed layer: locking its files and opening its data path.

What must hold: the shared locks are taken before the catalog is read for the second time, and what was locked is what
it then still names; so no file that an open data path reads is freed by anybody.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

from onionskin._volume import DataPath
from onionskin.catalog import BaseRow, Catalog, LayerRow, PendingRow, SegmentRow, new_id
from onionskin.errors import ChainError, StateError, VerifyError
from onionskin.layout import Layout
from onionskin.locks import BaseLock, ByteLocks

LOCK_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers, bottom first, with their segments, and the base below them."""

    layers: tuple[LayerRow, ...]
    segments: dict[bytes, list[SegmentRow]]
    base: BaseRow | None

    @property
    def top(self) -> LayerRow:
        """The layer that everything else lies under."""
        return self.layers[-1]

    @property
    def lock_bytes(self) -> set[int]:
        """The bytes of the lock file that stand for the chain's files."""
        maps = {layer.map_lock_byte for layer in self.layers}
        return maps.union(*({segment.lock_byte for segment in rows} for rows in self.segments.values()))


def read_chain(catalog: Catalog, layer_id: bytes) -> Chain:
    """Read a chain from the catalog, in one state of it."""
    with catalog.reading():
        layers = catalog.chain(layer_id)
        if not layers:
            raise StateError("the layer is gone: another process changed the tree; try again")
        base = catalog.row(BaseRow, "id = ?", layers[0].base) if layers[0].base else None
        return Chain(tuple(layers), catalog.segments_of(layers), base)


def lock_chain(catalog: Catalog, layer_id: bytes, locks: ByteLocks) -> Chain:
    """Take shared locks on all files of a chain, and return the chain as it is under them."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    held_before = locks.shared
    while True:
        chain = read_chain(catalog, layer_id)
        if locks.take_shared(chain.lock_bytes):
            if read_chain(catalog, layer_id) == chain:
                return chain
            locks.keep_shared(held_before)
        elif time.monotonic() > deadline:
            raise StateError("files of the volume are being wiped by another process; try again when it is done")
        else:
            time.sleep(0.01)  # somebody frees slots in one of the files; nothing tells us when it is done


def check_base(catalog: Catalog, base: BaseRow, *, verify: bool = False) -> None:
    """Refuse a base that is not the file that the volume was made on."""
    refuse_half_merged(catalog, base.path)
    advice = "put the file back, or name the right one with 'onionskin relocate'"
    try:
        found = Path(base.path).stat()
    except FileNotFoundError:
        raise ChainError(f"the base {base.path} is gone: {advice}") from None
    if (found.st_ino, found.st_size, found.st_mtime_ns) != (base.inode, base.size_bytes, base.mtime_ns):
        raise ChainError(
            f"the base {base.path} has changed since the volume was made (inode, size or time differ): {advice} "
            "(--trust if its contents are the same)"
        )
    if verify and base.digest is None:
        raise ChainError(f"no digest of the base {base.path} was taken: create volumes with digest=True to verify them")
    if verify and digest_of(Path(base.path)) != base.digest:
        raise VerifyError(f"the base {base.path} does not have the SHA-256 that it had: {advice}")


def pending_base_merges(catalog: Catalog, head: bytes) -> list[bytes]:
    """Return the layers below a head up to which a merge into the base was begun and not ended. There seldom are any."""
    begun = catalog.rows(PendingRow, "kind = 'base-merge'")
    ids = {layer.id for layer in catalog.chain(head)} if begun else set()
    return [work.target for work in begun if work.target in ids]


def refuse_half_merged(catalog: Catalog, base_path: str) -> None:
    """Raise while a merge into a base is not ended: what the base holds is no disk by itself."""
    for work in catalog.rows(PendingRow, "kind = 'base-merge'"):
        layers = catalog.chain(work.target)
        base = catalog.row(BaseRow, "id = ?", layers[0].base) if layers and layers[0].base else None
        if base and base.path == base_path:
            raise StateError(
                f"a merge into the base {base_path} was interrupted; open the volume that it was started from for "
                "writing, which resumes it"
            )


def digest_of(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def base_row(path: Path, *, digest: bytes | None = None) -> BaseRow:
    """Describe a raw image file as it is now."""
    path = path.resolve(strict=True)
    if not path.is_file():
        raise ChainError(f"{path} is not a regular file: a base is a raw image file")
    found = path.stat()
    return BaseRow(new_id(), str(path), found.st_ino, found.st_size, found.st_mtime_ns, digest)


def lock_base(base: BaseRow | None) -> BaseLock | None:
    """Take the shared lock of a base."""
    return BaseLock(Path(base.path)) if base else None


def open_chain(layout: Layout, chain: Chain, *, writable: bool, dirty: Path | None = None) -> DataPath:
    """Open the data path of a chain. If `writable`, its top is a head, which keeps in `dirty` what is not flushed; else all
    of it is sealed.
    """
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
            path.set_base(chain.base.path, chain.base.size_bytes)
        for layer in chain.layers[:-1] if writable else chain.layers:
            _add_layer(layout, path, layer, chain.segments[layer.id])
        if writable:
            _open_head(layout, path, top, chain.segments[top.id], dirty)
            path.free_own_slots()
        else:
            path.fold_layers()
    except BaseException:
        path.close()
        raise
    return path


def _add_layer(layout: Layout, path: DataPath, layer: LayerRow, segments: list[SegmentRow]) -> None:
    path.add_layer(
        map_path=str(layout.map_file(layer.map_id)),
        map_id=layer.map_id,
        length=layer.map_length,
        frames=layer.map_frames,
        crc=layer.map_crc,
        segments=[(segment.id, segment.slots) for segment in segments],
    )


def _open_head(
    layout: Layout, path: DataPath, head: LayerRow, segments: list[SegmentRow], dirty: Path | None
) -> None:
    own = [segment.id for segment in segments if segment.role == "own"]
    (spare,) = [segment.id for segment in segments if segment.role == "spare"]
    path.open_head(
        map_path=str(layout.map_file(head.map_id)),
        map_id=head.map_id,
        adopted=[(segment.id, segment.slots) for segment in segments if segment.role == "sealed"],
        own=own[-1],
        more_own=own[:-1],
        spare=spare,
        dirty_path=dirty,
    )


def replace_spare(catalog: Catalog, head: bytes) -> SegmentRow:
    """Make a head's spare segment one of its own, and register another. Inside a transaction."""
    for row in catalog.rows(SegmentRow, "layer = ? AND role = 'spare'", head):
        catalog.update(SegmentRow, row.id, role="own")
        catalog.add_pending("map", row.id, row.lock_byte, "release")  # made beforehand perhaps, and empty
    spare = SegmentRow(new_id(), head, "spare", 0, catalog.take_lock_byte())
    catalog.insert(spare)
    return spare


@dataclass(frozen=True, slots=True)
class NewHead:
    """The rows of a head that is about to be made. Lock bytes are filled in by `insert`."""

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

    def insert(self, catalog: Catalog) -> None:
        """Write the rows. Inside a transaction."""
        catalog.insert(replace(self.layer, map_lock_byte=catalog.take_lock_byte()))
        for id, role in ((self.own, "own"), (self.spare, "spare")):
            catalog.insert(SegmentRow(id, self.layer.id, role, 0, catalog.take_lock_byte()))

    def chain(self, below: Chain | None, base: BaseRow | None) -> Chain:
        """Return the chain that ends in this head, before it is in the catalog."""
        segments = dict(below.segments) if below else {}
        segments[self.layer.id] = [
            SegmentRow(self.own, self.layer.id, "own", 0, 0),
            SegmentRow(self.spare, self.layer.id, "spare", 0, 0),
        ]
        return Chain((*(below.layers if below else ()), self.layer), segments, base)
