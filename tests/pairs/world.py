"""The world that each run begins with: a store with four volumes, and images beside it.

    v        over base.img: snapshots s1 and s2, and a head with data
    c        a clone of v@s1, with snapshots s1 and s2 of its own
    w        over nothing, with snapshots s1 and s2
    x        a fork of a disk that is gone, whose lifetime is over
    u        a fork of v@s1 to which nothing was written

It is built once for each wipe policy and kept in memory; each run gets fresh files. The images keep their inodes, which
the catalog knows them by. The model of it is written down beside, from the same calls.
"""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pairs import model
from pairs.model import Disk, State
from pairs.units import UNIT_BYTES, disk_bytes, numbers_of
from pairs.verbs import EXPIRED, UNWRITTEN, VOLUME_UNITS

BASE_UNITS = 24
IMAGES = {"base.img": 9, "moved.img": 9, "import.img": 8}  # name -> the number that it is written with


@dataclass(frozen=True)
class World:
    """The files of a fresh store, by their paths below it; the streams that lead from s2 on; and the model of it all."""

    root: Path
    wipe: str
    files: dict[str, bytes]
    images: dict[str, bytes]
    mtimes: dict[str, int]
    streams: dict[str, tuple[bytes, Disk, Disk]]  # volume -> stream, the disk where it starts, where it ends
    state: State

    @property
    def store(self) -> Path:
        return self.root / "store"

    def lay_out(self) -> None:
        """Make the world anew."""
        shutil.rmtree(self.store, ignore_errors=True)
        for directory in ("layers", "segments", "volumes"):
            (self.store / directory).mkdir(parents=True)
        for name, data in self.files.items():
            (self.store / name).write_bytes(data)
        for path in self.root.glob("*.img*"):
            if path.name not in self.images:
                path.unlink()
        for name, data in self.images.items():
            lay_image(self.root / name, data, self.mtimes[name])


def lay_image(path: Path, data: bytes, mtime_ns: int) -> None:
    """Write an image over the file that is there, so that it keeps its inode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
    finally:
        os.close(descriptor)


class Builder:
    """Does the same to the store and to the model."""

    def __init__(self, store, state: State) -> None:
        self.store, self.state = store, state
        self.number = 10

    def write(self, volume, first: int, count: int) -> None:
        self.number += 1
        volume.write(first * UNIT_BYTES, disk_bytes([self.number] * count, first))
        self.state = model.write(self.state, None, "build", first, self.number, count)

    def snapshot(self, volume, name: str) -> None:
        volume.snapshot(name)
        self.state = model.snapshot(self.state, None, "build", name)

    def fill(self, name: str, shift: int) -> tuple[bytes, Disk, Disk]:
        """Write, s1, write, s2, write; the stream of a snapshot s3 that was taken back."""
        from onionskin.delta import delta

        self.state = model.open_(self.state, None, "build", name)
        with self.store.open(name) as volume:
            self.write(volume, shift, 6)
            self.write(volume, 18 + shift, 6)
            self.snapshot(volume, "s1")
            self.write(volume, shift + 2, 2)
            self.write(volume, 28, 2)
            self.snapshot(volume, "s2")
            at_s2 = self.state
            self.write(volume, 6, 4)
            self.snapshot(volume, "s3")
            stream = io.BytesIO()
            delta(self.store, name, "s2", "s3", stream)
            start, end = at_s2.volumes[name].disk, self.state.volumes[name].disk
            volume.revert("s2")
            volume.discard("s3")
            self.state = at_s2
            self.write(volume, shift + 4, 4)
            self.write(volume, 24, 2)
            volume.trim(28 * UNIT_BYTES, 2 * UNIT_BYTES)
            self.state = model.trim(self.state, None, "build", 28, 2)
        self.state = model.close(self.state, None, "build")
        return stream.getvalue(), start, end


def build(root: Path, wipe: str) -> World:
    """Build the world in its place."""
    import onionskin

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    images = {name: disk_bytes([number] * BASE_UNITS) for name, number in IMAGES.items()}
    state = State(images={name: numbers_of(data) for name, data in images.items()})
    for name, data in images.items():
        lay_image(root / name, data, 10**18)
    streams = {}
    with onionskin.Store(root / "store") as store:
        builder = Builder(store, state)
        for name in ("v", "c", "w"):
            base = root / "base.img" if name == "v" else None
            if name == "c":
                store.clone("v", "s1", "c")
                builder.state = model.clone(builder.state, None, "v", "s1", "c", "c")
            else:
                store.create(name, base=base, size=VOLUME_UNITS * UNIT_BYTES, wipe=wipe).close()
                builder.state = model.create(
                    builder.state, None, "build", name, VOLUME_UNITS, "base.img" if base else None, name
                )
            streams[name] = builder.fill(name, {"v": 0, "c": 2, "w": 4}[name])
        builder.state = model.create(builder.state, None, "build", "y", 8, None, "y")
        with store.create("y", size=8 * UNIT_BYTES, wipe=wipe) as volume:
            builder.write(volume, 0, 4)
            store.fork("y", names=[EXPIRED], lifetime=1e-9)
        state = model.close(model.fork(builder.state, None, "y", None, (EXPIRED,), "x"), None, "build")
        store.delete("y")
        state = model.delete(state, None, "y")
        state = state.with_volume(EXPIRED, model.replace(state.volumes[EXPIRED], source=None, expires=True))
        store.fork("v", "s1", names=[UNWRITTEN])
        builder.state = model.fork(state, None, "v", "s1", (UNWRITTEN,), "u")
    with onionskin.Store(root / "store") as store:
        store.check(repair=True)
    (root / "store" / "reserve").write_bytes(b"")
    files = {
        str(path.relative_to(root / "store")): path.read_bytes()
        for path in (root / "store").rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }
    state = model.replace(builder.state, handles={})
    mtimes = {name: (root / name).stat().st_mtime_ns for name in images}
    return World(root, wipe, files, images, mtimes, streams, state)
