"""What is done to machines by their names: a new one, lists, a new name; and what the next start begins as.

What must hold: what a name means is asked inside the transaction that changes it. The RAM volume of a machine is held for as
long as the machine runs, by whoever runs it, and that alone says that it runs. A disk belongs to one machine.

A revert of a machine puts several disks back, one after the other or together. So first, or with them, it is noted what
they are put back to (`REVERTING`), and at last that all are (`RESUMES`). A start that finds the first one ends the
revert. Before the guest may write, the note is removed (`note_running`): RAM that is older than its disks is never
loaded. Where the guest goes on in its process, the note goes in the transaction that puts the RAM volume back, the last
one.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from onionskin.base.held import held
from onionskin.base.limits import DISKS_MAX, MEMORY_BYTES_MAX, STATE_BYTES_MAX
from onionskin.base.naming import check_name, refuse_no_mapping
from onionskin.base.records import field, record
from onionskin.base.waiting import within
from onionskin.catalog import (
    Catalog,
    LayerRow,
    MachineDiskRow,
    MachineRow,
    MachineSnapshotRow,
    VolumeRow,
    new_id,
)
from onionskin.catalog.sqlite_errors import damaged
from onionskin.catalog.tree import when
from onionskin.errors import MachineExistsError, MachineNotFoundError, SnapshotNotFoundError, StateError
from onionskin.operations import lineage, ownership, volumes
from onionskin.storage.block_maps import map_is_used
from onionskin.storage.chain import NewHead
from onionskin.storage.layout import bytes_in
from onionskin.storage.locks import locked_to_remove, volume_holder
from onionskin.storage.open_store import OpenStore

if TYPE_CHECKING:
    from typing import Literal

BOOTS, REVERTING, RESUMES = 0, 1, 2  # `MachineRow.resumes`: what the next start begins as
RAM_SUFFIX = ".ram"
WAITING_PREFIX = "warm-"  # of the names of machines that wait in a pool
_RAM_BLOCK_SIZE = 4096
KEPT_SECONDS = 10.0  # for which a transaction that drops snapshots, or a revert, is waited for


@record
class MachineDisk:
    """A disk of a machine.

    Attributes
    ----------
    name : str
        What it is called in the machine.
    volume : str
        Its volume.
    is_owned : bool
        Whether the volume goes with the machine, as the disks of forks do.
    """

    name: str
    volume: str
    is_owned: bool


@record
class MachineInfo:
    """The description of a machine, as the store knows it.

    Attributes
    ----------
    name : str
    state : str
        "running" if a process holds its RAM volume, whatever the guest does; else "off".
    pid : int or None
        That process.
    memory_bytes, cpus : int
    disks : tuple of MachineDisk
        In their order.
    ram : str
        The volume that keeps its RAM.
    snapshots : int
        How many there are.
    stands_on : str or None
        The snapshot of it that it was at last.
    begins : str
        What a start begins with: "boots" from the disks as they are, "resumes" from RAM, or "reverting": a revert of the
        machine did not end, and a start ends it.
    created : datetime.datetime
    expires : datetime.datetime or None
        From when on `Store.expire` may drop it.
    labels : mapping of str to str
    """

    name: str
    state: "Literal['off', 'running']"
    pid: int | None
    memory_bytes: int
    cpus: int
    disks: tuple[MachineDisk, ...]
    ram: str
    snapshots: int
    stands_on: str | None
    begins: str
    created: datetime
    expires: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@record
class Beginning:
    """What the next start of a machine begins with.

    Attributes
    ----------
    machine : MachineRow
    snapshot : MachineSnapshotRow or None
        The one that it stands on.
    is_reverting : bool
        Whether the disks have to be put back to that first.
    ram : tuple of (str, str or None), or None
        The volume and the snapshot that have the RAM, and the state of the devices behind it; without a snapshot the head of
        the volume has it. None: the start boots.
    key : str
        The GUID of that RAM, which is the same in all forks of a snapshot; empty where it boots.
    state_bytes : int
    recorded : str
        JSON about what saved it.
    """

    machine: MachineRow
    snapshot: MachineSnapshotRow | None
    is_reverting: bool
    ram: tuple[str, str | None] | None
    key: str
    state_bytes: int
    recorded: str


# ---- finding ----


Which = str | bytes  # the name of a machine; or its id, which means the same one whatever that is called by now


def find(catalog: Catalog, which: Which) -> MachineRow:
    """Return a machine, or raise MachineNotFoundError: there is none of that name; or StateError: it was deleted."""
    if isinstance(which, bytes):
        row = catalog.machine_with_id(which)
        if row is None:
            raise StateError(f"a machine of {catalog.path.parent} was deleted meanwhile; nothing was changed")
        return row
    row = catalog.machine_named(which)
    if row is None:
        where = "'onionskin machine list' lists them"
        if catalog.has_volume_named(which):
            where = "a volume has that name, whose verbs are those without 'machine'"
        raise MachineNotFoundError(f"the store {catalog.path.parent} has no machine {which!r}; {where}")
    return row


def find_snapshot(catalog: Catalog, machine: MachineRow, name: str) -> MachineSnapshotRow:
    """Return a snapshot of a machine by its name, or raise SnapshotNotFoundError."""
    row = catalog.machine_snapshot_named(machine.id, name)
    if row is None:
        raise SnapshotNotFoundError(
            f"machine {machine.name!r} has no snapshot {name!r}; 'onionskin machine tree' lists those it has"
        )
    return row


def volumes_of(catalog: Catalog, machine: MachineRow) -> list[VolumeRow]:
    """Return the volumes of a machine: its disks in their order, then its RAM."""
    ids = [disk.volume for disk in catalog.disks_of_machine(machine.id)] + [machine.ram]
    found = {row.id: row for row in catalog.volumes_with_ids(ids)}
    return [_there(catalog, machine, found.get(id)) for id in ids]


def _there(catalog: Catalog, machine: MachineRow, volume: VolumeRow | None) -> VolumeRow:
    """Return a volume of a machine. A sound catalog has it."""
    if volume is None:
        raise damaged(catalog.path, f"a volume of machine {machine.name!r} is missing")
    return volume


def disks_of(catalog: Catalog, machine: MachineRow) -> dict[bytes, str]:
    """Return the volumes that are the disks of a machine: their names, by their ids."""
    return {row.id: row.name for row in volumes_of(catalog, machine) if row.id != machine.ram}


def memory_of(catalog: Catalog, machine: MachineRow) -> tuple[int, int]:
    """Return how many bytes of RAM, and how many CPUs, the configuration of a machine says."""
    try:
        found = json.loads(machine.configuration)
        memory_bytes, cpus = found["memory_bytes"], found.get("cpus", 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        memory_bytes = cpus = None
    if type(memory_bytes) is not int or type(cpus) is not int or not 0 < memory_bytes <= MEMORY_BYTES_MAX:
        raise damaged(catalog.path, f"the configuration of machine {machine.name!r} does not say how much RAM it has")
    return memory_bytes, cpus


# ---- making ----


def create(
    store: OpenStore, name: str, disks: Sequence[str], *, configuration: str, memory_bytes: int, wipe: str | None
) -> MachineRow:
    """Make a machine of volumes, with a RAM volume of its own, in one transaction.

    Without `wipe` its RAM is wiped as the strictest of its disks is, or as the store says.
    """
    name = check_machine_name(name)
    wanted = list(disks)
    if len(wanted) > DISKS_MAX:
        raise ValueError(f"a machine has at most {DISKS_MAX} disks, not {len(wanted)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError("a disk is named twice; a machine has each of its disks once")
    if not 0 < memory_bytes <= MEMORY_BYTES_MAX or memory_bytes % _RAM_BLOCK_SIZE:
        raise ValueError(f"a machine has RAM in whole pages, at most {MEMORY_BYTES_MAX >> 40} TiB, not {memory_bytes}")
    catalog = store.catalog

    def change() -> MachineRow:
        refuse_taken(store, [name])
        rows = [catalog.volume(disk) for disk in wanted]
        ownership.refuse_owned(
            catalog,
            [row.id for row in rows],
            "given to another",
            "delete machine {machine}, or make a clone of the volume",
        )
        policies = {catalog.layer(row.head).wipe for row in rows}
        policy = wipe or ("zero" if "zero" in policies else catalog.defaults().wipe)
        ram = new_ram_head(memory_bytes, policy)
        machine = MachineRow(new_id(), name, new_id(), configuration, time.time_ns())
        volumes.insert(store, machine.ram, ram_name(name), ram)
        catalog.insert(machine)
        catalog.insert_all(
            MachineDiskRow(machine.id, position, row.name, row.id, 0) for position, row in enumerate(rows)
        )
        return machine

    return store.change(change)


def check_machine_name(name: str) -> str:
    """Return a name that a machine may have; else raise TypeError or ValueError."""
    name = check_name("machine", name)
    check_name("volume of a machine", ram_name(name))  # which is longer
    return name


def ram_name(machine: str) -> str:
    """Return what the RAM volume of a machine is called."""
    return f"{machine}{RAM_SUFFIX}"


def disk_name(machine: str, disk: str) -> str:
    """Return what the volume of a disk that a machine owns is called."""
    return f"{machine}.{disk}"


def check_owned_names(catalog: Catalog, machine: str, disks: Sequence[MachineDiskRow]) -> None:
    """Raise an error where volumes of a machine of this name cannot be called as they would be."""
    for disk in disks:
        try:
            check_name("disk", disk.name)
        except ValueError as error:
            raise damaged(catalog.path, error) from None
        check_name("volume of a machine", disk_name(machine, disk.name))


def new_ram_head(memory_bytes: int, wipe: str) -> NewHead:
    """Describe the head of a new RAM volume: the RAM, and behind it room for the state of the devices."""
    return NewHead.on(None, base=None, block_size=_RAM_BLOCK_SIZE, wipe=wipe, size_bytes=memory_bytes + STATE_BYTES_MAX)


def refuse_taken(store: OpenStore, names: Sequence[str]) -> None:
    """Raise MachineExistsError where a machine has one of these names. Inside the transaction that gives them."""
    taken = sorted(row.name for row in store.catalog.machines_named(names))
    if taken:
        raise MachineExistsError(f"the store {store.path} already has a machine {taken[0]!r}; choose another name")


def rename(store: OpenStore, name: str, new_name: str) -> None:
    """Give a machine that is off another name, and the volumes that go with it too."""
    new_name = check_machine_name(new_name)
    catalog = store.catalog
    machine = find(catalog, name)

    def change() -> None:
        row = find(catalog, name)
        if row.id != machine.id:
            raise StateError(f"machine {name!r} was renamed meanwhile; nothing was changed; try again")
        if new_name == name:
            return
        refuse_taken(store, [new_name])
        owned = [disk for disk in catalog.disks_of_machine(row.id) if disk.owned]
        names = {row.ram: ram_name(new_name)} | {disk.volume: disk_name(new_name, disk.name) for disk in owned}
        check_owned_names(catalog, new_name, owned)
        for volume, called in names.items():
            volumes.refuse_taken(store, called)
            catalog.update(VolumeRow, volume, name=called)
            lineage.rename(catalog, volume, called)
        catalog.update_machine(row.id, name=new_name)

    with kept_off(store, machine):
        store.change(change)


# ---- whether it runs ----


@held
def kept_off(store: OpenStore, machine: MachineRow) -> Iterator[None]:
    """Keep a machine that is off from being started, for the time of the block.

    Raises
    ------
    StateError
        It runs, or something else is done to it.
    """
    try:
        with locked_to_remove(store.layout, {machine.ram: ram_name(machine.name)}):
            yield
    except StateError:  # not one of the block: this is not told those
        raise StateError(said_to_run(store, machine)) from None


@held
def snapshots_kept(store: OpenStore, machine: bytes, *, to_drop: bool = False) -> Iterator[None]:
    """Keep the snapshots of a machine from being dropped for the time of the block, while it is put back in place to one.

    That changes its RAM while the transaction is under way which notes to what it is put back: a snapshot that went just then
    would leave it between two states. With `to_drop`, the block drops some, and nothing is put back meanwhile.

    Raises
    ------
    StateError
        Somebody else has them, and did not end.
    """
    how = fcntl.LOCK_EX if to_drop else fcntl.LOCK_SH
    try:
        descriptor = os.open(
            store.layout.root / "machines" / machine.hex(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        )
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # it never ran, and has no snapshot to which it is put back in place
        yield
        return
    try:
        if not within(KEPT_SECONDS, lambda: _is_locked(descriptor, how)):
            raise StateError(
                f"another process has put the machine back, dropped snapshots of it or begun a pool of it for "
                f"{KEPT_SECONDS:g} s, or was stopped in that; nothing was changed; try again"
            )
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def said_to_run(store: OpenStore, machine: MachineRow) -> str:
    """Say which process runs a machine, and what to do."""
    holder = volume_holder(store.layout.volume_lock(machine.ram))
    who = f"in process {holder.pid}" if holder and holder.pid else "or is worked on by another process"
    return f"machine {machine.name!r} runs {who}; stop it first, with 'onionskin machine stop'"


def is_running(store: OpenStore, machine: MachineRow) -> bool:
    """Whether a process holds the RAM volume of a machine."""
    return volume_holder(store.layout.volume_lock(machine.ram)) is not None


# ---- what a start begins with ----


def beginning(store: OpenStore, which: Which) -> Beginning:
    """Return what the next start of a machine begins with."""
    catalog = store.catalog
    with catalog.reading():
        machine = find(catalog, which)
        taken = catalog.machine_snapshot_with_id(machine.stands_on)
        boots = Beginning(machine, taken, machine.resumes == REVERTING, None, "", 0, "")
        if machine.resumes == BOOTS or (taken and taken.ram is None):
            return boots
        ram = _there(catalog, machine, catalog.volume_with_id(machine.ram))
        if taken is None:
            origin = catalog.lineage_of(machine.ram)
            key = origin.guid.hex() if origin and origin.guid else machine.ram.hex()
            return Beginning(machine, None, False, (ram.name, None), key, machine.state_bytes, machine.recorded)
        snapshot = catalog.snapshot_of_layer(taken.ram or b"")
        if snapshot is None:
            raise damaged(catalog.path, f"the RAM of snapshot {taken.name!r} of machine {machine.name!r} is missing")
        return Beginning(
            machine,
            taken,
            machine.resumes == REVERTING,
            (ram.name, snapshot.name),
            snapshot.guid.hex(),
            taken.state_bytes,
            taken.recorded,
        )


def refuse_written(store: OpenStore, machine: MachineRow) -> None:
    """Raise StateError where a disk of a machine that is about to go on from RAM is not as it was with that RAM.

    Before anything opens the disks. A guest whose disk was changed behind its back destroys it.
    """
    catalog = store.catalog
    with catalog.reading():
        disks = catalog.disks_of_machine(machine.id)
        bound = {row.position: row.layer for row in catalog.disks_of_machine_snapshot(machine.stands_on or b"")}
        rows = {row.id: row for row in volumes_of(catalog, machine)}
        chains = {disk.volume: catalog.chain(rows[disk.volume].head) for disk in disks}
        if machine.stands_on is None:
            bound = {disk.position: catalog.layer_of_origin(disk.volume) or b"" for disk in disks}
    for disk in disks:
        if _is_written(store, disk.volume, chains[disk.volume], bound.get(disk.position, b"")):
            raise StateError(
                f"volume {rows[disk.volume].name!r} was written to since machine {machine.name!r} was put back, so its RAM "
                "would not agree with its disks; revert it again, which drops what was written"
            )


def _is_written(store: OpenStore, volume: bytes, chain: Sequence[LayerRow], below: bytes) -> bool:
    """Whether a volume that nobody has open reads as something else than a layer of its chain."""
    if bytes_in(store.layout.dirty_file(volume)):
        return True
    at = next((at for at, layer in enumerate(chain) if layer.id == below), None)
    if at is None or chain[-1].size_bytes != chain[at].size_bytes:
        return True
    return any(map_is_used(store, layer) for layer in chain[at + 1 :])


def note_reverting(store: OpenStore, machine: bytes, snapshot: bytes) -> None:
    """Note that the disks of a machine are being put back to one of its snapshots: the next start ends that."""
    store.change(lambda: write_reverting(store.catalog, machine, snapshot))


def write_reverting(catalog: Catalog, machine: bytes, snapshot: bytes) -> None:
    """Write that note. Inside a transaction."""
    found = catalog.machine_snapshot_with_id(snapshot)
    if found is None or found.machine != machine:
        raise StateError("the snapshot was dropped meanwhile; nothing was changed")
    catalog.update_machine(machine, stands_on=snapshot, resumes=REVERTING, state_bytes=0, recorded="")


def note_reverted(store: OpenStore, machine: bytes, snapshot: bytes) -> None:
    """Note that they all are: the next start goes on from the snapshot's RAM, or boots where it has none."""

    def change() -> None:
        found = refuse_other_revert(store.catalog, machine, snapshot)
        store.catalog.update_machine(machine, resumes=BOOTS if found.ram is None else RESUMES)

    store.change(change)


def refuse_other_revert(catalog: Catalog, machine: bytes, snapshot: bytes) -> MachineSnapshotRow:
    """Raise StateError if a machine is not being put back to this snapshot any more. Return it. Inside a transaction."""
    row, found = catalog.machine_with_id(machine), catalog.machine_snapshot_with_id(snapshot)
    if row is None or found is None or row.stands_on != snapshot or row.resumes == BOOTS:
        raise StateError("the machine was put back to something else meanwhile; try again")
    return found


def forget_ram(store: OpenStore, which: Which) -> None:
    """Have the next start of a machine that is kept off boot from its disks, and not go on from RAM."""

    def change() -> None:
        machine = find(store.catalog, which)
        if machine.resumes == REVERTING:
            raise StateError(f"machine {machine.name!r} is being put back; start it, which ends that, or revert it")
        store.catalog.update_machine(machine.id, resumes=BOOTS, state_bytes=0, recorded="")

    store.change(change)


def has_unnamed_ram(store: OpenStore, which: Which) -> bool:
    """Whether a machine is about to go on from RAM that no snapshot has."""
    catalog = store.catalog
    with catalog.reading():
        machine = find(catalog, which)
        volume = catalog.volume_with_id(machine.ram)
        if machine.resumes != RESUMES or machine.stands_on is not None or volume is None:
            return False
        below = catalog.layer(volume.head).parent
        return below is None or catalog.snapshot_of_layer(below) is None


def note_running(store: OpenStore, machine: bytes) -> None:
    """Note that the guest may write from now on: RAM that the machine began with is not loaded again.

    Durable on return. Called when all is loaded, before the guest runs.
    """
    store.change(lambda: write_running(store.catalog, machine))


def write_running(catalog: Catalog, machine: bytes) -> None:
    """Write that note. Inside a transaction."""
    catalog.update_machine(machine, resumes=BOOTS, state_bytes=0, recorded="")


# ---- lists ----


def list_machines(store: OpenStore, wanted: Mapping[str, str]) -> list[MachineInfo]:
    """Return the machines that have all these labels, by name."""
    refuse_no_mapping(wanted)
    catalog = store.catalog
    with catalog.reading():
        machines = catalog.machines_by_name()
        if not machines:
            return []
        disks, counts = catalog.disks_of_machines(), catalog.machine_snapshot_counts()
        labels = {machine.id: catalog.labels_of(machine.ram) for machine in machines}
        chosen = [machine for machine in machines if wanted.items() <= labels[machine.id].items()]
        ids = {disk.volume for machine in chosen for disk in disks.get(machine.id, ())}
        rows = {row.id: row for row in catalog.volumes_with_ids(ids | {machine.ram for machine in chosen})}
        return [
            _info(store, machine, disks.get(machine.id, ()), rows, counts.get(machine.id, 0), labels[machine.id])
            for machine in chosen
        ]


def machine_info(store: OpenStore, which: Which) -> MachineInfo:
    """Return one machine."""
    catalog = store.catalog
    with catalog.reading():
        machine = find(catalog, which)
        disks = catalog.disks_of_machine(machine.id)
        rows = {row.id: row for row in volumes_of(catalog, machine)}
        count = len(catalog.snapshots_of_machine(machine.id))
        return _info(store, machine, disks, rows, count, catalog.labels_of(machine.ram))


def _info(
    store: OpenStore,
    machine: MachineRow,
    disks: Sequence[MachineDiskRow],
    rows: Mapping[bytes, VolumeRow],
    snapshots: int,
    labels: Mapping[str, str],
) -> MachineInfo:
    ram = _there(store.catalog, machine, rows.get(machine.ram))
    memory_bytes, cpus = memory_of(store.catalog, machine)
    holder = volume_holder(store.layout.volume_lock(machine.ram))
    at = store.catalog.machine_snapshot_with_id(machine.stands_on)
    return MachineInfo(
        machine.name,
        "running" if holder else "off",
        holder.pid if holder else None,
        memory_bytes,
        cpus,
        tuple(
            MachineDisk(disk.name, _there(store.catalog, machine, rows.get(disk.volume)).name, bool(disk.owned))
            for disk in disks
        ),
        ram.name,
        snapshots,
        at.name if at else None,
        ("boots", "reverting", "resumes")[machine.resumes],
        when(machine.created_ns),
        None if ram.expires_ns is None else when(ram.expires_ns),
        labels,
    )
