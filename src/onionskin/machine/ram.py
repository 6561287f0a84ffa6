"""The RAM of a running machine, and the volume of the store that has it.

The machine runs with its RAM mapped privately over a RAM file. The kernel notes what it writes. `GuestRam` collects that,
in rounds while the machine runs and in a last one while it is stopped, and writes it to the RAM volume; a snapshot of the
volume is then the RAM of that instant. The RAM file is a cache, which `build_file` makes from a snapshot of the volume.

Where writes cannot be noted, the machine has a file of its own for its RAM, shared, and `ComparedRam` compares it with the
RAM volume while the machine is stopped.

What must hold: a page that a scan returned is in `unsaved` until somebody says that a snapshot which has it is durable
(`forget_saved`), whatever fails in between. What is written to the volume is what the page held when the machine was
stopped. A RAM file that machines map privately is never written to by a machine.
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onionskin.base.dtypes import PAGE_RUN
from onionskin.base.files import data_ranges, write_all
from onionskin.base.states import DATA as DATA_STATE
from onionskin.errors import StateError
from onionskin.kernels import _ram
from onionskin.kernels._ram import PAGE_BYTES, PageTracker
from onionskin.machine.preload import Preload

if TYPE_CHECKING:
    from onionskin.volume import Volume

_MAP_NORESERVE = 0x4000  # linux/mman.h; Python 3.11 does not have it
PIECE_PAGES = 1024  # that are looked at and written at a time
FIRST_PAGE = np.array([(0, PAGE_BYTES)], PAGE_RUN)
PIECE_BYTES = PIECE_PAGES * PAGE_BYTES
_FEW_RUNS = 256  # up to so many runs are marked one by one
_START_WRITING_PAGES = 512  # after so many the disk begins to write, so that the last sync waits for less
_LONG_RUN_PAGES = 32  # runs that are as long as this on the average are written one by one, from where they are


def runs_of(pages: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the runs of the pages that are set, as byte offsets."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pages, [False])).astype(np.int8)))
    runs = np.empty(len(edges) // 2, PAGE_RUN)
    runs["start"], runs["end"] = edges[::2] * PAGE_BYTES, edges[1::2] * PAGE_BYTES
    return runs


def runs_of_numbers(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Return the runs of pages of which these are the numbers, in their order, as byte offsets."""
    ends = np.append(np.flatnonzero(np.diff(numbers) != 1), len(numbers) - 1)[: len(numbers)]
    runs = np.empty(len(ends), PAGE_RUN)
    runs["end"] = (numbers[ends] + 1) * PAGE_BYTES
    runs["start"] = numbers[np.append(0, ends[:-1] + 1)[: len(ends)]] * PAGE_BYTES
    return runs


def blocks_of(runs: NDArray[Any]) -> NDArray[np.int64]:
    """Return the numbers of all pages of runs."""
    first = runs["start"].astype(np.int64) // PAGE_BYTES
    counts = runs["end"].astype(np.int64) // PAGE_BYTES - first
    before = np.cumsum(counts) - counts
    blocks: NDArray[np.int64] = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(first - before, counts)
    return blocks


def pieces_of(runs: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Give runs in pieces of about PIECE_BYTES together; a longer run is cut."""
    start, end = runs["start"].astype(np.int64), runs["end"].astype(np.int64)
    parts = -(-(end - start) // PIECE_BYTES)  # of each run
    number = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
    cut = np.empty(len(number), PAGE_RUN)
    cut["start"] = np.repeat(start, parts) + number * PIECE_BYTES
    cut["end"] = np.minimum(cut["start"].astype(np.int64) + PIECE_BYTES, np.repeat(end, parts))
    held = np.cumsum((cut["end"] - cut["start"]).astype(np.int64))
    first = 0
    while first < len(cut):
        before = int(held[first - 1]) if first else 0
        last = int(np.searchsorted(held, before + PIECE_BYTES, "right"))
        yield cut[first:last]
        first = last


def runs_of_extents(extents: NDArray[Any], length: int, *, only_data: bool) -> NDArray[Any]:
    """Return extents of a RAM volume as runs of whole pages of the RAM, which has `length` bytes and comes first."""
    kept = extents[extents["offset"] < length]
    if only_data:
        kept = kept[kept["state"] == DATA_STATE]
    runs = np.empty(len(kept), PAGE_RUN)
    starts = kept["offset"].astype(np.int64)
    runs["start"] = starts // PAGE_BYTES * PAGE_BYTES
    runs["end"] = np.minimum(-(-(starts + kept["length"].astype(np.int64)) // PAGE_BYTES) * PAGE_BYTES, length)
    return runs


def _runs_among(numbers: NDArray[np.int64], chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return runs of chosen places of a sorted list in which the numbers follow each other, as places."""
    places = np.flatnonzero(chosen)
    if not len(places):
        return []
    ends = np.flatnonzero((np.diff(places) != 1) | (np.diff(numbers[places]) != 1)) + 1
    starts = places[np.concatenate(([0], ends))]
    lasts = places[np.concatenate((ends - 1, [len(places) - 1]))]
    return list(zip(starts.tolist(), (lasts + 1).tolist(), strict=True))


def mark(pages: NDArray[np.bool_], runs: NDArray[Any]) -> None:
    """Set the pages of runs."""
    if len(runs) <= _FEW_RUNS:
        for start, end in (runs.view(np.uint64).reshape(-1, 2) // PAGE_BYTES).tolist():
            pages[start:end] = True
    else:
        pages[blocks_of(runs)] = True


class UnsavedRam(ABC):
    """What a machine wrote to its RAM since the snapshot that it stands on. For one thread at a time.

    Parameters
    ----------
    length : int
        Bytes of RAM.

    Attributes
    ----------
    length : int
        Bytes of RAM.
    """

    is_tracked: bool

    def __init__(self, length: int) -> None:
        self.length: int = length
        count = length // PAGE_BYTES
        self._unsaved = np.zeros(count, np.bool_)
        self._make_copy()
        self._copied = np.zeros(count, np.bool_)  # of the unsaved: what the copy has, and the volume has not
        self._stored = np.zeros(count, np.bool_)  # of the unsaved: what was written to the volume as data
        self._volume_has: NDArray[np.bool_] | None = None
        self._parent = page_aligned(
            0
        )  # room for a piece of the volume, which is kept: the first touch of it takes time
        self._is_closed = False

    def _make_copy(self) -> None:
        # Each page has its place in it, so the last state of a page replaces the one before. Only what is written to
        # takes memory.
        self._copy = mmap.mmap(-1, self.length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._bytes = np.frombuffer(self._copy, np.uint8)
        self._pages = self._bytes.reshape(-1, PAGE_BYTES)

    def _empty_copy(self) -> None:
        try:
            self._copy.madvise(mmap.MADV_DONTNEED)
        except OSError:  # in a sandbox that refuses it
            self._make_copy()

    @property
    def unsaved_pages(self) -> int:
        """How many pages differ from the snapshot that the machine stands on, as far as was looked."""
        return int(np.count_nonzero(self._unsaved))

    @property
    def unsaved_runs(self) -> NDArray[Any]:
        """The runs of those pages."""
        return runs_of(self._unsaved)

    def bytes_in_holes(self, file: int, besides: NDArray[Any]) -> int:
        """Return how many bytes of the unsaved pages, and of these runs, are in holes of a file that is as long as RAM."""
        wanted = self._unsaved.copy()
        mark(wanted, besides)
        held = np.zeros(len(self._unsaved), np.bool_)
        for start, end in data_ranges(file, 0, self.length):
            held[start // PAGE_BYTES : -(-end // PAGE_BYTES)] = True
        return int(np.count_nonzero(wanted & ~held)) * PAGE_BYTES

    @abstractmethod
    def add_unsaved(self, runs: NDArray[Any]) -> None:
        """Count runs as unsaved, though the machine did not write them: the volume has something else there."""

    @abstractmethod
    def collect(self) -> int:
        """Collect what was written since the last call, and return how many pages were read.

        When this is called while the machine is stopped, the copy has all that is unsaved, as it is now.
        """

    def save(self, volume: "Volume") -> int:
        """Write what was collected to the RAM volume. Return how many bytes of all that is unsaved are data there.

        Nothing is flushed. Pages that the volume has already are not written again. Pages that hold only zeros become zeros
        of the volume, which take no room.
        """
        self._refuse_closed()
        for piece in pieces_of(runs_of(self._copied)):
            numbers = blocks_of(piece)
            if len(piece) == 1:
                pages = self._pages[numbers[0] : numbers[-1] + 1]
            else:
                pages = page_aligned(len(numbers))
                np.take(self._pages, numbers, axis=0, out=pages)
            self._save_pages(volume, numbers, pages)
            self._copied[numbers] = False
        return int(np.count_nonzero(self._stored)) * PAGE_BYTES

    def _refuse_closed(self) -> None:
        """Raise StateError where the copy was given up: it has zeros now, and the process may have ended."""
        if self._is_closed:
            raise StateError("the machine is being ended, so its RAM cannot be saved; start it again")

    def _save_pages(self, volume: "Volume", numbers: NDArray[np.int64], pages: NDArray[np.uint8]) -> None:
        """Write pages to the volume, in the order of their numbers."""
        held = self._held_by(volume)
        is_held = held[numbers]
        if is_held.any():
            # What the volume has no data of reads as zeros there, so a page of zeros is the same.
            kinds = _ram.classify(pages.reshape(-1), volume_pages(volume, numbers, self._room_of_parent(len(numbers))))
        else:
            kinds = _ram.classify(pages.reshape(-1))
        zero = (kinds == _ram.ZERO) & is_held
        data = kinds == _ram.DATA
        for start, end in _runs_among(numbers, zero):
            at, length = int(numbers[start]) * PAGE_BYTES, (end - start) * PAGE_BYTES
            volume.zero(at, length)
        held[numbers[zero]] = False
        self._stored[numbers[zero]] = False
        runs = _runs_among(numbers, data)
        if len(runs) * _LONG_RUN_PAGES <= len(numbers):
            for start, end in runs:
                volume.write(int(numbers[start]) * PAGE_BYTES, pages[start:end].reshape(-1))
        elif data.all():
            volume.write_blocks(numbers, pages.reshape(-1))
        else:
            volume.write_blocks(numbers[data], np.ascontiguousarray(pages[data]).reshape(-1))
        held[numbers[data]] = True
        self._stored[numbers[data]] = True

    def _room_of_parent(self, count: int) -> NDArray[np.uint8]:
        if len(self._parent) < count:
            self._parent = page_aligned(max(count, PIECE_PAGES))
        return self._parent[:count]

    def _held_by(self, volume: "Volume") -> NDArray[np.bool_]:
        """Return which pages the volume has data of. It is asked once for each snapshot: nobody else writes to it."""
        if self._volume_has is None:
            self._volume_has = np.zeros(len(self._unsaved), np.bool_)
            mark(self._volume_has, runs_of_extents(volume.extents(), self.length, only_data=True))
        return self._volume_has

    def use_volume(self, volume: "Volume") -> None:
        """Save to the RAM volume as it was opened again: all that is unsaved is collected and written anew."""
        self.collect_again()

    def forget_saved(self) -> None:
        """The snapshot that has what was saved is durable: only what is collected from now on is unsaved."""
        self._unsaved[:] = False
        self._forget_collected()

    def collect_again(self) -> None:
        """The snapshot came to nothing: all that is unsaved is collected and written anew for the next one."""
        self._forget_collected()

    def _forget_collected(self) -> None:
        self._copied[:] = False
        self._stored[:] = False
        self._volume_has = None
        self._empty_copy()

    @abstractmethod
    def put_back(self, pages: NDArray[Any], volume: "Volume") -> None:
        """Write runs of RAM as a snapshot has them to the machine, which is stopped, and forget that they were written."""

    @abstractmethod
    def write_page(self, number: int, page: NDArray[np.uint8]) -> None:
        """Change a page of the machine, which is stopped. It counts as written by the machine."""

    @abstractmethod
    def read_pages(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return pages of the machine as they are now."""

    def close(self) -> None:
        """Give up the copy."""
        self._is_closed = True
        self._empty_copy()


def page_aligned(count: int) -> NDArray[np.uint8]:
    """Return room for pages, aligned to a page."""
    room = np.empty((count + 1) * PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % PAGE_BYTES
    return room[start : start + count * PAGE_BYTES].reshape(count, PAGE_BYTES)


def volume_pages(volume: "Volume", numbers: NDArray[np.int64], into: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Read pages of the RAM volume into room for them, and return it as bytes."""
    volume.read_blocks(numbers, into)
    return into.reshape(-1)


class GuestRam(UnsavedRam):
    """The RAM of a machine whose writes are noted.

    Parameters
    ----------
    tracker : PageTracker
        Over all of RAM, in which writes are noted.
    length : int
        Bytes of RAM.
    """

    is_tracked = True

    def __init__(self, tracker: PageTracker, length: int) -> None:
        super().__init__(length)
        self._tracker = tracker
        self._unread = np.zeros(
            len(self._unsaved), np.bool_
        )  # of the unsaved: what neither the copy nor the volume has as it is now
        self._rooms = (page_aligned(PIECE_PAGES), page_aligned(PIECE_PAGES))  # as `_parent`

    def try_out(self, *, writes: bool) -> None:
        """Read a page of the machine, and write it as it is. Raise OSError where a sandbox forbids that (process_vm_*).

        Nobody notes what the machine writes then: a snapshot or a revert would find out later.
        """
        page = page_aligned(1).reshape(-1)
        self._tracker.read(FIRST_PAGE, page)
        if writes:
            self._tracker.write(FIRST_PAGE, page)

    def touch_rooms(self) -> None:
        """Have the memory that `stream` reads into before it is wanted. Nobody may be in `stream`.

        The kernel gives each page of it at the first touch: that was a fifth of a first snapshot.
        """
        for room in self._rooms:
            room[:, 0] = 0

    def add_private(self, *, swapped: bool) -> None:
        """Count all pages as unsaved that do not read as the RAM file: what was written before writes were noted.

        Call it before writes are noted, with `swapped`, and again behind that, without.
        """
        self.add_unsaved(self._tracker.private(swapped=swapped))

    def add_unsaved(self, runs: NDArray[Any]) -> None:
        """Count runs as unsaved, though the machine did not write them: the volume has something else there."""
        mark(self._unsaved, runs)
        mark(self._unread, runs)

    def collect(self) -> int:
        """Collect what was written since the last call, and return how many pages were read.

        When this is called while the machine is stopped, the copy has all that is unsaved, as it is now.
        """
        self._refuse_closed()
        self.note_written()
        runs = runs_of(self._unread)
        self._tracker.read_in_place(runs, self._bytes)
        count = int(np.count_nonzero(self._unread))
        self._copied |= self._unread
        self._unread[:] = False
        return count

    def stream(self, volume: "Volume") -> int:
        """Write what was written since the last call to the volume, while the machine runs. Return how many pages.

        They go through small buffers, which stay in the processor's cache, and on to the disk at once. So when the machine
        is stopped, little is left to copy, and little to write behind that. While one piece is written, the next is read: a
        page that the machine writes meanwhile is found by the next scan, as one that it writes before it is read.
        """
        self._refuse_closed()
        self.note_written()
        count = 0
        with closing(self._read_ahead(list(pieces_of(runs_of(self._unread))))) as ahead:
            for numbers, pages in ahead:
                self._save_pages(volume, numbers, pages)
                self._unread[numbers] = False
                self._copied[numbers] = False
                count += len(numbers)
                if len(numbers) >= _START_WRITING_PAGES:
                    volume._opened.on_path(lambda path: path.start_writing())
        return count

    def _read_ahead(self, pieces: list[NDArray[Any]]) -> Generator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Read pieces of RAM, the next one while the caller uses the one before. Give their page numbers and their pages."""

        def read(place: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
            piece = pieces[place]
            numbers = blocks_of(piece)
            pages = self._rooms[place % 2][: len(numbers)]
            self._tracker.read(piece, pages.reshape(-1))
            return numbers, pages

        if len(pieces) == 1:
            yield read(0)
        elif pieces:
            with ThreadPoolExecutor(1, "onionskin RAM") as thread:  # at its end, nobody uses the tracker
                ahead = thread.submit(read, 0)
                for place in range(len(pieces)):
                    found = ahead.result()
                    if place + 1 < len(pieces):
                        ahead = thread.submit(read, place + 1)
                    yield found

    def note_written(self, *, again: bool = False) -> NDArray[Any]:
        """Count as unsaved what was written since the last call, without a look at what it holds. Return its runs.

        With `again`, the next call finds it once more: so a write to it meanwhile costs no fault.
        """
        try:
            found = self._tracker.written(protect=not again)
        except OSError as error:
            if (some := getattr(error, "written", None)) is not None:
                self.add_unsaved(some)
            raise
        self.add_unsaved(found)
        return found

    def forget_saved(self) -> None:
        """The snapshot that has what was saved is durable: only what is collected from now on is unsaved."""
        super().forget_saved()
        self._unread[:] = False

    def collect_again(self) -> None:
        """The snapshot came to nothing: all that is unsaved is collected and written anew for the next one."""
        super().collect_again()
        self._unread |= self._unsaved

    def put_back(self, pages: NDArray[Any], volume: "Volume") -> None:
        """Write runs of RAM as a snapshot has them to the machine, which is stopped, and forget that they were written."""
        for piece in pieces_of(pages):
            numbers = blocks_of(piece)
            pages = self._rooms[0][: len(numbers)]
            volume.read_blocks(numbers, pages)
            self._tracker.write(piece, pages.reshape(-1))
        self._tracker.written(protect=True)
        self.forget_saved()

    def put_back_from(self, pages: NDArray[Any], file: int) -> None:
        """Write runs of RAM as a RAM file has them to the machine, which is stopped, and forget that they were written."""
        self._tracker.write_from(pages, file)
        self._tracker.written(protect=True)
        self.forget_saved()

    def fill(self, pages: NDArray[Any], file: int, preload: Preload) -> None:
        """Do what `put_back_from` does in the machine's own process: in less than half of the time."""
        preload.fill(pages, file)
        self._tracker.written(protect=True)
        self.forget_saved()

    def drop(self, pages: NDArray[Any], preload: Preload) -> None:
        """Make runs of RAM read as the RAM file again, in the stopped machine, and forget that they were written."""
        preload.forget(pages)
        self._tracker.written(protect=True)
        self.forget_saved()

    def write_page(self, number: int, page: NDArray[np.uint8]) -> None:
        """Change a page of the machine, which is stopped. It counts as written by the machine."""
        run = np.array([(number * PAGE_BYTES, (number + 1) * PAGE_BYTES)], PAGE_RUN)
        self.add_unsaved(run)
        self._tracker.write(run, page)

    def read_pages(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return pages of the machine as they are now."""
        pages = page_aligned(len(numbers))
        self._tracker.read(runs_of_numbers(numbers), pages.reshape(-1))
        return pages

    def close(self) -> None:
        """Give up the copy and the tracker."""
        super().close()
        self._tracker.close()


class ComparedRam(UnsavedRam):
    """The RAM of a machine whose writes cannot be noted: a file of its own, which it maps shared.

    Parameters
    ----------
    path : Path
        That file, on tmpfs.
    volume : Volume
        The RAM volume, whose head is what the snapshot has that the machine stands on.
    """

    is_tracked = False

    def __init__(self, path: Path, volume: "Volume") -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        super().__init__(os.fstat(self._descriptor).st_size)
        self._volume = volume
        self._shared = mmap.mmap(self._descriptor, self.length)
        self._shared_pages = np.frombuffer(self._shared, np.uint8).reshape(-1, PAGE_BYTES)

    def use_volume(self, volume: "Volume") -> None:
        """Compare with the RAM volume as it was opened again."""
        super().use_volume(volume)
        self._volume = volume

    def add_unsaved(self, runs: NDArray[Any]) -> None:
        """Do nothing: each collection compares all of RAM."""

    def collect(self) -> int:
        """Compare RAM with the volume, and return how many pages differ. The machine is stopped."""
        self._refuse_closed()
        held = self._held()  # a look at a hole would make a page of tmpfs of it
        stored = np.zeros(len(held), np.bool_)
        mark(stored, runs_of_extents(self._volume.extents(), self.length, only_data=True))
        self._unsaved[:] = False
        wanted = np.flatnonzero(held | stored)
        for at in range(0, len(wanted), PIECE_PAGES):
            self._compare(wanted[at : at + PIECE_PAGES], held, stored)
        self._copied[:] = self._unsaved
        return self.unsaved_pages

    def _compare(self, numbers: NDArray[np.int64], held: NDArray[np.bool_], stored: NDArray[np.bool_]) -> None:
        pages, parent = page_aligned(len(numbers)), page_aligned(len(numbers))
        pages[:] = 0
        here = held[numbers]
        pages[here] = self._shared_pages[numbers[here]]
        volume_pages(self._volume, numbers, parent)
        differ = _ram.classify(pages.reshape(-1), parent.reshape(-1)) != _ram.SAME
        self._unsaved[numbers[differ]] = True
        self._pages[numbers[differ]] = pages[differ]

    def _held(self) -> NDArray[np.bool_]:
        held = np.zeros(len(self._unsaved), np.bool_)
        for start, end in data_ranges(self._descriptor, 0, self.length):
            held[start // PAGE_BYTES : -(-end // PAGE_BYTES)] = True
        return held

    def put_back(self, pages: NDArray[Any], volume: "Volume") -> None:
        """Write runs of RAM as a snapshot has them to the machine, which is stopped."""
        numbers = blocks_of(pages)
        for at in range(0, len(numbers), PIECE_PAGES):
            piece = numbers[at : at + PIECE_PAGES]
            self._shared_pages[piece] = volume.read_blocks(piece)
        self.forget_saved()

    def write_page(self, number: int, page: NDArray[np.uint8]) -> None:
        """Change a page of the machine, which is stopped."""
        self._shared_pages[number] = page

    def read_pages(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return pages of the machine as they are now."""
        pages = page_aligned(len(numbers))
        pages[:] = self._shared_pages[numbers]
        return pages

    def close(self) -> None:
        """Give up the copy and the file."""
        super().close()
        os.close(self._descriptor)


@contextmanager
def made_whole(path: Path) -> Iterator[int]:
    """Make a file that appears when it is whole, for its owner alone. Gives its descriptor."""
    made = path.with_name(path.name + ".new")
    descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
        made.rename(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


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
    with made_whole(path) as descriptor:
        fill_file(snapshot, descriptor, length)


def fill_file(snapshot: "Volume", descriptor: int, length: int) -> None:
    """Write what the RAM volume or a snapshot of it has to an empty file, which gets `length` bytes."""
    os.ftruncate(descriptor, length)
    room = np.empty(min(PIECE_BYTES, length), np.uint8)
    for start, end in runs_of_extents(snapshot.extents(), length, only_data=True).tolist():
        for at in range(start, end, PIECE_BYTES):
            piece = room[: min(PIECE_BYTES, end - at)]
            snapshot.readinto(at, piece)
            write_all(descriptor, piece.data, at)
