"""What a store holds at the end of a run, and what is wrong with it by itself: read in a process of its own.

What must hold when nobody has the store open any more, whatever happened before: every volume opens and every snapshot
reads; `check` finds no error; after `check(repair=True)` no file is without a row, no row of a sealed file without its
file, no layer that neither a head nor a name reaches, and no file waits to be freed.
"""

from __future__ import annotations

import gc
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pairs.model import Disk
from pairs.units import numbers_of


@dataclass
class Findings:
    """What was read, and what is wrong."""

    volumes: dict[str, Disk] = field(default_factory=dict)
    snaps: dict[tuple[str, str], Disk] = field(default_factory=dict)
    images: dict[str, Disk] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)  # volumes that are there and were not read


@dataclass(frozen=True)
class Question:
    """What has to be looked at. `half_merged`: a merge into the base may not have ended.

    `only`: the volumes that were used, where the others, and `check`, which opens all of them once more, are passed over;
    that their files are there is seen in any case.
    """

    half_merged: bool = False
    killed: bool = False
    only: frozenset[str] | None = None


def find(root: Path, asked: Question) -> Findings:
    """Open the store of a run and look at it."""
    import onionskin

    found = Findings()
    found.wrong += [f"before any opening: {fault}" for fault in structure(root / "store", ended=False)]
    with onionskin.Store(root / "store") as store:
        names = [info.name for info in store.volumes()]
        if asked.half_merged:
            end_merges(store, names)
        for name in names:
            if asked.only is None or name not in ("v", "c", "w", "x") or name in asked.only:
                _attempt(found, f"volume {name}", lambda name=name: _read_volume(store, name, found))
            else:
                found.passed.add(name)
        if asked.only is None:
            _attempt(found, "check", lambda: _check(store, found, asked.half_merged))
    for path in sorted(root.glob("*.img*")):
        if path.suffix == ".img":
            found.images[path.name] = numbers_of(path.read_bytes())
        elif not asked.killed:
            found.wrong.append(f"{path.name.split('.')[0]} left a part behind")
    found.wrong += structure(root / "store", ended=not asked.half_merged and asked.only is None)
    return found


def end_merges(store: Any, names: list[str]) -> None:
    """Let the volume that began a merge into a base end it: until then its base is for nobody else."""
    for name in names:
        with suppress(Exception), store.open(name) as volume:
            volume.merge_into_base("s1")


def _attempt(found: Findings, what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        found.wrong.append(f"{what}: {type(error).__name__}: {error}")


def _read_volume(store: Any, name: str, found: Findings) -> None:
    for snap in store.snapshots(name):
        _attempt(found, f"{name}@{snap.name}", lambda snap=snap.name: _read_snapshot(store, name, snap, found))
    with store.open(name) as volume:
        found.volumes[name] = numbers_of(volume.read(0, volume.size_bytes))


def _read_snapshot(store: Any, name: str, snap: str, found: Findings) -> None:
    with store.open(name, snapshot=snap) as view:
        found.snaps[name, snap] = numbers_of(view.read(0, view.size_bytes))


def _check(store: Any, found: Findings, half_merged: bool) -> None:
    for problem in store.check(repair=True):
        if problem.severity == "error" and not (half_merged and problem.where.endswith(".img")):
            found.wrong.append(f"check: {problem.what} ({Path(problem.where).name})")


def structure(store: Path, *, ended: bool) -> list[str]:
    """Compare the rows of a store that nobody has open with its files. `ended`: nothing is left to be done."""
    with closing(sqlite3.connect(f"file:{store / 'catalog.db'}?mode=ro", uri=True)) as catalog:
        layers = catalog.execute("SELECT id, parent, sealed, map_id, map_length FROM layers").fetchall()
        segments = catalog.execute("SELECT id, role, slots FROM segments").fetchall()
        pending = catalog.execute("SELECT kind, target FROM pending").fetchall()
        tops = {head for (head,) in catalog.execute("SELECT head FROM volumes")}
        tops |= {layer for (layer,) in catalog.execute("SELECT layer FROM snapshots")}
        lineage = catalog.execute("SELECT volume, parent, name, dropped_ns FROM lineage").fetchall()
        named = dict(catalog.execute("SELECT id, name FROM volumes").fetchall())
    maps, data = _files(store / "layers"), _files(store / "segments")
    waits = {target.hex() for _, target in pending}
    spares = {id.hex() for id, role, _ in segments if role == "spare"}
    wrong = [f"map {id[:4]} has no row" for id in maps - {row[3].hex() for row in layers} - spares - waits]
    wrong += [f"segment {id[:4]} has no row" for id in data - {row[0].hex() for row in segments} - waits]
    sealed = {map_id.hex() for _, _, is_sealed, map_id, length in layers if is_sealed and length}
    wrong += [f"the map {id[:4]} of a sealed layer is gone" for id in sealed - maps]
    filled = {id.hex() for id, role, slots in segments if role == "sealed" and slots}
    wrong += [f"the sealed segment {id[:4]} is gone" for id in filled - data]
    wrong += [f"layer {id.hex()[:4]} is reached by nothing" for id in _unreached(layers, tops)]
    wrong += _wrong_lineage(lineage, named)
    if ended:
        wrong += [f"{kind} {target.hex()[:4]} is still to be done" for kind, target in pending if kind != "scrub"]
    return sorted(wrong)


def _wrong_lineage(lineage: list[tuple[Any, ...]], named: dict[bytes, str]) -> list[str]:
    """Each volume has its row, with its name; one that is gone has a row as long as another comes from it."""
    there = {volume: name for volume, _, name, dropped_ns in lineage if dropped_ns is None}
    parents = {parent for _, parent, _, _ in lineage}
    wrong = [f"volume {name} has the lineage of {there.get(id)}" for id, name in named.items() if there.get(id) != name]
    wrong += [
        f"volume {name} is gone, and its lineage says nothing of it" for id, name in there.items() if id not in named
    ]
    gone = [(volume, name) for volume, _, name, dropped_ns in lineage if dropped_ns is not None]
    return wrong + [f"nothing comes from {name}, and its lineage is there" for id, name in gone if id not in parents]


def _files(directory: Path) -> set[str]:
    return {name.split(".")[0] for name in os.listdir(directory)}


def _unreached(layers: list[tuple[Any, ...]], tops: set[bytes]) -> set[bytes]:
    parents = {row[0]: row[1] for row in layers}
    reached: set[bytes] = set()
    for top in tops:
        at: bytes | None = top
        while at is not None and at not in reached:
            reached.add(at)
            at = parents.get(at)
    return set(parents) - reached


def find_and_send(root: Path, answer: Connection, asked: Question) -> None:
    """Run in a forked process. Never returns."""
    gc.disable()
    try:
        answer.send(find(root, asked))
    except BaseException as error:
        answer.send(Findings(wrong=[f"the store cannot be looked at: {type(error).__name__}: {error}"]))
    finally:
        os._exit(0)
