"""Moving the bytes of whole disks: export, flatten, and the copying half of a merge into the base.

What must hold: a destination is written under the exclusive use of whoever calls; what it names as done is durable.
The loops run in C: here are only tables of extents.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from onionskin._copy import CopyCancelled, CopyJob
from onionskin._maplog import MAGIC_SEGMENT, encode_header
from onionskin.barriers import sync_directory, sync_file
from onionskin.catalog import LayerRow, SegmentRow, new_id
from onionskin.chain import Chain, open_chain, read_chain
from onionskin.layermaps import empty_map
from onionskin.snapshots import free_unneeded

if TYPE_CHECKING:
    import numpy.typing

    from onionskin._volume import DataPath
    from onionskin.store import Store
    from onionskin.volume import Progress, Volume

    Array = numpy.typing.NDArray[Any]

HEADER_BYTES = 4096
OPEN_SEGMENTS_MAX = 256
PROGRESS_SECONDS = 0.2
EXTENT_DTYPE = numpy.dtype([("offset", "<u8"), ("length", "<u8"), ("state", "u1")])
_COPY_DTYPE = numpy.dtype(
    [
        ("source", "<i8"),
        ("destination", "<i8"),
        ("source_offset", "<u8"),
        ("destination_offset", "<u8"),
        ("length", "<u8"),
    ]
)


def extents(volume: "Volume") -> "Array":
    """Return (offset, length, state) of what is DATA (1) or ZERO (2) in the layers, clipped to the size."""
    runs = volume.path.runs()
    out = numpy.empty(len(runs), dtype=EXTENT_DTYPE)
    for name in ("offset", "length", "state"):
        out[name] = runs[name]
    if len(out):
        out["length"][-1] = min(int(out["length"][-1]), volume.size_bytes - int(out["offset"][-1]))
    return out


@contextmanager
def chain_path(store: "Store", chain: Chain) -> "Iterator[DataPath]":
    """Open a sealed chain for the time of a copy; its files must be locked by the caller."""
    path = open_chain(store.layout, chain, writable=False)
    try:
        yield path
    finally:
        path.close()


def run_job(job: CopyJob, progress: "Progress | None", done_before: int, total: int) -> None:
    """Run a copy in a thread of its own, so that this one can report progress and be interrupted."""
    if progress is None and threading.current_thread() is not threading.main_thread():
        job.run()
        return
    failure: list[BaseException] = []

    def work() -> None:
        try:
            job.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="onionskin copy")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(PROGRESS_SECONDS)
            if progress:
                progress(done_before + job.bytes_done, total)
    except BaseException:
        job.cancel()
        raise
    finally:
        thread.join()
    if failure:
        raise KeyboardInterrupt if isinstance(failure[0], CopyCancelled) else failure[0]


def copy_runs(
    store: "Store",
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
    """Copy what the layers of a data path hold to the same offsets of a file: DATA as bytes, ZERO as zeros."""
    runs = path.runs()
    ends = numpy.minimum(runs["offset"] + runs["length"], size_bytes)
    table = numpy.empty(len(runs), dtype=_COPY_DTYPE)
    table["source"] = -1
    table["destination"] = destination
    table["destination_offset"] = runs["offset"]
    table["length"] = numpy.where(ends > runs["offset"], ends - runs["offset"], 0)
    table["source_offset"] = HEADER_BYTES + runs["slot"].astype(numpy.uint64) * path.block_size
    keep = table["length"] > 0
    total = int(table["length"].sum())
    paths = {number: store.layout.segment_file(id) for number, id, _, _ in path.segments()}
    done = 0
    for extents, descriptors in _by_segments(table[keep], runs["segment"][keep], paths):
        try:
            job = CopyJob(
                extents, threads=threads, reflink=reflink, zero_holes=punch, bytes_per_second=bytes_per_second
            )
            run_job(job, progress, done, total)
            done += job.bytes_done
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _by_segments(table: "Array", segment: "Array", paths: dict[int, Path]) -> "Iterator[tuple[Array, list[int]]]":
    """Cut a table into parts that need few descriptors each; open them and fill in the sources."""
    numbers = numpy.unique(segment)
    for first in range(0, len(numbers), OPEN_SEGMENTS_MAX):
        group = numbers[first : first + OPEN_SEGMENTS_MAX]
        mine = numpy.isin(segment, group)
        part = table[mine].copy()
        descriptors = []
        try:
            for number in group:
                if number:
                    descriptors.append(os.open(paths[int(number)], os.O_RDONLY | os.O_CLOEXEC))
                    part["source"][segment[mine] == number] = descriptors[-1]
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        yield part, descriptors


def check_room(store: "Store", folded: Chain) -> None:
    """Refuse a merge into the base for which its file system has no room."""
    assert folded.base is not None
    base = Path(folded.base.path)
    with chain_path(store, folded) as path:
        runs = path.runs()
        needed = int(runs["length"][runs["state"] == 1].sum())
    found = base.stat()
    holes = max(0, found.st_size - found.st_blocks * 512) + max(0, folded.top.size_bytes - found.st_size)
    needed = min(needed, holes + 4096)
    system = os.statvfs(base)
    if needed > system.f_bavail * system.f_frsize:
        raise OSError(ENOSPC, f"merging needs up to {needed} bytes that the file system does not have", str(base))


def _base_extents(base_path: str, base_bytes: int, destination: int, source: int, runs: "Array") -> "Array":
    """Return the copy of what the base shows through: all of it that no run hides."""
    starts = numpy.concatenate(([0], runs["offset"] + runs["length"])).astype(numpy.uint64)
    ends = numpy.concatenate((runs["offset"], [base_bytes])).astype(numpy.uint64)
    starts, ends = numpy.minimum(starts, base_bytes), numpy.minimum(ends, base_bytes)
    keep = ends > starts
    table = numpy.empty(int(keep.sum()), dtype=_COPY_DTYPE)
    table["source"], table["destination"] = source, destination
    table["source_offset"] = table["destination_offset"] = starts[keep]
    table["length"] = (ends - starts)[keep]
    return table


def copy_base(path: "DataPath", chain: Chain, destination: int, size_bytes: int, *, reflink: bool) -> None:
    """Copy the part of the base that shows through, holes kept, to a new file."""
    if chain.base is None:
        return
    source = os.open(chain.base.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        base_bytes = min(chain.base.size_bytes, size_bytes)
        table = _base_extents(chain.base.path, base_bytes, destination, source, path.runs())
        if len(table):
            run_job(CopyJob(table, reflink=reflink, zero_holes=True), None, 0, 0)
    finally:
        os.close(source)


def export(volume: "Volume", target: str, *, progress: "Progress | None") -> None:
    """Write the disk to a raw image file. See `Volume.export`."""
    draft = f"{target}.{os.getpid()}.part"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        size_bytes = volume.size_bytes
        os.ftruncate(descriptor, size_bytes)
        reflink = volume.wipe == "release"
        layer = volume.head if volume.writable else volume.store.catalog.layer(volume.head).id
        chain = read_chain(volume.store.catalog, layer)
        copy_base(volume.path, chain, descriptor, size_bytes, reflink=reflink)
        copy_runs(volume.store, volume.path, descriptor, size_bytes, reflink=reflink, punch=True, progress=progress)
        sync_file(descriptor)  # BARRIER: exported image
        Path(draft).replace(target)
        sync_directory(Path(target).absolute().parent)  # BARRIER: exported image name
    except BaseException:
        with suppress(FileNotFoundError):
            Path(draft).unlink()
        raise
    finally:
        os.close(descriptor)


# ---- flatten ----


def flatten(volume: "Volume", *, progress: "Progress | None") -> None:
    """Put all that the disk reads into one new layer without a parent, and the head on it."""
    store, catalog = volume.store, volume.store.catalog
    old = volume.seal(lambda: None, lambda layer, created_ns: None)
    sealed = read_chain(catalog, old.id)
    if len(sealed.layers) == 1 and sealed.base is None:
        return
    segment, map_id = new_id(), new_id()
    try:
        with chain_path(store, sealed) as path:
            slots, written = _write_flat(store, path, sealed, segment, map_id, progress)
    except BaseException:
        store.layout.segment_file(segment).unlink(missing_ok=True)
        store.layout.map_file(map_id).unlink(missing_ok=True)
        raise
    length, frames, crc = written
    flat = LayerRow(
        new_id(),
        None,
        None,
        old.block_size,
        old.wipe,
        old.size_bytes,
        1,
        map_id,
        0,
        length,
        frames,
        crc,
        old.created_ns,
    )

    def insert() -> None:
        row = LayerRow(**{**_fields(flat), "map_lock_byte": catalog.take_lock_byte()})
        catalog.insert(row)
        if slots:
            catalog.insert(SegmentRow(segment, flat.id, "sealed", slots, catalog.take_lock_byte()))

    with catalog.transaction():
        insert()
    head_before = volume.head
    volume.restart(flat.id, lambda: None)
    with catalog.transaction():
        for id in (head_before, old.id):
            free_unneeded(catalog, id)
    store.work_soon()


def _fields(row: LayerRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in LayerRow.__slots__}


def _write_flat(
    store: "Store", path: "DataPath", chain: Chain, segment: bytes, map_id: bytes, progress: "Progress | None"
) -> tuple[int, tuple[int, int, int]]:
    """Write a segment whose slots follow the disk, and a map for it. Returns (slots, what the map file is)."""
    block_size, size_bytes, wipe_zero = path.block_size, path.size_bytes, chain.top.wipe == "zero"
    target = store.layout.segment_file(segment)
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        header = encode_header(MAGIC_SEGMENT, uuid=segment, block_size=block_size, wipe_zero=wipe_zero)
        os.pwrite(descriptor, header, 0)
        blocks = _needed_blocks(path, chain, size_bytes)
        done, total = 0, len(blocks) * block_size
        for first in range(0, len(blocks), 4096):
            batch = blocks[first : first + 4096]
            data = path.read_blocks(batch)
            os.pwrite(descriptor, data.data, HEADER_BYTES + first * block_size)
            done += data.nbytes
            if progress:
                progress(done, total)
        sync_file(descriptor)  # BARRIER: flat segment
    finally:
        os.close(descriptor)
    with_map = empty_map(block_size)
    try:
        if len(blocks):
            number = with_map.add_segment(segment)
            edges = numpy.flatnonzero(numpy.diff(blocks) != 1) + 1
            starts = numpy.concatenate(([0], edges))
            ends = numpy.concatenate((edges, [len(blocks)]))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                with_map.set(int(blocks[start]), end - start, number << 32 | start)
        written = with_map.write(
            str(store.layout.map_file(map_id)), map_id=map_id, wipe_zero=wipe_zero, size_bytes=size_bytes
        )
    finally:
        with_map.close()
    sync_directory(store.layout.segments)  # BARRIER: flat segment name
    sync_directory(store.layout.layers)  # BARRIER: flat map name
    return len(blocks), written


def _needed_blocks(path: "DataPath", chain: Chain, size_bytes: int) -> "Array":
    """Return the indices of all blocks that may not read zero: DATA, and what is no hole of the base."""
    block_size = path.block_size
    count = -(-size_bytes // block_size)
    needed = numpy.zeros(count, dtype=bool)
    if chain.base:
        for start, end in _data_of(Path(chain.base.path), min(chain.base.size_bytes, size_bytes)):
            needed[start // block_size : -(-end // block_size)] = True
    for run in path.runs():
        first = int(run["offset"]) // block_size
        needed[first : first + int(run["length"]) // block_size] = run["state"] == 1
    return numpy.flatnonzero(needed).astype(numpy.uint64)


def _data_of(path: Path, size_bytes: int) -> Iterator[tuple[int, int]]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = 0
        while end < size_bytes:
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, min(end, size_bytes)
    finally:
        os.close(descriptor)
