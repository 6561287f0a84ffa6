"""Disks with known bytes: each 4 KiB block holds its own number, so any copy of it can be checked."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onionskin

BLOCK = 4096
BATCH = 16384
GIB = 1 << 30
Array = np.ndarray[Any, Any]


def blocks_of(indices: Array, *, generation: int = 0) -> Array:
    """The bytes that blocks hold: their number plus one, with the generation in the upper bits, over and over."""
    marks = np.asarray(indices, np.uint64) + np.uint64(1) + (np.uint64(generation) << np.uint64(48))
    return np.repeat(marks, BLOCK // 8).view(np.uint8)


def make_flat(path: Path, size_bytes: int) -> Path:
    """Write a raw image in which no block is a hole, and sync it."""
    with path.open("wb") as file:
        for start in range(0, size_bytes // BLOCK, BATCH):
            file.write(blocks_of(np.arange(start, min(start + BATCH, size_bytes // BLOCK))))
        os.fsync(file.fileno())
    return path


def scattered(count: int, block_count: int, *, seed: int = 1) -> Array:
    """Draw distinct blocks, in random order."""
    return np.random.default_rng(seed).choice(block_count, count, replace=False, shuffle=True).astype(np.uint64)


def stepped(count: int, size_bytes: int) -> tuple[int, Array]:
    """Choose a step that visits a disk all over, and name the blocks that `qemu-img bench -S STEP` comes to."""
    step = size_bytes // 1000 * 618 // BLOCK * BLOCK + BLOCK
    return step, (np.arange(count, dtype=np.uint64) * np.uint64(step) % np.uint64(size_bytes)) // np.uint64(BLOCK)


def write_blocks(volume: onionskin.Volume, indices: Array, *, generation: int = 0) -> None:
    """Write blocks in the order given, in batches, with their known bytes."""
    for start in range(0, len(indices), BATCH):
        part = indices[start : start + BATCH]
        volume.write_blocks(part, blocks_of(part, generation=generation))


def write_layers(volume: onionskin.Volume, indices: Array, layers: int) -> None:
    """Write blocks in the order given, a snapshot after each part: `layers` sealed layers, and an empty head."""
    for number, part in enumerate(np.array_split(indices, layers)):
        write_blocks(volume, part)
        volume.snapshot(f"layer-{number}")


def write_extents(volume: onionskin.Volume, offsets: Sequence[int], length: int, pattern: int) -> None:
    """Write one extent of a repeated byte at each offset, and flush."""
    data = bytes([pattern]) * length
    for offset in offsets:
        volume.write(offset, data)
    volume.flush()


def drop_cache(*paths: Path) -> None:
    """Put files out of the page cache; what is dirty is written first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill_cache(*paths: Path) -> None:
    """Read files once, so that they are in the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
