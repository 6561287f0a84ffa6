"""Keeps the files of block maps from being freed while an operation reads several of them.

What must hold: an operation that reads several maps locks them first, and checks that the catalog names them after it
took the locks. Then nobody has freed one, and nobody will. Work that waits for these locks is done after them.
"""

import time
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import TypeVar

from onionskin.base.held import held
from onionskin.catalog import Catalog, LayerRow
from onionskin.errors import StateError
from onionskin.storage.chain import LOCK_WAIT_SECONDS
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_store import OpenStore

STRETCHES_MAX = 256
FILLED_MAX = 1 << 16

Found = TypeVar("Found")


@held
def locked_maps(
    store: OpenStore, find: Callable[[], Found], layers_of: Callable[[Found], Collection[LayerRow]]
) -> Iterator[Found]:
    """Give what `find` read in one state of the catalog, while the map files of its layers are locked.

    The catalog may have changed since that state. This changes nothing in the files: those of sealed layers never
    change, and of a head's log, frames that were added later may be seen too.

    Raises
    ------
    StateError
        The tree was changed each time that the maps were locked.
    """
    locks = ByteLocks(store.layout.lock)
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    try:
        while True:
            version = store.catalog.version()
            with store.catalog.reading():
                found = find()
            layers = layers_of(found)
            wanted = {layer.map_lock_byte for layer in layers}
            # A byte between them may be held alone for hours, because its file is being made or wiped.
            is_held = locks.take_shared(in_few_stretches(wanted)) or locks.take_shared(wanted)
            if is_held and (store.catalog.version() == version or _are_named(store.catalog, layers)):
                break
            locks.keep_shared(())
            if time.monotonic() > deadline:
                raise StateError(
                    f"the tree of {store.path} keeps changing; try again when the other operations are done"
                )
            time.sleep(0.01)  # somebody frees one of the files; nothing tells us when it is done
        yield found
    finally:
        locks.close()
        if any(handle.writable for handle in store.open_handles()):
            from onionskin.operations import reclaim  # imported late: whoever only looks frees nothing

            reclaim.work_soon(store)  # this is the work that waited for these locks


def in_few_stretches(numbers: set[int]) -> set[int]:
    """Add numbers that lie between those given, until they are no more than STRETCHES_MAX stretches.

    The time for a lock grows with the locks that a file has. A byte that is locked without need only keeps its file from
    being freed until these locks are released. Gaps that have more than FILLED_MAX numbers together stay: each
    number is kept in memory, and the bytes of a volume's layers lie as far apart as the other volumes are busy.
    """
    ordered = sorted(numbers)
    gaps = sorted(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    filled = set(numbers)
    room = FILLED_MAX
    for before, after in gaps[: max(len(gaps) + 1 - STRETCHES_MAX, 0)]:
        room -= after - before - 1
        if room < 0:
            break
        filled.update(range(before + 1, after))
    return filled


def _are_named(catalog: Catalog, layers: Collection[LayerRow]) -> bool:
    """Whether the catalog still names the map files of all these layers. If so, none was freed before it was locked."""
    files = {layer.id: (layer.map_id, layer.map_lock_byte) for layer in layers}
    found = {row.id: (row.map_id, row.map_lock_byte) for row in catalog.layers_with_ids(files)}
    return found == files
