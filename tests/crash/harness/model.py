"""The plan of a crash workload: seeded operations on a tiny store, and what the store must hold before and
after each.

`plan(seed, wipe)` is a pure function, so the program that runs the steps and the checker that judges the
states which a crash leaves make the same plan and nothing has to be handed over but the number of a step, in
a marker.

What a sector of the head may hold after a crash: what the last flush covered, or anything written to it
since. Every write is a pattern of 16 bytes of its own, repeated: a canary, whose bytes tell where they came
from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
CANARY_BYTES = 16
VOLUME_BYTES = 64 * BLOCK_BYTES
BASE_BYTES = 48 * BLOCK_BYTES
STEPS = 40
SNAPSHOTS_MAX = 5
MAIN = "main"
MAIN_CLONE = "clone"
FORKS_MAX = 6
FORKS_DRAWN = (4, 0, 1, 0)  # by seed, how often: where nothing is forked, all else can be reached
FORK_LABELS = (("of", "a crash"),)
Seed = int | str  # a number draws steps; a name is one of crash.harness.scripts


def canary(number: int) -> bytes:
    return b"CANARY-%09d" % number


@dataclass(frozen=True)
class Disk:
    """What a disk reads, and for sectors that were changed since the last flush what else they may hold."""

    content: bytes
    unflushed: Mapping[int, frozenset[bytes]] = field(default_factory=dict)

    def changed(self, offset: int, data: bytes) -> Disk:
        content = self.content[:offset] + data + self.content[offset + len(data) :]
        unflushed = dict(self.unflushed)
        for sector in range(offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)):
            place = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            before = unflushed.get(sector, frozenset({self.content[place]}))
            unflushed[sector] = before | {content[place]}
        return Disk(content, unflushed)

    def flushed(self) -> Disk:
        return Disk(self.content)

    def difference(self, found: bytes) -> str | None:
        """Why `found` is not what this disk may read after a crash; None where it is."""
        if len(found) != len(self.content):
            return f"has {len(found)} bytes instead of {len(self.content)}"
        if found == self.content:
            return None
        for sector in range(len(found) // SECTOR_BYTES):
            place = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            allowed = self.unflushed.get(sector, frozenset({self.content[place]}))
            if found[place] not in allowed:
                wanted = ", ".join(sorted(repr(value[:CANARY_BYTES]) for value in allowed))
                return f"sector {sector} begins with {found[place][:CANARY_BYTES]!r}, not with {wanted}"
        return None


@dataclass(frozen=True)
class Taken:
    """A snapshot: what the disk was, and the snapshot that it was written over."""

    content: bytes
    parent: str | None


@dataclass(frozen=True)
class Origin:
    """What a volume was cloned or forked from, and as which snapshots it may say that it began."""

    volume: str
    snapshots: tuple[str | None, ...]


@dataclass(frozen=True)
class VolumeModel:
    """A volume, its snapshots and the snapshot that its head is a child of.

    `stands_on` is the nearest snapshot (volume, name) of another volume below all of it, and `ancestors` what it comes
    from, the nearest first. `expires`: it was made with a lifetime, which is over at once.
    """

    head: Disk
    snapshots: Mapping[str, Taken] = field(default_factory=dict)
    parent: str | None = None
    stands_on: tuple[str, str] | None = None
    ancestors: tuple[Origin, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    expires: bool = False

    def subtree(self, name: str) -> set[str]:
        found = {name}
        while True:
            more = {child for child, taken in self.snapshots.items() if taken.parent in found} | found
            if more == found:
                return found
            found = more

    def children(self, name: str) -> int:
        return sum(taken.parent == name for taken in self.snapshots.values()) + (self.parent == name)


@dataclass(frozen=True)
class StoreModel:
    """All volumes, and the image files that were exported beside the store.

    `hides` is set once a layer without a name may hold blocks that nothing reads: it had several children when its name
    was merged away, or it never had a name.
    """

    volumes: Mapping[str, VolumeModel] = field(default_factory=dict)
    hides: bool = False
    files: Mapping[str, bytes] = field(default_factory=dict)

    def with_volume(self, name: str, volume: VolumeModel) -> StoreModel:
        return replace(self, volumes={**self.volumes, name: volume})

    def without(self, names: Collection[str]) -> StoreModel:
        return replace(self, volumes={name: volume for name, volume in self.volumes.items() if name not in names})

    def standing_on(self, volume: str, snapshots: Collection[str]) -> set[str]:
        """The other volumes that stand on some snapshots of a volume."""
        below = {(volume, snapshot) for snapshot in snapshots}
        return {name for name, other in self.volumes.items() if other.stands_on in below}

    def has_forks(self, name: str) -> bool:
        return any(volume.ancestors[:1] and volume.ancestors[0].volume == name for volume in self.volumes.values())


@dataclass(frozen=True)
class Step:
    """One operation and the store before and after it."""

    number: int
    operation: str
    arguments: tuple[object, ...]
    before: StoreModel
    after: StoreModel

    def __str__(self) -> str:
        shown = ", ".join(f"{len(a)} bytes" if isinstance(a, bytes) else repr(a) for a in self.arguments)
        return f"step {self.number}: {self.operation}({shown})"


@dataclass(frozen=True)
class Plan:
    """The steps of one seed, and the base file that is there before the first (None: a volume without a
    base)."""

    seed: Seed
    wipe: str
    base: bytes | None
    steps: list[Step]


def plan(seed: Seed, wipe: str, step_count: int = STEPS) -> Plan:
    """The same steps for the same arguments, always."""
    source = random.Random(f"{seed} {wipe}")
    if isinstance(seed, str):
        from crash.harness.scripts import SCRIPTS

        planner = Planner(source, has_base=SCRIPTS[seed].has_base)
        planner.create()
        SCRIPTS[seed].steps(planner)
        return Plan(seed, wipe, planner.base, planner.steps)
    planner = Planner(source, has_base=seed % 3 != 2, forks=FORKS_DRAWN[seed % 4])
    planner.create()
    while len(planner.steps) < step_count:
        planner.add_one()
    planner.finish()
    return Plan(seed, wipe, planner.base, planner.steps)


class Planner:
    """Draws operations that the store will not refuse, and keeps the model."""

    def __init__(self, source: random.Random, *, has_base: bool, forks: int = 0) -> None:
        self.source = source
        self.forks = forks  # the weight of each that is drawn
        self.flat = False  # the disk stands on nothing any more, or did once
        self.store = StoreModel()
        self.steps: list[Step] = []
        self.canaries = 0
        self.names = 0
        self.base = (
            None
            if not has_base
            else b"".join(
                canary(900_000_000 + index) * (BLOCK_BYTES // CANARY_BYTES)
                for index in range(BASE_BYTES // BLOCK_BYTES)
            )
        )

    @property
    def main(self) -> VolumeModel:
        return self.store.volumes[MAIN]

    def step(self, operation: str, arguments: tuple[object, ...], after: StoreModel) -> None:
        self.steps.append(Step(len(self.steps), operation, arguments, self.store, after))
        self.store = after

    def step_main(self, operation: str, arguments: tuple[object, ...], after: VolumeModel) -> None:
        self.step(operation, arguments, self.store.with_volume(MAIN, after))

    def create(self) -> None:
        content = (self.base or b"").ljust(VOLUME_BYTES, b"\0")
        self.step("create", (VOLUME_BYTES,), StoreModel({MAIN: VolumeModel(Disk(content))}))

    def add_one(self) -> None:
        weighted: list[tuple[int, Callable[[], None]]] = [
            (14, self.write),
            (3, self.zero),
            (4, self.trim),
            (7, self.flush),
            (5, self.snapshot),
            (2, self.revert),
            (2, self.discard),
            (3, self.merge),
            (1, self.resize),
            (1, self.clone),
            (2, self.write_other),
            (2, self.delete_clone),
            (2 * self.forks, self.fork_some),
            (self.forks, self.fork_again),
            (self.forks, self.delete_some),
            (self.forks, self.expire),
            (self.forks, self.use_temporary),
            (self.forks, self.snapshot_some),
            (1, self.reopen),
            (2, self.merge_upto_into_base),
            (1, self.flatten),
            (1, self.export),
        ]
        (chosen,) = self.source.choices([add for _, add in weighted], [weight for weight, _ in weighted])
        chosen()

    def place(self, unit: int, size_bytes: int) -> tuple[int, int]:
        """A range: mostly a part of a block or two, sometimes many blocks."""
        units = size_bytes // unit
        offset = self.source.randrange(units) if self.source.random() < 0.6 else self.source.randrange(units // 8)
        length = self.source.choice((1, 2, BLOCK_BYTES // unit, 2 * BLOCK_BYTES // unit, 6 * BLOCK_BYTES // unit))
        if self.source.random() < 0.5:  # whole blocks
            offset = offset * unit // BLOCK_BYTES * BLOCK_BYTES // unit
        return offset * unit, max(1, min(length, units - offset)) * unit

    def pattern(self, length: int) -> bytes:
        self.canaries += 1
        return canary(self.canaries) * (length // CANARY_BYTES)

    def write(self) -> None:
        self.write_at(*self.place(CANARY_BYTES, len(self.main.head.content)))

    def write_at(self, offset: int, length: int) -> None:
        data = self.pattern(length)
        self.step_main("write", (offset, data), replace(self.main, head=self.main.head.changed(offset, data)))

    def clear_at(self, operation: str, offset: int, length: int) -> None:
        after = replace(self.main, head=self.main.head.changed(offset, bytes(length)))
        self.step_main(operation, (offset, length), after)

    def zero(self) -> None:
        self.clear_at("zero", *self.place(SECTOR_BYTES, len(self.main.head.content)))

    def trim(self) -> None:
        self.clear_at("trim", *self.place(SECTOR_BYTES, len(self.main.head.content)))

    def flush(self) -> None:
        self.step_main("flush", (), replace(self.main, head=self.main.head.flushed()))

    def expect_seal(self) -> None:
        """The background makes the map of the head and the files of the next one, as behind a first write to a server."""
        self.step("expect_seal", (), self.store)

    def snapshot(self) -> None:
        if len(self.main.snapshots) >= SNAPSHOTS_MAX:
            return
        self.names += 1
        name = f"s{self.names}"
        main = self.main
        taken = {**main.snapshots, name: Taken(main.head.content, main.parent)}
        self.step_main("snapshot", (name,), replace(main, head=main.head.flushed(), snapshots=taken, parent=name))

    def _some_snapshot(self) -> str | None:
        return self.source.choice(sorted(self.main.snapshots)) if self.main.snapshots else None

    def revert(self) -> None:
        name = self._some_snapshot()
        if name is not None:
            main = self.main
            after = replace(main, head=Disk(main.snapshots[name].content), parent=name)
            self.step_main("revert", (name,), after)

    def discard(self) -> None:
        name = self._some_snapshot()
        if name is None:
            return
        main = self.main
        gone = main.subtree(name)
        if self.store.standing_on(MAIN, gone):
            return  # refused
        taken = main.snapshots[name]
        kept = {other: found for other, found in main.snapshots.items() if other not in gone}
        if main.parent in gone:
            after = replace(main, head=Disk(taken.content), snapshots=kept, parent=taken.parent)
        else:
            after = replace(main, snapshots=kept)
        self.step_main("discard", (name,), after)

    def merge(self) -> None:
        name = self._some_snapshot()
        if name is not None:
            self.merge_named(name)

    def merge_named(self, name: str) -> None:
        main, below = self.main, self.main.snapshots[name].parent
        kept = {
            other: replace(found, parent=below) if found.parent == name else found
            for other, found in main.snapshots.items()
            if other != name
        }
        others = self.store.standing_on(MAIN, [name])
        on_it = main.children(name) + len(others)
        after = replace(self.store, hides=self.store.hides or on_it > 1)
        for other in others:
            volume = after.volumes[other]
            after = after.with_volume(other, replace(volume, stands_on=(MAIN, below) if below else None))
        parent = below if main.parent == name else main.parent
        self.step("merge", (name,), after.with_volume(MAIN, replace(main, snapshots=kept, parent=parent)))

    def resize(self) -> None:
        self.resize_to(self.source.choice((40, 56, 64, 72)) * BLOCK_BYTES + self.source.choice((0, SECTOR_BYTES)))

    def resize_to(self, size_bytes: int) -> None:
        content = self.main.head.content
        if size_bytes == len(content):
            return
        resized = content[:size_bytes].ljust(size_bytes, b"\0")
        self.step_main("resize", (size_bytes,), replace(self.main, head=Disk(resized)))

    # ---- other volumes ----

    def others(self) -> list[str]:
        return sorted(self.store.volumes.keys() - {MAIN})

    def _below_head(self, name: str) -> tuple[str, str] | None:
        """The nearest snapshot that the head of a volume stands on."""
        volume = self.store.volumes[name]
        return (name, volume.parent) if volume.parent else volume.stands_on

    def _forked(self, source: str, snapshot: str | None, **said: Any) -> VolumeModel:
        """A volume that begins as a snapshot of another one, or as that is now."""
        volume = self.store.volumes[source]
        content = volume.snapshots[snapshot].content if snapshot else volume.head.content
        # A head that nothing was written to is forked as the snapshot that it stands on.
        began_as = (snapshot,) if snapshot else (None, volume.parent)
        return VolumeModel(
            Disk(content),
            stands_on=(source, snapshot) if snapshot else self._below_head(source),
            ancestors=(Origin(source, began_as), *volume.ancestors),
            **said,
        )

    def clone(self) -> None:
        name = self._some_snapshot()
        if name is not None and MAIN_CLONE not in self.store.volumes:
            self.step("clone", (name,), self.store.with_volume(MAIN_CLONE, self._forked(MAIN, name)))

    def fork_some(self) -> None:
        """Of the disk or of another volume, as it is or as it was; some of them expire."""
        if len(self.store.volumes) > FORKS_MAX:
            return
        source = self.source.choice([MAIN, MAIN, MAIN, *self.others()])
        snapshots = sorted(self.store.volumes[source].snapshots)
        snapshot = self.source.choice([*snapshots, *snapshots, None])
        names = [self._new_name("f") for _ in range(self.source.randint(1, 3))]
        self.fork(snapshot, *names, source=source, expires=self.source.random() < 0.5)

    def _new_name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def fork(self, snapshot: str | None, *names: str, source: str = MAIN, expires: bool = False) -> None:
        """All begin as a snapshot, or as the disk is: what was written until then is flushed by that."""
        volume = self.store.volumes[source]
        made = {name: self._forked(source, snapshot, labels=FORK_LABELS, expires=expires) for name in names}
        flushed = volume if snapshot else replace(volume, head=volume.head.flushed())
        # What a cut holds and all that stands on it hides goes when it is looked for, not at once.
        after = replace(self.store, hides=self.store.hides or snapshot is None)
        asked = f"{source}@{snapshot}" if snapshot else source
        after = replace(after, volumes={**after.volumes, source: flushed, **made})
        self.step("fork", (asked, names, expires), after)

    def fork_again(self) -> None:
        """A call that was made before, under its key: it makes nothing."""
        before = [step.arguments for step in self.steps if step.operation == "fork"]
        if before:
            self.step("fork", self.source.choice(before), self.store)

    def expire(self) -> None:
        """Those with a lifetime go that have no snapshots, and that nothing there was forked from."""
        gone = {
            name
            for name, volume in self.store.volumes.items()
            if volume.expires and not volume.snapshots and not self.store.has_forks(name)
        }
        self.step("expire", tuple(sorted(gone)), self.store.without(gone))

    def delete_some(self) -> None:
        """Some go together, where none that stays stands on them."""
        names = self.source.sample(self.others(), min(len(self.others()), self.source.randint(1, 3)))
        kept = self.store.without(names)
        if names and not any(kept.standing_on(name, self.store.volumes[name].snapshots) for name in names):
            self.delete_several(*names)

    def delete_several(self, *names: str) -> None:
        self.step("delete_several", names, self.store.without(names))

    def use_temporary(self) -> None:
        """A fork for a while, of a snapshot or of the disk as it is, which is written to."""
        snapshot = self._some_snapshot() if self.source.random() < 0.7 else None
        name = self._new_name("t")
        forked = self._forked(MAIN, snapshot)
        main = self.main if snapshot else replace(self.main, head=self.main.head.flushed())
        after = replace(self.store, hides=self.store.hides or snapshot is None).with_volume(MAIN, main)
        self.step("open_temporary", (name, f"{MAIN}@{snapshot}" if snapshot else MAIN), after.with_volume(name, forked))
        offset, length = self.place(SECTOR_BYTES, len(forked.head.content))
        data = self.pattern(length)
        written = replace(forked, head=forked.head.changed(offset, data))
        self.step("write_temporary", (offset, data), self.store.with_volume(name, written))
        self.step("close_temporary", (), self.store.without([name]))

    def snapshot_some(self) -> None:
        """The disk and another volume are cut together."""
        room = len(self.main.snapshots) < SNAPSHOTS_MAX
        if room and self.others():
            self.snapshot_group(self._new_name("g"), self.source.choice(self.others()))

    def snapshot_group(self, name: str, other: str = MAIN_CLONE) -> None:
        """The disk and another volume, both open and written to, get a snapshot of one name."""
        clone = self.store.volumes[other]
        offset, length = 3 * BLOCK_BYTES, 2 * BLOCK_BYTES
        data = self.pattern(length)
        self.step(
            "open_clone",
            (other, offset, data),
            self.store.with_volume(other, replace(clone, head=clone.head.changed(offset, data))),
        )
        self.write_at(offset, length)
        taken = {volume: self._with_snapshot(volume, name) for volume in (MAIN, other)}
        self.step("snapshot_group", (name, other), replace(self.store, volumes={**self.store.volumes, **taken}))
        self.step("close_clone", (), self.store)

    def _with_snapshot(self, volume: str, name: str) -> VolumeModel:
        found = self.store.volumes[volume]
        taken = {**found.snapshots, name: Taken(found.head.content, found.parent)}
        return replace(found, head=found.head.flushed(), snapshots=taken, parent=name)

    def write_other(self) -> None:
        if self.others():
            self.write_clone(self.source.choice(self.others()))

    def write_clone(self, name: str = MAIN_CLONE) -> None:
        """Opens another volume and writes; then closes it, which flushes."""
        clone = self.store.volumes[name]
        offset, length = self.place(SECTOR_BYTES, len(clone.head.content))
        data = self.pattern(length)
        written = replace(clone, head=clone.head.changed(offset, data))
        flushed = replace(clone, head=written.head.flushed())
        self.step("open_clone", (name, offset, data), self.store.with_volume(name, written))
        self.step("close_clone", (), self.store.with_volume(name, flushed))

    def delete_clone(self) -> None:
        if MAIN_CLONE not in self.store.volumes:
            return
        kept = self.store.without([MAIN_CLONE])
        if not kept.standing_on(MAIN_CLONE, self.store.volumes[MAIN_CLONE].snapshots):
            self.step("delete_clone", (), kept)

    def reopen(self) -> None:
        self.step_main("reopen", (), replace(self.main, head=self.main.head.flushed()))

    def flatten(self) -> None:
        """It flushes where there is something to do, but does not promise it."""
        self.flat = True
        self.step_main("flatten", (), replace(self.main, parent=None))

    def export(self) -> None:
        """To a new image file. Whether it is flushed before is not promised."""
        name = f"exported-{len(self.store.files) + 1}.raw"
        files = {**self.store.files, name: self.main.head.content}
        self.step("export", (name,), replace(self.store, files=files))

    def merge_upto_into_base(self) -> None:
        """Of the oldest snapshot, where all else descends from it."""
        main = self.main
        oldest = [name for name, taken in main.snapshots.items() if taken.parent is None]
        if not self._may_merge_into_base() or len(oldest) != 1:
            return
        (name,) = oldest
        if main.parent is not None:
            self.step_main("merge_into_base", (name,), main)

    def _may_merge_into_base(self) -> bool:
        in_the_way = self.flat or self.store.hides or bool(self.others())
        return self.base is not None and not in_the_way

    def finish(self) -> None:
        """Everything goes into the base, where there is one and it may."""
        self.flush()
        if not self._may_merge_into_base():
            return
        while self.main.snapshots:
            self.merge()
            if self.store.hides:
                return
        self.step_main("merge_into_base", (None,), replace(self.main, head=self.main.head.flushed()))
