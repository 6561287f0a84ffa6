"""Sealing a head: the head becomes a layer that never changes again, and writers go on in a new head.

What must hold: the sealed data is durable before the transaction that makes it a sealed layer and gives the volume its
new head. Whatever error is raised, the data path goes on with the head that the catalog has. Writers go on all the
time, except while the heads are swapped. No data is synced inside the transaction, so a slow disk under one volume does
not delay others.

A seal has two parts, so that several heads can be sealed in one transaction. The rows are written in the with block of
`begin_seal`, and `Sealing.finish` is called after the block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onionskin.catalog import LayerRow, SegmentRow, VolumeRow, new_id
from onionskin.operations import reclaim
from onionskin.storage.chain import NewHead, replace_spare
from onionskin.storage.open_head import OpenHead, if_begun

if TYPE_CHECKING:
    from onionskin.kernels._volume import Sealed


@dataclass(frozen=True, slots=True)
class NextHead:
    """The ids of the new head and its spare segment after a seal, and the lock bytes of its map and of the spare."""

    head: bytes
    spare: bytes
    map_byte: int
    spare_byte: int


class Sealing:
    """A seal that was begun. The data path has its new head, and waits to be told whether the volume has it too.

    `begin_seal` makes it.
    """

    def __init__(self, volume: OpenHead, spare: SegmentRow, sealed: "Sealed") -> None:
        self._volume = volume
        self._spare = spare  # the first segment of the next head; its id is also the id of that head's map
        self._sealed = sealed
        # The last flush of this head may have freed slots in inherited segments. The new head does not know of them.
        self.to_reclaim: list[bytes] = volume.path.reclaim_wanted()
        self.next_head: NextHead | None = None
        self._unused: set[int] = set()

    def write_rows(self, also: Callable[[LayerRow, LayerRow], None]) -> LayerRow:
        """Write the rows of the sealed layer and the new head, and return the sealed layer.

        This is called inside a transaction, which may run twice. `also` is called with the rows of the sealed layer and
        of the new head.
        """
        self.next_head, self._unused = None, set()
        volume, catalog = self._volume, self._volume.store.catalog
        # The size comes from the map, because a crash after a resize may have left the old size in the row.
        old = catalog.layer(volume.head)._replace(size_bytes=self._sealed.size_bytes)
        # The map has the id of the spare. So if the map is made beforehand, the catalog names it before the head
        # exists.
        head = NewHead.on(
            old,
            base=None,
            block_size=volume.block_size,
            wipe=volume.wipe,
            size_bytes=old.size_bytes,
            map_id=self._spare.id,
        )
        self.next_head = new = NextHead(head.layer.id, new_id(), *catalog.take_lock_bytes(2))
        layer = head.layer._replace(map_lock_byte=new.map_byte)
        self._write_next_head(layer, new)
        reclaim.add_slot_work(volume.store, self.to_reclaim, volume.wipe)
        row = self._write_sealed(old)
        also(row, layer)
        volume.share({new.spare_byte: new.spare}, new.map_byte)
        return row

    def _write_next_head(self, layer: LayerRow, new: NextHead) -> None:
        """Write the row of the new head, make the old head's spare its segment, and give it to the volume."""
        catalog = self._volume.store.catalog
        catalog.insert(layer)
        catalog.update(SegmentRow, self._spare.id, role="own", layer=layer.id)
        catalog.insert(SegmentRow(new.spare, layer.id, "spare", 0, new.spare_byte))
        catalog.update(VolumeRow, self._volume.row.id, head=layer.id)

    def _write_sealed(self, old: LayerRow) -> LayerRow:
        """Write the rows of the layer that was sealed and of its segments, and return the row of the layer.

        Segments without slots are dropped.
        """
        catalog, sealed = self._volume.store.catalog, self._sealed
        what: dict[str, Any] = {
            "sealed": 1,
            "size_bytes": sealed.size_bytes,
            "map_length": sealed.map_length,
            "map_frames": sealed.map_frames,
            "map_crc": sealed.map_crc,
        }
        catalog.update(LayerRow, old.id, **what)
        for id, slots in sealed.segments:
            if slots:
                catalog.update(SegmentRow, id, role="sealed", slots=slots)
            else:
                self._drop_empty_segment(id, old.wipe)
        return old._replace(**what)

    def _drop_empty_segment(self, id: bytes, wipe: str) -> None:
        """Remove the row of a segment without slots. If it has a file, the file becomes pending work."""
        store = self._volume.store
        row = store.catalog.segment_with_id(id)
        if row is None:
            return
        if store.layout.segment_file(id).exists():
            store.catalog.add_work("segment", id, row.lock_byte, wipe)
            self._unused.add(row.lock_byte)
        store.catalog.remove_segment(id)

    def go_on(self) -> None:
        """Tell the data path that the volume goes on with the new head."""
        assert self.next_head is not None
        self._volume.head = self.next_head.head
        spare = self.next_head.spare
        if_begun(lambda: self._volume.path.seal_commit(spare))

    def finish(self) -> None:
        """Give up files that were made for nothing, and start freeing slots. The data path knows its head by then."""
        self._volume.locks.drop_shared(self._unused)
        if self.to_reclaim or self._unused:
            reclaim.work_soon(self._volume.store)
        self._volume.note_seal()


@contextmanager
def begin_seal(volume: OpenHead) -> Iterator[Sealing]:
    """Make durable what was written, and swap the heads. In the with block, one transaction calls `Sealing.write_rows`.

    At the end of the block, the data path is told which head goes on. This is the new one if the catalog has it, and
    otherwise the old one. The caller is in an operation of the volume, and calls `Sealing.finish` after the block.
    """
    _need_spare(volume)
    spare = volume.store.catalog.spare_of(volume.head)
    begun: list[Sealing] = []
    try:
        with volume.resolving(lambda: _resolve(volume, begun), lambda: begun[0].go_on()):
            map_path = str(volume.store.layout.map_file(spare.id))
            begun.append(Sealing(volume, spare, volume.path.seal(map_path=map_path, map_id=spare.id)))
            yield begun[0]
    except BaseException:
        if begun and begun[0].to_reclaim and not volume.path.closed:
            volume.path.want_reclaim(begun[0].to_reclaim)
        raise


def _resolve(volume: OpenHead, begun: list[Sealing]) -> None:
    """Go on with the new head if the catalog has it, and otherwise with the old one."""
    new = begun[0].next_head if begun else None
    if new is None or volume.path.poisoned or volume.store.catalog.head_of(volume.row) != new.head:
        if_begun(volume.path.seal_abort)
    else:
        begun[0].go_on()


def seal(
    volume: OpenHead,
    *,
    check: Callable[[], None] = lambda: None,
    also: Callable[[LayerRow, LayerRow], None] = lambda sealed, head: None,
) -> LayerRow:
    """Seal the head and go on in a new one. Returns the sealed layer. The caller is in an operation of the volume.

    `check` is called before anything happens, and again inside the transaction. `also` is called in the same
    transaction, with the rows of the sealed layer and of the new head.
    """
    check()

    def write_rows() -> LayerRow:
        check()
        return sealing.write_rows(also)

    with begin_seal(volume) as sealing:
        row = volume.store.change(write_rows)
    sealing.finish()
    return row


def _need_spare(volume: OpenHead) -> None:
    """Give the head a new spare segment if an aborted snapshot used its spare."""
    if volume.path.has_spare:
        return
    catalog = volume.store.catalog

    def register() -> SegmentRow:
        spare = replace_spare(catalog, volume.head)
        volume.share({spare.lock_byte: spare.id})
        return spare

    volume.path.set_spare(volume.store.change(register).id)
