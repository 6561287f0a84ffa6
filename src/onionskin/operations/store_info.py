"""What a store is as a whole: how much is in it, what of that can be given back, and whether work waits.

What must hold: nothing is opened for writing, made or changed. Files are listed before the rows are read, as a file that is
being made has a row by then; and nothing is asked once for each file.
"""

from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from onionskin.base.paths import FilePath
from onionskin.base.records import record
from onionskin.catalog import SCHEMA_VERSION, LayerRow, WorkRow
from onionskin.errors import FormatError, StateError
from onionskin.operations.locked_maps import locked_maps
from onionskin.storage.block_maps import open_map
from onionskin.storage.layout import allocated_files
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import WipePolicy


@record
class StoreInfo:
    """What a store is.

    Attributes
    ----------
    path : str
    format_version : int
        Of its catalog.
    volumes : int
        The number of volumes.
    snapshots : int
        The number of snapshots of all volumes.
    bytes_held : int
        What the files with the data of all volumes take on the disk; what is to be freed is among it.
    map_bytes : int
        What the block maps take.
    bytes_freed_by_work : int
        What comes back when the pending work is done, so far as it can be told.
    bytes_freed_by_repair : int
        What files take that nothing names, which older versions could leave; ``check(repair=True)`` removes them.
    reserve_bytes : int
        What is set aside to free something with when the disk is full.
    pending_work : int
        Files, and slots in files, that have to be freed: so many rows. It is done in the background of whoever has a volume
        open for writing.
    unfinished_base_merges : int
        Merges into a base that were begun and not ended.
    default_wipe : str
        The policy of volumes that are made without one: ``"release"`` or ``"zero"``.
    default_block_size : int
        The block size of volumes that are made without one.
    read_only : bool
        Whether this user can only read it.
    """

    path: str
    format_version: int
    volumes: int
    snapshots: int
    bytes_held: int
    map_bytes: int
    bytes_freed_by_work: int
    bytes_freed_by_repair: int
    reserve_bytes: int
    pending_work: int
    unfinished_base_merges: int
    default_wipe: "WipePolicy"
    default_block_size: int
    read_only: bool


def store_info(store: OpenStore) -> StoreInfo:
    """Describe a store."""
    catalog, layout = store.catalog, store.layout
    segments = dict(allocated_files(layout.segments, ".seg"))
    maps = dict(allocated_files(layout.layers, ".map"))
    with catalog.reading():
        work = catalog.all_sound(WorkRow)
        defaults = catalog.defaults()
        merges = len(catalog.base_merges())
        volumes, snapshots = catalog.volume_count(), sum(catalog.snapshot_counts().values())
        named = {row.target for row in work}
        lost_segments = segments.keys() - named - {id for id, _ in catalog.layers_of_segments(segments)}
        lost_maps = maps.keys() - named - set(catalog.maps_among(maps))
        # The next head's map, if it was made beforehand, has the id of the spare segment.
        lost_maps -= {id for id, _ in catalog.layers_of_segments(lost_maps)}
    reclaims = [row for row in work if row.kind != "base-merge"]
    whole = {row.target for row in reclaims if row.kind in ("map", "segment")}
    freed = sum(bytes for files in (segments, maps) for id, bytes in files.items() if id in whole)
    return StoreInfo(
        path=str(layout.root),
        format_version=SCHEMA_VERSION,
        volumes=volumes,
        snapshots=snapshots,
        bytes_held=sum(segments.values()),
        map_bytes=sum(maps.values()),
        bytes_freed_by_work=freed + _free_slots(store, segments, [row for row in reclaims if row.kind == "scrub"]),
        bytes_freed_by_repair=_still_there(layout.segment_file, segments, lost_segments)
        + _still_there(layout.map_file, maps, lost_maps),
        reserve_bytes=_size(layout.reserve),
        pending_work=len(reclaims),
        unfinished_base_merges=merges,
        default_wipe=defaults.wipe,
        default_block_size=defaults.block_size,
        read_only=store.read_only,
    )


def _still_there(path_of: Callable[[bytes], FilePath], sizes: dict[bytes, int], ids: set[bytes]) -> int:
    """Add up files that had no row: one that was freed between the two looks is gone."""
    return sum(sizes[id] for id in ids if path_of(id).exists())


def _size(path: FilePath) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _free_slots(store: OpenStore, sizes: dict[bytes, int], work: list[WorkRow]) -> int:
    """Return what the segments take whose slots are to be freed, beyond what their owners' maps name."""
    catalog = store.catalog
    if not work:
        return 0

    def find() -> dict[bytes, LayerRow]:
        owners = dict(catalog.layers_of_segments({row.target for row in work}))
        rows = {row.id: row for row in catalog.layers_with_ids(set(owners.values()))}
        return {segment: rows[layer] for segment, layer in owners.items() if layer in rows}

    freed = 0
    with suppress(FormatError, StateError, OSError), locked_maps(store, find, lambda found: found.values()) as found:
        live: dict[bytes, dict[bytes, tuple[int, int]]] = {}
        for segment, layer in found.items():
            if layer.id not in live:
                with closing(open_map(store, layer)) as layer_map:
                    live[layer.id] = layer_map.segment_use()
            blocks, _ = live[layer.id].get(segment, (0, 0))
            freed += max(sizes.get(segment, 0) - blocks * layer.block_size, 0)
    return freed
