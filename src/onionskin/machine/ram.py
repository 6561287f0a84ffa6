"""The RAM of a running machine, and the volume of the store that has it.

The machine runs with its RAM mapped privately over a RAM file. The kernel notes what it writes. `GuestRam` collects that,
in rounds while the machine runs and in a last one while it is stopped, and writes it to the RAM volume; a snapshot of the
volume is then the RAM of that instant. The RAM file is a cache, which `build_file` makes from a snapshot of the volume.

What must hold: a page that a scan returned is in `unsaved` until somebody says that a snapshot which has it is durable
(`forget_saved`), whatever fails in between. What is written to the volume is what the page held when the machine was
stopped. The RAM file is never written to by a machine.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onionskin.kernels import _ram
from onionskin.kernels._ram import PAGE_BYTES, RUN_DTYPE, PageTracker

if TYPE_CHECKING:
    from onionskin.volume import Volume

_MAP_NORESERVE = 0x4000  # linux/mman.h; Python 3.11 does not have it
PIECE_BYTES = 8 << 20  # that are looked at and written at a time


def runs_of(pages: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the runs of the pages that are set, as byte offsets."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pages, [False])).astype(np.int8)))
    runs = np.empty(len(edges) // 2, RUN_DTYPE)
    runs["start"], runs["end"] = edges[::2] * PAGE_BYTES, edges[1::2] * PAGE_BYTES
    return runs


def blocks_of(runs: NDArray[Any]) -> NDArray[np.int64]:
    """Return the numbers of all pages of runs."""
    first = runs["start"].astype(np.int64) // PAGE_BYTES
    counts = runs["end"].astype(np.int64) // PAGE_BYTES - first
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(first - before, counts)


def pieces_of(runs: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Give runs in pieces of about PIECE_BYTES together; a longer run is cut."""
    cut = [(at, min(at + PIECE_BYTES, end)) for start, end in runs.tolist() for at in range(start, end, PIECE_BYTES)]
    first, held = 0, 0
    for number, (start, end) in enumerate(cut):
        if held and held + end - start > PIECE_BYTES:
            yield np.array(cut[first:number], RUN_DTYPE)
            first, held = number, 0
        held += end - start
    if held:
        yield np.array(cut[first:], RUN_DTYPE)


class GuestRam:
    """What a machine wrote to its RAM since the snapshot that it stands on. For one thread at a time.

    Parameters
    ----------
    tracker : PageTracker
        Over all of RAM, in which writes are noted.
    length : int
        Bytes of RAM.
    """

    def __init__(self, tracker: PageTracker, length: int) -> None:
        self._tracker = tracker
        self._length = length
        count = length // PAGE_BYTES
        self._unsaved = np.zeros(count, np.bool_)
        self._unread = np.zeros(count, np.bool_)  # of those: what the copy does not have as it is now
        # Each page has its place in it, so the last state of a page replaces the one before. Only what is written to
        # takes memory.
        self._copy = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._bytes = np.frombuffer(self._copy, np.uint8)

    @property
    def unsaved_pages(self) -> int:
        """How many pages differ from the snapshot that the machine stands on, as far as was looked."""
        return int(np.count_nonzero(self._unsaved))

    def add_private(self, *, swapped: bool) -> None:
        """Count all pages as unsaved that do not read as the RAM file: what was written before writes were noted.

        Call it before writes are noted, with `swapped`, and again behind that, without.
        """
        self._mark(self._tracker.private(swapped=swapped))

    def collect(self) -> int:
        """Collect what was written since the last call, and return how many pages were read.

        When this is called while the machine is stopped, the copy has all that is unsaved, as it is now.
        """
        try:
            self._mark(self._tracker.written(protect=True))
        except OSError as error:
            if (found := getattr(error, "written", None)) is not None:
                self._mark(found)
            raise
        runs = runs_of(self._unread)
        pieces = [self._bytes[start:end] for start, end in runs.tolist()]
        buffer = np.empty(sum(map(len, pieces)), np.uint8)
        self._tracker.read(runs, buffer)
        at = 0
        for piece in pieces:
            piece[:] = buffer[at : at + len(piece)]
            at += len(piece)
        self._unread[:] = False
        return len(buffer) // PAGE_BYTES

    def _mark(self, runs: NDArray[Any]) -> None:
        for start, end in (runs.view(np.uint64).reshape(-1, 2) // PAGE_BYTES).tolist():
            self._unsaved[start:end] = True
            self._unread[start:end] = True

    def save(self, volume: "Volume") -> int:
        """Write what is unsaved to the RAM volume, and return how many bytes are data. Nothing is flushed.

        Pages that hold only zeros become zeros of the volume, which take no room.
        """
        written = 0
        for start, end in runs_of(self._unsaved).tolist():
            for at in range(start, end, PIECE_BYTES):
                written += self._save_piece(volume, at, min(at + PIECE_BYTES, end))
        return written

    def _save_piece(self, volume: "Volume", start: int, end: int) -> int:
        kinds = _ram.classify(self._bytes[start:end])
        for a, b in (runs_of(kinds == _ram.ZERO)).tolist():
            volume.zero(start + a, b - a)
        data = runs_of(kinds == _ram.DATA)
        for a, b in data.tolist():
            volume.write(start + a, self._bytes[start + a : start + b])
        return int((data["end"] - data["start"]).sum())

    def forget_saved(self) -> None:
        """The snapshot that has what was saved is durable: only what is collected from now on is unsaved."""
        self._unsaved[:] = False
        self._unread[:] = False
        self._copy.madvise(mmap.MADV_DONTNEED)

    def put_back(self, pages: NDArray[Any], volume: "Volume") -> None:
        """Write runs of RAM as a snapshot has them to the machine, which is stopped, and forget that they were written."""
        for piece in pieces_of(pages):
            buffer = np.empty(int((piece["end"] - piece["start"]).sum()), np.uint8)
            volume.read_blocks(blocks_of(piece), buffer.reshape(-1, PAGE_BYTES))
            self._tracker.write(piece, buffer)
        self._tracker.written(protect=True)
        self.forget_saved()


def build_file(snapshot: "Volume", path: Path, length: int) -> None:
    """Make a RAM file from a snapshot of the RAM volume: sparse, readable by its owner only. It appears when it is whole.

    Parameters
    ----------
    snapshot : Volume
        Open, and as the machine's RAM was.
    path : Path
        The file. If it exists, it is replaced.
    length : int
        Bytes of RAM. The volume may have more.
    """
    made = path.with_name(path.name + ".new")
    descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, length)
        with mmap.mmap(descriptor, length) as mapped:
            whole = np.frombuffer(mapped, np.uint8)
            try:
                for offset, size, state in snapshot.extents().tolist():
                    if state == 1 and offset < length:
                        snapshot.readinto(offset, whole[offset : min(offset + size, length)])
            finally:
                del whole
        os.rename(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
