"""This module gives a layer a new block map, into which other layers were folded or which has no dead records.

What must hold: a new map file is durable before the one transaction that switches to it. That transaction also moves
the segments and notes what has to be freed. Reads do not change, at whatever step a crash comes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onionskin.base.fsync import sync_directory
from onionskin.catalog import LayerRow, WorkRow
from onionskin.operations import reclaim
from onionskin.operations.staging import StagedFiles, put_off, staged_files
from onionskin.storage.open_head import OpenHead, if_begun
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.kernels._maplog import LayerMap
    from onionskin.kernels._volume import LowerLayer


# ---- the map of a sealed layer ----


def write_map(
    store: OpenStore, file: WorkRow, layer_map: "LayerMap", wipe: str, size_bytes: int
) -> tuple[int, int, int]:
    """Write the new map of a sealed layer to a file that the catalog names, and return (length, frames, crc).

    The file is durable on return.
    """
    written = layer_map.write(
        str(store.layout.map_file(file.target)), map_id=file.target, wipe_zero=wipe == "zero", size_bytes=size_bytes
    )
    sync_directory(store.layout.layers)  # BARRIER: folded map name
    return written


def give_up_maps(volume: OpenHead, folded: Sequence[LayerRow]) -> None:
    """Unlock the maps that were replaced. The data path has read them already, and does not need them any more.

    The segments need no change of locks: they belong to other layers now, but keep their lock bytes.
    """
    volume.locks.drop_shared({layer.map_lock_byte for layer in folded})


def switch_map(
    volume: OpenHead,
    lowers: Sequence[LayerRow],
    upper: LayerRow,
    files: StagedFiles,
    written: tuple[int, int, int],
    *,
    to_reclaim: Sequence[bytes] | None = None,
) -> None:
    """Give `upper` its new map and all segments of `lowers`, which are sorted bottom first. Inside a transaction.

    `to_reclaim` are the segments with slots that the new map no longer names, or None if they were not counted.
    """
    store, catalog = volume.store, volume.store.catalog
    (map_file,) = files.rows
    catalog.add_work("map", upper.map_id, upper.map_lock_byte, upper.wipe)
    files.keep(volume.locks if upper.map_lock_byte in volume.locks.shared else None)
    length, frames, crc = written
    catalog.update(
        LayerRow,
        upper.id,
        map_id=map_file.target,
        map_lock_byte=map_file.lock_byte,
        map_length=length,
        map_frames=frames,
        map_crc=crc,
    )
    if not lowers:
        return
    if to_reclaim is None:
        to_reclaim = [row.id for lower in lowers for row in catalog.segments_of_layer(lower.id)]
    reclaim.add_slot_work(store, to_reclaim, stricter(upper, *lowers))
    catalog.update(LayerRow, upper.id, parent=lowers[0].parent, base=lowers[0].base)
    for lower in reversed(lowers):
        catalog.move_segments(lower.id, upper.id)
        catalog.add_work("map", lower.map_id, lower.map_lock_byte, lower.wipe)
        catalog.remove_layer(lower.id)


def stricter(*layers: LayerRow) -> str:
    """Return the wipe policy of a layer that is made from these layers: `zero` if one of them has it."""
    return "zero" if any(layer.wipe == "zero" for layer in layers) else "release"


def stands_on_nothing(layer: LayerRow) -> bool:
    """Whether there is neither a layer nor a base below a layer. If so, ZERO hides nothing."""
    return layer.parent is None and layer.base is None


# ---- the map of the head ----


def rewrite(
    volume: OpenHead,
    head: LayerRow,
    lower: LayerRow | None = None,
    source: "LowerLayer | None" = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the head's map anew. If `lower`, the layer below the head, is given, fold it into the head.

    `source` describes the files of `lower`. `check` is called inside the transaction.
    """
    store = volume.store
    with staged_files(store, ["map"], stricter(head, *([lower] if lower else []))) as files:
        (map_file,) = files.rows

        def switch() -> None:
            check()
            written_as = (written.map_length, written.map_frames, written.map_crc)
            switch_map(volume, [lower] if lower else [], head, files, written_as)

        with volume.resolving(lambda: _resolve_rewrite(volume, [lower, head] if lower else [head], map_file.target)):
            written = volume.path.rewrite_map(
                new_path=str(store.layout.map_file(map_file.target)),
                new_id=map_file.target,
                lower=source,
                drop_zero=stands_on_nothing(lower or head),
            )
            store.change(switch)


def _resolve_rewrite(volume: OpenHead, folded: Sequence[LayerRow], map_id: bytes) -> None:
    """Go on with the new map file if the catalog names it, and otherwise with the old one.

    If the outcome is not known, both files stay, and nothing more is written.
    """
    if not volume.path.poisoned and volume.store.catalog.layer(folded[-1].id).map_id != map_id:
        if_begun(volume.path.rewrite_abort)
        return
    if_begun(volume.path.rewrite_commit)
    if not volume.path.poisoned:
        give_up_maps(volume, folded)


def compact_map(volume: OpenHead) -> None:
    """Write the head's map log anew, without its dead records."""
    put_off(lambda: rewrite(volume, volume.store.catalog.layer(volume.head)))
