"""A fresh file system over a sparse file, for what ext4 has not. Needs root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onionskin.measure import peers


def mount_missing(kind: str) -> str | None:
    """The reason to skip what needs a mount of this kind, or None."""
    if os.geteuid() != 0:
        return "only root mounts a file system"
    return peers.missing(f"mkfs.{kind}", "mount")


@contextmanager
def loop_mount(directory: Path, kind: str, size_bytes: int) -> Iterator[Path]:
    """Mount a file system of this kind; it is gone afterwards."""
    image, point = directory / f"{kind}.img", directory / kind
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    peers.run(f"mkfs.{kind}", "-q", image)
    peers.run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        peers.run("umount", "--lazy", point)  # what an interrupt left running may still have a file open
        image.unlink()
        point.rmdir()
