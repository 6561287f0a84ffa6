"""The snapshots of a machine as a tree: what there is, and dropping some of them, disks and RAM alike.

What must hold: a snapshot of a machine goes with all that it binds, in one transaction, and the question whether anything
needs it is asked there. What is folded afterwards is left to whoever holds the volumes, and to their next opening.

The head of a RAM volume is what a running machine has, or what a fork that never ran begins with. Of any other machine that
is off nothing reads it, so it is made anew on what stays (`reset_ram`): no RAM that was discarded is kept below it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, cast

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.naming import some_of
from onionskin.base.records import record
from onionskin.catalog import Catalog, LayerRow, MachineRow, MachineSnapshotRow, SnapshotRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import remove_unreachable_layers, when
from onionskin.errors import StateError
from onionskin.operations import holds, machines
from onionskin.operations.machines import Which
from onionskin.operations.snapshots import Target, all_of_branches, refuse_discard, revert_together
from onionskin.storage.chain import NewHead
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from onionskin.base.annotations import RecordedMode


@record
class MachineSnapshotInfo:
    """A snapshot of a machine.

    Attributes
    ----------
    name : str
    created : datetime.datetime
    parent : str or None
        The snapshot of the machine after which it was taken.
    mode : str
        "live" or "pause", with its RAM, or "off": of its disks and configuration alone.
    note : str
    disks : mapping of str to str
        What it has of each disk, as ``"volume@snapshot"``.
    ram : str or None
        The snapshot of the RAM volume, so too.
    state_bytes : int
        How many bytes the state of the devices has.
    """

    name: str
    created: datetime
    parent: str | None
    mode: "RecordedMode"
    note: str
    disks: Mapping[str, str]
    ram: str | None
    state_bytes: int


class Dropped(NamedTuple):
    """What was dropped: the names of the snapshots, in the order of taking, and the volumes that have layers to fold."""

    snapshots: list[str]
    volumes: list[str]


# ---- looking ----


def list_snapshots(store: OpenStore, which: Which) -> list[MachineSnapshotInfo]:
    """Return the snapshots of a machine, in the order of taking."""
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        taken = catalog.snapshots_of_machine(machine.id)
        return [_described(catalog, machine, row, {one.id: one.name for one in taken}) for row in taken]


def snapshot_info(store: OpenStore, which: Which, snapshot: str) -> MachineSnapshotInfo:
    """Return one snapshot of a machine."""
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        row = machines.find_snapshot(catalog, machine, snapshot)
        above = catalog.machine_snapshot_with_id(row.parent)
        return _described(catalog, machine, row, {above.id: above.name} if above else {})


def _described(
    catalog: Catalog, machine: MachineRow, row: MachineSnapshotRow, names: Mapping[bytes, str]
) -> MachineSnapshotInfo:
    bound = {one.position: one.layer for one in catalog.disks_of_machine_snapshot(row.id)}
    return MachineSnapshotInfo(
        row.name,
        when(row.created_ns),
        names.get(row.parent) if row.parent else None,
        cast("RecordedMode", row.mode),
        row.note,
        {disk.name: _snapshot_name(catalog, bound.get(disk.position)) for disk in catalog.disks_of_machine(machine.id)},
        None if row.ram is None else _snapshot_name(catalog, row.ram),
        row.state_bytes,
    )


def _snapshot_name(catalog: Catalog, layer: bytes | None) -> str:
    found = catalog.snapshot_of_layer(layer or b"")
    volume = catalog.volume_with_id(found.volume) if found else None
    return f"{volume.name}@{found.name}" if found and volume else "(missing)"  # in a damaged catalog


# ---- putting back ----

PutBack = Callable[[str, str, str, MachineRow], None]


class Part(NamedTuple):
    """A volume of a machine, and the snapshot of it that a snapshot of the machine binds: its name and its GUID."""

    volume: str
    id: bytes
    snapshot: str
    guid: str


PutBackTogether = Callable[[Sequence[Part], MachineRow, bytes], bool]


def _parts(
    catalog: Catalog, which: Which, snapshot: str
) -> tuple[MachineRow, MachineSnapshotRow, list[Part], Part | None]:
    """Return a machine, a snapshot of it, and what that binds: the disks, and the RAM, if it has any."""
    with catalog.reading():
        machine = machines.find(catalog, which)
        row = machines.find_snapshot(catalog, machine, snapshot)
        layers = [one.layer for one in catalog.disks_of_machine_snapshot(row.id)]
        wanted = layers + ([] if row.ram is None else [row.ram])
        named = {one.layer: one for one in catalog.snapshots_of_layers(wanted)}
        volumes = {one.id: one.name for one in machines.volumes_of(catalog, machine)}
        has = sorted(one.volume for one in named.values())
        if has != sorted(volumes if row.ram is not None else volumes.keys() - {machine.ram}):
            raise damaged(catalog.path, f"a part of snapshot {snapshot!r} of machine {machine.name!r} is missing")

    def part(layer: bytes) -> Part:
        found = named[layer]
        return Part(volumes[found.volume], found.volume, found.name, found.guid.hex())

    return machine, row, [part(layer) for layer in layers], None if row.ram is None else part(row.ram)


def revert(store: OpenStore, which: Which, snapshot: str, put_back: PutBack, *, ram: bool) -> MachineSnapshotRow:
    """Put the disks of a machine back to one of its snapshots, so that the next start goes on from there.

    The guest does not run meanwhile. `put_back` is called for each volume with its name, the name and the GUID of its
    snapshot, and the machine; where it fails, this can be called again, and a start of the machine does so. With `ram`, the
    RAM volume is put back too, for which nobody else may hold it.
    """
    machine, row, parts, of_ram = _parts(store.catalog, which, snapshot)
    if ram and of_ram is not None:
        parts.append(of_ram)
    machines.note_reverting(store, machine.id, row.id)
    _put_back_each(parts, machine, snapshot, put_back)
    machines.note_reverted(store, machine.id, row.id)
    return row


def _put_back_each(parts: Sequence[Part], machine: MachineRow, snapshot: str, put_back: PutBack) -> None:
    try:
        _at_once([partial(put_back, part.volume, part.snapshot, part.guid, machine) for part in parts])
    except StateError as error:
        raise StateError(
            f"{error}; of machine {machine.name!r} some disks may be put back and others not: revert it again, else its next "
            f"start puts all of them back to {snapshot!r}"
        ) from error


class RevertInPlace:
    """Puts the volumes of a machine back whose process stays: the disks first, and at last the RAM volume.

    Two transactions do it where one server has all disks. The first puts them back, and notes that the machine is being put
    back, which a start would end. The second puts the RAM volume back, and notes that the guest may write.

    Parameters
    ----------
    store : OpenStore
    which : str or bytes
        The machine.
    snapshot : str
        Of it, with RAM.
    """

    def __init__(self, store: OpenStore, which: Which, snapshot: str) -> None:
        self._store = store
        self._snapshot = snapshot
        self._machine, self._row, self._disks, self._ram = _parts(store.catalog, which, snapshot)

    def put_disks_back(self, together: PutBackTogether, put_back: PutBack) -> None:
        """Put the disks back: `together`, if one process has them all, or else each with `put_back`, as in `revert`."""
        machine, row = self._machine, self._row
        if self._disks and together(self._disks, machine, row.id):
            return
        machines.note_reverting(self._store, machine.id, row.id)
        _put_back_each(self._disks, machine, self._snapshot, put_back)

    def put_ram_back(
        self,
        ram: OpenHead,
        when_ready: Callable[[], None] = lambda: None,
        when_changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Put the RAM volume back. The disks are, and the guest may write from here on.

        `when_ready` is called when all is done that can be done before the guest may write. Where it raises, the RAM volume
        stays as it is. `when_changed` is called when the guest may write.
        """
        part, catalog = self._ram, self._store.catalog
        assert part is not None

        def note() -> None:
            machines.refuse_other_revert(catalog, self._machine.id, self._row.id)
            machines.write_running(catalog, self._machine.id)

        target = Target(ram, part.snapshot, part.guid)
        revert_together(
            [target], for_machine=self._machine.id, then=note, when_ready=when_ready, when_changed=when_changed
        )


def _at_once(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls at the same time, since each waits for its server or its disk. A failure is raised when all have ended."""
    if len(calls) <= 1:
        for call in calls:
            call()
        return
    from concurrent.futures import (
        ThreadPoolExecutor,
    )  # it brings logging, and few calls have more than one disk to wait for

    with ThreadPoolExecutor(len(calls), "onionskin put back") as threads:
        begun = [threads.submit(call) for call in calls]
    for one in begun:
        one.result()


def put_back_to_beginning(store: OpenStore, which: Which, *, held: Collection[bytes]) -> None:
    """Put a fork back to what it was made from: its disks and its RAM, so that the next start goes on from there again.

    The machine is off and kept off, and the caller keeps these of its disks closed. Its own snapshots stay.
    """
    catalog = store.catalog

    def change() -> None:
        machine = machines.find(catalog, which)
        layers, taken = beginning_of_fork(catalog, machine)
        volumes = machines.volumes_of(catalog, machine)
        if not {volume.id for volume in volumes} - {machine.ram} <= set(held):
            raise StateError(f"the disks of machine {machine.name!r} changed meanwhile; nothing was changed; try again")
        for volume in volumes:
            layer = layers.get(volume.id)
            _put_head(store, volume, None if layer is None else catalog.layer(layer))
        resumes = machines.BOOTS if taken.ram is None else machines.RESUMES
        catalog.update_machine(
            machine.id, stands_on=None, resumes=resumes, state_bytes=taken.state_bytes, recorded=taken.recorded
        )

    store.change(change)


def beginning_of_fork(catalog: Catalog, machine: MachineRow) -> tuple[dict[bytes, bytes], MachineSnapshotRow]:
    """Return the layers that the volumes of a fork began as, and the snapshot of a machine that binds them.

    Raises
    ------
    StateError
        It is no fork, or that snapshot is gone.
    """
    origin = catalog.lineage_of(machine.ram)
    if origin is None or origin.parent is None:
        raise StateError(f"machine {machine.name!r} is no fork, so it has no beginning; revert it to a snapshot of it")
    found = {volume.id: catalog.layer_of_origin(volume.id) for volume in machines.volumes_of(catalog, machine)}
    layers = {volume: layer for volume, layer in found.items() if layer is not None}
    taken = list(catalog.machine_snapshots_of_layers(layers.values()).values())
    is_whole = found.keys() - {machine.ram} <= layers.keys() and len({row.id for row in taken}) == 1
    if not is_whole or (taken[0].ram is None) != (machine.ram not in layers):
        raise StateError(
            f"the snapshot that machine {machine.name!r} was forked from is gone; revert it to a snapshot of its own"
        )
    return layers, taken[0]


# ---- dropping ----


def merge(store: OpenStore, which: Which, snapshots: Sequence[str], ids: Collection[bytes] | None = None) -> Dropped:
    """Drop snapshots of a machine and keep all data: what was written after each joins what was written before it.

    With `ids`, only while the names mean the snapshots with these ids.
    """
    id = machines.find(store.catalog, which).id

    def change() -> Dropped:
        catalog = store.catalog
        machine = machines.find(catalog, id)
        going = chosen(catalog, machine, snapshots)
        if ids is not None and {row.id for row in going} != set(ids):
            raise StateError(
                f"snapshots of machine {machine.name!r} were renamed meanwhile; nothing was dropped; look at them, and try "
                "again"
            )
        refuse_awaited(catalog, machine, going)
        layers = catalog.layers_of_machine_snapshots(row.id for row in going)
        holds.refuse_held(catalog, layers, for_machine=True)
        _forget(catalog, going)
        for layer in layers:
            catalog.remove_snapshot_of_layer(layer)
        remove_unreachable_layers(catalog, *layers)
        return _dropped(catalog, machine, going)

    with machines.snapshots_kept(store, id, to_drop=True):
        return store.change(change)


def discard(
    store: OpenStore, which: Which, snapshots: Sequence[str], *, recursive: bool, held: Collection[bytes] | None
) -> Dropped:
    """Drop snapshots of a machine, and all that was written after them on their branches.

    `held`: the machine is off and kept off, and the caller keeps these of its disks closed; where they stand on what goes,
    they read as the lowest that goes again. None: it runs, and what it runs on is refused.
    """
    id = machines.find(store.catalog, which).id

    def change() -> Dropped:
        catalog = store.catalog
        machine = machines.find(catalog, id)
        going = going_with(catalog, machine, snapshots, recursive=recursive)
        refuse_awaited(catalog, machine, going, but_own=held is not None)
        stands = machine.stands_on in {row.id for row in going}
        if held is None:
            refuse_run_on(machine, going)
        named = catalog.snapshots_of_layers(catalog.layers_of_machine_snapshots(row.id for row in going))
        if held is not None:
            reset_ram(store, machine, without={row.layer for row in named})
        layers = _layers_of_branches(store, named, recursive=recursive, held=held or ())
        refuse_others(catalog, layers, going)
        holds.refuse_held(catalog, layers, for_machine=True)
        _forget(catalog, going)
        if stands:
            catalog.update_machine(machine.id, resumes=machines.BOOTS, state_bytes=0, recorded="")
        for layer in layers:
            catalog.remove_snapshot_of_layer(layer)
        remove_unreachable_layers(catalog, *layers)
        return _dropped(catalog, machine, going)

    with machines.snapshots_kept(store, id, to_drop=True):
        return store.change(change)


def chosen(catalog: Catalog, machine: MachineRow, names: Sequence[str]) -> list[MachineSnapshotRow]:
    """Return snapshots of a machine, each once, in the order of taking."""
    rows = {row.id: row for row in (machines.find_snapshot(catalog, machine, name) for name in names)}
    return sorted(rows.values(), key=lambda row: row.number)


def going_with(
    catalog: Catalog, machine: MachineRow, names: Sequence[str], *, recursive: bool
) -> list[MachineSnapshotRow]:
    """Return snapshots of a machine and those that were taken after them, in the order of taking.

    Raises
    ------
    StateError
        There are some after them that are not named, and `recursive` is not given.
    """
    wanted = {row.id for row in chosen(catalog, machine, names)}
    taken = catalog.snapshots_of_machine(machine.id)
    going = set(wanted)
    for row in taken:  # in the order of taking, so a parent is before what was taken after it
        if row.parent in going:
            going.add(row.id)
    after = [row.name for row in taken if row.id in going - wanted]
    if after and not recursive:
        raise StateError(
            f"snapshots of machine {machine.name!r} were taken after {some_of(sorted(names))}: {some_of(after)}; pass "
            "recursive to discard them too, or merge instead, which keeps what was written"
        )
    return [row for row in taken if row.id in going]


def stands_on_any(store: OpenStore, which: Which, snapshots: Sequence[str], *, recursive: bool) -> bool:
    """Whether a machine stands on one of the snapshots that a discard of these drops."""
    catalog = store.catalog
    with catalog.reading():
        machine = machines.find(catalog, which)
        return machine.stands_on in {row.id for row in going_with(catalog, machine, snapshots, recursive=recursive)}


def refuse_awaited(
    catalog: Catalog, machine: MachineRow, going: Sequence[MachineSnapshotRow], *, but_own: bool = False
) -> None:
    """Raise StateError where a machine is about to go on from the RAM of one of these: itself, or a fork that never ran."""
    ids = {row.id for row in going}
    if machine.resumes and machine.stands_on in ids and not but_own:
        raise StateError(
            f"machine {machine.name!r} is about to go on from a snapshot that would go; start it first, or revert it to "
            "another one; nothing was dropped"
        )
    names = {row.layer: row for row in catalog.snapshots_of_layers(row.ram for row in going if row.ram is not None)}
    guids = {row.guid for row in names.values()}
    forks = sorted(one.name for one in catalog.machines_awaiting(machine.ram) if one.guid in guids)
    if forks and all(one.startswith(machines.WAITING_PREFIX) for one in forks):
        raise StateError(
            f"a pool of machine {machine.name!r} has forks ready of a snapshot that would go: {some_of(forks)}; end it "
            "first, with 'onionskin machine pool --stop'; nothing was dropped"
        )
    if forks:
        raise StateError(
            f"machines were forked from {machine.name!r} that have not run yet: {some_of(forks)}; start them first, or "
            "delete them; nothing was dropped"
        )


def _layers_of_branches(
    store: OpenStore, named: Sequence[SnapshotRow], *, recursive: bool, held: Collection[bytes]
) -> set[bytes]:
    """Return the layers that go with snapshots of volumes, those of each volume on branches. Inside the transaction.

    A head on one of the branches is put on the lowest layer of it, if its volume is held; else it is refused.
    """
    catalog = store.catalog
    layers: set[bytes] = set()
    of_volumes: dict[bytes, list[SnapshotRow]] = {}
    for row in named:
        of_volumes.setdefault(row.volume, []).append(row)
    for volume in catalog.volumes_with_ids(of_volumes):
        branches = refuse_discard(catalog, volume, of_volumes[volume.id], recursive)
        under_head = [root for root, above in branches.items() if volume.head in above]
        layers |= all_of_branches(branches) - {volume.head}
        if under_head and volume.id not in held:
            raise StateError(
                f"the disk of volume {volume.name!r} stands on what would be discarded; put the machine back to another "
                "snapshot first; nothing was discarded"
            )
        for root in under_head:
            _put_head(store, volume, catalog.layer(root))
    return layers


def refuse_run_on(machine: MachineRow, going: Sequence[MachineSnapshotRow]) -> None:
    """Raise StateError where a machine that runs stands on one of these."""
    if machine.stands_on in {row.id for row in going}:
        raise StateError(
            f"machine {machine.name!r} runs on what would be discarded; stop it, or revert it to another snapshot first; "
            "nothing was discarded"
        )


def refuse_others(catalog: Catalog, layers: set[bytes], going: Sequence[MachineSnapshotRow]) -> None:
    """Raise StateError if a snapshot of a machine would lose a part that is not discarded as a whole."""
    ids = {row.id for row in going}
    others = {row.name for row in catalog.machine_snapshots_of_layers(layers).values() if row.id not in ids}
    if others:
        raise StateError(f"snapshots of machines stand on these: {some_of(sorted(others))}; nothing was discarded")


def _forget(catalog: Catalog, going: Sequence[MachineSnapshotRow]) -> None:
    for row in going:
        now = catalog.machine_snapshot_with_id(row.id)  # its parent may have gone a moment ago
        if now is not None:
            catalog.remove_machine_snapshot(now)


def _dropped(catalog: Catalog, machine: MachineRow, going: Sequence[MachineSnapshotRow]) -> Dropped:
    return Dropped([row.name for row in going], [row.name for row in machines.volumes_of(catalog, machine)])


def reset_ram(store: OpenStore, machine: MachineRow, *, without: set[bytes]) -> None:
    """Put the head of a RAM volume on the newest RAM that stays below it, or on nothing. Inside a transaction.

    The machine is kept off, and `without` are layers that lose their names. The head of a fork that never ran is kept.
    """
    catalog = store.catalog
    if machine.resumes and machine.stands_on is None:
        return
    volume = machines.volumes_of(catalog, machine)[-1]
    chain = catalog.chain(volume.head)[:-1]
    if not any(layer.id in without for layer in chain):
        return
    own = {row.layer for row in catalog.snapshots_of(volume.id)}
    below = next((layer for layer in reversed(chain) if layer.id in own - without), None)
    _put_head(store, volume, below)


def _put_head(store: OpenStore, volume: VolumeRow, below: LayerRow | None) -> None:
    """Give a volume that nobody has open an empty head, on a layer or on nothing. What the old one had goes."""
    catalog = store.catalog
    old = catalog.layer(volume.head)
    size_bytes = below.size_bytes if below else old.size_bytes
    head = NewHead.on(below, base=None, block_size=old.block_size, wipe=old.wipe, size_bytes=size_bytes)
    head.insert(catalog)
    catalog.update(VolumeRow, volume.id, head=head.layer.id)
    remove_unreachable_layers(catalog, volume.head)
