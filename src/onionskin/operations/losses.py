"""Losses: the names and the data that a change would drop, found before the change is made.

What must hold: nothing is changed, and no block data is read. If the change itself would be refused, the question is
refused too, with the same message. The answer describes one past state of the store. So the change itself checks again,
inside its transaction.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing

from onionskin.base import states
from onionskin.base.records import record, replaced
from onionskin.catalog import Catalog, LayerRow, VolumeRow
from onionskin.catalog.tree import find_snapshot
from onionskin.errors import FormatError
from onionskin.operations import fold_policy, holds, ownership
from onionskin.operations.locked_maps import locked_maps
from onionskin.operations.snapshots import all_of_branches, refuse_discard
from onionskin.operations.unflushed import has_unflushed, refuse_open
from onionskin.operations.volumes import refuse_delete
from onionskin.storage.block_maps import open_map
from onionskin.storage.open_store import OpenStore


@record
class Loss:
    """The names and the data that a change would drop.

    Attributes
    ----------
    volumes : tuple of str
        The names of the volumes.
    snapshots : tuple of str
        The snapshots as ``volume@snapshot``, in the order in which they were taken.
    bytes_freed : int or None
        The number of bytes of data that would be freed. It is None if a block map is damaged, so that nobody knows.
    is_lost : bool
        Whether anything that was written, trimmed or resized would be lost.
    """

    volumes: tuple[str, ...]
    snapshots: tuple[str, ...]
    bytes_freed: int | None
    is_lost: bool


@record
class _Going:
    """The names that a change would drop, and the layers that hold the data."""

    volumes: list[VolumeRow]
    snapshots: list[str]
    layers: list[LayerRow]
    is_resized: bool


# ---- the losses of each change ----


def of_delete(store: OpenStore, names: Sequence[str], *, recursive: bool) -> Loss:
    """Return what a deletion of volumes would drop. A volume that is open, here or elsewhere, is refused."""

    def find() -> _Going:
        catalog = store.catalog
        rows = list({row.id: row for row in map(catalog.volume, names)}.values())
        ownership.refuse_removed(catalog, [row.id for row in rows])
        refuse_delete(catalog, rows, recursive)
        named = {row.id: catalog.snapshots_of(row.id) for row in rows}
        holds.refuse_held(catalog, [one.layer for row in rows for one in named[row.id]])
        snapshots = [f"{row.name}@{one.name}" for row in rows for one in named[row.id]]
        dropped = [layer for row in rows for layer in (row.head, *(one.layer for one in named[row.id]))]
        return _going(catalog, rows, snapshots, dropped)

    for name in names:
        refuse_open(store, name)
    return _measured(store, find)


def of_revert(store: OpenStore, name: str, snapshot: str) -> Loss:
    """Return what a revert would drop of a volume's head."""

    def find() -> _Going:
        catalog = store.catalog
        row = catalog.volume(name)
        ownership.refuse_put_back(catalog, row.id)
        target = find_snapshot(catalog, row, snapshot).layer
        return _going(catalog, [], [], [row.head], kept={target})

    return _measured(store, find, unflushed_of=name)


def of_discard(store: OpenStore, name: str, snapshots: Sequence[str], *, recursive: bool) -> Loss:
    """Return what a discard of snapshots would drop, with everything that was written after them."""

    def find() -> _Going:
        catalog = store.catalog
        row = catalog.volume(name)
        branches = refuse_discard(catalog, row, [find_snapshot(catalog, row, one) for one in snapshots], recursive)
        dropped = all_of_branches(branches)
        holds.refuse_held(catalog, dropped)
        named = [one for one in catalog.snapshots_of(row.id) if one.layer in dropped]
        # A head that is above one of the snapshots is put on the lowest of them, whose layer therefore stays.
        kept = [root for root, above in branches.items() if row.head in above]
        if kept:
            ownership.refuse_put_back(catalog, row.id)
        return _going(catalog, [], [f"{name}@{one.name}" for one in named], dropped, kept=kept)

    return _measured(store, find, unflushed_of=name)


def of_merge(store: OpenStore, name: str, snapshots: Sequence[str], *, for_machine: bool = False) -> Loss:
    """Say what a merge of snapshots frees: data that only they read, because it was written again after them.

    What several children of a layer all hide, as clones may, is not counted. Only policy `zero` frees it.
    """

    def find() -> tuple[_Going, list[list[LayerRow]]]:
        catalog = store.catalog
        row = catalog.volume(name)
        rows = [find_snapshot(catalog, row, one) for one in snapshots]
        dropped = {one.layer for one in rows}
        holds.refuse_held(catalog, dropped, for_machine=for_machine)
        in_order = sorted(rows, key=lambda one: one.number)
        going = _going(catalog, [], [f"{name}@{one.name}" for one in in_order], dropped)
        return going, _runs(catalog, row.head, [one.layer for one in in_order], going)

    return _measured_with_folds(store, find)


def of_names(
    store: OpenStore, find: Callable[[], tuple[list[VolumeRow], list[str], Collection[bytes], Collection[bytes]]]
) -> Loss:
    """Return what goes with volumes and names that `find` says, in one state of the catalog, which may refuse it.

    It returns the volumes, what the snapshots are called, the layers that lose their names or heads, and layers that stay.
    """

    def going() -> _Going:
        volumes, snapshots, dropped, kept = find()
        return _going(store.catalog, volumes, snapshots, dropped, kept=kept)

    return _measured(store, going)


def of_names_and_folds(
    store: OpenStore,
    find: Callable[[], tuple[list[VolumeRow], list[str], Collection[bytes], list[tuple[bytes, list[bytes]]]]],
) -> Loss:
    """Return what goes with volumes and with names of volumes that stay, of which what nothing reads then is dropped too.

    `find` returns the volumes, what the snapshots are called, and all layers that lose their names or heads; and of each
    volume that stays, its head and which of these layers were its snapshots, in the order of taking.
    """

    def going() -> tuple[_Going, list[list[LayerRow]]]:
        volumes, snapshots, dropped, staying = find()
        found = _going(store.catalog, volumes, snapshots, dropped)
        return found, [run for head, layers in staying for run in _runs(store.catalog, head, layers, found)]

    loss = _measured_with_folds(store, going)
    return replaced(loss, is_lost=loss.is_lost or loss.bytes_freed != 0)


def _runs(catalog: Catalog, head: bytes, layers: Sequence[bytes], going: _Going) -> list[list[LayerRow]]:
    """Return the runs that are folded in a volume whose snapshots of these layers lose their names. Inside `reading`."""
    dropped = set(layers)
    gone = {layer.id for layer in going.layers}
    runs: list[list[LayerRow]] = []
    seen: set[bytes] = set()
    # What stood beside a layer that goes may be alone on the one below now.
    for layer in (*layers, *(one.parent for one in going.layers)):
        if layer is not None and layer not in gone and layer not in seen:
            runs.append(fold_policy.run_around(catalog, head, layer, dropped=dropped, gone=gone))
            seen.update(one.id for one in runs[-1])
    return runs


def _measured_with_folds(store: OpenStore, find: Callable[[], tuple[_Going, list[list[LayerRow]]]]) -> Loss:
    """Count the data of the layers that go, and what folding those frees that stay. Their maps are locked meanwhile."""

    def layers_of(found: tuple[_Going, list[list[LayerRow]]]) -> list[LayerRow]:
        going, runs = found
        return [*going.layers, *(layer for run in runs for layer in run)]

    with locked_maps(store, find, layers_of) as (going, runs):
        loss = _count(store, going)
        folded = _freed_by_folds(store, runs)
    freed = None if loss.bytes_freed is None or folded is None else loss.bytes_freed + folded
    return replaced(loss, bytes_freed=freed)


def _freed_by_folds(store: OpenStore, runs: Iterable[Sequence[LayerRow]]) -> int | None:
    """Return the data that folding runs of layers frees, so far as they are folded now; None where a map is damaged."""
    freed = 0
    try:
        for group in (group for run in runs for group in fold_policy.groups_to_fold(store, run)):
            with closing(fold_policy.lay(store, group)) as laid:
                freed += sum(laid.freed.values()) * group[-1].block_size
    except (FormatError, OSError):
        return None
    return freed


def of_shrinking(store: OpenStore, name: str, size_bytes: int) -> Loss:
    """Return what a resize would drop: the data behind the new end that no snapshot has, if the volume shrinks."""

    def find() -> list[LayerRow]:
        catalog = store.catalog
        own: list[LayerRow] = []
        for layer in reversed(catalog.chain(catalog.volume(name).head)):
            if own and (catalog.is_named(layer.id) or catalog.child_count(layer.id) > 1):
                break
            own.append(layer)
        return own

    with locked_maps(store, find, lambda layers: layers) as layers:
        behind = 0
        for layer in layers:
            first = -(-size_bytes // layer.block_size)
            with closing(open_map(store, layer)) as layer_map:
                data = layer_map.extents().only(states.DATA)
            behind += data.total_bytes - data.bytes_before(first * layer.block_size)
    return Loss((), (), behind, is_lost=behind > 0)  # zeros are no loss: they read as zeros if the volume grows again


# ---- the layers that are dropped ----


def _going(
    catalog: Catalog,
    volumes: list[VolumeRow],
    snapshots: list[str],
    dropped: Iterable[bytes],
    *,
    kept: Collection[bytes] = (),
) -> _Going:
    """Find the layers that `remove_unreachable_layers` would remove without these heads and names. Inside `reading`."""
    roots, gone = set(dropped), dict[bytes, LayerRow]()
    left: dict[bytes, int] = {}  # how many layers that stay stand on one; it is asked once, as ten thousand may go
    resized = False
    for root in roots:
        at: bytes | None = root
        while at is not None and at not in gone and at not in kept:
            row = catalog.layer_with_id(at)
            if row is None or _children_left(catalog, at, left) or (at not in roots and _has_name(catalog, at)):
                break
            gone[at], at = row, row.parent
            if at is not None:
                left[at] = _children_left(catalog, at, left) - 1
            below = catalog.layer_with_id(at)
            resized = resized or (below is not None and below.size_bytes != row.size_bytes)
    return _Going(volumes, snapshots, list(gone.values()), resized)


def _children_left(catalog: Catalog, layer: bytes, left: dict[bytes, int]) -> int:
    if layer not in left:
        left[layer] = catalog.child_count(layer)
    return left[layer]


def _has_name(catalog: Catalog, layer: bytes) -> bool:
    return catalog.is_named(layer) or catalog.volume_with_head(layer) is not None


def _measured(store: OpenStore, find: Callable[[], _Going], *, unflushed_of: str | None = None) -> Loss:
    """Count the data of the layers from their maps, which are locked meanwhile."""
    with locked_maps(store, find, lambda going: going.layers) as going:
        loss = _count(store, going)
        ids = {row.id for row in going.volumes}
        if unflushed_of is not None:
            ids.add(store.catalog.volume(unflushed_of).id)
        return replaced(loss, is_lost=loss.is_lost or any(has_unflushed(store, id) for id in ids))


def _count(store: OpenStore, going: _Going) -> Loss:
    """Count what layers hold whose maps are locked."""
    freed: int | None = 0
    is_lost = going.is_resized
    for layer in going.layers:
        try:
            with closing(open_map(store, layer)) as layer_map:
                data, zeros = (int(count) for count in layer_map.count())
        except (FormatError, OSError):  # the map is damaged, but the layer can be dropped all the same
            freed, is_lost = None, True
            continue
        is_lost = is_lost or bool(data or zeros)
        freed = None if freed is None else freed + data * layer.block_size
    return Loss(tuple(row.name for row in going.volumes), tuple(going.snapshots), freed, is_lost)
