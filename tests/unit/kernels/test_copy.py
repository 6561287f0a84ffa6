"""onionskin.kernels._copy: every byte arrives, nothing else changes, and each way is used only where allowed."""

import errno
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import Mount
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin.kernels._copy import CopyCancelled, CopyJob, CopyResult
from onionskin.kernels._extents import Extents

MIB = 1 << 20
RNG = np.random.default_rng(7)
NOISE = RNG.integers(1, 256, 40 * MIB, np.uint8).tobytes()


@contextmanager
def file_of(path: Path, contents: bytes | bytearray = b"") -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, contents, 0)
        yield fd
    finally:
        os.close(fd)


def contents_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def disk_bytes_of(fd: int) -> int:
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


@st.composite
def extents_in(draw: st.DrawFn, source_size: int) -> list[tuple[int, int, int, int]]:
    """(source number or -1, source offset, destination offset, length), apart on the destination side."""
    extents: list[tuple[int, int, int, int]] = []
    position = 0
    for _ in range(draw(st.integers(0, 14))):
        position += draw(st.sampled_from([0, 0, 0, 1, 4096, 10_000]))
        length = draw(st.integers(1, 20_000))
        continues = draw(st.booleans())
        if extents and continues:  # the one before, on both sides
            source, source_offset = extents[-1][0], extents[-1][1] + extents[-1][3]
        else:
            source, source_offset = draw(st.integers(-1, 1)), draw(st.integers(0, source_size - 1))
        length = min(length, source_size - source_offset)
        if length > 0:
            extents.append((source, source_offset, position, length))
            position += length
    return draw(st.permutations(extents))


@settings(max_examples=examples(60), deadline=None)
@given(
    extents=extents_in(100_000),
    threads=st.integers(1, 3),
    reflink=st.booleans(),
    zero_holes=st.booleans(),
    holes=st.booleans(),
)
def test_extents_arrive_like_slices(
    extents: list[tuple[int, int, int, int]], threads: int, reflink: bool, zero_holes: bool, holes: bool
) -> None:
    sources = [bytearray(NOISE[:100_000]), bytearray(NOISE[100_000:200_000])]
    expected = bytearray(b"\xee" * 300_000)
    with tempfile.TemporaryDirectory() as name, file_of(Path(name) / "to", expected) as destination:
        with file_of(Path(name) / "a") as a, file_of(Path(name) / "b") as b:
            for fd, source in zip((a, b), sources, strict=True):
                os.ftruncate(fd, len(source))
                if holes:
                    source[8192:40_960] = bytes(32_768)
                os.pwrite(fd, source[:8192], 0)
                os.pwrite(fd, source[40_960 if holes else 8192 :], 40_960 if holes else 8192)
            rows = []
            for source_number, source_offset, destination_offset, length in extents:
                source_fd = (-1, a, b)[source_number + 1]
                rows.append((source_fd, destination, source_offset, destination_offset, length))
                part = sources[source_number][source_offset : source_offset + length]
                expected[destination_offset : destination_offset + length] = (
                    part if source_number >= 0 else bytes(length)
                )
            job = CopyJob(rows, threads=threads, reflink=reflink, zero_holes=zero_holes)
            result = job.run()
        assert contents_of(destination) == expected
    total = sum(extent[3] for extent in extents)
    assert result.bytes_done == job.bytes_done == job.bytes_total == total == sum(result[1:])
    if not reflink:
        assert result.bytes_reflinked == result.bytes_ranged == 0


def test_extents_may_be_those_of_a_table(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE[:8192]) as source, file_of(tmp_path / "to") as destination:
        table = Extents.of([(0, 4096, 1, 3, 4096), (4096, 10, 2, 0, 0), (5000, 10, 1, 4, 0)])
        job = CopyJob(table.copies(destination, {3: source, 0: -1}))
        assert job.descriptors == ([source], [destination])
        result = job.run()
        assert result == CopyResult(4106, 0, 0, 4096, 10)
        assert contents_of(destination) == NOISE[4096:8192] + bytes(10)


def test_no_extents_are_no_work() -> None:
    assert CopyJob([]).run() == CopyResult(0, 0, 0, 0, 0)


@pytest.mark.parametrize("reflink", [False, True])
def test_pieces_of_many_threads_cover_a_long_extent(tmp_path: Path, reflink: bool) -> None:
    with file_of(tmp_path / "from", NOISE) as source, file_of(tmp_path / "to") as destination:
        length = len(NOISE) - 5
        CopyJob([(source, destination, 2, 3, length)], threads=4, reflink=reflink).run()
        assert contents_of(destination) == bytes(3) + NOISE[2 : 2 + length]


# ---- sharing ----


def test_blocks_are_shared_only_if_that_is_allowed(xfs_mount: Mount) -> None:
    directory = xfs_mount()
    length = 10 * MIB + 100
    with file_of(directory / "from", NOISE[:length]) as source, file_of(directory / "to") as destination:
        extents = [(source, destination, 0, 0, length)]
        # copy_file_range would share on XFS without being asked.
        assert CopyJob(extents).run() == CopyResult(length, 0, 0, length, 0)
        assert CopyJob(extents, reflink=True).run() == CopyResult(length, length, 0, 0, 0)
        assert contents_of(destination) == NOISE[:length]


def test_a_copy_that_may_not_share_takes_its_own_blocks(xfs_mount: Mount) -> None:
    directory = xfs_mount()
    free = []
    with file_of(directory / "from", NOISE[: 16 * MIB]) as source:
        for name, reflink in ("own", False), ("shared", True):
            os.sync()
            before = os.statvfs(directory).f_bavail * 4096
            with file_of(directory / name) as destination:
                CopyJob([(source, destination, 0, 0, 16 * MIB)], reflink=reflink).run()
                os.fsync(destination)
            free.append(before - os.statvfs(directory).f_bavail * 4096)
    assert free[0] >= 16 * MIB
    assert free[1] < MIB


def test_unaligned_extents_are_copied_although_sharing_is_allowed(xfs_mount: Mount) -> None:
    directory = xfs_mount()
    with (
        file_of(directory / "from", NOISE[:MIB]) as source,
        file_of(directory / "to", b"\xee" * 2 * MIB) as destination,
    ):
        rows = [
            (source, destination, 1, 0, 4096),
            (source, destination, 8192, 8192, 8192 + 5),  # the tail is neither's end
            (source, destination, 64 * 1024, MIB, 64 * 1024),
        ]
        result = CopyJob(rows, reflink=True).run()
        assert result.bytes_reflinked >= 8192 + 64 * 1024
        got = contents_of(destination)
    expected = bytearray(b"\xee" * 2 * MIB)
    for _, _, source_offset, offset, length in rows:
        expected[offset : offset + length] = NOISE[source_offset : source_offset + length]
    assert got == expected


def test_files_that_cannot_share_are_copied(tmp_path: Path) -> None:
    with (
        file_of(tmp_path / "from", NOISE[: 20 * MIB]) as source,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as other,
    ):
        result = CopyJob([(source, other.fileno(), 0, 0, 20 * MIB)], reflink=True).run()
        assert (result.bytes_reflinked, result.bytes_done) == (0, 20 * MIB)
        assert contents_of(other.fileno()) == NOISE[: 20 * MIB]


# ---- zeros and holes ----


def test_holes_become_holes_only_if_asked_for(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE[:65536]) as source:
        os.ftruncate(source, 20 * MIB)
        os.pwrite(source, NOISE[:65536], 19 * MIB)
        for zero_holes, least, most in (False, 20 * MIB, 21 * MIB), (True, 131072, 200_000):
            with file_of(tmp_path / f"to {zero_holes}", b"\xee" * 20 * MIB) as destination:
                CopyJob([(source, destination, 0, 0, 20 * MIB)], zero_holes=zero_holes).run()
                assert contents_of(destination) == contents_of(source)
                assert least <= disk_bytes_of(destination) <= most


def test_holes_of_solid_sources_are_copied_as_zeros(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE[:4096]) as source, file_of(tmp_path / "to", b"\xee" * MIB) as destination:
        os.ftruncate(source, MIB)
        CopyJob([(source, destination, 0, 0, MIB)], zero_holes=True, solid=True).run()
        assert contents_of(destination) == contents_of(source)
        assert disk_bytes_of(destination) >= MIB


def test_a_table_that_is_cut_short_or_has_an_empty_extent_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole rows"):
        CopyJob(bytes(33))
    with pytest.raises(ValueError, match="length 0"):
        CopyJob(bytes(32))


def test_zeros_are_written_unless_holes_are_allowed(tmp_path: Path) -> None:
    with file_of(tmp_path / "file", NOISE[:MIB]) as destination:
        assert CopyJob([(-1, destination, 0, 0, MIB)]).run().bytes_zeroed == MIB
        assert contents_of(destination) == bytes(MIB)
        assert disk_bytes_of(destination) >= MIB
        CopyJob([(-1, destination, 0, 0, MIB)], zero_holes=True).run()
        assert disk_bytes_of(destination) == 0


def test_a_hole_at_the_end_still_makes_the_file_longer(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE[:4096]) as source, file_of(tmp_path / "to") as destination:
        os.ftruncate(source, 50_000)
        CopyJob([(source, destination, 0, 0, 50_000)], zero_holes=True).run()
        assert contents_of(destination) == NOISE[:4096] + bytes(50_000 - 4096)


# ---- failures ----


@pytest.mark.parametrize("zero_holes", [False, True])
@pytest.mark.parametrize("reflink", [False, True])
def test_a_source_that_ends_early_is_an_error(tmp_path: Path, zero_holes: bool, reflink: bool) -> None:
    with file_of(tmp_path / "from", NOISE[:4096]) as source, file_of(tmp_path / "to") as destination:
        job = CopyJob([(source, destination, 0, 0, 4097)], zero_holes=zero_holes, reflink=reflink)
        with pytest.raises(OSError) as failed:
            job.run()
    assert failed.value.errno == errno.EIO


def test_a_full_destination_is_enospc_and_copying_again_with_room_succeeds(ext4_mount: Mount, tmp_path: Path) -> None:
    directory = ext4_mount(16 * MIB)
    with (
        file_of(directory / "ballast", NOISE[: 4 * MIB]) as ballast,
        file_of(tmp_path / "from", NOISE[: 14 * MIB]) as source,
        file_of(directory / "to") as destination,
    ):
        os.fsync(ballast)
        room = os.statvfs(directory).f_bfree * os.statvfs(directory).f_frsize
        length = room + 2 * MIB
        assert length <= 14 * MIB
        extents = [(source, destination, 0, 0, length)]
        with pytest.raises(OSError) as full:
            CopyJob(extents, threads=2).run()
        assert full.value.errno == errno.ENOSPC
        os.ftruncate(ballast, 0)
        CopyJob(extents, threads=2).run()
        assert contents_of(destination) == NOISE[:length]


def test_a_write_that_fails_is_reported_by_its_errno(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE) as source, file_of(tmp_path / "to") as destination:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 10, before[1]))
        try:
            job = CopyJob([(source, destination, 0, 0, len(NOISE))], threads=2)
            with pytest.raises(OSError) as failed:
                job.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert failed.value.errno == errno.EFBIG
        assert job.bytes_done <= MIB + 10


def test_after_a_failure_no_piece_is_begun(tmp_path: Path) -> None:
    with (
        file_of(tmp_path / "empty") as empty,
        file_of(tmp_path / "from", NOISE) as source,
        file_of(tmp_path / "to") as destination,
    ):
        assert empty < source  # extents are copied in the order of their sources
        rows = [(source, destination, 0, 0, len(NOISE)), (empty, destination, 0, len(NOISE), 1)]
        job = CopyJob(rows, threads=1)
        with pytest.raises(OSError):
            job.run()
        assert job.bytes_done == 0


@pytest.mark.parametrize(
    "extent", [(-2, 1, 0, 0, 1), (0, -1, 0, 0, 1), (0, 1, 1 << 63, 0, 1), (0, 1, 0, (1 << 63) - 1, 1)]
)
def test_impossible_extents_are_refused(extent: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(OSError) as refused:
        CopyJob([extent]).run()
    assert refused.value.errno == errno.EINVAL


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        CopyJob([(0, 1, 0, 0, 0)])
    with pytest.raises(ValueError, match="threads is 65"):
        CopyJob([], threads=65)


# ---- watching ----


def test_a_job_runs_once() -> None:
    job = CopyJob([])
    job.run()
    with pytest.raises(RuntimeError, match="already run"):
        job.run()


def test_a_cancelled_copy_stops_although_its_rate_would_take_days(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE) as source, file_of(tmp_path / "to") as destination:
        job = CopyJob([(source, destination, 0, 0, len(NOISE))], threads=2, bytes_per_second=100)
        outcome: list[BaseException] = []

        def run() -> None:
            try:
                job.run()
            except CopyCancelled as cancelled:
                outcome.append(cancelled)

        copying = threading.Thread(target=run)
        copying.start()
        while job.bytes_done == 0 and copying.is_alive():
            pass
        job.cancel()
        copying.join()
        assert len(outcome) == 1
        assert 0 < job.bytes_done < MIB


def test_a_rate_may_be_lifted_while_the_copy_runs(tmp_path: Path) -> None:
    with file_of(tmp_path / "from", NOISE) as source, file_of(tmp_path / "to") as destination:
        job = CopyJob([(source, destination, 0, 0, len(NOISE))], threads=2, bytes_per_second=100)
        copying = threading.Thread(target=job.run)
        copying.start()
        while job.bytes_done == 0 and copying.is_alive():
            pass
        job.bytes_per_second = 0
        copying.join()
        assert contents_of(destination) == NOISE
