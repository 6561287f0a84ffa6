"""Judges what a crash left of a workload's store.

In each state:
- the store opens, and so does every volume for writing, which resumes pending work;
- all volumes, names, sizes, snapshots (bit for bit) and heads (sector by sector) are those before the step
  that was under way, or those after it: never a mixture;
- a marker that says what an opening read (see `recover`) is true of every later one, and so is one that says what it
  wrote and flushed;
- an image file that was exported is there and whole;
- store.check() finds no error, and nothing at all once every volume has been opened and closed again a few
  times: work that a background thread does may outlive one opening, but is not left pending for ever;
- then there is no file without a row, and no row without a file;
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crash.harness.model import (
    BLOCK_BYTES,
    CANARY_BYTES,
    MAIN,
    VOLUME_BYTES,
    Disk,
    Seed,
    StoreModel,
    VolumeModel,
    canary,
    plan,
)
from crash.harness.run import mark
from crash.harness.workload import STORE, lower_limits
from support.strays import strays

OPENINGS_MAX = 8
CANARY = re.compile(rb"CANARY-\d{9}")
BUILT = canary(800_000_000) * (BLOCK_BYTES // CANARY_BYTES)  # what a recovery writes to the first block of each volume
RECOVERY_WORDS = ("read", "building", "creating", "built")


@dataclass(frozen=True)
class Found:
    """What a volume reads: its head, and each of its snapshots; and what is said of it."""

    head: bytes
    snapshots: dict[str, bytes]
    ancestors: tuple[tuple[str, str | None], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    expires: bool = False


def workload_checker(seed: Seed, wipe: str, step_count: int) -> Callable[[Path, Sequence[str]], list[str]]:
    """A checker (see `harness.check_states`) of the workload with the same arguments."""
    steps = plan(seed, wipe, step_count).steps

    def check(directory: Path, markers: Sequence[str]) -> list[str]:
        under_way, models = StoreModel(), [StoreModel()]
        text = "before the first step"
        recovery = [marker.split() for marker in markers if marker.split()[0] in RECOVERY_WORDS]
        reached = [marker for marker in markers if marker.split()[0] not in RECOVERY_WORDS]
        if reached:
            word, number = reached[-1].split()
            step = steps[int(number)]
            under_way = step.after
            models = [step.after] if word == "done" else [step.before, step.after]
            text = f"{word} {step}"
        problems = check_store(directory / STORE, models, Recovered({word: digests for word, *digests in recovery}))
        problems += check_files(directory, models)
        if wipe == "zero" and not problems and not under_way.hides:
            problems = stray_canaries(directory / STORE)
        return [f"{text}: {problem}" for problem in problems]

    return check


@dataclass(frozen=True)
class Recovered:
    """The markers of a recovery that was crashed again (see `recover`): each word, and the digests behind it."""

    said: dict[str, list[str]]

    def models(self, models: Sequence[StoreModel]) -> Sequence[StoreModel]:
        """What the store may be, by what it may have been when the recovery began."""
        if "creating" in self.said:
            made = StoreModel({MAIN: VolumeModel(Disk(bytes(VOLUME_BYTES)).changed(0, BUILT))})
            return [*models, made]
        if "building" in self.said:
            return [
                replace(model, volumes={name: built_upon(volume) for name, volume in model.volumes.items()})
                for model in models
            ]
        return models

    def problems(self, found: dict[str, Found]) -> list[str]:
        if "built" in self.said:
            lost = [digest_of(found)] != self.said["built"]
            return ["what a recovery flushed before the crash is lost"] if lost else []
        if "creating" in self.said or "read" not in self.said:
            return []
        whole, besides = self.said["read"]
        if "building" in self.said:
            lost = digest_of(found, besides_first_block=True) != besides
        else:
            lost = digest_of(found) != whole
        return ["an opening before the crash read something else"] if lost else []


def built_upon(volume: VolumeModel) -> VolumeModel:
    return replace(volume, head=volume.head.changed(0, BUILT))


def check_store(path: Path, models: Sequence[StoreModel], recovered: Recovered) -> list[str]:
    """What is wrong with a store that must be one of `models`, but for what a recovery did to it."""
    first = read_store(path)
    differences = [difference(model, first) for model in recovered.models(models)]
    problems = [] if None in differences else [" and ".join(f"not as wanted: {text}" for text in differences)]
    return problems + recovered.problems(first) + check_again(path, first)


def check_files(directory: Path, models: Sequence[StoreModel]) -> list[str]:
    """What is wrong with the image files beside a store: each is absent or whole, as one of `models` has it."""
    problems = []
    for name in sorted({name for model in models for name in model.files}):
        path = directory / name
        found = path.read_bytes() if path.exists() else None
        if found not in [model.files.get(name) for model in models]:
            problems.append(f"{name} is {'gone' if found is None else 'not what was exported'}")
    return problems


def digest_of(found: dict[str, Found], *, besides_first_block: bool = False) -> str:
    """Of all that a store reads."""
    begin = BLOCK_BYTES if besides_first_block else 0
    parts = [(name, found[name].head[begin:], sorted(found[name].snapshots.items())) for name in sorted(found)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_store(path: Path) -> dict[str, Found]:
    """Opens every volume for writing, and every snapshot; reads all of it, and closes the store."""
    import onionskin

    with onionskin.Store(path) as store:
        return {info.name: read_volume(store, info.name) for info in store.volumes()}


def read_volume(store: Any, name: str) -> Found:
    with store.open(name) as volume:
        return read_all(store, volume)


def read_all(store: Any, volume: Any) -> Found:
    snapshots = {}
    for snapshot in volume.snapshots:
        with store.open(volume.name, snapshot=snapshot.name) as view:
            snapshots[snapshot.name] = view.read(0, view.size_bytes)
    info = store.info(volume.name)
    return Found(
        volume.read(0, volume.size_bytes),
        snapshots,
        tuple((ancestor.name, ancestor.snapshot) for ancestor in store.lineage(volume.name)),
        tuple(sorted(info.labels.items())),
        info.expires is not None,
    )


# The replay makes directories and files with modes of its own; and no opening ends a merge into the base.
OF_NO_CONCERN = ("users may get at it", "pending work: base-merge")


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
            left = [problem for problem in store.check() if not problem.what.endswith(OF_NO_CONCERN)]
        if not left:
            break
    problems += [f"still there after {OPENINGS_MAX} more openings: {problem}" for problem in left]
    return problems + [f"after {OPENINGS_MAX} more openings: {problem}" for problem in strays(path)]


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
        reason = volume.head.difference(found[name].head) or difference_of_what_is_said(volume, found[name])
        if reason is not None:
            return f"the head of {name} {reason}"
    return None


def difference_of_what_is_said(volume: VolumeModel, found: Found) -> str | None:
    """Why the lineage, the labels or the lifetime of a volume are not as the model has them."""
    if (found.labels, found.expires) != (volume.labels, volume.expires):
        return f"has the labels {found.labels}, and expires: {found.expires}"
    are_right = len(found.ancestors) == len(volume.ancestors) and all(
        name == origin.volume and snapshot in origin.snapshots
        for (name, snapshot), origin in zip(found.ancestors, volume.ancestors, strict=True)
    )
    return None if are_right else f"comes from {found.ancestors} instead of {volume.ancestors}"


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
    """Opens what a crash left, says what it read, builds upon it, and dies without closing: for `harness.resume`.

    Markers: `read WHOLE BESIDES` (digests, of all and of all but the first blocks of the heads), then `building` before a
    block is written to each volume, or `creating` before a volume is made where there is none, then `built WHOLE`.
    """
    import onionskin

    lower_limits()
    store = onionskin.Store(root / STORE)
    opened = [store.open(info.name) for info in store.volumes()]
    found = {volume.name: read_all(store, volume) for volume in opened}
    mark(root, f"read {digest_of(found)} {digest_of(found, besides_first_block=True)}")
    if opened:
        mark(root, "building")
    else:
        mark(root, "creating")
        opened = [store.create(MAIN, size=VOLUME_BYTES, block_size=BLOCK_BYTES)]
    for volume in opened:
        volume.write(0, BUILT)
        volume.flush()
    found = {volume.name: read_all(store, volume) for volume in opened}
    mark(root, f"built {digest_of(found)}")
    os._exit(0)


if __name__ == "__main__":
    recover(Path(sys.argv[1]))
