"""Makes the catalog of a store what it was in an older version: takes away what `catalog.schema.UPGRADES` adds."""

import sqlite3
from contextlib import closing
from pathlib import Path

_STEPS_BACK: dict[int, tuple[str, ...]] = {
    6: (
        "DROP TABLE machine_snapshot_disks",
        "UPDATE machines SET stands_on = NULL",
        "DROP TABLE machine_snapshots",
        "DROP TABLE machine_disks",
        "DROP TABLE machines",
    ),
    5: ("ALTER TABLE store DROP COLUMN wipe", "ALTER TABLE store DROP COLUMN block_size"),
    4: (
        "DROP TABLE labels",
        "DROP TABLE lineage",
        "DROP TABLE fork_calls",
        "DROP INDEX volumes_expires",
        "DROP INDEX volumes_numbers",
        "ALTER TABLE volumes DROP COLUMN expires_ns",
    ),
    3: ("DROP TABLE holds",),
    2: (
        "ALTER TABLE snapshots DROP COLUMN number",
        "DROP INDEX layers_base",
        "DROP INDEX pending_target",
        "DROP INDEX pending_kind",
    ),
    1: ("ALTER TABLE pending DROP COLUMN done_bytes",),
}


def make_older(store: Path, version: int) -> None:
    """Take away what came after a version. No process has the store open."""
    with closing(sqlite3.connect(store / "catalog.db")) as catalog:
        for older in range(max(_STEPS_BACK), version - 1, -1):
            for statement in _STEPS_BACK[older]:
                catalog.execute(statement)
        catalog.execute(f"PRAGMA user_version = {version}")
        catalog.commit()


def version_of(store: Path) -> int:
    """Return the version that a catalog has on the disk."""
    with closing(sqlite3.connect(store / "catalog.db")) as catalog:
        (version,) = catalog.execute("PRAGMA user_version").fetchone()
    return int(version)


def tables_of(store: Path) -> dict[str, list[str]]:
    """Return the columns of each table, and the indexes."""
    with closing(sqlite3.connect(store / "catalog.db")) as catalog:
        names = catalog.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite%' ORDER BY name")
        return {name: sorted(row[1] for row in catalog.execute(f"PRAGMA table_info({name})")) for (name,) in names}
