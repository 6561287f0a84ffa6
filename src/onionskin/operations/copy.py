"""Copies of whole disks: the part of an export, of a merge into the base and of a flatten that moves bytes.

What must hold: only the caller uses the destination while it is written. A caller makes the copied data durable before
it records the data as done. The loops over blocks run in C; this module only makes tables of extents.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENOSPC
from functools import partial
from typing import TYPE_CHECKING, Any

from onionskin.base.files import data_ranges, name_of
from onionskin.base.intervals import covered, distinct
from onionskin.base.lazy import dtypes
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.naming import some_of
from onionskin.base.paths import FilePath
from onionskin.kernels._copy import EXTENT_FIELDS, CopyCancelled, CopyJob
from onionskin.storage.chain import Chain, open_chain
from onionskin.storage.open_head import OpenDisk
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, refuse_changed_base

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from onionskin.base.progress import Progress
    from onionskin.kernels._volume import DataPath
    from onionskin.storage.locks import BaseLock

    Array = numpy.typing.NDArray[Any]
else:
    from onionskin.base.lazy import numpy

_FICLONERANGE = 0x4020940D
OPEN_SEGMENTS_MAX = 256
PROGRESS_SECONDS = 0.2
BASE = 0xFFFF  # stands for the base where the number of a segment is expected; no segment has this number
_PIECE_FIELDS = [("first", "<i8"), ("end", "<i8"), ("segment", "<u2"), ("slot", "<i8")]


def extents(volume: OpenDisk) -> "Array":
    """Return (offset, length, state) of the DATA (1) and ZERO (2) extents of the layers, cut at the end of the disk."""
    volume.begin_writing()
    runs, size_bytes = volume.on_path(lambda path: (path.runs(), path.size_bytes))
    runs = runs[runs["offset"] < size_bytes]  # another thread may have made the disk shorter in between
    out = numpy.empty(len(runs), dtype=dtypes.EXTENT)
    for name in ("offset", "length", "state"):
        out[name] = runs[name]
    if len(out):
        out["length"][-1] = min(int(out["length"][-1]), size_bytes - int(out["offset"][-1]))
    return out


@contextmanager
def chain_path(store: OpenStore, chain: Chain, base_lock: "BaseLock | None" = None) -> "Iterator[DataPath]":
    """Open a sealed chain for the time of a copy. The caller has locked its files."""
    path = open_chain(store.layout, chain, writable=False, base_lock=base_lock)
    try:
        yield path
    finally:
        path.close()


def run_job(job: CopyJob, table: "Array", progress: "Progress | None", done_before: int, total: int) -> None:
    """Run the copy of a table in a thread of its own, so that this one can report progress and be interrupted."""
    if progress is None and threading.current_thread() is not threading.main_thread():
        with naming(table):
            job.run()
        return
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with naming(table):
                job.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="onionskin copy")
    thread.start()
    try:
        while True:  # progress is reported at least once, however short the copy is
            thread.join(PROGRESS_SECONDS)
            if progress:
                progress(done_before + job.bytes_done, total)
            if not thread.is_alive():
                break
    except BaseException:
        job.cancel()
        raise
    finally:
        thread.join()
    if failure:
        raise KeyboardInterrupt if isinstance(failure[0], CopyCancelled) else failure[0]


@contextmanager
def naming(table: "Array") -> Iterator[None]:
    """Name the files of a copy in an error that names none: the one that is written, and some of those that are read."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or not len(table):
            raise
        sources = [name_of(int(one)) for one in numpy.unique(table["source"]) if one >= 0]
        what = f"{error.strerror}, in a copy from {some_of(sources, 3)}" if sources else error.strerror
        raise OSError(error.errno, what, name_of(int(table["destination"][0]))) from None


class StretchCopy:
    """A copy of all that the layers of a data path hold to the same offsets of a file. ZERO is copied as zeros."""

    def __init__(
        self,
        store: OpenStore,
        path: "DataPath",
        destination: int,
        size_bytes: int,
        *,
        reflink: bool,
        punch: bool,
        progress: "Progress | None" = None,
        threads: int = 0,
        bytes_per_second: int = 0,
    ) -> None:
        self._block_size, self._size_bytes = path.block_size, size_bytes
        self._progress = progress
        self._copy = partial(
            copy_table,
            sources={number: store.layout.segment_file(id) for number, id, _, _ in path.segments()},
            reflink=reflink,
            punch=punch,
            solid=True,
            progress=progress,
            threads=threads,
            bytes_per_second=bytes_per_second,
        )
        runs = path.runs()
        starts = runs["offset"].astype(numpy.int64)
        lengths = numpy.minimum(runs["length"].astype(numpy.int64), size_bytes - starts)
        keep = lengths > 0
        runs, starts, lengths = runs[keep], starts[keep], lengths[keep]
        self._table = numpy.empty(len(runs), dtype=EXTENT_FIELDS)
        self._table["source"] = -1
        self._table["destination"] = destination
        self._table["destination_offset"] = starts
        self._table["length"] = lengths
        self._table["source_offset"] = HEADER_BYTES + runs["slot"].astype(numpy.uint64) * path.block_size
        self._segment, self._starts, self._ends = runs["segment"], starts, starts + lengths
        self._before = numpy.concatenate(([0], numpy.cumsum(lengths)))  # bytes to copy before each row, and of all

    def run(self, start: int, length: int) -> int:
        """Copy about `length` bytes that lie at or behind an offset, and return the offset where the copy ended.

        Both offsets are multiples of the block size, or the size of the disk. Nothing is durable on return.
        """
        done, total = self._bytes_before(start), int(self._before[-1])
        end = self._size_bytes if done + length >= total else self._offset_after(done + length)
        first = int(numpy.searchsorted(self._ends, start, "right"))
        last = int(numpy.searchsorted(self._starts, end, "left"))
        part = self._table[first:last].copy()
        if len(part):
            cut = max(0, start - int(self._starts[first]))
            part["destination_offset"][0] += numpy.uint64(cut)
            part["source_offset"][0] += numpy.uint64(cut)
            part["length"][0] -= numpy.uint64(cut)
            part["length"][-1] -= numpy.uint64(max(0, int(self._ends[last - 1]) - end))
        self._copy(part, self._segment[first:last], done=done, total=total)
        if self._progress and len(part):  # a short stretch may have had no time to report
            self._progress(self._bytes_before(end), total)
        return end

    def _bytes_before(self, offset: int) -> int:
        """Return how many of the bytes to copy lie below an offset."""
        row = int(numpy.searchsorted(self._ends, offset, "right"))
        inside = max(0, offset - int(self._starts[row])) if row < len(self._starts) else 0
        return int(self._before[row]) + inside

    def _offset_after(self, copied: int) -> int:
        """Return the first offset of a block below which at least `copied` of the bytes to copy lie.

        `copied` is less than the number of all bytes to copy.
        """
        row = int(numpy.searchsorted(self._before, copied, "left")) - 1
        offset = int(self._starts[row]) + copied - int(self._before[row])
        return min(-(-offset // self._block_size) * self._block_size, self._size_bytes)


def copy_runs(
    store: OpenStore,
    path: "DataPath",
    destination: int,
    size_bytes: int,
    *,
    reflink: bool,
    punch: bool,
    progress: "Progress | None" = None,
) -> None:
    """Copy everything that the layers of a data path hold to the same offsets of a file."""
    copy = StretchCopy(store, path, destination, size_bytes, reflink=reflink, punch=punch, progress=progress)
    copy.run(0, size_bytes)


def copy_table(
    table: "Array",
    segment: "Array",
    sources: Mapping[int, FilePath | int],
    *,
    reflink: bool,
    punch: bool,
    solid: bool,
    progress: "Progress | None",
    done: int = 0,
    total: int | None = None,
    threads: int = 0,
    bytes_per_second: int = 0,
) -> None:
    """Copy the extents of a table. If the table is a part of a larger copy, progress counts from `done` to `total`."""
    total = int(table["length"].sum()) if total is None else total
    for extents, descriptors in _by_segments(table, segment, sources):
        try:
            job = CopyJob(
                extents,
                threads=threads,
                reflink=reflink,
                zero_holes=punch,
                solid=solid,
                bytes_per_second=bytes_per_second,
            )
            run_job(job, extents, progress, done, total)
            done += job.bytes_done
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _by_segments(
    table: "Array", segment: "Array", sources: Mapping[int, FilePath | int]
) -> "Iterator[tuple[Array, list[int]]]":
    """Cut a table into parts that need few descriptors each, open the sources that are paths, and fill them in.

    Yields each part with the descriptors that the caller has to close.
    """
    numbers = distinct(segment)
    for first in range(0, len(numbers), OPEN_SEGMENTS_MAX):
        group = numbers[first : first + OPEN_SEGMENTS_MAX]
        mine = (segment >= group[0]) & (segment <= group[-1])  # those of a group follow each other
        part = table[mine].copy()
        descriptors = []
        try:
            for number in group:
                if not number:
                    continue
                source = sources[int(number)]
                if isinstance(source, FilePath):
                    source = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                    descriptors.append(source)
                part["source"][segment[mine] == number] = source
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        yield part, descriptors


def check_room_for_copy(store: OpenStore, opened: OpenChain, directory: "str | os.PathLike[str]") -> None:
    """Refuse a copy of a whole disk if the file system has no room for it. Parts that are reflinked need no room."""
    pieces = pieces_of(opened)
    lengths = (pieces["end"] - pieces["first"]) * opened.path.block_size
    system = os.statvfs(directory)
    needed, room = int(lengths.sum()), system.f_bavail * system.f_frsize
    if needed > room and may_reflink(opened.chain):
        is_base = pieces["segment"] == BASE
        needed = 0
        if is_base.any() and opened.base_lock and not _can_reflink(opened.base_lock.descriptor, directory):
            needed += int(lengths[is_base].sum())
        numbers = set(pieces["segment"][~is_base].tolist())
        paths = [store.layout.segment_file(id) for number, id, _, _ in opened.path.segments() if number in numbers]
        if paths and not _segment_can_reflink(paths[0], directory):
            needed += int(lengths[~is_base].sum())
    if needed > room:
        raise OSError(
            ENOSPC, f"the copy needs {needed} bytes, and the file system has {room}; free some room", str(directory)
        )


def may_reflink(chain: Chain) -> bool:
    """Whether a copy may share blocks with the store. It may not if any layer has data that has to be wiped one day."""
    return all(layer.wipe == "release" for layer in chain.layers)


def _segment_can_reflink(segment: FilePath, directory: "str | os.PathLike[str]") -> bool:
    with open(segment, "rb") as file:
        return _can_reflink(file.fileno(), directory)


def _can_reflink(source: int, directory: "str | os.PathLike[str]") -> bool:
    """Try whether a file in a directory can share blocks with an open file."""
    import tempfile

    with tempfile.TemporaryFile(dir=directory) as probe:
        try:
            fcntl.ioctl(probe, _FICLONERANGE, struct.pack("=qQQQ", source, 0, HEADER_BYTES, 0))
        except OSError:
            return False
        return True


def check_room(store: OpenStore, folded: Chain, base_lock: "BaseLock") -> None:
    """Refuse a merge into the base if the base's file system has no room for it."""
    assert folded.base is not None
    with chain_path(store, folded._replace(base=None)) as path:
        runs = path.runs()
        needed = int(runs["length"][runs["state"] == 1].sum())
    found = os.fstat(base_lock.descriptor)
    holes = max(0, found.st_size - found.st_blocks * 512) + max(0, folded.top.size_bytes - found.st_size)
    needed = min(needed, holes + 4096)
    system = os.statvfs(base_lock.descriptor)
    if needed > system.f_bavail * system.f_frsize:
        raise OSError(
            ENOSPC,
            f"merging needs up to {needed} bytes, and the file system has fewer; free some room",
            folded.base.path,
        )


def _base_extents(base_bytes: int, destination: int, source: int, runs: "Array") -> "Array":
    """Return a table that copies the visible part of the base, which is everything that no run hides."""
    starts = numpy.concatenate(([0], runs["offset"] + runs["length"])).astype(numpy.uint64)
    ends = numpy.concatenate((runs["offset"], [base_bytes])).astype(numpy.uint64)
    starts, ends = numpy.minimum(starts, base_bytes), numpy.minimum(ends, base_bytes)
    keep = ends > starts
    table = numpy.empty(int(keep.sum()), dtype=EXTENT_FIELDS)
    table["source"], table["destination"] = source, destination
    table["source_offset"] = table["destination_offset"] = starts[keep]
    table["length"] = (ends - starts)[keep]
    return table


def copy_base(opened: OpenChain, destination: int, size_bytes: int, *, reflink: bool) -> None:
    """Copy the visible part of the base to a new file, and keep the holes. The locked descriptor is read."""
    if opened.chain.base is None:
        return
    assert opened.base_lock is not None
    base_bytes = min(opened.chain.base.size_bytes, size_bytes)
    table = _base_extents(base_bytes, destination, opened.base_lock.descriptor, opened.path.runs())
    if len(table):
        run_job(CopyJob(table, reflink=reflink, zero_holes=True), table, None, 0, 0)


def copy_disk(store: OpenStore, opened: OpenChain, destination: int, *, progress: "Progress | None") -> None:
    """Write the whole disk of a sealed chain to an empty file, and keep the holes. Nothing is durable on return.

    Raises
    ------
    ChainError
        The base is not as the catalog describes it, at the beginning or at the end of the copy.
    OSError
        A file could not be read, a file ended early, or the file system is full.
    """
    refuse_changed_base(opened)
    size_bytes, reflink = opened.path.size_bytes, may_reflink(opened.chain)
    os.ftruncate(destination, size_bytes)
    copy_base(opened, destination, size_bytes, reflink=reflink)
    copy_runs(store, opened.path, destination, size_bytes, reflink=reflink, punch=True, progress=progress)
    refuse_changed_base(opened)


def pieces_of(opened: OpenChain) -> "Array":
    """Return the stretches of blocks [first, end) that may have other data than zeros.

    The data of each stretch lies in one segment, or in the base.
    """
    path, block_size, runs = opened.path, opened.path.block_size, opened.path.runs()
    run_first = (runs["offset"] // block_size).astype(numpy.int64)
    run_end = run_first + (runs["length"] // block_size).astype(numpy.int64)
    base = numpy.zeros((0, 2), dtype=numpy.int64)
    if opened.chain.base:
        assert opened.base_lock is not None
        base_bytes = min(opened.chain.base.size_bytes, path.size_bytes)
        found = list(data_ranges(opened.base_lock.descriptor, 0, base_bytes))
        base = numpy.array(found, dtype=numpy.int64).reshape(-1, 2)
    base_first, base_end = base[:, 0] // block_size, -(-base[:, 1] // block_size)
    cuts = distinct(numpy.concatenate((run_first, run_end, base_first, base_end)))
    first, end = cuts[:-1], cuts[1:]
    run = covered(first, run_first, run_end)
    hidden = run >= 0
    is_data = hidden & (runs["state"][run] == 1) if len(runs) else hidden
    keep = is_data | (~hidden & (covered(first, base_first, base_end) >= 0))
    pieces = numpy.zeros(int(keep.sum()), dtype=_PIECE_FIELDS)
    pieces["first"], pieces["end"] = first[keep], end[keep]
    pieces["segment"] = BASE
    inside, run = is_data[keep], run[is_data]
    pieces["segment"][inside] = runs["segment"][run]
    pieces["slot"][inside] = runs["slot"][run] + (first[is_data] - run_first[run])
    return pieces
