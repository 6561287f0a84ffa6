"""A NumPy array larger than memory: held in a volume, worked on in pieces, forked, compared, dropped.

    python examples/array_larger_than_memory.py STORE --size 30G

A volume of any size costs nothing until it is written, a fork of it nothing but a name, and what two forks differ in is
known from their maps, without reading either.
"""

import argparse
import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import onionskin

COLUMNS = 1 << 17  # a row of float64 is 1 MiB
ROW_BYTES = COLUMNS * 8
PIECE_ROWS = 16
Rows = npt.NDArray[np.float64]


class VolumeArray:
    """A volume as a two-dimensional array of float64, of which slices of rows are read and written."""

    def __init__(self, volume: onionskin.Volume) -> None:
        self.volume = volume
        self.shape = (volume.size_bytes // ROW_BYTES, COLUMNS)

    def __getitem__(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        piece = np.empty((max(0, stop - start), COLUMNS))
        self.volume.readinto(start * ROW_BYTES, piece)
        return piece

    def __setitem__(self, rows: slice, values: Rows) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        self.volume.write(start * ROW_BYTES, np.ascontiguousarray(np.broadcast_to(values, (stop - start, COLUMNS))))


@dataclass
class Comparison:
    """What two forks differ in."""

    bytes_changed: int
    difference_max: float


def pieces(first: int, end: int) -> Iterator[slice]:
    """Cut rows into slices that fit in memory many times."""
    for start in range(first, end, PIECE_ROWS):
        yield slice(start, min(start + PIECE_ROWS, end))


def fill(array: VolumeArray, every: int) -> None:
    """Measure something in one row of `every`; the others stay zero and take no room."""
    for row in range(0, array.shape[0], every):
        array[row : row + 1] = np.full((1, COLUMNS), float(row))


def normalise(array: VolumeArray, first: int, end: int) -> None:
    """Change a part of the array, piece by piece."""
    for rows in pieces(first, end):
        piece = array[rows]
        if piece.any():
            array[rows] = piece / array.shape[0]


def compare(before: VolumeArray, after: VolumeArray, since: str) -> Comparison:
    """Read what was written to `after` since a snapshot, in both, and nothing else."""
    result = Comparison(0, 0.0)
    for offset, length, _ in after.volume.diff(since).tolist():
        result.bytes_changed += length
        for rows in pieces(offset // ROW_BYTES, -(-(offset + length) // ROW_BYTES)):
            result.difference_max = max(result.difference_max, float(np.abs(before[rows] - after[rows]).max()))
    return result


def work(store: onionskin.Store, size: int, every: int) -> Comparison:
    """Fill an array, fork it, change the fork, compare the two, and drop the fork."""
    with store.create("array", size=size) as volume:
        array = VolumeArray(volume)
        fill(array, every)
        volume.snapshot("measured")
        store.clone("array", "measured", "fork")
        with store.open("fork") as fork_volume:
            fork = VolumeArray(fork_volume)
            fork_volume.snapshot("begin")  # empty: a name for the fork as it was made
            normalise(fork, 0, array.shape[0] // 2)
            found = compare(array, fork, since="begin")
        store.delete("fork", recursive=True)
        volume.revert("measured")
    return found


def main() -> None:
    """Do it once, and say what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path, help="a store, which is made if it is not there")
    parser.add_argument("--size", type=onionskin.parse_size, default="1G", help="of the array, such as 30G")
    parser.add_argument("--every", type=int, default=256, help="one row of so many is filled")
    parser.add_argument("--keep", action="store_true", help="leave the array in the store")
    arguments = parser.parse_args()
    with contextlib.closing(onionskin.Store(arguments.store)) as store:
        found = work(store, arguments.size, arguments.every)
        held = sum(path.stat().st_blocks * 512 for path in (store.path / "segments").iterdir())
        if not arguments.keep:
            store.delete("array", recursive=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"array: {onionskin.format_size(arguments.size)}, on disk {onionskin.format_size(held)}")
    print(f"fork: {onionskin.format_size(found.bytes_changed)} changed, by at most {found.difference_max:.6g}")
    print(f"memory: at most {onionskin.format_size(peak)}, pages of the files included")


if __name__ == "__main__":
    main()
