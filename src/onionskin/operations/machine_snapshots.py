"""One snapshot of a machine: its disks, cut at one instant, and its RAM, bound together.

What must hold: all of a snapshot of a machine is there, or nothing of it: one transaction names the snapshots of all disks,
seals and names the RAM, and writes what binds them. The disks are cut before that, while the guest is stopped, in a
transaction of its own, so that the guest goes on while its RAM is written. Between the two the layers that were cut have no
name, and nothing may fold them or give up a block of them. Therefore a staged volume stands on each, a pin, whose rows are
written with the cut and go with the commit. Whoever makes pins holds their locks. Those that a process leaves which died are
dropped as every staged volume is, and the layers are folded with the next cut or opening of their volume.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from onionskin.base.held import held
from onionskin.base.lazy import logger
from onionskin.base.naming import check_name, check_note
from onionskin.catalog import (
    Catalog,
    CommitUnknownError,
    LayerRow,
    MachineDiskRow,
    MachineRow,
    MachineSnapshotDiskRow,
    MachineSnapshotRow,
    SnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.rows import STAGED_PREFIX
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import unnamed_around
from onionskin.errors import OnionskinError, SnapshotExistsError, StateError
from onionskin.operations import machines, reclaim, snapshot_names, staged_volumes
from onionskin.operations.fold import fold_unnamed_below, fold_where_unnamed
from onionskin.operations.group_snapshot import Finder, Opener, open_heads
from onionskin.operations.hidden_blocks import free_hidden
from onionskin.operations.seal import Part, Ready, RemoteHead, seal_together
from onionskin.operations.snapshots import in_operations
from onionskin.storage.chain import NewHead, insert_heads
from onionskin.storage.locks import VolumeLock
from onionskin.storage.open_head import OpenHead
from onionskin.storage.open_store import OpenStore

_log = logger(__name__)

Head = OpenHead | RemoteHead


@dataclass(slots=True)
class _CutDisk:
    """A disk of a snapshot under way: its head, and the layer that was cut off, once it was."""

    row: MachineDiskRow
    head: Head
    pin: bytes
    lock: VolumeLock
    sealed: LayerRow | None = None
    number: int = 0
    created_ns: int = 0

    def keep(self, sealed: LayerRow, head: LayerRow) -> None:
        """Note what was sealed. Inside the transaction, which may run twice."""
        # The lock byte of the next head grows in the order of taking: see `snapshots`.
        self.sealed, self.number, self.created_ns = sealed, head.map_lock_byte, head.created_ns


class MachineCut:
    """A snapshot of a machine that is under way: `seal`, then `commit`. `cut_machine` makes it.

    Attributes
    ----------
    machine : MachineRow
        As it was when this began.
    """

    def __init__(self, store: OpenStore, machine: MachineRow, disks: Sequence[_CutDisk]) -> None:
        self.machine = machine
        self._store = store
        self._disks = disks
        self._id = new_id()
        self._is_sealed = False
        self._is_ended = False

    # ---- the cut ----

    def seal(self, when_cut: Callable[[], None] = lambda: None, when_ready: Ready = lambda keep_waiting: None) -> None:
        """Cut all disks at one instant. What was cut stays until `commit` or `abandon`.

        Durable on return, with no name yet. `when_ready` is called when all is done that can be done while the guest runs;
        on its return the guest stands still, and if it raises, nothing is cut. It calls what it is given every few seconds,
        so that who serves the disks waits for it. `when_cut` is called as soon as what the guest writes is in the snapshot no
        more: it may run from then on, while this makes durable what was cut.

        Raises
        ------
        StateError, OSError
            A disk cannot be cut: none was, and all go on.
        """
        if self._is_sealed or self._is_ended:
            raise StateError(f"the disks of machine {self.machine.name!r} were cut before; begin another snapshot")
        if not self._disks:
            when_ready(lambda: None)
            when_cut()
        else:
            with in_operations([disk.head for disk in self._disks]):
                parts = [
                    Part(disk.head, disk.head.refuse_half_merged, disk.keep, is_named=False) for disk in self._disks
                ]
                seal_together(self._store, parts, self._insert_pins, when_ready=when_ready, when_cut=when_cut)
        self._is_sealed = True

    def _insert_pins(self) -> None:
        """Write the rows of the pins. Inside the transaction that seals the disks."""
        catalog, heads, rows = self._store.catalog, [], []
        for disk in self._disks:
            layer = disk.sealed
            assert layer is not None
            head = NewHead.on(
                layer, base=None, block_size=layer.block_size, wipe=layer.wipe, size_bytes=layer.size_bytes
            )
            heads.append(head)
            rows.append(VolumeRow(disk.pin, f"{STAGED_PREFIX}{disk.pin.hex()}", head.layer.id, head.layer.created_ns))
        insert_heads(catalog, heads)
        catalog.insert_all(rows)

    def _remove_pins(self) -> None:
        """Remove the pins that are there. Inside a transaction. No file was ever made for one."""
        catalog = self._store.catalog
        rows = catalog.volumes_with_ids(disk.pin for disk in self._disks)
        catalog.remove_volumes(row.id for row in rows)
        catalog.remove_segments_of(*(row.head for row in rows))
        catalog.remove_layers(row.head for row in rows)

    # ---- its end ----

    def check(self, name: str | None) -> None:
        """Raise SnapshotExistsError where a name is taken, on the machine or on one of its disks; `commit` asks again."""
        if name is not None:
            refuse_taken(self._store.catalog, self.machine, self._volumes(), check_name("snapshot", name))

    def commit(
        self,
        name: str | None,
        note: str = "",
        *,
        mode: str,
        configuration: str,
        recorded: str = "",
        ram: OpenHead | None = None,
        state_bytes: int = 0,
    ) -> MachineSnapshotRow:
        """Name all of it in one transaction. Durable on return.

        Parameters
        ----------
        name : str or None
            What the snapshots of the machine, of its disks and of its RAM are called; None: by the time.
        note : str
        mode : {"live", "pause", "off"}
        configuration, recorded : str
            JSON, of the machine now.
        ram : OpenHead, optional
            The RAM volume, which is sealed as it is now; without it the mode is "off".
        state_bytes : int
            Of device state behind the RAM.

        Raises
        ------
        SnapshotExistsError
            The name is taken.
        StateError, OSError
            Nothing was named. `abandon` gives up what was cut.
        """
        name = None if name is None else check_name("snapshot", name)
        note = check_note(note)
        if not self._is_sealed or self._is_ended:
            raise StateError(f"the disks of machine {self.machine.name!r} are not cut, or the snapshot has ended")
        if (ram is None) != (mode == "off"):
            raise ValueError("a snapshot of a machine has RAM, or it was off")
        if ram is not None and ram.row.id != self.machine.ram:
            raise ValueError(f"volume {ram.name!r} is not the RAM of machine {self.machine.name!r}")
        taken: list[MachineSnapshotRow] = []
        of_ram: list[tuple[LayerRow, LayerRow]] = []

        def write() -> None:
            row = MachineSnapshotRow(
                self._id,
                self.machine.id,
                name or "",
                None,
                0,
                mode,
                note,
                None,
                state_bytes,
                configuration,
                recorded,
                0,
            )
            taken[:] = [self._write(row, name, of_ram[-1] if of_ram else None)]

        if ram is None:
            self._store.change(write)
        else:
            with in_operations([ram]):
                part = Part(ram, ram.refuse_half_merged, lambda sealed, head: of_ram.append((sealed, head)))
                seal_together(self._store, [part], write)
        self._end()
        if ram is not None:
            _fold_unnamed(ram)
        return taken[0]

    def _write(
        self, row: MachineSnapshotRow, name: str | None, ram: tuple[LayerRow, LayerRow] | None
    ) -> MachineSnapshotRow:
        """Write all rows of the snapshot. Inside the transaction, which may run twice."""
        catalog = self._store.catalog
        machine = catalog.machine_with_id(self.machine.id)
        if machine is None:
            raise StateError(f"machine {self.machine.name!r} was deleted meanwhile; nothing was taken")
        if row.mode == "off":
            refuse_resuming(machine)
        self._refuse_changed()
        now_ns = ram[1].created_ns if ram else 0
        created_ns = min((disk.created_ns for disk in self._disks), default=now_ns)
        volumes = self._volumes()
        if name is None:
            name = _name_of_time(catalog, machine, volumes, created_ns)
        else:
            refuse_taken(catalog, machine, volumes, name)
        for disk in self._disks:
            self._name(disk.head.row.id, disk.sealed, disk.number, name, row.note, created_ns)
        number = min((disk.number for disk in self._disks), default=0)
        if ram:
            number = number or ram[1].map_lock_byte
            self._name(machine.ram, ram[0], ram[1].map_lock_byte, name, row.note, created_ns)
        row = row._replace(
            name=name,
            parent=machine.stands_on,
            number=number or catalog.take_lock_byte(),
            ram=ram[0].id if ram else None,
            created_ns=created_ns,
        )
        catalog.insert(row)
        catalog.insert_all(
            MachineSnapshotDiskRow(row.id, disk.row.position, disk.sealed.id) for disk in self._disks if disk.sealed
        )
        catalog.update_machine(machine.id, stands_on=row.id, resumes=0, state_bytes=0, recorded="")
        self._remove_pins()
        return row

    def _refuse_changed(self) -> None:
        """Raise StateError if what was cut is not as it was left. Somebody else took the pins for dead ones."""
        catalog = self._store.catalog
        pinned = {row.id for row in catalog.volumes_with_ids(disk.pin for disk in self._disks)}
        for disk in self._disks:
            assert disk.sealed is not None
            if disk.pin not in pinned or not catalog.has_layer(disk.sealed.id) or catalog.is_named(disk.sealed.id):
                raise StateError(
                    f"what was cut of disk {disk.row.name!r} of machine {self.machine.name!r} is gone; nothing was taken; "
                    "try again"
                )
            if catalog.volume_with_id(disk.row.volume) is None:
                raise StateError(f"disk {disk.row.name!r} of machine {self.machine.name!r} was deleted meanwhile")

    def _name(self, volume: bytes, layer: LayerRow | None, number: int, name: str, note: str, created_ns: int) -> None:
        assert layer is not None
        self._store.catalog.insert(SnapshotRow(volume, name, layer.id, new_id(), created_ns, note, number))

    def _volumes(self) -> list[bytes]:
        return [disk.row.volume for disk in self._disks] + [self.machine.ram]

    def abandon(self) -> None:
        """Give up what was cut and not committed: nothing of it remains. Further calls do nothing.

        Where that cannot be done now, it is logged, and the next opening of a volume of the store does it.
        """
        if self._is_ended:
            return
        # The catalog is asked, because any error may have come behind the commit: that has removed the pins.
        layers = [(disk.head, disk.sealed.id) for disk in self._disks if disk.sealed is not None]
        try:
            if layers:
                self._store.change(self._remove_pins)
        except CommitUnknownError:
            raise
        except (OSError, OnionskinError) as error:
            _log.warning("a snapshot of machine %r could not be given up: %s", self.machine.name, error)
        finally:
            self._end()
        for head, layer in layers:
            if isinstance(head, OpenHead) and not head.closed:
                _fold_back(head, layer)

    def _end(self) -> None:
        self._is_ended = True
        for disk in self._disks:
            disk.lock.close()


def refuse_resuming(machine: MachineRow) -> None:
    """Raise StateError if the next start of a machine that is off goes on from RAM, which a snapshot would not have."""
    if machine.resumes:
        raise StateError(
            f"machine {machine.name!r} is about to go on from its RAM, or is being put back; nothing was taken; start it, "
            "and take the snapshot then"
        )


def _fold_unnamed(ram: OpenHead) -> None:
    """Fold layers of the RAM whose names somebody dropped while the machine ran. If that fails, the next opening does."""
    try:
        with ram.operation(during_merge=True):
            fold_unnamed_below(ram)
    except (OSError, OnionskinError) as error:
        _log.warning("%s: layers of %r could not be joined: %s", ram.store.path, ram.name, error)


def _fold_back(head: OpenHead, layer: bytes) -> None:
    """Fold a layer that was cut for nothing into what was written since. If that fails, the next opening does it."""
    catalog = head.store.catalog
    if catalog.is_named(layer):
        return
    try:
        with head.operation(during_merge=True):
            around = unnamed_around(catalog, layer)
            fold_where_unnamed(head, [layer])
            free_hidden(head, around)
        reclaim.work_soon(head.store)
    except (OSError, OnionskinError) as error:
        _log.warning("%s: what was cut for nothing could not be folded back: %s", head.store.path, error)


@held
def cut_machine(store: OpenStore, which: machines.Which, opener: Opener, finder: Finder) -> Iterator[MachineCut]:
    """Begin a snapshot of a machine: find or open its disks, whoever holds them. At the end, what is not committed goes.

    `opener` and `finder` are as for `group_snapshot.Heads`.
    """
    catalog = store.catalog
    catalog.refuse_read_only()
    staged_volumes.drop_dead(store)
    with catalog.reading():
        machine = machines.find(catalog, which)
        disks = catalog.disks_of_machine(machine.id)
        names = {row.id: row.name for row in machines.volumes_of(catalog, machine) if row.id != machine.ram}
        if not {disk.volume for disk in disks} <= names.keys():
            raise damaged(
                catalog.path, f"a disk of machine {machine.name!r} is no volume, or the one that keeps its RAM"
            )
    with open_heads(store, names.values(), opener, finder) as found:
        cut_disks: list[_CutDisk] = []
        cut = MachineCut(store, machine, cut_disks)
        try:
            for disk in disks:
                pin = new_id()
                lock = VolumeLock(store.layout, pin, "a snapshot of a machine")
                cut_disks.append(_CutDisk(disk, found.heads[names[disk.volume]], pin, lock))
            yield cut
        finally:
            cut.abandon()


def refuse_taken_name(store: OpenStore, machine: str, name: str | None) -> None:
    """Raise SnapshotExistsError where a name is taken, before a snapshot begins; `MachineCut.check` asks again."""
    if name is None:
        return
    catalog = store.catalog
    with catalog.reading():
        row = machines.find(catalog, machine)
        volumes = [disk.volume for disk in catalog.disks_of_machine(row.id)] + [row.ram]
        refuse_taken(catalog, row, volumes, check_name("snapshot", name))


def refuse_taken(catalog: Catalog, machine: MachineRow, volumes: Sequence[bytes], name: str) -> None:
    """Raise SnapshotExistsError if a name is taken on a machine, or on one of its volumes."""
    if catalog.machine_snapshot_named(machine.id, name):
        raise SnapshotExistsError(f"machine {machine.name!r} already has a snapshot {name!r}; choose another name")
    for volume in catalog.volumes_with_ids(volumes):
        snapshot_names.refuse_taken(catalog, volume.id, volume.name, name)


def _name_of_time(catalog: Catalog, machine: MachineRow, volumes: Sequence[bytes], time_ns: int) -> str:
    """Return the time as a name that is free on a machine and on its volumes. Inside a transaction."""
    is_taken = partial(_is_taken, catalog, machine, volumes)
    while True:
        name = snapshot_names.name_of_time(catalog, machine.ram, time_ns)
        if not is_taken(name):
            return name
        time_ns += 1_000_000


def _is_taken(catalog: Catalog, machine: MachineRow, volumes: Sequence[bytes], name: str) -> bool:
    try:
        refuse_taken(catalog, machine, volumes, name)
    except SnapshotExistsError:
        return True
    return False
