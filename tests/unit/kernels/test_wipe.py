"""onionskin.kernels._wipe: what it overwrites, in which order, what is left on the medium, what it says about it."""

import errno
import fcntl
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import Mount, image_of, unmount
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples

from onionskin.errors import VerifyError
from onionskin.kernels._wipe import WipeCancelled, WipeJob, unused_ranges, wipe

MIB = 1 << 20
CANARY = b"onionskin canary 5b1f0c! " * 40
EXT4_MAGIC, BTRFS_MAGIC, TMPFS_MAGIC = 0xEF53, 0x9123683E, 0x01021994
FICLONE, FS_IOC_SETFLAGS, FS_NOCOW_FL = 0x40049409, 0x40086602, 0x00800000


@contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def canary_file(path: Path, size_bytes: int) -> Iterator[int]:
    """A file full of the canary, on the medium; open for reading and writing."""
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        os.write(fd, (CANARY * (size_bytes // len(CANARY) + 1))[:size_bytes])
        os.fsync(fd)
        yield fd


def canaries_in(image: Path) -> int:
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, at = 0, data.find(CANARY[:25])
        while at >= 0:
            count, at = count + 1, data.find(CANARY[:25], at + 1)
        return count


ranges_of_bytes = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 60_000)), max_size=12)


@settings(max_examples=examples(40), deadline=None)
@given(gaps_and_lengths=ranges_of_bytes, verify=st.booleans(), punch=st.booleans(), threads=st.integers(1, 3))
def test_wipe_zeros_the_ranges_and_no_other_byte(
    gaps_and_lengths: list[tuple[int, int]], verify: bool, punch: bool, threads: int
) -> None:
    size_bytes = 200_000
    ranges, position = [], 0
    for gap, length in gaps_and_lengths:
        ranges.append((position + gap, length))
        position += gap + length
    expected = np.full(size_bytes, 0xAA, np.uint8)
    for offset, length in ranges:
        expected[offset : offset + length] = 0
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"\xaa" * size_bytes)
        result = wipe(file.fileno(), ranges, zero=True, punch=punch, verify=verify, threads=threads)
        assert os.pread(file.fileno(), size_bytes + 1, 0) == expected.tobytes()
    zeroed = int((expected == 0).sum())
    assert result.bytes_wiped == zeroed
    assert result.bytes_verified == (zeroed if verify else 0)
    assert result.bytes_punched == (zeroed if punch else 0)
    assert result.bytes_unwipeable == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=8), st.integers(0, 2000))
def test_all_behind_the_header_that_no_slot_has_is_unused(gaps_and_counts: list[tuple[int, int]], rest: int) -> None:
    slots, used = b"", set(range(4096))
    at = 0
    for gap, count in gaps_and_counts:
        at += gap
        slots += struct.pack("<QQ", at, count)
        used |= set(range(4096 + at * 512, 4096 + (at + count) * 512))
        at += count
    size = 4096 + at * 512 + rest
    found = unused_ranges(slots, header_bytes=4096, slot_bytes=512, file_bytes=size)
    ranges = list(struct.iter_unpack("<QQ", found))
    assert all(length for _, length in ranges)
    unused = [byte for offset, length in ranges for byte in range(offset, offset + length)]
    assert unused == sorted(set(range(size)) - used)


def test_ranges_may_be_what_is_unused(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 8192) as fd:
        unused = unused_ranges(struct.pack("<QQ", 1, 5), header_bytes=4096, slot_bytes=512, file_bytes=8192)
        result = wipe(fd, unused, zero=True, punch=False)
        assert result.bytes_wiped == 512 + 1024
        assert [at for at in range(0, 8192, 512) if os.pread(fd, 512, at) == bytes(512)] == [4096, 7168, 7680]


def test_ranges_may_be_an_array(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 8192) as fd:
        result = wipe(fd, np.array([[0, 4096], [4096, 4096]], np.uint64), zero=True, punch=False)
        assert result.bytes_wiped == 8192
        assert os.pread(fd, 8192, 0) == bytes(8192)


def test_pieces_of_many_threads_cover_a_long_range(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 35 * MIB + 77) as fd:
        job = WipeJob(fd, [(5, 35 * MIB + 70)], zero=True, punch=False, verify=True, threads=4)
        assert job.run().bytes_verified == 35 * MIB + 70
        assert job.bytes_done == 35 * MIB + 70
        left = np.frombuffer(os.pread(fd, 36 * MIB, 0), np.uint8)
        assert np.flatnonzero(left).tolist() == [0, 1, 2, 3, 4, 35 * MIB + 75, 35 * MIB + 76]


def test_holes_are_skipped_and_stay_holes(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 4096) as fd:
        os.ftruncate(fd, 1 << 40)
        result = wipe(fd, [(0, 1 << 40)], zero=True, punch=False, verify=True)
        assert result[:3] == (4096, (1 << 40) - 4096, 4096)  # wiped, skipped, verified
        assert os.fstat(fd).st_blocks * 512 < MIB


def test_wipe_reaches_more_extents_than_one_answer_of_fiemap_holds(tmp_path: Path) -> None:
    with opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as fd:
        for i in range(200):
            os.pwrite(fd, CANARY, i * 64 * 1024)
        os.fsync(fd)
        result = wipe(fd, [(0, 200 * 64 * 1024)], zero=True, punch=False)
        assert result.bytes_wiped == 199 * 4096 + len(CANARY)
        assert all(os.pread(fd, len(CANARY), i * 64 * 1024) == bytes(len(CANARY)) for i in range(200))


def test_punching_gives_the_space_back_and_keeps_the_size(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", MIB + 1) as fd:
        # Neither range ends at a block, but together they cover the file and the rest of its last block.
        result = wipe(fd, [(0, 5000), (5000, MIB)], zero=True, punch=True)
        assert result.bytes_punched == MIB + 1
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (MIB + 1, 0)


def test_a_range_behind_the_end_of_the_file_is_ignored(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 4096) as fd:
        result = wipe(fd, [(8192, 4096)], zero=True, punch=True, verify=True)
        assert result[:5] == (0, 0, 0, 0, 0)
        assert os.fstat(fd).st_size == 4096
        assert CANARY in os.pread(fd, 4096, 0)


def test_a_write_only_unlinked_file_is_wiped_and_verified(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", MIB):
        pass
    with opened(tmp_path / "file", os.O_WRONLY) as fd:
        (tmp_path / "file").unlink()
        assert wipe(fd, [(1, MIB)], zero=True, punch=False, verify=True).bytes_verified == MIB - 1


def test_verify_alone_finds_a_byte_that_is_not_zero(tmp_path: Path) -> None:
    with opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, bytes(3 * MIB) + b"\x01")
        os.fsync(fd)
        result = wipe(fd, [(1, 3 * MIB - 1)], zero=False, punch=False, verify=True)
        assert result.bytes_verified == 3 * MIB - 1
        with pytest.raises(VerifyError, match="do not read back"):
            wipe(fd, [(1, 3 * MIB)], zero=False, punch=True, verify=True)
        assert os.fstat(fd).st_blocks * 512 >= 3 * MIB


def test_verify_works_where_fiemap_is_missing() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(CANARY * 300)
        file.flush()
        result = wipe(file.fileno(), [(0, MIB)], zero=True, punch=True, verify=True)
        assert result.filesystem_magic == TMPFS_MAGIC
        assert result.bytes_wiped == result.bytes_verified == len(CANARY) * 300
        assert os.fstat(file.fileno()).st_blocks == 0


# ---- refusals ----


def test_ranges_that_overlap_are_refused(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 8192) as fd:
        with pytest.raises(ValueError, match="sorted and apart"):
            wipe(fd, [(0, 4097), (4096, 1)], zero=True, punch=False)
        with pytest.raises(ValueError, match="no file has such bytes"):
            wipe(fd, [(1, (1 << 63) - 1)], zero=True, punch=False)
        assert bytes(1) not in os.pread(fd, 8192, 0)


def test_anything_but_a_regular_file_is_refused() -> None:
    with opened("/dev/null", os.O_RDWR) as fd:
        with pytest.raises(OSError) as refused:
            wipe(fd, [(0, 4096)], zero=True, punch=True)
        assert refused.value.errno == errno.EINVAL


def test_a_cancelled_wipe_punches_nothing_and_runs_once(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", MIB) as fd:
        job = WipeJob(fd, [(0, MIB)], zero=True, punch=True)
        job.cancel()
        with pytest.raises(WipeCancelled):
            job.run()
        assert os.fstat(fd).st_blocks * 512 >= MIB
        with pytest.raises(RuntimeError, match="already run"):
            job.run()


def test_a_write_that_fails_punches_nothing(tmp_path: Path) -> None:
    with canary_file(tmp_path / "file", 4 * MIB) as fd:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, before[1]))
        try:
            with pytest.raises(OSError) as failed:
                wipe(fd, [(0, 4 * MIB)], zero=True, punch=True, threads=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert failed.value.errno == errno.EFBIG
        assert os.fstat(fd).st_blocks * 512 >= 4 * MIB


# ---- the order, seen from outside ----

TRACED = """
import os, sys
from onionskin.kernels._wipe import wipe
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    wipe(fd, [(0, 1 << 20), (2 << 20, 20 << 20)], zero=True, punch=True, verify=True, threads=2)
except OSError as error:
    sys.exit(error.errno)
"""


def traced_calls(path: Path, tmp_path: Path, *injected: str) -> tuple[int, list[str]]:
    """What a wipe of the file at path asks of the system, in order: names of calls. And its exit status."""
    trace = tmp_path / "trace"
    package = Path(sys.modules["onionskin.kernels._wipe"].__file__ or "").parents[2]
    calls_of_interest = "trace=pwrite64,fdatasync,fsync,pread64,fallocate"
    strace = ["strace", "-f", "-y", "-o", str(trace), "-e", calls_of_interest, *injected]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run([*strace, sys.executable, "-c", TRACED, str(path)], env=environment)
    calls = [line.split(None, 1)[1] for line in trace.read_text().splitlines() if str(path) in line]
    return done.returncode, [call.split("(")[0] for call in calls]


def test_all_zeros_come_before_one_fdatasync_and_all_punching_after_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with canary_file(path, 30 * MIB):
        pass
    status, calls = traced_calls(path, tmp_path)
    assert status == 0
    phases = [call for i, call in enumerate(calls) if i == 0 or calls[i - 1] != call]
    assert phases == ["pwrite64", "fdatasync", "pread64", "fallocate"]
    assert [calls.count(name) for name in phases] == [21, 1, 21, 2]


@pytest.mark.parametrize("failing", ["fdatasync", "pwrite64:when=9", "pread64"])
def test_a_failure_before_the_punch_means_no_punch(tmp_path: Path, failing: str) -> None:
    path = tmp_path / "file"
    with canary_file(path, 30 * MIB):
        pass
    call, *when = failing.split(":")
    injection = ":".join([call, "error=EIO", *when])
    # -P: only calls on this file fail, not those of the interpreter that starts.
    status, calls = traced_calls(path, tmp_path, "-P", str(path), "-e", f"inject={injection}")
    assert status == errno.EIO
    assert call in calls
    assert "fallocate" not in calls
    assert path.stat().st_blocks * 512 >= 30 * MIB


def test_a_file_system_that_cannot_punch_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with canary_file(path, 30 * MIB):
        pass
    status, calls = traced_calls(path, tmp_path, "-P", str(path), "-e", "inject=fallocate:error=EOPNOTSUPP")
    assert status == 0
    assert calls[-1] == "fallocate"
    assert calls.count("fallocate") == 1


# ---- on the medium ----


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("zero", [True, False], ids=["wiped", "only punched"])
def test_the_medium_holds_the_canary_after_a_punch_but_not_after_a_wipe(
    kind: str, zero: bool, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(f"{kind}_mount")(64 * MIB)
    with canary_file(directory / "file", 4 * MIB) as fd:
        result = wipe(fd, [(0, 4 * MIB)], zero=zero, punch=True)
        assert (result.bytes_punched, result.bytes_unwipeable, result.copy_on_write) == (4 * MIB, 0, False)
    unmount(directory)
    assert (canaries_in(image_of(directory)) == 0) is zero


def test_bytes_under_an_unwritten_extent_are_overwritten(ext4_mount: Mount) -> None:
    directory = ext4_mount(64 * MIB)
    with canary_file(directory / "file", MIB) as fd:
        # On ext4 ZERO_RANGE makes the extents unwritten and leaves the bytes under them, as a crash can.
        zero_range = ["fallocate", "--zero-range", "--keep-size", "-l", str(MIB), str(directory / "file")]
        subprocess.run(zero_range, check=True)
        subprocess.run(["sync", "-f", directory], check=True)
        assert canaries_in(image_of(directory)) > 0
        assert wipe(fd, [(0, MIB)], zero=True, punch=False, verify=True).bytes_wiped == MIB
    unmount(directory)
    assert canaries_in(image_of(directory)) == 0


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
def test_zeros_that_were_written_and_not_synced_are_written_again(kind: str, request: pytest.FixtureRequest) -> None:
    """As whoever was killed between the two leaves them: to the next one they are no hole, which is wiped already."""
    with ExitStack() as stack:
        directory = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
            if kind == "tmpfs"
            else request.getfixturevalue(f"{kind}_mount")(64 * MIB)
        )
        with canary_file(directory / "file", MIB) as fd:
            os.pwrite(fd, bytes(MIB), 0)
        fd = stack.enter_context(opened(directory / "file", os.O_RDWR))
        assert wipe(fd, [(0, MIB)], zero=True, punch=True).bytes_wiped == MIB
        assert wipe(fd, [(0, MIB)], zero=True, punch=True).bytes_wiped == 0


def test_shared_extents_are_unwipeable(xfs_mount: Mount) -> None:
    directory = xfs_mount()
    with canary_file(directory / "file", MIB) as fd:
        with (directory / "clone").open("wb") as clone:
            fcntl.ioctl(clone.fileno(), FICLONE, fd)
        os.pwrite(fd, bytes(256 * 1024), 0)  # what is written again is not shared any more
        result = wipe(fd, [(0, 512 * 1024)], zero=True, punch=True)
        assert result.bytes_wiped == 512 * 1024
        assert result.bytes_unwipeable == 256 * 1024
        assert CANARY in (directory / "clone").read_bytes()


@pytest.mark.parametrize("nocow", [False, True])
def test_btrfs_is_copy_on_write_unless_the_file_says_nocow(btrfs_mount: Mount, nocow: bool) -> None:
    path = btrfs_mount() / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        if nocow:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("i", FS_NOCOW_FL))
        os.write(fd, b"x" * MIB)
        os.fsync(fd)
        result = wipe(fd, [(0, MIB)], zero=True, punch=True)
        assert result.filesystem_magic == BTRFS_MAGIC
        assert result.copy_on_write is not nocow
        assert result.bytes_unwipeable == (0 if nocow else MIB)


def test_a_range_may_end_where_no_file_can(ext4_mount: Mount) -> None:
    with canary_file(ext4_mount() / "file", 4096) as fd:
        result = wipe(fd, [(0, (1 << 63) - 1)], zero=True, punch=True)
    assert (result.filesystem_magic, result.bytes_punched) == (EXT4_MAGIC, 4096)
