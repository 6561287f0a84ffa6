"""What is asked of the catalog about machines, their disks, and the snapshots that bind disks and RAM together."""

from collections.abc import Iterable
from typing import Any

from onionskin.base.named_tuples import NamedTuple
from onionskin.base.naming import is_text
from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import (
    MachineDiskRow,
    MachineRow,
    MachineSnapshotDiskRow,
    MachineSnapshotRow,
)
from onionskin.catalog.volumes import OWNED


class Awaiting(NamedTuple):
    """A machine that was forked and never ran: its name, and the GUID of the RAM that it begins with."""

    name: str
    guid: bytes | None


class Machines(Connection):
    """The queries about machines. Each raises FormatError where a row that it returns breaks a condition."""

    # ---- machines and their volumes ----

    def machine_named(self, name: str) -> MachineRow | None:
        """Return the machine of that name, or None."""
        return self.row(MachineRow, "name = ?", name) if is_text(name) else None

    def machine_with_id(self, id: bytes) -> MachineRow | None:
        """Return a machine by its id, or None if it is gone."""
        return self.row(MachineRow, "id = ?", id)

    def machines_named(self, names: Iterable[str]) -> list[MachineRow]:
        """Return the machines that have one of these names, in no order."""
        return self.rows_in(MachineRow, "name", names)

    def machines_by_name(self) -> list[MachineRow]:
        """Return all machines, in the order of their names."""
        return self.rows(MachineRow, "1 ORDER BY name")

    def has_machines(self) -> bool:
        """Whether there is any machine; its row may be unsound."""
        return self.has(MachineRow, "1")

    def greatest_machine_number(self, prefix: str, suffix: str) -> int:
        """Return the greatest number that stands between the two in the name of a machine; 0: none does."""
        greatest = 0
        for (name,) in self.values(MachineRow, "name"):
            digits = name[len(prefix) : len(name) - len(suffix)]
            is_like = name == f"{prefix}{digits}{suffix}" and digits.isascii() and digits.isdigit()
            if is_like and len(digits) <= 18:
                greatest = max(greatest, int(digits))
        return greatest

    def disks_of_machine(self, machine: bytes) -> list[MachineDiskRow]:
        """Return the disks of a machine, in their order."""
        return self.rows(MachineDiskRow, "machine = ? ORDER BY position", machine)

    def disks_of_machines(self) -> dict[bytes, list[MachineDiskRow]]:
        """Return the disks of each machine, in their order."""
        found: dict[bytes, list[MachineDiskRow]] = {}
        for row in self.rows(MachineDiskRow, "1 ORDER BY machine, position"):
            found.setdefault(row.machine, []).append(row)
        return found

    def machines_of_volumes(self, volumes: Iterable[bytes]) -> dict[bytes, MachineRow]:
        """Return the machine of each of these volumes that is a disk or the RAM of one."""
        asked = list(volumes)
        with self.reading():
            if not self.has_machines():  # as in most stores
                return {}
            disks = {row.volume: row.machine for row in self.rows_in(MachineDiskRow, "volume", asked)}
            found = {row.ram: row for row in self.rows_in(MachineRow, "ram", asked)}
            by_id = {row.id: row for row in self.rows_in(MachineRow, "id", set(disks.values()))}
        return found | {volume: by_id[machine] for volume, machine in disks.items() if machine in by_id}

    def machine_of_ram(self, volume: bytes) -> MachineRow | None:
        """Return the machine whose RAM a volume is, or None."""
        return self.row(MachineRow, "ram = ?", volume)

    def owned_volumes(self) -> set[bytes]:
        """Return the volumes that go with their machines: their RAM, and the disks of forks. The rows may be unsound."""
        with self._guard, self._errors():
            return {volume for (volume,) in self._connection.execute(OWNED)}

    def machines_awaiting(self, ram: bytes) -> list["Awaiting"]:
        """Return the machines that were forked from the one with this RAM volume, and never ran, by name."""
        with self._guard, self._errors():
            found = self._connection.execute(
                "SELECT machines.name, lineage.guid FROM machines JOIN lineage ON lineage.volume = ram "
                "WHERE resumes != 0 AND stands_on IS NULL AND lineage.parent = ? ORDER BY machines.name",
                (ram,),
            ).fetchall()
        return [Awaiting(str(name), guid) for name, guid in found]

    def layer_of_origin(self, volume: bytes) -> bytes | None:
        """Return the layer of the snapshot that a fork began as, or None if that has no name any more."""
        with self._guard, self._errors():
            found = self._connection.execute(
                "SELECT layer FROM lineage JOIN snapshots ON snapshots.guid = lineage.guid "
                "AND snapshots.volume = lineage.parent WHERE lineage.volume = ?",
                (volume,),
            ).fetchone()
        return found[0] if found and type(found[0]) is bytes else None

    def expired_machines(self, now_ns: int) -> list[MachineRow]:
        """Return the machines whose time was over before this one, and that have no snapshot; oldest first."""
        return self.rows(
            MachineRow,
            "ram IN (SELECT id FROM volumes WHERE expires_ns <= ?) "
            "AND NOT EXISTS (SELECT 1 FROM machine_snapshots WHERE machine = machines.id) ORDER BY created_ns",
            now_ns,
        )

    def update_machine(self, id: bytes, **values: Any) -> None:
        """Change columns of a machine. Inside a transaction."""
        self.update(MachineRow, id, **values)

    def remove_machine(self, id: bytes) -> None:
        """Remove a machine and its disks, whose snapshots are gone; the volumes stay. Inside a transaction."""
        self.delete(MachineDiskRow, "machine = ?", id)
        self.delete(MachineRow, "id = ?", id)

    # ---- snapshots of machines ----

    def machine_snapshot_named(self, machine: bytes, name: str) -> MachineSnapshotRow | None:
        """Return a machine's snapshot of that name, or None."""
        return self.row(MachineSnapshotRow, "machine = ? AND name = ?", machine, name) if is_text(name) else None

    def machine_snapshot_with_id(self, id: bytes | None) -> MachineSnapshotRow | None:
        """Return a snapshot of a machine by its id, or None."""
        return self.row(MachineSnapshotRow, "id = ?", id)

    def snapshots_of_machine(self, machine: bytes) -> list[MachineSnapshotRow]:
        """Return a machine's snapshots in the order of taking."""
        return self.rows(MachineSnapshotRow, "machine = ? ORDER BY number, name", machine)

    def machine_snapshot_counts(self) -> dict[bytes, int]:
        """Return how many snapshots each machine with snapshots has; unsound rows do not count."""
        return dict(self.values(MachineSnapshotRow, "machine, count(*)", "1 GROUP BY machine"))

    def disks_of_machine_snapshot(self, snapshot: bytes) -> list[MachineSnapshotDiskRow]:
        """Return what a snapshot of a machine has of each disk, in the order of the disks."""
        return self.rows(MachineSnapshotDiskRow, "snapshot = ? ORDER BY position", snapshot)

    def layers_of_machine_snapshots(self, snapshots: Iterable[bytes]) -> list[bytes]:
        """Return the layers of disks and RAM that snapshots of machines bind, in no order."""
        asked = list(snapshots)
        with self.reading():
            disks = self.rows_in(MachineSnapshotDiskRow, "snapshot", asked)
            taken = self.rows_in(MachineSnapshotRow, "id", asked)
        return [row.layer for row in disks] + [row.ram for row in taken if row.ram is not None]

    def machine_snapshots_of_layers(self, layers: Iterable[bytes]) -> dict[bytes, MachineSnapshotRow]:
        """Return the snapshot of a machine that binds each of these layers, where one does."""
        asked = list(layers)
        with self.reading():
            if not self.has_machines():  # as in most stores
                return {}
            bound = {row.layer: row.snapshot for row in self.rows_in(MachineSnapshotDiskRow, "layer", asked)}
            found = {row.ram: row for row in self.rows_in(MachineSnapshotRow, "ram", asked) if row.ram is not None}
            by_id = {row.id: row for row in self.rows_in(MachineSnapshotRow, "id", set(bound.values()))}
        return found | {layer: by_id[snapshot] for layer, snapshot in bound.items() if snapshot in by_id}

    def remove_machine_snapshot(self, snapshot: MachineSnapshotRow) -> None:
        """Remove a snapshot of a machine; what stood on it, stands on its parent then. Inside a transaction.

        The names of the disks' snapshots and of the RAM's stay.
        """
        self._execute("UPDATE machines SET stands_on = ? WHERE stands_on = ?", snapshot.parent, snapshot.id)
        self._execute("UPDATE machine_snapshots SET parent = ? WHERE parent = ?", snapshot.parent, snapshot.id)
        self.delete(MachineSnapshotDiskRow, "snapshot = ?", snapshot.id)
        self.delete(MachineSnapshotRow, "id = ?", snapshot.id)
