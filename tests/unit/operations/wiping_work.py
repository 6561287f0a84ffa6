"""Random operations on volumes of both policies, for the test that kills this process: `wiping_work.py STORE OUTSIDE SEED`.

Each block that is written begins with words that no other has, which say whether the volume's policy was `zero`. It
prints a line when it has begun, and goes on until it is killed.
"""

import contextlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import onionskin
from onionskin.images import import_image

BLOCK = 4096
BLOCKS = 96
VOLUMES_MAX = 4
SNAPSHOTS_MAX = 5


def fresh_block(wipe: str) -> bytes:
    return f"canary-{wipe}-{os.urandom(8).hex()}!".encode().ljust(BLOCK, b"#")


class Work:
    """What one process does to a store."""

    def __init__(self, store: onionskin.Store, outside: Path, seed: int) -> None:
        self.store, self.outside, self.random = store, outside, random.Random(seed)
        self.open: dict[str, onionskin.Volume] = {}
        self.views: list[onionskin.Volume] = []
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"{os.getpid()}-{self.count}"

    def volume(self) -> onionskin.Volume:
        """Return one of the volumes, opened if it is not; they are few."""
        names = [volume.name for volume in self.store.volumes()]
        if not names or (len(names) < VOLUMES_MAX and self.random.random() < 0.1):
            name, wipe = self.name(), self.random.choice(["zero", "zero", "release"])
            self.open[name] = self.store.create(name, size=BLOCKS * BLOCK, wipe=wipe)
            return self.open[name]
        name = self.random.choice(names)
        if name not in self.open:
            self.open[name] = self.store.open(name)
        return self.open[name]

    def snapshot_of(self, volume: onionskin.Volume) -> str:
        found = volume.snapshots
        if not found:
            raise onionskin.StateError("it has none")
        return self.random.choice(found).name

    def write(self, volume: onionskin.Volume) -> None:
        first = self.random.randrange(BLOCKS)
        count = self.random.randint(1, min(12, BLOCKS - first))
        volume.write(first * BLOCK, b"".join(fresh_block(volume.wipe) for _ in range(count)))

    def trim(self, volume: onionskin.Volume) -> None:
        first = self.random.randrange(BLOCKS)
        volume.trim(first * BLOCK, self.random.randint(1, BLOCKS - first) * BLOCK)

    def flush(self, volume: onionskin.Volume) -> None:
        volume.flush()

    def snapshot(self, volume: onionskin.Volume) -> None:
        if len(volume.snapshots) < SNAPSHOTS_MAX:
            volume.snapshot(self.name())
        else:
            volume.merge(self.snapshot_of(volume))

    def merge(self, volume: onionskin.Volume) -> None:
        volume.merge(self.snapshot_of(volume))

    def discard(self, volume: onionskin.Volume) -> None:
        volume.discard(self.snapshot_of(volume), recursive=True)

    def revert(self, volume: onionskin.Volume) -> None:
        volume.revert(self.snapshot_of(volume))

    def clone(self, volume: onionskin.Volume) -> None:
        if len(self.store.volumes()) < VOLUMES_MAX:
            wipe = self.random.choice(["zero", "release"])
            self.store.clone(volume.name, self.snapshot_of(volume), self.name(), wipe=wipe)

    def flatten(self, volume: onionskin.Volume) -> None:
        if volume.wipe == "zero":  # the copy is the volume's own, and has its policy
            volume.flatten()

    def delete(self, volume: onionskin.Volume) -> None:
        name = volume.name
        self.open.pop(name).close()
        self.store.delete(name, recursive=True)

    def close(self, volume: onionskin.Volume) -> None:
        self.open.pop(volume.name).close()

    def look(self, volume: onionskin.Volume) -> None:
        if len(self.views) > 2:
            self.views.pop(0).close()
        self.views.append(self.store.open(volume.name, snapshot=self.snapshot_of(volume)))

    def copy(self, volume: onionskin.Volume) -> None:
        """Export, and import what that gave, where there is room for one more."""
        image = self.outside / "image.raw"
        volume.export(image)
        if len(self.store.volumes()) < VOLUMES_MAX:
            import_image(self.store, image, self.name(), wipe="zero")

    def step(self) -> None:
        verbs: list[tuple[Callable[[onionskin.Volume], None], int]] = [
            (self.write, 12), (self.trim, 3), (self.flush, 3), (self.snapshot, 4), (self.merge, 2), (self.discard, 1),
            (self.revert, 2), (self.clone, 2), (self.flatten, 1), (self.delete, 1), (self.close, 1), (self.look, 2),
            (self.copy, 1),
        ]  # fmt: skip
        (verb,) = self.random.choices([verb for verb, _ in verbs], [weight for _, weight in verbs])
        with contextlib.suppress(onionskin.StateError):  # a snapshot or a clone is in the way
            verb(self.volume())


def main() -> None:
    """Work until somebody ends this."""
    root, outside, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with onionskin.Store(root) as store:
        work = Work(store, outside, seed)
        print("begun", flush=True)
        while True:
            work.step()


if __name__ == "__main__":
    main()
