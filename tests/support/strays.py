"""What a store has too much or too little: files without a row, rows without a file.

Reads the catalog by itself, with SQLite, so that it does not believe what it judges.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def strays(store: Path) -> list[str]:
    """What is wrong with a store that nobody has open; files that pending work will free have a row for it."""
    with closing(sqlite3.connect(store / "catalog.db")) as catalog:
        layers = catalog.execute("SELECT map_id, map_length FROM layers").fetchall()
        segments = catalog.execute("SELECT id, role, slots FROM segments").fetchall()
        pending = catalog.execute("SELECT kind, target FROM pending").fetchall()
        volumes = {id.hex() for (id,) in catalog.execute("SELECT id FROM volumes")}
    volumes |= targets(pending, "volume")
    spares = {id for id, role, _ in segments if role == "spare"}  # the next head's map may be there already
    maps = {id.hex() for id, _ in layers} | {id.hex() for id in spares} | targets(pending, "map")
    datas = {id.hex() for id, _, _ in segments} | targets(pending, "segment")
    needed_maps = {id.hex() for id, length in layers if length}
    needed_datas = {id.hex() for id, role, slots in segments if role == "sealed" and slots}
    problems = []
    for directory, named, needed in (
        ("layers", maps, needed_maps),
        ("segments", datas, needed_datas),
        ("volumes", volumes, set()),
    ):
        found = {path.stem for path in (store / directory).iterdir()}
        problems += [f"{directory}/{name}* has no row" for name in sorted(found - named)]
        problems += [f"{directory}/{name}* has a row and is not there" for name in sorted(needed - found)]
    return problems


def targets(pending: list[tuple[str, bytes]], kind: str) -> set[str]:
    return {target.hex() for found, target in pending if found == kind}
