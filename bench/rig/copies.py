"""What one would use instead of a fork, in the quickest way that one process has: no program is started for a copy.

Each makes copies of an image, all of them durable when it returns, and none of them read yet.
"""

import os
import struct
from collections.abc import Callable, Sequence
from fcntl import ioctl
from pathlib import Path

CLUSTER = 65536
FICLONE = 0x40049409
BTRFS_SNAPSHOT_V2 = 0x50009417  # _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2)
_VOLUME_ARGUMENTS = struct.Struct("=qQQ32x4040s")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def qcow2_overlay(size_bytes: int, backing: Path) -> bytes:
    """Return an empty qcow2 image (version 3) over a raw one, as short as one may be.

    The header with the backing file's name and format, the table of refcount blocks, one refcount block, and the L1 table,
    a cluster each; the L1 table is the last and holds zeros, so that its one cluster need not be written in full.
    """
    name = os.fsencode(backing)
    entries = -(-size_bytes // (CLUSTER // 8 * CLUSTER))
    extension = struct.pack(">II8s", 0xE2792ACA, 3, b"raw") + bytes(8)
    length = 104
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, length + len(extension), len(name), 16, size_bytes, 0),
        *(entries, 3 * CLUSTER, CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, length),
    )
    first = (header + extension + name).ljust(CLUSTER, b"\0")
    table = struct.pack(">Q", 2 * CLUSTER).ljust(CLUSTER, b"\0")
    counts = struct.pack(">4H", 1, 1, 1, 1).ljust(CLUSTER, b"\0")
    return first + table + counts + bytes(entries * 8)


def make_overlays(image: bytes, paths: Sequence[Path]) -> None:
    """Write the image of an overlay under each name, and sync it: the files, and their directory at the end."""

    def write(path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, image[:512])  # what is zero is a hole, as qemu-img leaves it
        os.pwrite(descriptor, image[CLUSTER : CLUSTER + 8], CLUSTER)
        os.pwrite(descriptor, image[2 * CLUSTER : 2 * CLUSTER + 8], 2 * CLUSTER)
        os.ftruncate(descriptor, len(image))
        return descriptor

    _make(paths, write)


def make_reflinks(source: Path, paths: Sequence[Path]) -> None:
    """Copy a file by sharing its extents (FICLONE, what `cp --reflink` calls), and sync."""
    opened = os.open(source, os.O_RDONLY)

    def clone(path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        ioctl(descriptor, FICLONE, opened)
        return descriptor

    try:
        _make(paths, clone)
    finally:
        os.close(opened)


def _make(paths: Sequence[Path], make: Callable[[Path], int]) -> None:
    """Make all, then sync all: the second sync often finds its data written by the first."""
    descriptors = [make(path) for path in paths]
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.close(descriptor)
    sync_directory(paths[0].parent)


def make_subvolumes(source: Path, paths: Sequence[Path]) -> None:
    """Snapshot a btrfs subvolume (the call of `btrfs subvolume snapshot`), and sync the file system once at the end."""
    opened = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    directory = os.open(paths[0].parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for path in paths:
            arguments = bytearray(_VOLUME_ARGUMENTS.pack(opened, 0, 0, os.fsencode(path.name)))
            ioctl(directory, BTRFS_SNAPSHOT_V2, arguments)
        os.fsync(directory)
    finally:
        os.close(opened)
        os.close(directory)


def make_scattered(path: Path, size_bytes: int, extents: int) -> Path:
    """Make an image of a size with so many extents of 4 KiB, each apart from the others, and sync it."""
    step = size_bytes // extents // 4096 * 4096
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for number in range(extents):
            os.pwrite(file.fileno(), bytes([number % 251 + 1]) * 4096, number * step)
        os.fsync(file.fileno())
    return path
