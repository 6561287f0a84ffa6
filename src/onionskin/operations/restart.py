"""Puts volumes' heads on other layers. Their disks then read as those layers, and what was written since is dropped.

What must hold: the new data paths are open in full, under the locks of their files, before the transaction that switches to
them, which is one for all. A failure at any step leaves the old ones working. Other threads read and write on, the old disks
or the new.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from onionskin.base.side_by_side import side_by_side
from onionskin.catalog import VolumeRow
from onionskin.catalog.tree import remove_unreachable_layers
from onionskin.errors import StateError
from onionskin.operations import reclaim
from onionskin.storage.chain import Chain, NewHead, lock_base, lock_chain, open_chain
from onionskin.storage.open_head import OpenHead

if TYPE_CHECKING:
    from onionskin.kernels._volume import DataPath
    from onionskin.storage.locks import BaseLock


class _Restart:
    """A head that is put on another layer: its new data path is open, once it is prepared, and waits for the transaction."""

    def __init__(self, volume: OpenHead) -> None:
        self.volume = volume
        self.is_begun = False  # from here on `resolve` alone decides which data path goes on
        self._new_path: DataPath | None = None
        self._base_lock: BaseLock | None = None

    def prepare_on(self, layer_id: bytes) -> None:
        """Lock what lies below a layer, and open an empty head on it."""
        volume = self.volume
        below = lock_chain(volume.store.catalog, layer_id, volume.locks)
        base_lock = volume.base_lock
        if below.base and not base_lock:  # the head was flattened, and the snapshot is older than that
            base_lock = lock_base(volume.store.catalog, below)
        self.prepare(below, base_lock)

    def prepare(self, below: Chain, base_lock: "BaseLock | None") -> None:
        """Open an empty head on a chain whose files are locked. The lock of its base is this object's from here on."""
        volume, top = self.volume, below.top
        self._below, self._base_lock = below, base_lock
        self._head = NewHead.on(top, base=None, block_size=top.block_size, wipe=volume.wipe, size_bytes=top.size_bytes)
        layout = volume.store.layout
        dirty = layout.dirty_file(volume.row.id)
        try:
            chain = self._head.chain(below)
            self._new_path = open_chain(layout, chain, writable=True, base_lock=base_lock, dirty=dirty)
        except BaseException:
            self.give_up()
            raise
        self._old_path, self._old_head, self._bytes_before = volume.path, volume.head, volume.segment_bytes()

    def change(self) -> None:
        """Write the rows. Inside the transaction, which may run twice."""
        volume, catalog, top = self.volume, self.volume.store.catalog, self._below.top
        if catalog.head_of(volume.row) != self._old_head or not catalog.has_layer(top.id):
            raise StateError("another process changed the tree; close the volume and open it again")
        map_byte, segments = self._head.insert(catalog)
        volume.share(segments, map_byte)
        catalog.update(VolumeRow, volume.row.id, head=self._head.layer.id)

    def remove_old(self) -> None:
        """Remove the rows of what the head was. Inside the transaction, behind what its caller changes."""
        remove_unreachable_layers(self.volume.store.catalog, self._old_head)

    def resolve(self) -> None:
        """Go on with the new head if the catalog has it, with the old one if not."""
        volume, new = self.volume, self._head.layer.id
        assert self._new_path is not None
        if self._old_path.poisoned or volume.store.catalog.head_of(volume.row) != new:
            self._new_path.close()
            volume.put_segment_bytes(self._bytes_before)
        else:
            volume.switch(self._new_path, new, self._base_lock, self._below.byte_of_segment)

    def give_up(self) -> None:
        """Let go of what was prepared, if the volume did not go on with it. Further calls do nothing."""
        if self._new_path is not None and not self.is_begun:
            self._new_path.close()
        base_lock, self._base_lock = self._base_lock, None
        if base_lock is not None and base_lock is not self.volume.base_lock:
            base_lock.close()


def restart_on(volume: OpenHead, layer_id: bytes, also: Callable[[], None]) -> None:
    """Replace the head by an empty child of a layer; `also` runs in the transaction, before layers are freed."""
    restart_together([(volume, layer_id)], also)


def restart_together(
    heads: Sequence[tuple[OpenHead, bytes]],
    also: Callable[[], None],
    when_ready: Callable[[], None] = lambda: None,
    when_changed: Callable[[], None] = lambda: None,
) -> None:
    """Replace heads by empty children of layers, all in one transaction; `also` runs in it, before layers are freed.

    In an operation of each volume. `when_ready` is called when all is done that can be done before that transaction. Where
    it raises, nothing has changed. `when_changed` is called when it is durable, and must not raise. What is left then is to
    go on with the new data paths, and to close the old ones.
    """
    restarts = [_Restart(volume) for volume, _ in heads]
    try:
        if len(restarts) == 1:
            restarts[0].prepare_on(heads[0][1])
        else:
            with side_by_side(len(heads)) as beside:
                prepare = [partial(one.prepare_on, layer) for one, (_, layer) in zip(restarts, heads, strict=True)]
                beside.run(prepare)
        when_ready()
        _change(restarts, also, when_changed)
    except BaseException:
        for one in restarts:
            one.give_up()
        raise


def _change(restarts: Sequence[_Restart], also: Callable[[], None], when_changed: Callable[[], None]) -> None:
    if not restarts:
        return
    store = restarts[0].volume.store

    def change() -> None:
        for one in restarts:
            one.change()
        also()
        for one in restarts:
            one.remove_old()

    with ExitStack() as stack:
        for one in restarts:
            stack.enter_context(one.volume.resolving(one.resolve))
            one.is_begun = True
        store.change(change)
        when_changed()
    reclaim.work_soon(store)
