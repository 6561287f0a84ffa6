"""A fresh file system over a file, for what ext4 has not. Needs root.

A sparse file is enough where contestants work alike. Where one writes to new places and another to those that it freed
before, the file must have been written: else a flush pays for the places of the file below too, and only the first one does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from onionskin.measure import peers


def mount_missing(kind: str) -> str | None:
    """The reason to skip what needs a mount of this kind, or None."""
    if os.geteuid() != 0:
        return "only root mounts a file system"
    return peers.missing(f"mkfs.{kind}", "mount")


_KEEP_WRITTEN = {"ext4": ["-E", "nodiscard"], "xfs": ["-K"], "btrfs": ["--nodiscard"]}  # else mkfs makes the file sparse


def _write_zeros(file: BinaryIO, size_bytes: int) -> None:
    zeros = bytes(1 << 20)
    for at in range(0, size_bytes, len(zeros)):
        file.write(zeros[: size_bytes - at])
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def loop_mount(directory: Path, kind: str, size_bytes: int, *, is_sparse: bool = True) -> Iterator[Path]:
    """Mount a file system of this kind; it is gone afterwards."""
    image, point = directory / f"{kind}.img", directory / kind
    point.mkdir()
    with image.open("wb") as file:
        if is_sparse:
            file.truncate(size_bytes)
        else:
            _write_zeros(file, size_bytes)
    peers.run(f"mkfs.{kind}", "-q", *_KEEP_WRITTEN[kind], image)
    peers.run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        peers.run("umount", "--lazy", point)  # what an interrupt left running may still have a file open
        image.unlink()
        point.rmdir()


@contextmanager
def place_for_reflinks(directory: Path, size_bytes: int) -> Iterator[Path | str]:
    """Give the directory where its files can share extents, else an XFS of this size in it; or the reason why not."""
    if peers.can_reflink(directory):
        yield directory
    elif reason := mount_missing("xfs"):
        yield f"the file system has no reflink, and {reason}"
    else:
        with loop_mount(directory, "xfs", size_bytes) as mounted:
            yield mounted
