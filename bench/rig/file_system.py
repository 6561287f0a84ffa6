"""What a directory is on: the file system, whether it has a journal, and how often its device was told to flush."""

import os
from pathlib import Path

from onionskin.measure.results import file_system_of

_FLUSHES = 15  # Documentation/block/stat.rst: flush I/Os, the 16th field


def describe(directory: Path) -> str:
    """Return the file system of a directory as the tables name it. ext4 may be without a journal, which is faster."""
    kind = file_system_of(directory)
    if kind != "ext4":
        return kind
    device = directory.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    has_journal = any(Path("/proc/fs/jbd2").glob(f"{name}-*"))
    return "ext4 with a journal" if has_journal else "ext4 without a journal"


def flushes(directory: Path) -> int | None:
    """Return how many flushes the device below a directory was told, or None where that is not one device."""
    device = directory.stat().st_dev
    try:
        counted = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    except FileNotFoundError:
        return None
    return int(counted[_FLUSHES])
