"""What the data path is given: numbers that are none, buffers that cannot be used, ranges that pass the end."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from support.listing import found_in

import onionskin
from onionskin.base.sizes import parse_size
from onionskin.errors import StateError
from onionskin.kernels._maplog import MAGIC_SEGMENT, encode_header
from onionskin.kernels._volume import DataPath, error_of

BLOCK = 4096


@pytest.fixture
def web(tmp_path: Path) -> Iterator[onionskin.Volume]:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size=16 * BLOCK) as web:
        web.write(0, b"x" * BLOCK)
        yield web


@pytest.mark.parametrize("number", [1.9, 2.0, True, numpy.True_, numpy.float64(2), "2", None, b"2"])
def test_what_is_no_whole_number_is_a_type_error(web: onionskin.Volume, number: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: web.read(number, 2),
        lambda: web.read(0, number),
        lambda: web.readinto(number, bytearray(1)),
        lambda: web.write(number, b"x"),
        lambda: web.zero(number, 1),
        lambda: web.trim(0, number),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("size", [True, numpy.True_, 1.5, None])
def test_a_size_that_is_no_whole_number_is_a_type_error(size: Any) -> None:
    with pytest.raises(TypeError):
        parse_size(size)


@pytest.mark.parametrize("kind", [numpy.int64, numpy.uint64, numpy.int8])
def test_whole_numbers_of_numpy_are_whole_numbers(web: onionskin.Volume, tmp_path: Path, kind: type) -> None:
    assert web.read(kind(1), kind(2)) == b"xx"
    assert web.write(kind(0), b"y") == 1
    web.zero(kind(0), kind(1))
    assert parse_size(kind(100)) == 100


@pytest.mark.parametrize("data", ["text", 7, None, numpy.array([b"x", None], dtype=object), [1, 2]])
def test_what_has_no_bytes_is_not_written(web: onionskin.Volume, data: Any) -> None:
    with pytest.raises(TypeError):
        web.write(0, data)
    with pytest.raises(TypeError):
        web.write_blocks([0], data)
    assert web.read(0, 2) == b"xx"


@pytest.mark.parametrize("buffer", [numpy.zeros((8, 8), numpy.uint8)[:, 1], memoryview(bytearray(16))[::2]])
def test_a_buffer_that_is_not_contiguous_is_a_buffer_error(web: onionskin.Volume, buffer: Any) -> None:
    for call in (lambda: web.write(0, buffer), lambda: web.readinto(0, buffer), lambda: web.read_blocks([0], buffer)):
        with pytest.raises(BufferError, match="contiguous"):
            call()


def test_a_buffer_that_is_read_only_is_a_buffer_error(web: onionskin.Volume) -> None:
    frozen = numpy.zeros(BLOCK, numpy.uint8)
    frozen.flags.writeable = False
    for buffer in (b"12", memoryview(b"12"), frozen):
        with pytest.raises(BufferError, match="read-only"):
            web.readinto(0, buffer)
    with pytest.raises(BufferError, match="read-only"):
        web.read_blocks([0], frozen)


def test_arrays_of_any_numbers_are_written_by_their_bytes(web: onionskin.Volume) -> None:
    numbers = numpy.arange(512, dtype=numpy.float64).reshape(2, 256)
    web.write(0, numbers)
    back = numpy.zeros((2, 256), dtype=numpy.float64)
    web.readinto(0, back)
    assert (back == numbers).all()


def test_an_error_of_a_range_says_offset_length_and_size(web: onionskin.Volume) -> None:
    calls: list[Callable[[], object]] = [
        lambda: web.read(65000, 1000),
        lambda: web.readinto(65000, bytearray(1000)),
        lambda: web.write(65000, bytes(1000)),
        lambda: web.zero(65000, 1000),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"1000 bytes at offset 65000 .* 65536 bytes"):
            call()
    with pytest.raises(ValueError, match=r"block 16 .* 16 blocks"):
        web.read_blocks([3, 16])


def test_an_error_of_a_read_names_the_file_and_the_byte(web: onionskin.Volume) -> None:
    web.snapshot("a")
    (segment,) = [path for path, status in found_in(web.store._opened.layout.segments) if status.st_size > BLOCK]
    with web.store.open("web", snapshot="a") as view:
        os.truncate(segment, BLOCK)
        with pytest.raises(OSError, match="at byte 4096") as caught:
            view.read(0, 4)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(segment))


def test_an_error_of_a_write_names_the_segment_and_of_a_flush_the_map(ext4_mount: Any) -> None:
    root = ext4_mount(16 << 20)
    with onionskin.Store(root / "store") as store, store.create("web", size="1G") as web:
        with pytest.raises(OSError) as caught:
            for at in range(1024):
                web.write(at << 20, bytes([at % 255 + 1]) * (1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert Path(caught.value.filename).parent == Path(store._opened.layout.segments)
        assert "at byte" in str(caught.value)


@pytest.mark.slow
def test_an_opening_is_refused_before_the_process_has_too_many_files_to_map(tmp_path: Path) -> None:
    ids = [os.urandom(16) for _ in range(2000)]
    for id in ids:
        header = encode_header(MAGIC_SEGMENT, uuid=id, block_size=BLOCK, wipe_zero=False)
        (tmp_path / f"{id.hex()}.seg").write_bytes(header)
    opened: list[DataPath] = []

    def open_view() -> DataPath:
        path = DataPath(
            block_size=BLOCK, size_bytes=BLOCK, segments_directory=tmp_path, layers_directory=tmp_path,
            wipe_zero=False, writable=False,
        )  # fmt: skip
        segments = [(id, 0) for id in ids]
        path.add_layer(map_path="", map_id=bytes(16), length=0, frames=0, crc=0, segments=segments)
        opened.append(path)
        path.fold_layers()
        return path

    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    with pytest.raises(StateError, match="max_map_count"):
        for _ in range(most // len(ids) + 1):
            open_view()
    assert len(opened) * len(ids) < most
    opened[-1].close()
    opened[0].close()
    open_view()
    for path in opened:
        path.close()


@pytest.mark.slow
def test_a_snapshot_that_is_refused_for_want_of_mappings_is_not_taken_and_the_volume_goes_on(
    web: onionskin.Volume, tmp_path: Path
) -> None:
    paths: list[DataPath] = []
    ids = [os.urandom(16) for _ in range(500)]
    for id in ids:
        header = encode_header(MAGIC_SEGMENT, uuid=id, block_size=BLOCK, wipe_zero=False)
        (tmp_path / f"{id.hex()}.seg").write_bytes(header)
    web.snapshot("before")
    with pytest.raises(StateError, match="max_map_count"):
        for count in (*[500] * 1000, 1):
            path = DataPath(
                block_size=BLOCK, size_bytes=BLOCK, segments_directory=tmp_path, layers_directory=tmp_path,
                wipe_zero=False, writable=False,
            )  # fmt: skip
            paths.append(path)
            segments = [(id, 0) for id in ids[:count]]
            path.add_layer(map_path="", map_id=bytes(16), length=0, frames=0, crc=0, segments=segments)
            path.fold_layers()
    with pytest.raises(StateError, match="max_map_count"):
        for turn in range(600):  # what is left
            web.write(0, b"%d" % (turn % 10))
            web.snapshot(f"s{turn}")
    taken = len(web.snapshots)
    web.write(0, b"after")
    web.flush()
    for path in paths:
        path.close()
    web.snapshot("after")
    assert len(web.snapshots) == taken + 1
    assert web.read(0, 5) == b"after"
    name, store = web.name, web.store
    web.close()
    with store.open(name) as again:
        assert again.read(0, 5) == b"after"


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (5000, onionskin.FormatError, "restore the file from a copy"),
        (5001, onionskin.FormatError, "use a newer one"),
        (5002, onionskin.FormatError, "restore the file from a copy"),
        (5004, ValueError, "give one that ends in it"),
        (5005, StateError, "close the volume and open it again"),
        (5006, StateError, "open it again"),
        (5009, StateError, "open the volume again in the child"),
        (5010, OSError, "the device may be failing"),
        (5014, StateError, "merge or discard snapshots"),
        (5015, StateError, "raise that limit"),
    ],
)
def test_each_code_of_the_kernels_says_what_to_do(code: int, kind: type[Exception], advice: str) -> None:
    error = error_of(-code, "flush", "/vms/layers/a.map", 4096)
    assert isinstance(error, kind) and advice in str(error)


def test_an_error_of_the_system_names_the_file_and_the_byte() -> None:
    assert str(error_of(-errno.EIO, "flush", "/a", 4096)) == f"[Errno 5] {os.strerror(errno.EIO)} at byte 4096: '/a'"
    assert str(error_of(-errno.ENOMEM, "flush")) == f"[Errno 12] flush: {os.strerror(errno.ENOMEM)}"


def test_an_error_of_a_trim_names_the_trim(web: onionskin.Volume) -> None:
    with pytest.raises(ValueError, match=r"^trim: 1 bytes at offset"):
        web.trim(web.size_bytes, 1)
    with pytest.raises(ValueError, match=r"^zero: 1 bytes at offset"):
        web.zero(web.size_bytes, 1)


@pytest.mark.parametrize("index", [1 << 63, 1 << 64, 1 << 200])
def test_a_block_beyond_all_numbers_is_past_the_end(web: onionskin.Volume, index: int) -> None:
    with pytest.raises(ValueError, match=f"block {index}"):
        web.read_blocks([index])
    with pytest.raises(ValueError, match="give blocks that it has"):
        web.write_blocks([0, index], bytes(2 * BLOCK))
    assert web.read(0, 1) == b"x"


def test_a_view_of_what_is_closed_says_that_it_is_closed(web: onionskin.Volume) -> None:
    web.close()
    with pytest.raises(StateError, match="closed"):
        web.view(0, BLOCK)
