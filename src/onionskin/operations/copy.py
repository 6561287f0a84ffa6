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
from typing import TYPE_CHECKING

from onionskin.base.files import data_ranges, name_of
from onionskin.base.limits import HEADER_BYTES
from onionskin.base.naming import some_of
from onionskin.base.paths import FilePath
from onionskin.base.states import DATA
from onionskin.base.threads import SureThread
from onionskin.kernels._copy import CopyCancelled, CopyJob
from onionskin.kernels._extents import Extents
from onionskin.operations.reclaim import has_to_be_wiped
from onionskin.storage.chain import Chain, open_chain
from onionskin.storage.open_head import OpenDisk
from onionskin.storage.open_store import OpenStore
from onionskin.storage.shared_paths import OpenChain, refuse_changed_base

if TYPE_CHECKING:
    from onionskin.base.progress import Progress
    from onionskin.kernels._volume import DataPath
    from onionskin.storage.locks import BaseLock

_FICLONERANGE = 0x4020940D
OPEN_SEGMENTS_MAX = 256
PROGRESS_SECONDS = 0.2
ZEROS = 0  # the source of extents that read as zeros; no segment has this number
BASE = 0xFFFF  # the source of what lies in the base; no segment has this number


def extents(volume: OpenDisk) -> Extents:
    """Return the DATA and ZERO extents of the layers, cut at the end of the disk."""
    volume.begin_writing()
    found, size_bytes = volume.on_path(lambda path: (path.extents(), path.size_bytes))
    return found.within(Extents([(0, size_bytes)]))  # another thread may have made the disk shorter in between


@contextmanager
def chain_path(store: OpenStore, chain: Chain, base_lock: "BaseLock | None" = None) -> "Iterator[DataPath]":
    """Open a sealed chain for the time of a copy. The caller has locked its files."""
    path = open_chain(store.layout, chain, writable=False, base_lock=base_lock)
    try:
        yield path
    finally:
        path.close()


def run_job(job: CopyJob, progress: "Progress | None", done_before: int, total: int) -> None:
    """Run a copy in a thread of its own, so that this one can report progress and be interrupted.

    Where the system gives no thread, the copy runs in this one.
    """
    if progress is None and threading.current_thread() is not threading.main_thread():
        with naming(job):
            job.run()
        return
    failure: list[BaseException] = []
    turn = [job]  # who takes it runs the copy: a thread that is given up may begin all the same

    def work() -> bool:
        try:
            taken = turn.pop()
        except IndexError:
            return False
        try:
            with naming(job):
                taken.run()
        except BaseException as error:
            failure.append(error)
        return True

    thread, was_here = SureThread(target=work, name="onionskin copy"), False
    try:
        try:
            thread.start()
        except RuntimeError:  # no thread can be started now
            was_here = work()
        while True:  # progress is reported at least once, however short the copy is
            if not was_here:
                thread.join(PROGRESS_SECONDS)
            if progress:
                progress(done_before + job.bytes_done, total)
            if was_here or thread.has_ended:
                break
    except BaseException:
        job.cancel()
        raise
    finally:
        if thread.ident is not None and not was_here:  # it was started
            thread.join()
    if failure:
        raise KeyboardInterrupt if isinstance(failure[0], CopyCancelled) else failure[0]


@contextmanager
def naming(job: CopyJob) -> Iterator[None]:
    """Add the names of files to an error of a copy that names none: the file that is written, and some that are read."""
    try:
        yield
    except OSError as error:
        read, written = job.descriptors
        if error.errno is None or error.filename is not None or not written:
            raise
        sources = [name_of(one) for one in read]
        what = f"{error.strerror}, in a copy from {some_of(sources, 3)}" if sources else error.strerror
        raise OSError(error.errno, what, name_of(written[0])) from None


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
            copy_extents,
            destination=destination,
            sources={number: store.layout.segment_file(id) for number, id, _, _ in path.segments()},
            reflink=reflink,
            punch=punch,
            solid=True,
            progress=progress,
            threads=threads,
            bytes_per_second=bytes_per_second,
        )
        self._extents = path.extents().within(Extents([(0, size_bytes)]))

    def run(self, start: int, length: int) -> int:
        """Copy about `length` bytes that lie at or behind an offset, and return the offset where the copy ended.

        Both offsets are multiples of the block size, or the size of the disk. Nothing is durable on return.
        """
        done, total = self._extents.bytes_before(start), self._extents.total_bytes
        end = self._size_bytes if done + length >= total else self._offset_after(done + length)
        part = self._extents.within(Extents([(start, end)]))
        self._copy(part, done=done, total=total)
        if self._progress and len(part):  # a short stretch may have had no time to report
            self._progress(done + part.total_bytes, total)
        return end

    def _offset_after(self, copied: int) -> int:
        """Return the first offset of a block below which at least `copied` of the bytes to copy lie."""
        offset = self._extents.offset_after(copied)
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


def copy_extents(
    extents: Extents,
    destination: int,
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
    """Copy extents from their sources to the same offsets of a file.

    If they are a part of a larger copy, progress counts from `done` to `total`.
    """
    total = extents.total_bytes if total is None else total
    numbers = sorted(extents.sources())
    for first in range(0, len(numbers), OPEN_SEGMENTS_MAX):
        with _opened(sources, numbers[first : first + OPEN_SEGMENTS_MAX]) as descriptors:
            job = CopyJob(
                extents.copies(destination, descriptors),
                threads=threads,
                reflink=reflink,
                zero_holes=punch,
                solid=solid,
                bytes_per_second=bytes_per_second,
            )
            run_job(job, progress, done, total)
            done += job.bytes_done


@contextmanager
def _opened(sources: Mapping[int, FilePath | int], numbers: list[int]) -> Iterator[dict[int, int]]:
    """Open those of the sources that are paths, and give the descriptors of all by their numbers."""
    found: dict[int, int] = {}
    opened = []
    try:
        for number in numbers:
            source = -1 if number == ZEROS else sources[number]
            if isinstance(source, FilePath):
                source = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                opened.append(source)
            found[number] = source
        yield found
    finally:
        for descriptor in opened:
            os.close(descriptor)


def check_room_for_copy(store: OpenStore, opened: OpenChain, directory: "str | os.PathLike[str]") -> None:
    """Refuse a copy of a whole disk if the file system has no room for it. Parts that are reflinked need no room."""
    data = data_of(opened)
    system = os.statvfs(directory)
    needed, room = data.total_bytes, system.f_bavail * system.f_frsize
    if needed > room and may_reflink(store, opened.chain):
        of_base = data.from_source(BASE).total_bytes
        of_segments, needed = needed - of_base, 0
        if of_base and opened.base_lock and not _can_reflink(opened.base_lock.descriptor, directory):
            needed += of_base
        numbers = data.sources()
        paths = [store.layout.segment_file(id) for number, id, _, _ in opened.path.segments() if number in numbers]
        if paths and not _segment_can_reflink(paths[0], directory):
            needed += of_segments
    if needed > room:
        raise OSError(
            ENOSPC, f"the copy needs {needed} bytes, and the file system has {room}; free some room", str(directory)
        )


def may_reflink(store: OpenStore, chain: Chain) -> bool:
    """Whether a copy may share blocks with the store. It may not if anything in the chain has to be wiped one day."""
    return not has_to_be_wiped(store, chain)


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
        needed = path.extents().only(DATA).total_bytes
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


def copy_base(opened: OpenChain, destination: int, size_bytes: int, *, reflink: bool) -> None:
    """Copy the visible part of the base to a new file, and keep the holes. The locked descriptor is read."""
    if opened.chain.base is None:
        return
    assert opened.base_lock is not None
    base = Extents([(0, min(opened.chain.base.size_bytes, size_bytes))], state=DATA, source=BASE)
    visible = opened.path.extents().over(base).copies(destination, {BASE: opened.base_lock.descriptor})
    if visible:
        run_job(CopyJob(visible, reflink=reflink, zero_holes=True), None, 0, 0)


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
    size_bytes, reflink = opened.path.size_bytes, may_reflink(store, opened.chain)
    os.ftruncate(destination, size_bytes)
    copy_base(opened, destination, size_bytes, reflink=reflink)
    copy_runs(store, opened.path, destination, size_bytes, reflink=reflink, punch=True, progress=progress)
    refuse_changed_base(opened)


def data_of(opened: OpenChain) -> Extents:
    """Return the blocks that may have other data than zeros, each where it lies: in a segment, or in the base (`BASE`)."""
    found = opened.path.extents()
    base = opened.chain.base
    if base is not None:
        assert opened.base_lock is not None
        block_size, base_bytes = opened.path.block_size, min(base.size_bytes, opened.path.size_bytes)
        blocks = (
            (first // block_size * block_size, min(-(-end // block_size) * block_size, base_bytes))
            for first, end in data_ranges(opened.base_lock.descriptor, 0, base_bytes)
        )
        found = found.over(Extents(blocks, state=DATA, source=BASE))
    return found.only(DATA)
