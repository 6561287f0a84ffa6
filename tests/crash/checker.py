"""Judges what a crash left of a workload's store.

In each state:
- the store opens, and so does every volume for writing, which resumes pending work;
- all volumes, names, sizes, snapshots (bit for bit) and heads (sector by sector) are those before the step
  that was under way, or those after it: never a mixture;
- a marker that says what an opening read (see `recover`) is true of every later one;
- store.check() finds no error, and nothing at all once every volume has been opened and closed again a few
  times: work that a background thread does may outlive one opening, but is not left pending for ever;
- a second opening reads the same;
- policy `zero`: once closed again, no file of the store holds bytes of a write that no volume and no snapshot
  reads.

The engine must be importable: the checker opens stores in this process.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash.harness import mark
from crash.model import StoreModel, plan
from crash.workload import STORE

OPENINGS_MAX = 8
CANARY = re.compile(rb"CANARY-\d{9}")


@dataclass(frozen=True)
class Found:
    """What a volume reads: its head, and each of its snapshots."""

    head: bytes
    snapshots: dict[str, bytes]


def workload_checker(seed: int, wipe: str, step_count: int) -> Callable[[Path, Sequence[str]], list[str]]:
    """A checker (see `harness.check_states`) of the workload with the same arguments."""
    steps = plan(seed, wipe, step_count).steps

    def check(directory: Path, markers: Sequence[str]) -> list[str]:
        under_way, models = StoreModel(), [StoreModel()]
        text = "before the first step"
        read = [marker for marker in markers if marker.startswith("read ")]
        reached = [marker for marker in markers if not marker.startswith("read ")]
        if reached:
            word, number = reached[-1].split()
            step = steps[int(number)]
            under_way = step.after
            models = [step.after] if word == "done" else [step.before, step.after]
            text = f"{word} {step}"
        problems = check_store(directory / STORE, models, read[-1] if read else None)
        if wipe == "zero" and not problems and not under_way.hides:
            problems = stray_canaries(directory / STORE)
        return [f"{text}: {problem}" for problem in problems]

    return check


def check_store(path: Path, models: Sequence[StoreModel], read: str | None = None) -> list[str]:
    """What is wrong with a store that must be one of `models`, and what an opening has read before."""
    first = read_store(path)
    differences = [difference(model, first) for model in models]
    problems = [] if None in differences else [" and ".join(f"not as wanted: {text}" for text in differences)]
    if read is not None and read != f"read {digest_of(first)}":
        problems.append("an opening before the crash read something else")
    problems += check_again(path, first)
    return problems


def digest_of(found: dict[str, Found]) -> str:
    """Of all that a store reads."""
    parts = [(name, found[name].head, sorted(found[name].snapshots.items())) for name in sorted(found)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_store(path: Path) -> dict[str, Found]:
    """Opens every volume for writing, and every snapshot; reads all of it, and closes the store."""
    import onionskin

    with onionskin.Store(path) as store:
        return {info.name: read_volume(store, info.name) for info in store.volumes()}


def read_volume(store: Any, name: str) -> Found:
    with store.open(name) as volume:
        head = volume.read(0, volume.size_bytes)
        snapshots = {}
        for snapshot in volume.snapshots:
            with store.open(name, snapshot=snapshot.name) as view:
                snapshots[snapshot.name] = view.read(0, view.size_bytes)
        return Found(head, snapshots)


def check_again(path: Path, first: dict[str, Found]) -> list[str]:
    """What is wrong with the store once it has been opened: it must be whole, and stay as it is."""
    import onionskin

    with onionskin.Store(path, create=False) as store:
        problems = [f"check: {problem}" for problem in store.check() if problem.severity == "error"]
    if read_store(path) != first:
        problems.append("a second opening reads something else")
    left: list[Any] = []
    for _ in range(OPENINGS_MAX):
        with onionskin.Store(path, create=False) as store:
            for info in store.volumes():
                store.open(info.name).close()
            left = store.check()
        if not left:
            break
    return problems + [f"still there after {OPENINGS_MAX} more openings: {problem}" for problem in left]


def difference(model: StoreModel, found: dict[str, Found]) -> str | None:
    """Why a store that reads `found` is not this one; None where it may be."""
    if set(found) != set(model.volumes):
        return f"volumes {sorted(found)} instead of {sorted(model.volumes)}"
    for name, volume in model.volumes.items():
        if set(found[name].snapshots) != set(volume.snapshots):
            return f"snapshots {sorted(found[name].snapshots)} of {name} instead of {sorted(volume.snapshots)}"
        for snapshot, taken in volume.snapshots.items():
            if found[name].snapshots[snapshot] != taken.content:
                return f"snapshot {snapshot} of {name} does not read as it was taken"
        reason = volume.head.difference(found[name].head)
        if reason is not None:
            return f"the head of {name} {reason}"
    return None


def stray_canaries(path: Path) -> list[str]:
    """Bytes of writes in the files of a closed store that nothing in it reads any more."""
    found = read_store(path)
    read = [content for volume in found.values() for content in (volume.head, *volume.snapshots.values())]
    reachable = {match for content in read for match in CANARY.findall(content)}
    problems = []
    for file in sorted(path.rglob("*")):
        if file.is_file():
            stray = set(CANARY.findall(file.read_bytes())) - reachable
            if stray:
                problems.append(f"{file.relative_to(path)} still holds {sorted(stray)[:4]}, which nothing reads")
    return problems


def recover(root: Path) -> None:
    """Opens what a crash left, says what it read, and dies without closing: for `harness.resume`."""
    import onionskin

    store = onionskin.Store(root / STORE)
    found: dict[str, Found] = {}
    opened = [store.open(info.name) for info in store.volumes()]
    for volume in opened:
        snapshots = {}
        for snapshot in volume.snapshots:
            with store.open(volume.name, snapshot=snapshot.name) as view:
                snapshots[snapshot.name] = view.read(0, view.size_bytes)
        found[volume.name] = Found(volume.read(0, volume.size_bytes), snapshots)
    mark(root, f"read {digest_of(found)}")
    os._exit(0)


if __name__ == "__main__":
    recover(Path(sys.argv[1]))
