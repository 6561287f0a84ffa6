"""A volume as a file, beside a plain file of the same bytes: every operation must answer alike, errors included.

The one difference is that of a block device: writes end at the end of the disk instead of making it longer.
"""

import errno
import gc
import io
import random
import shutil
import tarfile
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.examples import examples

import onionskin

SIZE = 3 * 4096 + 700
PLACES = st.integers(-100, SIZE + 5000)
LENGTHS = st.one_of(st.integers(0, 40), st.integers(0, SIZE + 100))
PAIRS = numpy.dtype([("a", ">u2"), ("b", "<u4")])
# Buffers of every format that a plain file takes, of about so many bytes.
BUFFERS: dict[str, Callable[[int], Any]] = {
    "bytearray": bytearray,
    "memoryview": lambda length: memoryview(bytearray(length)),
    "words": lambda length: array("I", bytes(length // 4 * 4)),
    "structured": lambda length: numpy.zeros(length // PAIRS.itemsize, PAIRS),
    "rows": lambda length: numpy.zeros((length // 8, 8), numpy.uint8),
}


class PlainFile(io.FileIO):
    """A plain file that ends where a disk ends."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        left = max(0, SIZE - self.tell())
        if view.nbytes and not left:
            raise OSError(errno.ENOSPC, "")
        return super().write(view.tobytes()[:left])

    def truncate(self, size: int | None = None, /) -> int:
        wanted = self.tell() if size is None else size
        if wanted != SIZE:
            raise io.UnsupportedOperation
        return wanted


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class and errno of what it raises."""
    try:
        return call()
    except (OSError, ValueError, TypeError) as error:
        kinds = [kind for kind in (io.UnsupportedOperation, OSError, ValueError, TypeError) if isinstance(error, kind)]
        return kinds[0], getattr(error, "errno", None)


class RawMachine(RuleBasedStateMachine):
    """One operation after the other on both files."""

    @staticmethod
    def wrap(file: io.RawIOBase) -> Any:
        return file

    @initialize(seed=st.integers(0, 2**32))
    def make(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = Path(tempfile.mkdtemp(prefix="onionskin-file-"))
        start = self.random.randbytes(SIZE)
        (self.root / "base.raw").write_bytes(start)
        (self.root / "plain.raw").write_bytes(start)
        self.store = onionskin.Store(self.root / "store")
        self.volume = self.store.create("web", base=self.root / "base.raw")
        self.disk = self.wrap(self.volume.open_file())
        self.plain = self.wrap(PlainFile(self.root / "plain.raw", "r+"))

    def teardown(self) -> None:
        if hasattr(self, "plain"):
            self.both(lambda file: file.close())
            self.store.close()
            shutil.rmtree(self.root)

    def both(self, call: Callable[[Any], Any]) -> None:
        assert outcome(lambda: call(self.disk)) == outcome(lambda: call(self.plain))

    @rule(offset=PLACES, whence=st.sampled_from([0, 0, 0, 1, 2, 99]))
    def seek(self, offset: int, whence: int) -> None:
        self.both(lambda file: file.seek(offset - SIZE if whence == 2 else offset, whence))

    @rule(length=LENGTHS)
    def read(self, length: int) -> None:
        self.both(lambda file: file.read(length))

    @rule(length=st.sampled_from([-1, None]))
    def read_to_the_end(self, length: int | None) -> None:
        self.both(lambda file: file.read(length))

    @rule()
    def readline(self) -> None:
        self.both(lambda file: file.readline())

    @rule(length=LENGTHS, kind=st.sampled_from(sorted(BUFFERS)))
    def readinto(self, length: int, kind: str) -> None:
        buffers = {file: BUFFERS[kind](length) for file in (self.disk, self.plain)}
        self.both(lambda file: file.readinto(buffers[file]))
        assert bytes(buffers[self.disk]) == bytes(buffers[self.plain])

    @rule(length=LENGTHS, kind=st.sampled_from(sorted(BUFFERS)))
    def write(self, length: int, kind: str) -> None:
        data = BUFFERS[kind](length)
        io.BytesIO(self.random.randbytes(memoryview(data).nbytes)).readinto(data)
        self.both(lambda file: file.write(data))

    @rule(size=st.sampled_from([None, 0, SIZE, SIZE + 1]))
    def truncate(self, size: int | None) -> None:
        self.both(lambda file: file.truncate(size))

    @rule()
    def flush(self) -> None:
        self.both(lambda file: file.flush())

    @rule()
    def read_into_what_cannot_be_written(self) -> None:
        self.both(lambda file: file.readinto(b"1234"))

    @invariant()
    def same_position(self) -> None:
        if hasattr(self, "plain"):
            self.both(lambda file: file.tell())

    @invariant()
    def same_bytes(self) -> None:
        if hasattr(self, "plain"):
            self.both(lambda file: file.flush())
            assert self.volume.read(0, SIZE) == (self.root / "plain.raw").read_bytes()


class BufferedMachine(RawMachine):
    """Both under `io.BufferedRandom`, whose small buffer fills and spills all the time."""

    @staticmethod
    def wrap(file: io.RawIOBase) -> io.BufferedRandom:
        return io.BufferedRandom(file, buffer_size=64)


TestRawFile = RawMachine.TestCase
TestBufferedFile = BufferedMachine.TestCase
TestRawFile.settings = TestBufferedFile.settings = settings(
    max_examples=examples(40), stateful_step_count=30, deadline=None
)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[onionskin.Volume]:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="8M") as volume:
        yield volume


def test_a_closed_file_refuses_everything_and_leaves_the_volume_open(volume: onionskin.Volume) -> None:
    with volume.open_file() as file:
        file.write(b"kept")
    assert file.closed
    file.close()
    for call in (
        file.tell,
        file.read,
        file.readall,
        file.flush,
        file.readable,
        file.writable,
        file.seekable,
        file.truncate,
    ):
        with pytest.raises(ValueError, match="closed file"):
            call()
    for call in (file.seek, file.read, file.readinto, file.write):
        with pytest.raises(ValueError, match="closed file"):
            call(bytearray(1) if call in (file.readinto, file.write) else 0)
    assert volume.read(0, 4) == b"kept"


def test_flush_and_close_make_durable_and_being_collected_does_not(
    volume: onionskin.Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[int] = []
    monkeypatch.setattr(onionskin.Volume, "flush", lambda volume: flushes.append(1))
    volume.open_file().flush()
    volume.open_file().close()
    assert len(flushes) == 2
    volume.open_file()
    io.BufferedRandom(volume.open_file()).write(b"spilled")
    gc.collect()
    assert len(flushes) == 2
    assert volume.read(0, 7) == b"spilled"


def test_a_view_is_a_file_that_can_only_be_read(volume: onionskin.Volume) -> None:
    volume.write(5000, b"seen")
    volume.snapshot("clean")
    with volume.store.open("web", snapshot="clean") as view, view.open_file() as file:
        assert (file.readable(), file.writable(), file.seekable(), file.mode) == (True, False, True, "rb")
        for call in (lambda: file.write(b"x"), file.truncate):
            with pytest.raises(io.UnsupportedOperation, match="view of a snapshot"):
                call()
        reader = io.BufferedReader(file)
        reader.seek(5000)
        assert reader.peek(4)[:4] == b"seen"
        assert len(reader.read()) == (8 << 20) - 5000


@pytest.mark.parametrize("data", ["text", 7, None, memoryview(b"abcdef")[::2]])
def test_what_is_no_buffer_of_contiguous_bytes_is_not_written(volume: onionskin.Volume, data: Any) -> None:
    file = volume.open_file()
    with pytest.raises((TypeError, BufferError)):
        file.write(data)
    assert file.tell() == 0


def test_there_is_no_descriptor(volume: onionskin.Volume) -> None:
    with volume.open_file() as file:
        assert not file.isatty()
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        with pytest.raises(io.UnsupportedOperation):
            numpy.fromfile(file, numpy.uint8)


def test_the_end_moves_with_a_resize(volume: onionskin.Volume) -> None:
    file = volume.open_file()
    assert file.seek(0, io.SEEK_END) == 8 << 20
    with pytest.raises(OSError, match="resize") as caught:
        file.write(b"more")
    assert caught.value.errno == errno.ENOSPC
    volume.resize("9M")
    assert file.write(b"more") == 4


def test_a_disk_of_terabytes_is_read_by_what_is_left_and_not_by_what_is_asked_for(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="60T") as volume:
        file = volume.open_file()
        file.seek(-10, io.SEEK_END)
        assert file.read(1 << 62) == bytes(10)
        assert file.read(1 << 62) == b""


def test_copyfileobj_copies_in_and_out(volume: onionskin.Volume) -> None:
    data = random.Random(1).randbytes(3 << 20)
    shutil.copyfileobj(io.BytesIO(data), volume.open_file())
    out = io.BytesIO()
    shutil.copyfileobj(volume.open_file(), out)
    assert out.getvalue() == data.ljust(8 << 20, b"\0")


def test_a_zip_archive_is_made_and_read_inside(volume: onionskin.Volume) -> None:
    with io.BufferedRandom(volume.open_file()) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}.txt", f"{number}" * 5000)
    end = volume.open_file().read().rindex(b"PK\5\6") + 22
    volume.resize(end, force=True)  # readers look for the table of contents at the end
    with zipfile.ZipFile(volume.open_file()) as archive:
        assert archive.testzip() is None
        assert archive.read("7.txt") == b"7" * 5000


def test_a_tar_archive_is_made_and_read_inside(volume: onionskin.Volume) -> None:
    with volume.open_file() as file, tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 5000
            archive.addfile(member, io.BytesIO(bytes([number]) * 5000))
    with volume.open_file() as file, tarfile.open(fileobj=file) as archive:
        assert len(archive.getmembers()) == 20
        member = archive.extractfile("7.txt")
        assert member is not None
        assert member.read() == b"\7" * 5000


def test_an_array_is_read_into_place(volume: onionskin.Volume) -> None:
    wanted = numpy.arange(100_000, dtype=">i8").reshape(1000, 100)
    volume.open_file().write(wanted)
    found = numpy.empty_like(wanted)
    assert volume.open_file().readinto(found) == wanted.nbytes
    assert numpy.array_equal(found, wanted)
    assert numpy.array_equal(numpy.frombuffer(volume.open_file().read(800), ">i8"), wanted[0])


def test_a_file_says_which_disk_it_is_of(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1M") as web:
        file = web.open_file()
        assert repr(file) == f"<DiskFile of {web!r}>"
        file.close()
        assert repr(file).endswith(", closed>")
