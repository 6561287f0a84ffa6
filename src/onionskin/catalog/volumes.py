"""What is asked of the catalog about volumes: their names and their heads.

A volume whose name begins with '@' is staged. `volume`, `has_volume`, `volume_names`, `volume_count`, `listed_heads`
and `staged_volumes` tell staged volumes from the others; all other queries take both.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from onionskin.base.naming import is_text, plain_name
from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import STAGED_PREFIX, TABLES, LabelRow, LayerRow, MachineRow, VolumeRow
from onionskin.catalog.schema import SOUND_ROW
from onionskin.errors import VolumeNotFoundError

_NOT_STAGED = "substr(name, 1, 1) != ?"
# Those that go with a machine. (A NULL, which a damaged row may have, would make the question unanswerable.)
OWNED = (
    "SELECT ram FROM machines WHERE ram IS NOT NULL "
    "UNION ALL SELECT volume FROM machine_disks WHERE owned = 1 AND volume IS NOT NULL"
)
_LISTED = f"{_NOT_STAGED} AND id NOT IN ({OWNED})"
_DIGITS_MAX = 18  # of the number in a name; more of them make a name like any other
NUMBER_MAX = 10**_DIGITS_MAX - 1
_GREATEST_OF_LENGTH = (
    f"SELECT name FROM {TABLES[VolumeRow]} WHERE coalesce({SOUND_ROW[VolumeRow]}, 0) AND length(name) = ?"
    " AND name BETWEEN ? AND ? AND name GLOB ? ORDER BY name DESC LIMIT 1"
)
_LONGEST_NAME = f"SELECT max(length(name)) FROM {TABLES[VolumeRow]}"


class Volumes(Connection):
    """The queries about volumes. Each raises FormatError where a row that it returns breaks a condition."""

    def volume(self, name: str) -> VolumeRow:
        """Return a volume by name, or raise VolumeNotFoundError."""
        found = None if plain_name(name).startswith(STAGED_PREFIX) else self.volume_named(plain_name(name))
        if found is None:
            raise VolumeNotFoundError(
                f"the store {self.path.parent} has no volume {name!r}; {self._where_else(plain_name(name))}"
            )
        return found

    def _where_else(self, name: str) -> str:
        """Say where to look for what is no volume."""
        if is_text(name) and self.has(MachineRow, "name = ?", name):
            return "a machine has that name, and its verbs are those of 'onionskin machine'"
        return "'onionskin tree' lists them"

    def volumes_called(self, names: Iterable[str]) -> dict[str, VolumeRow]:
        """Return volumes by their names, or raise VolumeNotFoundError for one that is not there."""
        wanted = [plain_name(name) for name in names]
        with self.reading():
            found = {row.name: row for row in self.volumes_named(filter(is_text, wanted))}
            missing = {name for name in wanted if name not in found or name.startswith(STAGED_PREFIX)}
            return {name: self.volume(name) if name in missing else found[name] for name in wanted}

    def volume_named(self, name: str) -> VolumeRow | None:
        """Return the volume of that name, or None."""
        return self.row(VolumeRow, "name = ?", name) if is_text(name) else None

    def has_volume_named(self, name: str) -> bool:
        """Whether a volume has that name; its row may be unsound."""
        return is_text(name) and self.has(VolumeRow, "name = ?", name)

    def volume_with_id(self, id: bytes) -> VolumeRow | None:
        """Return a volume by id, or None if it is gone."""
        return self.row(VolumeRow, "id = ?", id)

    def volumes(self) -> list[VolumeRow]:
        """Return all volumes, in no order: of many, that takes half the time of `volumes_by_name`."""
        return self.rows(VolumeRow)

    def volumes_by_name(self) -> list[VolumeRow]:
        """Return all volumes, in the order of their names."""
        return self.rows(VolumeRow, "1 ORDER BY name")

    def volume_names(self) -> list[str]:
        """Return the names of all volumes that are neither staged nor go with a machine, sorted.

        Unsound rows are left out.
        """
        return [name for (name,) in self.values(VolumeRow, "name", f"{_LISTED} ORDER BY name", STAGED_PREFIX)]

    def volume_count(self) -> int:
        """Return how many volumes there are that are neither staged nor go with a machine; unsound rows do not count."""
        ((count,),) = self.values(VolumeRow, "count(*)", _LISTED, STAGED_PREFIX)
        return int(count)

    def has_volume(self, name: str) -> bool:
        """Whether there is a volume of that name, which no staged volume is; its row may be unsound."""
        return is_text(name) and self.has(VolumeRow, f"name = ? AND {_NOT_STAGED}", name, STAGED_PREFIX)

    def staged_volumes(self) -> list[VolumeRow]:
        """Return the volumes that have no name yet, in the order of their ids; unsound rows are left out."""
        return self.sound_rows(VolumeRow, "name >= ? AND name < ?", STAGED_PREFIX, chr(ord(STAGED_PREFIX) + 1))

    def listed_heads(self) -> Iterator[tuple[Any, ...]]:
        """Yield (id, name, created_ns, expires_ns, head) of each volume that is not staged, then (parent, base, size_bytes,
        block_size, wipe) of its head, by name.

        A volume is left out if its head is gone or its row is not sound. No row is kept after it was yielded: a hundred
        thousand rows that live at once cost Python's garbage collector as much as reading them.
        """
        volumes, layers = (
            f"(SELECT * FROM {TABLES[kind]} WHERE coalesce({SOUND_ROW[kind]}, 0))" for kind in (VolumeRow, LayerRow)
        )
        with self._guard, self._errors():
            yield from self._connection.execute(
                "SELECT v.id, v.name, v.created_ns, v.expires_ns, v.head,"
                " l.parent, l.base, l.size_bytes, l.block_size, l.wipe"
                f" FROM {volumes} AS v JOIN {layers} AS l ON l.id = v.head"
                " WHERE substr(v.name, 1, 1) != ? ORDER BY v.name",
                (STAGED_PREFIX,),
            )

    def volumes_over_layers(self) -> list[tuple[bytes, bytes, bytes]]:
        """Return (layer, least id, greatest id) of the volumes whose heads stand directly on each layer, staged ones too."""
        with self._guard, self._errors():
            return self._connection.execute(
                f"SELECT l.parent, min(v.id), max(v.id) FROM {TABLES[VolumeRow]} AS v JOIN {TABLES[LayerRow]} AS l"
                " ON l.id = v.head WHERE l.parent IS NOT NULL GROUP BY l.parent"
            ).fetchall()

    def volumes_named(self, names: Iterable[str]) -> list[VolumeRow]:
        """Return the volumes that have one of these names, in no order."""
        return self.rows_in(VolumeRow, "name", names)

    def greatest_number(self, prefix: str, suffix: str) -> int:
        """Return the greatest number that stands between the two in the name of a volume, in decimal digits; 0: none does.

        Names of one length with the number in one place sort as their numbers do: so one step in the index finds the
        greatest of each length, however many there are. Lengths that no name has are not asked for: each costs 20 us.
        """
        with self._guard, self._errors():
            (longest,) = self._connection.execute(_LONGEST_NAME).fetchone()
            values: list[Any] = []
            for digits in range(1, min((longest or 0) - len(prefix) - len(suffix), _DIGITS_MAX) + 1):
                low, high = (f"{prefix}{digit * digits}{suffix}" for digit in "09")
                values += (len(low), low, high, f"{_as_glob(prefix)}{'[0-9]' * digits}{_as_glob(suffix)}")
            parts = [f"SELECT name FROM ({_GREATEST_OF_LENGTH})"] * (len(values) // 4)
            found = self._connection.execute(" UNION ALL ".join(parts), values).fetchall() if parts else []
        return max((int(name[len(prefix) : len(name) - len(suffix)]) for (name,) in found), default=0)

    def expired(self, now_ns: int) -> list[VolumeRow]:
        """Return the volumes whose time was over before this one, and that nothing but their heads stands on; earliest first.

        Those of machines are left out: they go with their machine.

        A server asks every few seconds, so those that cannot go yet cost a step in an index each.
        """
        kept = (
            "EXISTS (SELECT 1 FROM snapshots WHERE volume = volumes.id) OR EXISTS (SELECT 1 FROM lineage "
            "JOIN volumes AS fork ON fork.id = lineage.volume WHERE lineage.parent = volumes.id) "
            "OR EXISTS (SELECT 1 FROM machine_disks WHERE volume = volumes.id) "
            "OR EXISTS (SELECT 1 FROM machines WHERE ram = volumes.id)"
        )
        return self.rows(VolumeRow, f"expires_ns <= ? AND NOT ({kept}) ORDER BY expires_ns", now_ns)

    def labels_of(self, volume: bytes) -> dict[str, str]:
        """Return the labels of a volume; unsound rows are left out."""
        return dict(self.values(LabelRow, "key, value", "volume = ? ORDER BY key", volume))

    def set_labels(self, volume: bytes, labels: Mapping[str, str]) -> None:
        """Give a volume these labels and no others."""
        self.delete(LabelRow, "volume = ?", volume)
        self.insert_all(LabelRow(volume, key, value) for key, value in labels.items())

    def labels(self) -> dict[bytes, dict[str, str]]:
        """Return the labels of each volume that has any; unsound rows are left out."""
        found: dict[bytes, dict[str, str]] = {}
        for volume, key, value in self.values(LabelRow, "volume, key, value", "1 ORDER BY volume, key"):
            found.setdefault(volume, {})[key] = value
        return found

    def volume_that_is(self, id: bytes) -> VolumeRow:
        """Return the volume with an id, which a handle has; raise VolumeNotFoundError if it is gone."""
        found = self.volume_with_id(id)
        if found is None:
            raise VolumeNotFoundError(f"the volume {id.hex()} of {self.path.parent} is gone")
        return found

    def head_of(self, volume: VolumeRow) -> bytes | None:
        """Return the layer that is a volume's head now, or None if the volume is gone."""
        found = self.volume_with_id(volume.id)
        return found.head if found else None

    def volume_with_head(self, layer: bytes) -> VolumeRow | None:
        """Return the volume whose head a layer is, or None."""
        return self.row(VolumeRow, "head = ?", layer)

    def volumes_with_heads(self, layers: Iterable[bytes], *, besides: bytes | None = None) -> list[VolumeRow]:
        """Return the volumes whose heads are among these layers, in no order; the one with the id `besides` is left out."""
        if besides is None:
            return self.rows_in(VolumeRow, "head", layers)
        return self.rows_in(VolumeRow, "head", layers, "id != ?", besides)

    def which_are_volumes(self, ids: Iterable[bytes]) -> set[bytes]:
        """Return those of these ids that a volume has; its row may be unsound."""
        return self.values_found(VolumeRow, "id", ids)

    def volumes_with_ids(self, ids: Iterable[bytes]) -> list[VolumeRow]:
        """Return those of these volumes that exist, in no order."""
        return self.rows_in(VolumeRow, "id", ids)

    def remove_volumes(self, ids: Iterable[bytes]) -> None:
        """Remove the rows of volumes, whose snapshots have none any more. Inside a transaction."""
        self.delete_all(VolumeRow, "id", ids)


def _as_glob(text: str) -> str:
    """Write a text so that GLOB takes each of its characters for itself."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
