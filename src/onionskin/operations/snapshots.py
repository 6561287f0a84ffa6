"""The operations on snapshots of an open volume: taking one, reverting to one, discarding and merging one.

What must hold: each change is one transaction. Whether it is allowed is checked inside the transaction, because another
process may name or clone a layer at any time. The work after it (folding and freeing) may fail, and then the next
opening does it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, takewhile
from typing import NamedTuple

from onionskin.base.held import held
from onionskin.base.naming import some_of
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import Catalog, LayerRow, SnapshotRow, VolumeRow
from onionskin.catalog.tree import (
    Snapshot,
    descendants,
    describe_snapshot,
    describe_snapshots,
    find_snapshot,
    nearest_snapshot,
    remove_unreachable_layers,
    unnamed_around,
    users_of,
)
from onionskin.errors import StateError
from onionskin.operations import holds, ownership, reclaim, snapshot_names
from onionskin.operations.flush import flush
from onionskin.operations.seal import Check, Part, RemoteHead, RemoteProcess, seal_together
from onionskin.storage.open_head import OpenDisk, OpenHead
from onionskin.storage.open_store import OpenStore

# So long a guest that goes back has the processors and the disk to itself, until it speaks: the files of what it had written
# are removed behind that, which takes tens of milliseconds of both. Not where the room of those may be missed meanwhile.
GUEST_SECONDS, GUEST_ROOM_BYTES = 0.25, 1 << 30
OPERATION_SECONDS = 10.0  # for which a group waits for each of its volumes, where others hold some of them too


def take(volume: OpenHead, name: str | None, note: str, guid: bytes) -> Snapshot:
    """Take a snapshot of the disk as it is now. See `Volume.snapshot`."""
    return take_together(volume.store, [(volume, name, guid)], note)[0]


def take_together(
    store: OpenStore,
    disks: Sequence[tuple[OpenHead | RemoteHead, str | None, bytes]],
    note: str,
    *,
    within: float | None = None,
    check: Check = lambda: None,
) -> list[Snapshot]:
    """Name disks of one store as they are at one instant: each with its name, or the time, and its GUID. All or none.

    `within` is for how many seconds other operations on heads that are open here are waited for, each; by default until they
    end. `check` is as for `seal.seal_together`.
    """

    def check_all() -> None:
        check()
        if store.catalog.base_merges():  # nearly never; asked once for all
            for naming in namings:
                naming.head.refuse_half_merged()
        _refuse_taken(store, namings)

    taken: list[Snapshot] = []
    with in_operations([head for head, _, _ in disks], within):
        if len(disks) > 1:
            _start_writing([head for head, _, _ in disks])
        namings = [_Naming(store, head, name, note, guid) for head, name, guid in disks]
        parts = [Part(naming.head, _check_nothing, naming.number) for naming in namings]
        seal_together(
            store,
            parts,
            lambda: taken.extend(_write_names(store, namings)),
            check=check_all,
        )
    return taken[-len(namings) :]  # the transaction may have run twice


def _start_writing(heads: Sequence[OpenHead | RemoteHead]) -> None:
    """Have the disk write what was not flushed, while the seals are prepared."""
    for head in heads:
        if isinstance(head, OpenHead):
            head.path.start_writing()


def _check_nothing() -> None:
    """Check nothing of one disk: all are checked at once."""


@held
def in_operations(heads: Sequence[OpenHead | RemoteHead], within: float | None = None) -> Iterator[None]:
    """Hold volumes for an operation on all of them.

    By their ids: whoever else holds several takes them in this order, so no two wait for each other. The last of other
    processes need not hold its volumes yet in the block: it does before their seals begin (`seal.RemoteProcess.entered`). An
    interrupt waits where there are several, since a stack of contexts that is interrupted as it is left would leave none of
    them.
    """
    if len(heads) == 1 and isinstance(heads[0], OpenHead):
        with heads[0].operation(during_merge=True, within=within):
            yield
        return
    if not all(isinstance(head, OpenHead) for head in heads):
        within = OPERATION_SECONDS
    ordered = sorted(heads, key=lambda head: head.row.id)
    with DeferredInterrupt(), ExitStack() as stack:
        last: RemoteProcess | None = None
        for _, run in groupby(ordered, key=lambda head: id(head if isinstance(head, OpenHead) else head.process)):
            if last is not None:
                last.entered()
            last = _enter(stack, list(run), within)
        yield


def _enter(stack: ExitStack, run: Sequence[OpenHead | RemoteHead], within: float | None) -> RemoteProcess | None:
    """Hold one volume that is open here, or those of another process that follow each other: in one message.

    Returns the process that was asked and has not answered yet.
    """
    remotes: list[RemoteHead] = []
    for head in run:
        if isinstance(head, OpenHead):
            stack.enter_context(head.operation(during_merge=True, within=within))
        else:
            remotes.append(head)
    if remotes:
        remotes[0].process.enter(remotes, within)
        return remotes[0].process
    return None


class _Naming:
    """The name that a snapshot gives, and its row."""

    row: SnapshotRow
    sealed: LayerRow

    def __init__(self, store: OpenStore, head: OpenHead | RemoteHead, name: str | None, note: str, guid: bytes) -> None:
        self.head = head
        self.name = name
        self._store = store
        self._note = note
        self._guid = guid

    def number(self, sealed: LayerRow, head: LayerRow) -> None:
        """Make the row. Inside the transaction, which may run twice."""
        volume = self.head.row.id
        # The head's lock byte is a number that no snapshot has yet. One of its own would lie between the bytes of
        # the chain, which are locked in stretches: for the kernel each stretch costs the more the more there are.
        number = head.map_lock_byte
        called = self.name or snapshot_names.name_of_time(self._store.catalog, volume, head.created_ns)
        self.sealed = sealed
        self.row = SnapshotRow(volume, called, sealed.id, self._guid, head.created_ns, self._note, number)


def _refuse_taken(store: OpenStore, namings: Sequence[_Naming]) -> None:
    """Raise SnapshotExistsError where one of the names is taken. For all in one question, as in `_write_names`."""
    wanted = {naming.head.row.id: naming.name for naming in namings if naming.name}
    taken = store.catalog.snapshot_names_found(wanted.items())
    for naming in namings:
        if naming.name and naming.head.row.id in taken:
            snapshot_names.refuse_taken(store.catalog, naming.head.row.id, naming.head.name, naming.name)


def _write_names(store: OpenStore, namings: Sequence[_Naming]) -> list[Snapshot]:
    """Write the rows, and describe them. Inside the transaction."""
    store.catalog.insert_all(naming.row for naming in namings)
    return describe_snapshots(store.catalog, [(naming.head.row, naming.row, naming.sealed) for naming in namings])


def parent_of(volume: OpenDisk) -> Snapshot | None:
    """Return the snapshot of this volume that the disk stands on."""
    catalog = volume.store.catalog
    with catalog.reading():
        top = catalog.layer_with_id(volume.head_now)
        if top is None:
            raise StateError(f"{volume!r}: the snapshot was dropped, and nothing says any more what it was taken after")
        row = nearest_snapshot(catalog, volume.row, top.parent)
        return describe_snapshot(catalog, volume.row, row, catalog.layer(row.layer)) if row else None


def is_changed(volume: OpenDisk) -> bool:
    """Whether anything was written, trimmed or resized since `parent_of`. This flushes first."""
    catalog = volume.store.catalog
    return is_changed_over(volume, lambda: {row.layer for row in catalog.snapshots_of(volume.row.id)})


def is_changed_over(volume: OpenDisk, names: Callable[[], set[bytes]]) -> bool:
    """Whether anything was written, trimmed or resized since the nearest of the layers that `names` returns.

    This flushes first. Other threads may change the tree meanwhile: the layers are read in one state of the catalog, and
    their maps under locks.
    """
    from onionskin.operations.locked_maps import locked_maps
    from onionskin.storage.block_maps import map_is_used, read_layers

    flush(volume)

    def find() -> tuple[list[LayerRow], LayerRow | None]:
        named, chain = names(), read_layers(volume.store.catalog, volume.head_now).layers
        above = list(takewhile(lambda layer: layer.id not in named, reversed(chain)))
        return above, chain[-len(above) - 1] if len(above) < len(chain) else None

    with locked_maps(volume.store, find, lambda found: found[0]) as (above, below):
        if below and below.size_bytes != volume.size_bytes:
            return True
        return any(map_is_used(volume.store, layer) for layer in above)


def revert(
    volume: OpenHead,
    name: str,
    *,
    guid: str | None = None,
    for_machine: bytes | None = None,
    check: Check = lambda: None,
) -> None:
    """Make the disk read as a snapshot again. See `Volume.revert`.

    `for_machine`: the machine that is put back as a whole; the disk of another one is refused. `check` is called in the
    transaction, and raises where nothing is to be done any more.
    """
    revert_together([Target(volume, name, guid)], for_machine=for_machine, then=check)


class Target(NamedTuple):
    """A volume that is put back to one of its snapshots, which has this GUID, if one is given."""

    volume: OpenHead
    name: str
    guid: str | None = None


def revert_together(
    targets: Sequence[Target],
    *,
    for_machine: bytes | None = None,
    then: Callable[[], None] = lambda: None,
    when_ready: Callable[[], None] = lambda: None,
    when_changed: Callable[[], None] = lambda: None,
) -> None:
    """Put volumes of one store back, all in one transaction, in which `then` is called. As for `revert`.

    `when_ready` is called before that transaction, and `when_changed` behind it, as `restart_together` does.
    """
    from onionskin.operations.hidden_blocks import free_hidden
    from onionskin.operations.restart import restart_together

    if not targets:
        return
    catalog = targets[0].volume.store.catalog
    with _in_all([target.volume for target in targets]):
        for target in targets:
            ownership.refuse_put_back(catalog, target.volume.row.id, for_machine)
        layers = [
            snapshot_names.find_chosen(catalog, target.volume.row, [target.name], target.guid)[0].layer
            for target in targets
        ]
        around = [unnamed_around(catalog, catalog.layer(target.volume.head).parent) for target in targets]

        def check() -> None:
            for target, layer in zip(targets, layers, strict=True):
                ownership.refuse_put_back(catalog, target.volume.row.id, for_machine)
                _refuse_renamed(target.volume, target.name, layer)
            then()

        heads = [(target.volume, layer) for target, layer in zip(targets, layers, strict=True)]
        if for_machine is not None and _has_room_for_a_guest(targets[0].volume.store):
            targets[0].volume.store.rest(GUEST_SECONDS)
        restart_together(heads, check, when_ready, when_changed)
        for target, unnamed in zip(targets, around, strict=True):
            free_hidden(target.volume, unnamed)


def _has_room_for_a_guest(store: OpenStore) -> bool:
    found = os.statvfs(store.layout.root)
    return found.f_bavail * found.f_frsize >= GUEST_ROOM_BYTES


@held
def _in_all(volumes: Sequence[OpenHead]) -> Iterator[None]:
    """Hold volumes that are open here for an operation on all of them, in the order of `in_operations`, and as that does."""
    if len(volumes) == 1:
        with volumes[0].operation():
            yield
        return
    with DeferredInterrupt(), ExitStack() as operations:
        for volume in sorted(volumes, key=lambda volume: volume.row.id):
            operations.enter_context(volume.operation())
        yield


def discard(
    volume: OpenHead,
    names: Sequence[str],
    *,
    recursive: bool,
    guids: str | Sequence[str] | None = None,
    check: Check = lambda: None,
) -> None:
    """Drop names of snapshots, and all that was written after them on their branches. See `Volume.discard`.

    `check` is as for `revert`.
    """
    from onionskin.operations.fold import fold_where_unnamed
    from onionskin.operations.hidden_blocks import free_hidden
    from onionskin.operations.restart import restart_on

    with volume.operation():
        catalog = volume.store.catalog
        rows = snapshot_names.find_chosen(catalog, volume.row, names, guids)
        parents = [catalog.layer(row.layer).parent for row in rows]
        around = dict.fromkeys(id for row in rows for id in unnamed_around(catalog, row.layer))

        def drop() -> None:
            # This is checked inside the transaction, because others may clone a snapshot at any time.
            check()
            for row in rows:
                _refuse_renamed(volume, row.name, row.layer)
            branches = refuse_discard(catalog, volume.row, rows, recursive)
            if any(volume.head in above for above in branches.values()):
                ownership.refuse_put_back(catalog, volume.row.id)
            going = all_of_branches(branches)
            holds.refuse_held(catalog, going)
            for id in going:
                catalog.remove_snapshot_of_layer(id)
            remove_unreachable_layers(catalog, *going)

        branches = refuse_discard(catalog, volume.row, rows, recursive)
        under_head = [root for root, above in branches.items() if volume.head in above]
        if under_head:
            ownership.refuse_put_back(catalog, volume.row.id)
            restart_on(volume, under_head[0], drop)
        else:
            volume.store.change(drop)
            reclaim.work_soon(volume.store)
        fold_where_unnamed(
            volume, [id for row, parent in zip(rows, parents, strict=True) for id in (row.layer, parent)]
        )
        free_hidden(volume, around)


def branches_of(catalog: Catalog, rows: Iterable[SnapshotRow]) -> dict[bytes, set[bytes]]:
    """Return what stands on the lowest of these snapshots, by their layers; the others stand on those."""
    branches: dict[bytes, set[bytes]] = {}
    covered: set[bytes] = set()
    for row in sorted(rows, key=lambda row: row.number):  # so what stands on another one is mostly not asked for
        if row.layer not in covered:
            branches[row.layer] = descendants(catalog, row.layer)
            covered |= branches[row.layer]
    return {root: above for root, above in branches.items() if root not in covered}


def all_of_branches(branches: dict[bytes, set[bytes]]) -> set[bytes]:
    """Return the layers of branches, and those that they stand on."""
    return set(branches).union(*branches.values())


def refuse_discard(
    catalog: Catalog, volume: VolumeRow, rows: Sequence[SnapshotRow], recursive: bool
) -> dict[bytes, set[bytes]]:
    """Raise StateError if something needs snapshots that are discarded together. Return their branches."""
    names = {row.layer: row.name for row in rows}
    branches = branches_of(catalog, rows)
    for root, above in branches.items():
        _refuse_needed(catalog, volume, names[root], above - names.keys(), recursive)
    return branches


def _refuse_needed(catalog: Catalog, volume: VolumeRow, name: str, above: set[bytes], recursive: bool) -> None:
    """Raise StateError if something above a snapshot needs it. `above` are the layers that stand on the snapshot."""
    users = users_of(catalog, above, besides=[volume.id])
    if users:
        raise StateError(
            f"snapshot {name!r} is needed by {some_of(users)}; delete or flatten those volumes first, or merge the "
            "snapshot instead"
        )
    named = sorted(row.name for row in catalog.snapshots_of(volume.id) if row.layer in above)
    if named and not recursive:
        raise StateError(
            f"snapshots were taken after {name!r}: {some_of(named)}; pass recursive to discard them too, or merge "
            f"{name!r} to keep what was written"
        )


def _refuse_renamed(volume: OpenHead, name: str, layer: bytes) -> None:
    """Raise StateError if a name does not mean this layer any more, because somebody renamed snapshots.

    This is called inside the transaction that makes the change.
    """
    if find_snapshot(volume.store.catalog, volume.row, name).layer != layer:
        raise StateError(
            f"snapshots of volume {volume.name!r} were renamed meanwhile, and {name!r} is another one now; nothing was "
            "changed; look at them, and try again"
        )


def merge(
    volume: OpenHead,
    names: Sequence[str],
    *,
    guids: str | Sequence[str] | None = None,
    check: Check = lambda: None,
) -> None:
    """Drop snapshots' names and keep all data. See `Volume.merge`. `check` is as for `revert`."""
    from onionskin.operations.fold import fold_where_unnamed
    from onionskin.operations.hidden_blocks import free_hidden

    with volume.operation():
        catalog = volume.store.catalog
        rows = snapshot_names.find_chosen(catalog, volume.row, names, guids)
        around = dict.fromkeys(id for row in rows for id in unnamed_around(catalog, row.layer))

        def drop() -> None:
            check()
            holds.refuse_held(catalog, [row.layer for row in rows])
            for row in rows:
                _refuse_renamed(volume, row.name, row.layer)
                catalog.remove_snapshot(volume.row.id, row.name)
            remove_unreachable_layers(catalog, *(row.layer for row in rows))

        volume.store.change(drop)
        reclaim.work_soon(volume.store)
        fold_where_unnamed(volume, [row.layer for row in rows])
        free_hidden(volume, around)
