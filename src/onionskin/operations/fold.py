"""Folding: layers without a name become one with the layer above them.

What must hold: reads do not change, and a fold is durable before anything that it replaces is freed (new_map.py). The
transaction checks again that the layers are as they were: no name, branch or merge into a base that somebody else began
may stand on one of them. The operation that the caller was asked for is already done, so a fold that fails is left to
the next opening. fold_policy.py decides which layers are folded now.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing

from onionskin.base.lazy import logger
from onionskin.catalog import CommitUnknownError, LayerRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import unnamed_below, unnamed_of
from onionskin.errors import OnionskinError
from onionskin.operations import compact_segments, fold_policy, reclaim
from onionskin.operations.hidden_blocks import free_hidden
from onionskin.operations.new_map import (
    give_up_maps,
    rewrite,
    stands_on_nothing,
    stricter,
    switch_map,
    write_map,
)
from onionskin.operations.staging import TreeChangedError, put_off, staged_files
from onionskin.storage.chain import is_in_base_merge
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)

SEGMENTS_OPEN = 64  # if an open volume has more segments than this, a fold drops those that have no block left


def fold_where_unnamed(volume: OpenHead, layers: Iterable[bytes | None]) -> None:
    """Fold each of these layers into its child, if it has no name and only one child, and this child is in reach.

    Each run of layers without a name is looked at once, however many of them are given. The head of another volume is not
    in reach. The operation that the caller was asked for is already done. So a fold that fails is logged and left to the
    next opening.
    """
    seen: set[bytes] = set()
    for id in layers:
        if id is None or id in seen:
            continue
        try:
            run = fold_policy.run_around(volume.store.catalog, volume.head, id)
            seen.update(layer.id for layer in run)
            _fold_run(volume, run)
        except CommitUnknownError:
            raise
        except (OSError, OnionskinError) as error:
            if volume.path.poisoned:
                raise
            _log.warning("%s: layer %s could not be joined with the next one: %s", volume.store.path, id.hex(), error)


def fold(volume: OpenHead, layer_id: bytes) -> bool:
    """Fold those layers without a name around a layer that are worth it now (fold_policy.py).

    Returns whether any layer was folded.
    """
    return _fold_run(volume, fold_policy.run_around(volume.store.catalog, volume.head, layer_id))


def _fold_run(volume: OpenHead, run: Sequence[LayerRow]) -> bool:
    store = volume.store
    if is_in_base_merge(store.catalog, run):
        return False
    try:
        groups = fold_policy.groups_to_fold(store, run)
    except FileNotFoundError:
        _check_run_is_gone(store, run)
        return False
    if groups:  # a snapshot whose row is damaged is no name, and a fork whose row is damaged no child
        store.catalog.refuse_dangling()
    folded = [_fold_group(volume, group) for group in groups]
    if not any(folded):
        return False
    reclaim.work_soon(store)
    return True


def _fold_group(volume: OpenHead, group: fold_policy.Group) -> bool:
    """Fold layers into the last of them, if that can be done now. Returns whether it was done."""
    *lowers, upper = group
    if not upper.sealed:
        if len(lowers) > 1 and not _fold_group(volume, lowers):
            return False
        # The layer is compacted while it is below the head. Once a head has inherited the segments, its log names them,
        # and they can no longer be replaced.
        compact_segments.compact_below(volume, lowers[-1].id)
        lowers = [volume.store.catalog.layer(lowers[-1].id)]

    def change() -> None:
        try:
            if upper.sealed:
                _fold_sealed(volume, lowers, upper)
            else:
                _fold_into_head(volume, lowers[0], upper)
        except FileNotFoundError:
            _check_unchanged(volume.store, lowers, upper)  # another process may have folded the map away: no damage
            raise

    folded = put_off(change)
    if folded and upper.sealed:
        compact_segments.compact_below(volume, upper.id)
    return folded


def _check_run_is_gone(store: OpenStore, run: Sequence[LayerRow]) -> None:
    """Raise the FileNotFoundError that is being handled again, unless another process folded the layers meanwhile."""
    try:
        _check_unchanged(store, run[:-1], run[-1])
    except TreeChangedError:
        return
    raise


def _fold_sealed(volume: OpenHead, lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    store = volume.store
    locks = ByteLocks(store.layout.lock)
    wipe = stricter(upper, *lowers)
    try:
        # The layers need not be in the volume's own chain, so the volume's locks may not cover them.
        locks.must_share({layer.map_lock_byte for layer in (*lowers, upper)})
        _check_unchanged(store, lowers, upper)
        with staged_files(store, ["map"], wipe) as files, closing(fold_policy.lay(store, [*lowers, upper])) as laid:
            (map_file,) = files.rows
            _refuse_segments_of_others(store, [*lowers, upper], laid)
            if stands_on_nothing(lowers[0]):
                laid.map.drop_zero()
            written = write_map(store, map_file, laid.map, wipe, upper.size_bytes)

            def switch() -> None:
                _check_unchanged(store, lowers, upper)
                switch_map(volume, lowers, upper, files, written, to_reclaim=list(laid.freed))

            store.change(switch)
    finally:
        locks.close()
    give_up_maps(volume, [*lowers, upper])


def _refuse_segments_of_others(store: OpenStore, layers: Sequence[LayerRow], laid: fold_policy.Laid) -> None:
    """Raise FormatError where the maps of layers name a segment that no row gives to one of them.

    The layer that its row should name would be gone behind the fold.
    """
    owned = {row.id for rows in store.catalog.segments_of(list(layers)).values() for row in rows}
    for id in set(laid.map.segment_use()) | set(laid.freed):
        if id not in owned:
            raise damaged(
                store.catalog.path,
                f"a map of layer {layers[-1].id.hex()}, or of one below, names the segment {id.hex()}, which no row gives "
                "to them",
            )


def _fold_into_head(volume: OpenHead, lower: LayerRow, upper: LayerRow) -> None:
    store = volume.store
    segments = store.catalog.segments_of_layer(lower.id)
    source = (
        str(store.layout.map_file(lower.map_id)),
        lower.map_id,
        lower.map_length,
        lower.map_frames,
        lower.map_crc,
        [(segment.id, segment.slots) for segment in segments],
    )
    rewrite(volume, upper, lower, source, lambda: _check_unchanged(store, [lower], upper))
    if len(volume.path.segments()) > SEGMENTS_OPEN:
        _drop_unused(volume)


def _drop_unused(volume: OpenHead) -> None:
    """Drop the segments of the head that hold no block any more, together with their numbers and their mappings.

    Otherwise a disk whose snapshots come and go while it is open would collect them, until it has no number left.
    """
    store, catalog = volume.store, volume.store.catalog
    owned = {row.id for row in catalog.sealed_segments_of(volume.head)}
    owned -= store.doubted_segments
    dropped = [id for id in volume.path.unused_segments() if id in owned]
    if not dropped:
        return

    def drop() -> None:
        wipe = catalog.layer(volume.head).wipe
        for row in catalog.segments_with_ids(dropped):
            catalog.add_work("segment", row.id, row.lock_byte, wipe)
            catalog.remove_segment(row.id)

    with volume.changing_below(lambda: not catalog.has_segment(dropped[0])):
        volume.path.prepare_below(dropped=dropped, keep_base=True)
        store.change(drop)


def _check_unchanged(store: OpenStore, lowers: Sequence[LayerRow], upper: LayerRow) -> None:
    """Raise TreeChangedError if the layers have changed since they were read.

    Another process may have folded the same layers, or cloned or named one of them.
    """
    catalog = store.catalog
    above = [*lowers[1:], upper]
    unchanged = all(catalog.layer_with_id(layer.id) == layer for layer in (*lowers, upper)) and all(
        [row.id for row in catalog.children_of(lower.id, at_most=2)] == [child.id]
        and not catalog.snapshot_of_layer(lower.id)
        and not catalog.base_merge_of(lower.id)
        for lower, child in zip(lowers, above, strict=True)
    )
    if not unchanged:
        raise TreeChangedError(
            "the layers changed while they were merged: another process works on the tree; try again"
        )


def fold_unnamed_below(volume: OpenHead) -> None:
    """Fold the layers without a name in the volume's own chain, which earlier operations left. An opening does this."""
    catalog = volume.store.catalog
    with catalog.reading():
        unnamed = unnamed_below(catalog, volume.head)
    fold_where_unnamed(volume, unnamed)
    free_hidden(volume, unnamed_of(catalog, volume.row.id))
