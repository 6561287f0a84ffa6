"""The tables of a catalog, and the condition of each value in them.

What must hold: the condition of a value is written once, here, and is checked both ways. No value is written that
breaks its condition, and no row is believed if one of its values does. (SQLite keeps any value that it was given, and a
damaged page or a hostile file may hold anything.)
"""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from onionskin.base.limits import (
    BLOCK_SIZES,
    DISKS_MAX,
    MACHINE_MODES,
    STATE_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WIPE_POLICIES,
)
from onionskin.base.named_tuples import NamedTuple
from onionskin.catalog.rows import (
    STAGED_PREFIX,
    BaseRow,
    ForkCallRow,
    HoldRow,
    LabelRow,
    LayerRow,
    LineageRow,
    MachineDiskRow,
    MachineRow,
    MachineSnapshotDiskRow,
    MachineSnapshotRow,
    SegmentRow,
    SnapshotRow,
    VolumeRow,
    WorkRow,
)

APPLICATION_ID = 0x4F6E696F  # "Onio"
SCHEMA_VERSION = 7
_NUMBER_MAX = (1 << 62) - 1

# By layer, as a snapshot's name may change. The reference keeps a name that is held also from code that does not ask.
_HOLDS = """CREATE TABLE holds (
    layer BLOB NOT NULL REFERENCES snapshots (layer), holder TEXT NOT NULL, created_ns INTEGER NOT NULL,
    PRIMARY KEY (layer, holder)) WITHOUT ROWID"""

# A label goes with its volume. A row of `lineage` may outlive its volume, so it refers to none.
_FORKS = (
    """CREATE TABLE labels (
    volume BLOB NOT NULL REFERENCES volumes ON DELETE CASCADE, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (volume, key)) WITHOUT ROWID""",
    "CREATE INDEX labels_value ON labels (key, value)",
    """CREATE TABLE lineage (
    volume BLOB PRIMARY KEY, parent BLOB, name TEXT NOT NULL, snapshot TEXT, guid BLOB, created_ns INTEGER NOT NULL,
    dropped_ns INTEGER) WITHOUT ROWID""",
    "CREATE INDEX lineage_parent ON lineage (parent) WHERE parent IS NOT NULL",
    """CREATE TABLE fork_calls (
    key TEXT PRIMARY KEY, digest BLOB NOT NULL, names TEXT NOT NULL, created_ns INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX volumes_expires ON volumes (expires_ns) WHERE expires_ns IS NOT NULL",
    # By length first: of the names that differ in a number alone, the last one of a length has the greatest number.
    "CREATE INDEX volumes_numbers ON volumes (length(name), name)",
)

# The references keep what a machine needs also from code that does not ask whose a volume or a snapshot is.
_MACHINES = (
    """CREATE TABLE machines (
    id BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, ram BLOB NOT NULL UNIQUE REFERENCES volumes,
    configuration TEXT NOT NULL, created_ns INTEGER NOT NULL, stands_on BLOB REFERENCES machine_snapshots,
    resumes INTEGER NOT NULL, state_bytes INTEGER NOT NULL, recorded TEXT NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE machine_disks (
    machine BLOB NOT NULL REFERENCES machines, position INTEGER NOT NULL, name TEXT NOT NULL,
    volume BLOB NOT NULL UNIQUE REFERENCES volumes, owned INTEGER NOT NULL,
    PRIMARY KEY (machine, position)) WITHOUT ROWID""",
    """CREATE TABLE machine_snapshots (
    id BLOB PRIMARY KEY, machine BLOB NOT NULL REFERENCES machines, name TEXT NOT NULL,
    parent BLOB REFERENCES machine_snapshots, number INTEGER NOT NULL, mode TEXT NOT NULL, note TEXT NOT NULL,
    ram BLOB UNIQUE REFERENCES snapshots (layer), state_bytes INTEGER NOT NULL, configuration TEXT NOT NULL,
    recorded TEXT NOT NULL, created_ns INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE UNIQUE INDEX machine_snapshots_name ON machine_snapshots (machine, name)",
    "CREATE INDEX machine_snapshots_parent ON machine_snapshots (parent) WHERE parent IS NOT NULL",
    """CREATE TABLE machine_snapshot_disks (
    snapshot BLOB NOT NULL REFERENCES machine_snapshots, position INTEGER NOT NULL,
    layer BLOB NOT NULL UNIQUE REFERENCES snapshots (layer), PRIMARY KEY (snapshot, position)) WITHOUT ROWID""",
)

# How the volumes are that are made without saying it. A store that is older than the question made them so.
_DEFAULTS = ("wipe TEXT NOT NULL DEFAULT 'release'", "block_size INTEGER NOT NULL DEFAULT 4096")

_LATER_SCRIPT = ";\n".join((*_FORKS, *_MACHINES))
SCHEMA = f"""
CREATE TABLE store (
    uuid BLOB NOT NULL, next_lock_byte INTEGER NOT NULL, stamp BLOB NOT NULL, {", ".join(_DEFAULTS)});
CREATE TABLE bases (
    id BLOB PRIMARY KEY, path TEXT NOT NULL, inode INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, digest BLOB) WITHOUT ROWID;
CREATE TABLE layers (
    id BLOB PRIMARY KEY, parent BLOB REFERENCES layers, base BLOB REFERENCES bases, block_size INTEGER NOT NULL,
    wipe TEXT NOT NULL, size_bytes INTEGER NOT NULL, sealed INTEGER NOT NULL, map_id BLOB NOT NULL UNIQUE,
    map_lock_byte INTEGER NOT NULL UNIQUE, map_length INTEGER NOT NULL, map_frames INTEGER NOT NULL,
    map_crc INTEGER NOT NULL, created_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX layers_parent ON layers (parent);
CREATE TABLE segments (
    id BLOB PRIMARY KEY, layer BLOB NOT NULL REFERENCES layers, role TEXT NOT NULL, slots INTEGER NOT NULL,
    lock_byte INTEGER NOT NULL UNIQUE) WITHOUT ROWID;
CREATE INDEX segments_layer ON segments (layer);
CREATE TABLE volumes (
    id BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, head BLOB NOT NULL UNIQUE REFERENCES layers,
    created_ns INTEGER NOT NULL, expires_ns INTEGER) WITHOUT ROWID;
CREATE TABLE snapshots (
    volume BLOB NOT NULL REFERENCES volumes, name TEXT NOT NULL, layer BLOB NOT NULL UNIQUE REFERENCES layers,
    guid BLOB NOT NULL, created_ns INTEGER NOT NULL, note TEXT NOT NULL, number INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (volume, name)) WITHOUT ROWID;
{_HOLDS};
CREATE TABLE pending (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, target BLOB NOT NULL, lock_byte INTEGER NOT NULL,
    wipe TEXT NOT NULL, done_bytes INTEGER NOT NULL DEFAULT 0);
CREATE INDEX layers_base ON layers (base) WHERE base IS NOT NULL;
CREATE INDEX pending_target ON pending (target);
CREATE INDEX pending_kind ON pending (kind);
{_LATER_SCRIPT}
"""


def _add_done_bytes(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE pending ADD COLUMN done_bytes INTEGER NOT NULL DEFAULT 0")


def _number_snapshots(connection: sqlite3.Connection) -> None:
    """Number the existing snapshots by their times. Each has a lock byte of its own, so new numbers are greater."""
    connection.execute("ALTER TABLE snapshots ADD COLUMN number INTEGER NOT NULL DEFAULT 0")
    found = connection.execute("SELECT layer FROM snapshots ORDER BY created_ns, name").fetchall()
    connection.executemany(
        "UPDATE snapshots SET number = ? WHERE layer = ?", ((number, layer) for number, (layer,) in enumerate(found, 1))
    )
    connection.execute("CREATE INDEX layers_base ON layers (base) WHERE base IS NOT NULL")
    connection.execute("CREATE INDEX pending_target ON pending (target)")
    connection.execute("CREATE INDEX pending_kind ON pending (kind)")


def _add_holds(connection: sqlite3.Connection) -> None:
    connection.execute(_HOLDS)


def _add_forks(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE volumes ADD COLUMN expires_ns INTEGER")
    for statement in _FORKS:
        connection.execute(statement)
    _find_lineage(connection)


def _find_lineage(connection: sqlite3.Connection) -> None:
    """Give each volume its lineage: it comes from whose snapshot is the nearest below its head, of another volume.

    Nobody wrote it down: of a clone whose snapshot has no name any more nothing is found. Nothing is believed here but
    that ids are equal: damaged rows end no upgrade.
    """
    below = dict(connection.execute("SELECT id, parent FROM layers"))
    names = {
        layer: (volume, name, guid)
        for layer, volume, name, guid in connection.execute("SELECT layer, volume, name, guid FROM snapshots")
    }
    found = []
    for id, name, head, created_ns in connection.execute("SELECT id, name, head, created_ns FROM volumes"):
        if str(name).startswith(STAGED_PREFIX):
            continue
        layer = below.get(head)
        seen: set[bytes] = set()
        while layer is not None and layer not in seen and names.get(layer, (id,))[0] == id:
            seen.add(layer)
            layer = below.get(layer)
        found.append((id, *_origin(names.get(layer), id), name, created_ns))
    connection.executemany(
        "INSERT INTO lineage (volume, parent, snapshot, guid, name, created_ns) VALUES (?, ?, ?, ?, ?, ?)", found
    )


def _origin(named: tuple[bytes, str, bytes] | None, volume: bytes) -> tuple[bytes | None, str | None, bytes | None]:
    return named if named and named[0] != volume else (None, None, None)


def _add_defaults(connection: sqlite3.Connection) -> None:
    for column in _DEFAULTS:
        connection.execute(f"ALTER TABLE store ADD COLUMN {column}")


def _add_machines(connection: sqlite3.Connection) -> None:
    for statement in _MACHINES:
        connection.execute(statement)


# The steps that bring a catalog of each older version to the next one.
UPGRADES: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: _add_done_bytes,
    2: _number_snapshots,
    3: _add_holds,
    4: _add_forks,
    5: _add_defaults,
    6: _add_machines,
}


class Value(NamedTuple):
    """The condition of a value: in SQL, where {0} stands for the column, and as a Python predicate.

    `hold`, if there is one, says whether the condition holds for each of many values, in few calls.
    """

    sql: str
    holds: Callable[[object], bool]
    hold: Callable[[Sequence[Any]], bool] | None = None

    def all_hold(self, values: Sequence[Any]) -> bool:
        """Whether the condition holds for each of these values."""
        return self.hold(values) if self.hold else all(map(self.holds, values))


def _number(least: int, most: int = _NUMBER_MAX) -> Value:
    return Value(
        f"(typeof({{0}}) = 'integer' AND {{0}} BETWEEN {least} AND {most})",
        lambda value: type(value) is int and least <= value <= most,
        lambda values: set(map(type, values)) == {int} and least <= min(values) and max(values) <= most,
    )


def _one_of(*values: "str | int") -> Value:
    listed = ", ".join(repr(value) for value in values)
    kind = "text" if isinstance(values[0], str) else "integer"
    return Value(
        f"(typeof({{0}}) = '{kind}' AND {{0}} IN ({listed}))",
        lambda value: type(value) is type(values[0]) and value in values,
        lambda found: set(map(type, found)) == {type(values[0])} and set(values).issuperset(found),
    )


def _text(least: int = 0) -> Value:
    return Value(
        f"(typeof({{0}}) = 'text' AND instr({{0}}, char(0)) = 0 AND length({{0}}) >= {least})",
        lambda value: type(value) is str and "\0" not in value and len(value) >= least and _is_unicode(value),
        lambda values: (
            set(map(type, values)) == {str}
            and min(map(len, values)) >= least
            and "\0" not in (joined := "".join(values))
            and _is_unicode(joined)
        ),
    )


def _is_unicode(value: str) -> bool:
    if value.isascii():  # nearly all are
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _or_null(value: Value) -> Value:
    return Value(f"({{0}} IS NULL OR {value.sql})", lambda found: found is None or value.holds(found))


_ID = Value(
    "(typeof({0}) = 'blob' AND length({0}) = 16)",
    lambda value: type(value) is bytes and len(value) == 16,
    lambda values: set(map(type, values)) == {bytes} and set(map(len, values)) == {16},
)
_BLOB = Value("(typeof({0}) = 'blob')", lambda value: type(value) is bytes)
_INTEGER = Value("(typeof({0}) = 'integer')", lambda value: type(value) is int and -(1 << 63) <= value < 1 << 63)

VALUES: dict[type, dict[str, Value]] = {
    BaseRow: {
        "id": _ID, "path": _text(1), "inode": _INTEGER, "size_bytes": _number(0), "mtime_ns": _INTEGER,
        "digest": _or_null(_BLOB),
    },
    LayerRow: {
        "id": _ID, "parent": _or_null(_ID), "base": _or_null(_ID), "block_size": _one_of(*BLOCK_SIZES),
        "wipe": _one_of(*WIPE_POLICIES), "size_bytes": _number(1, VOLUME_BYTES_MAX), "sealed": _number(0, 1),
        "map_id": _ID, "map_lock_byte": _number(1), "map_length": _number(0), "map_frames": _number(0),
        "map_crc": _number(0, 0xFFFFFFFF), "created_ns": _INTEGER,
    },
    SegmentRow: {
        "id": _ID, "layer": _ID, "role": _one_of("own", "spare", "sealed"), "slots": _number(0, 1 << 32),
        "lock_byte": _number(1),
    },
    VolumeRow: {
        "id": _ID, "name": _text(1), "head": _ID, "created_ns": _INTEGER, "expires_ns": _or_null(_INTEGER),
    },
    SnapshotRow: {
        "volume": _ID, "name": _text(1), "layer": _ID, "guid": _ID, "created_ns": _INTEGER, "note": _text(),
        "number": _number(0),
    },
    HoldRow: {"layer": _ID, "holder": _text(1), "created_ns": _INTEGER},
    LabelRow: {"volume": _ID, "key": _text(1), "value": _text()},
    LineageRow: {
        "volume": _ID, "parent": _or_null(_ID), "name": _text(1), "snapshot": _or_null(_text(1)),
        "guid": _or_null(_ID), "created_ns": _INTEGER, "dropped_ns": _or_null(_INTEGER),
    },
    MachineRow: {
        "id": _ID, "name": _text(1), "ram": _ID, "configuration": _text(2), "created_ns": _INTEGER,
        "stands_on": _or_null(_ID), "resumes": _number(0, 2), "state_bytes": _number(0, STATE_BYTES_MAX),
        "recorded": _text(),
    },
    MachineDiskRow: {
        "machine": _ID, "position": _number(0, DISKS_MAX - 1), "name": _text(1), "volume": _ID, "owned": _number(0, 1),
    },
    MachineSnapshotRow: {
        "id": _ID, "machine": _ID, "name": _text(1), "parent": _or_null(_ID), "number": _number(0),
        "mode": _one_of(*MACHINE_MODES), "note": _text(), "ram": _or_null(_ID),
        "state_bytes": _number(0, STATE_BYTES_MAX), "configuration": _text(2), "recorded": _text(),
        "created_ns": _INTEGER,
    },
    MachineSnapshotDiskRow: {"snapshot": _ID, "position": _number(0, DISKS_MAX - 1), "layer": _ID},
    ForkCallRow: {"key": _text(1), "digest": _BLOB, "names": _text(2), "created_ns": _INTEGER},
    WorkRow: {
        "id": _INTEGER, "kind": _one_of("map", "segment", "scrub", "volume", "base-merge"), "target": _ID,
        "lock_byte": _number(0), "wipe": _one_of(*WIPE_POLICIES), "done_bytes": _number(0),
    },
}  # fmt: skip

STORE_VALUES = {
    "uuid": _ID, "next_lock_byte": _number(0), "stamp": _BLOB, "wipe": _one_of(*WIPE_POLICIES),
    "block_size": _one_of(*BLOCK_SIZES),
}  # fmt: skip
SOUND_STORE = " AND ".join(value.sql.format(column) for column, value in STORE_VALUES.items())
SOUND_ROW = {
    kind: " AND ".join(value.sql.format(column) for column, value in values.items()) for kind, values in VALUES.items()
}
SOUND_ROW[LayerRow] += " AND (parent IS NULL OR base IS NULL)"
SOUND_ROW[MachineSnapshotRow] += " AND (mode = 'off') = (ram IS NULL)"

# Conditions on several rows together: each query gives the ids of the rows that break one.
UNSOUND_WHOLES = {
    "volumes: its head has not one spare segment, and one of its own": (
        "SELECT id FROM volumes WHERE 1 != (SELECT count(*) FROM segments WHERE layer = head AND role = 'spare') "
        "OR NOT EXISTS (SELECT 1 FROM segments WHERE layer = head AND role = 'own')"
    ),
    "volumes: its head is sealed": "SELECT volumes.id FROM volumes JOIN layers ON layers.id = head WHERE sealed",
    "snapshots: its layer is not sealed": (
        "SELECT layer FROM snapshots JOIN layers ON layers.id = layer WHERE NOT sealed"
    ),
    "layers: it is in a circle, or stands on one": (
        "WITH RECURSIVE up(id) AS (SELECT id FROM layers WHERE parent IS NULL "
        "UNION ALL SELECT layers.id FROM up JOIN layers ON layers.parent = up.id) "
        "SELECT id FROM layers WHERE id NOT IN (SELECT id FROM up)"
    ),
    "layers: its blocks are of another size than what it stands on": (
        "SELECT layers.id FROM layers JOIN layers AS below ON below.id = layers.parent "
        "WHERE below.block_size != layers.block_size"
    ),
    "machines: it stands on a snapshot of another machine": (
        "SELECT machines.id FROM machines JOIN machine_snapshots AS at ON at.id = stands_on "
        "WHERE at.machine != machines.id"
    ),
    "machine_snapshots: it was taken after one of another machine, or in a circle": (
        "WITH RECURSIVE up(id) AS (SELECT id FROM machine_snapshots WHERE parent IS NULL UNION ALL "
        "SELECT above.id FROM up JOIN machine_snapshots AS below ON below.id = up.id "
        "JOIN machine_snapshots AS above ON above.parent = below.id AND above.machine = below.machine) "
        "SELECT id FROM machine_snapshots WHERE id NOT IN (SELECT id FROM up)"
    ),
    "machine_snapshots: its RAM is not a snapshot of its machine's RAM": (
        "SELECT machine_snapshots.id FROM machine_snapshots JOIN machines ON machines.id = machine "
        "JOIN snapshots ON snapshots.layer = machine_snapshots.ram WHERE snapshots.volume != machines.ram"
    ),
    "machine_snapshots: it has not one snapshot of each disk of its machine": (
        "SELECT taken.id FROM machine_snapshots AS taken "
        "WHERE (SELECT count(*) FROM machine_disks WHERE machine = taken.machine) != "
        "(SELECT count(*) FROM machine_snapshot_disks WHERE snapshot = taken.id) "
        "OR EXISTS (SELECT 1 FROM machine_disks AS disk LEFT JOIN machine_snapshot_disks AS bound "
        "ON bound.snapshot = taken.id AND bound.position = disk.position "
        "LEFT JOIN snapshots ON snapshots.layer = bound.layer "
        "WHERE disk.machine = taken.machine AND snapshots.volume IS NOT disk.volume)"
    ),
    "machines: its RAM volume is a disk too": (
        "SELECT machines.id FROM machines JOIN machine_disks ON machine_disks.volume = machines.ram"
    ),
}
