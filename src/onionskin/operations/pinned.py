"""Keeps one state of a disk for as long as an export, a stream or a comparison reads it.

What must hold: what is read is the disk at one instant, whoever writes, reverts, merges or discards meanwhile. A view is
such a state already, and so is a head that nobody writes: what a writer that died left unflushed belongs to it. The head of a
volume that is open here is sealed into a layer without a name, which is read under locks of its own while writers go on in
the new head. It is folded back afterwards, however the reading ended. So the files of what is pinned do not change, and
nobody frees them while their bytes are locked.
"""

from collections.abc import Iterator
from contextlib import closing

from onionskin.base import forking
from onionskin.base.held import held
from onionskin.base.lazy import logger
from onionskin.catalog import LayerRow
from onionskin.errors import OnionskinError, StateError
from onionskin.operations import reclaim
from onionskin.storage.locks import ReadersLock
from onionskin.storage.open_head import OpenDisk, OpenHead
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, refuse_changed_base

_log = logger(__name__)


@held
def pinned(volume: OpenDisk) -> Iterator[OpenChain]:
    """Give a sealed chain that reads as the volume or the view does now, and does not change before the end of the block.

    It holds what was written before the call. Several threads may call this at once. Writers wait as for a snapshot.

    Raises
    ------
    StateError
        The volume is closed or poisoned, or a merge into its base is under way.
    ChainError
        The base is not the file that it was.
    """
    if isinstance(volume, OpenHead):
        keep = _sealed_head(volume)
    else:
        _refuse_ended(volume)
        keep = _head_that_is_read(volume) if volume.snapshot_name is None else _shared_view(volume)
    with keep as opened:
        refuse_changed_base(opened)
        yield opened


def _refuse_ended(volume: OpenDisk) -> None:
    if volume.closed:
        raise StateError(f"volume {volume.row.name!r} is closed; open it again")
    if volume.forked:
        raise forking.forked_error(f"volume {volume.row.name!r}")


@held
def _head_that_is_read(volume: OpenDisk) -> Iterator[OpenChain]:
    """Open the head once more, with what a writer that died left unflushed, and keep writers away also when it is closed."""
    store = volume.store
    with closing(ReadersLock(store.layout, volume.row.id, volume.row.name)):
        _refuse_ended(volume)  # it was open all the time, so this is its head still
        opened = store.open_layer(volume.head, dirty=store.layout.dirty_file(volume.row.id))
        try:
            yield opened
        finally:
            _close(opened)


@held
def _shared_view(volume: OpenDisk) -> Iterator[OpenChain]:
    store, layer = volume.store, volume.head
    opened = store.views.take(layer, lambda: store.open_layer(layer))
    try:
        # It was open all the time, so this is its view. A layer that lost its name may have lost what all above it hide.
        _refuse_ended(volume)
        yield opened
    finally:
        store.views.give_back(layer)


@held
def _sealed_head(volume: OpenHead) -> Iterator[OpenChain]:
    store = volume.store
    with volume.operation(during_merge=True):
        if volume.is_merging:
            raise StateError(
                f"a merge into the base of volume {volume.name!r} is under way; try again when it has ended"
            )
        layer = _seal(volume)
        try:
            opened = store.open_layer(layer.id)
        except BaseException:
            _fold_back(volume, layer)
            raise
    try:
        yield opened
    finally:
        _close(opened)
        _fold_back(volume, layer)


def _seal(volume: OpenHead) -> LayerRow:
    # Loaded here, as who reads a snapshot seals and folds nothing: both, before anything is sealed that has to be folded.
    from onionskin.operations import fold, seal

    assert fold
    sealed: list[LayerRow] = []
    # A seal frees nothing, but it is undone soon, so a disk that is full can still be read.
    volume.store.reserve.retry(lambda: sealed.append(seal.seal(volume)))
    return sealed[-1]


def _close(opened: OpenChain) -> None:
    opened.path.close()
    opened.locks.close()
    if opened.base_lock:
        opened.base_lock.close()


def _fold_back(volume: OpenHead, layer: LayerRow) -> None:
    """Fold the layer into what was written since. If that fails, the reading has not: the next open folds the layer."""
    from onionskin.operations.fold import fold  # `_seal` has loaded it

    store: OpenStore = volume.store
    try:
        if not volume.closed:
            with volume.operation(during_merge=True):
                fold(volume, layer.id)
            reclaim.work_soon(store)  # if the layer was dropped meanwhile, its files waited for the locks
    except (OSError, OnionskinError) as error:
        _log.warning(
            "%s: a layer that was made for a reading could not be folded back; the next opening of the volume does it: %s",
            store.path,
            error,
        )
