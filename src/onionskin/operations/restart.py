"""Puts a volume's head on another layer. Its disk then reads as that layer, and what was written since is dropped.

What must hold: the new data path is open in full, under the locks of its files, before the transaction that switches to
it. A failure at any step leaves the old one working. Other threads read and write on, the old disk or the new.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from onionskin.catalog import VolumeRow
from onionskin.catalog.tree import remove_unreachable_layers
from onionskin.errors import StateError
from onionskin.operations import reclaim
from onionskin.storage.chain import Chain, NewHead, lock_base, lock_chain, open_chain
from onionskin.storage.open_head import OpenHead

if TYPE_CHECKING:
    from onionskin.storage.locks import BaseLock


def restart_on(volume: OpenHead, layer_id: bytes, also: Callable[[], None]) -> None:
    """Replace the head by an empty child of a layer; `also` runs in the transaction, before layers are freed."""
    catalog = volume.store.catalog
    below = lock_chain(catalog, layer_id, volume.locks)
    base_lock = volume.base_lock
    if below.base and not base_lock:  # the head was flattened, and the snapshot is older than that
        base_lock = lock_base(catalog, below)
    try:
        restart_over(volume, below, base_lock, also=also)
    except BaseException:
        if base_lock is not volume.base_lock and base_lock:
            base_lock.close()
        raise


def restart_over(volume: OpenHead, below: Chain, base_lock: "BaseLock | None", *, also: Callable[[], None]) -> None:
    """Replace the head by an empty child of the top of a chain whose files are locked.

    `also` runs in the transaction, before layers are freed.
    """
    store, catalog, top = volume.store, volume.store.catalog, below.top
    head = NewHead.on(top, base=None, block_size=top.block_size, wipe=volume.wipe, size_bytes=top.size_bytes)
    dirty = store.layout.dirty_file(volume.row.id)
    new_path = open_chain(store.layout, head.chain(below), writable=True, base_lock=base_lock, dirty=dirty)
    old_path, old_head, bytes_before = volume.path, volume.head, volume.segment_bytes()

    def change() -> None:
        if catalog.head_of(volume.row) != old_head or not catalog.has_layer(top.id):
            raise StateError("another process changed the tree; close the volume and open it again")
        map_byte, segments = head.insert(catalog)
        volume.share(segments, map_byte)
        catalog.update(VolumeRow, volume.row.id, head=head.layer.id)
        also()
        remove_unreachable_layers(catalog, old_head)

    def resolve() -> None:
        if old_path.poisoned or catalog.head_of(volume.row) != head.layer.id:
            new_path.close()
            volume.put_segment_bytes(bytes_before)
        else:
            volume.switch(new_path, head.layer.id, base_lock, below.byte_of_segment)

    with volume.resolving(resolve):
        store.change(change)
    reclaim.work_soon(store)
