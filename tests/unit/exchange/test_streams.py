"""Images that come through a pipe, or compressed: all of their bytes arrive, or there is no volume."""

import bz2
import gzip
import lzma
import os
import select
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

from onionskin import images
from onionskin.errors import FormatError, OnionskinError, VolumeExistsError
from onionskin.exchange.streams import COMPRESSED, Source
from onionskin.images import import_image
from onionskin.store import Store

BLOCK = 4096
DISK = b"begin" + bytes(3 * BLOCK) + os.urandom(5 * BLOCK + 100) + bytes(9 << 20) + b"end"


def with_program(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": with_program("zstd", "-qc"),
    "lz4": with_program("lz4", "-qc"),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def contents(store: Store, name: str) -> bytes:
    with store.open(name) as volume:
        return volume.read(0, volume.size_bytes)


@contextmanager
def pipe_of(data: bytes) -> Iterator[IO[bytes]]:
    """Give the end of a pipe into which a thread writes."""
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb") as file, suppress(BrokenPipeError):
            file.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    with open(reader, "rb", buffering=0) as file:
        yield file
    thread.join()


def test_every_compression_is_tried_here() -> None:
    assert set(PACK) == COMPRESSED


def test_a_raw_image_comes_through_a_pipe_and_its_zeros_are_not_stored(store: Store) -> None:
    with pipe_of(DISK) as pipe:
        assert import_image(store, pipe, "web") == len(DISK)
    assert contents(store, "web") == DISK
    with store.open("web") as volume:
        extents = [(int(o), int(n)) for o, n, state in volume.extents() if state == 1]
    assert sum(length for _, length in extents) <= 9 * BLOCK
    assert store.check() == []


def test_a_disk_grows_with_a_stream_that_is_larger_than_it_began(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_FIRST_SIZE_BYTES", BLOCK)
    with pipe_of(DISK) as pipe:
        import_image(store, pipe, "web")
    assert contents(store, "web") == DISK


@pytest.mark.parametrize("way", ["file", "pipe"])
@pytest.mark.parametrize("kind", PACK)
def test_a_compressed_image_is_unpacked_and_that_is_said(store: Store, tmp_path: Path, kind: str, way: str) -> None:
    packed = PACK[kind](DISK)
    notes: list[str] = []
    if way == "file":
        (tmp_path / "packed").write_bytes(packed)
        import_image(store, tmp_path / "packed", "web", note=notes.append)
    else:
        with pipe_of(packed) as pipe:
            import_image(store, pipe, "web", note=notes.append)
    assert contents(store, "web") == DISK
    assert notes == [f"unpacked with {kind}"]


@pytest.mark.parametrize("way", ["file", "pipe"])
@pytest.mark.parametrize("kind", PACK)
def test_a_compressed_image_that_was_cut_short_leaves_nothing(
    store: Store, tmp_path: Path, kind: str, way: str
) -> None:
    packed = PACK[kind](DISK)[:-6]
    with pytest.raises(FormatError, match="could not unpack it"):
        if way == "file":
            (tmp_path / "packed").write_bytes(packed)
            import_image(store, tmp_path / "packed", "web")
        else:
            with pipe_of(packed) as pipe:
                import_image(store, pipe, "web")
    assert store.volumes() == []
    assert store.check() == []


@pytest.mark.parametrize("kind", PACK)
def test_several_compressed_streams_in_a_row_are_one_disk_and_one_that_is_damaged_is_none(
    store: Store, kind: str
) -> None:
    """Parallel programs make such: bzip2 says nothing worse of a damaged one than that there is trailing garbage."""
    first, second = PACK[kind](DISK[:50_000]), PACK[kind](DISK[50_000:])
    with pipe_of(first + second) as pipe:
        import_image(store, pipe, "whole")
    assert contents(store, "whole") == DISK
    for behind in (b"?" + second[1:], second[:3], b"?"):
        with pytest.raises(FormatError, match="could not unpack it"), pipe_of(first + behind) as pipe:
            import_image(store, pipe, "web")
    assert list(store) == ["whole"]


def test_an_image_of_another_format_may_be_compressed_or_come_through_a_pipe(store: Store, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(DISK + bytes(-len(DISK) % 512))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2"], check=True
    )
    image = (tmp_path / "qcow2").read_bytes()
    (tmp_path / "qcow2.gz").write_bytes(gzip.compress(image))
    import_image(store, tmp_path / "qcow2.gz", "a")
    with pipe_of(image) as pipe:
        import_image(store, pipe, "b")
    with pipe_of(gzip.compress(image)) as pipe:
        import_image(store, pipe, "c", format="qcow2")
    expected = (tmp_path / "raw").read_bytes()
    assert [contents(store, name) == expected for name in "abc"] == [True, True, True]


@pytest.mark.parametrize("wipe", ["zero", "release"])
def test_what_an_image_from_a_pipe_passes_through_is_wiped_where_the_disk_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wipe: Any
) -> None:
    kept: list[int] = []
    real = tempfile.TemporaryFile

    def keep(*arguments: Any, **options: Any) -> IO[bytes]:
        file = real(*arguments, **options)
        if options.get("dir") == store.path:
            kept.append(os.dup(file.fileno()))
        return file

    (tmp_path / "raw").write_bytes(b"data" * BLOCK)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "qcow2"], check=True
    )
    monkeypatch.setattr(tempfile, "TemporaryFile", keep)
    with pipe_of((tmp_path / "qcow2").read_bytes()) as pipe:
        import_image(store, pipe, "web", wipe=wipe)
    (descriptor,) = kept
    assert (b"data" in os.pread(descriptor, 16 << 20, 0)) is (wipe == "release")
    os.close(descriptor)


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_raw_means_the_bytes_of_a_compressed_file_as_they_are(store: Store, tmp_path: Path, way: str) -> None:
    packed = gzip.compress(DISK)
    (tmp_path / "packed").write_bytes(packed)
    if way == "file":
        import_image(store, tmp_path / "packed", "web", format="raw")
    else:
        with pipe_of(packed) as pipe:
            import_image(store, pipe, "web", format="raw")
    assert contents(store, "web") == packed


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(lzma.compress(DISK)), "compressed with gzip, and with xz within"),
        (b"LUKS\xba\xbe\0\2" + DISK, "a LUKS container"),
        (gzip.compress(b"LUKS\xba\xbe\0\2" + DISK), "a LUKS container"),
        (DISK + b"conectix" + bytes(504), "of fixed size"),
        (DISK + b"koly\0\0\0\4" + bytes(504), "a DMG image"),
        (gzip.compress(DISK + b"koly\0\0\0\4" + bytes(504)), "a DMG image"),
    ],
    # By name: what gzip makes holds the time, and each worker of the tests has to find tests of the same names.
    ids=["nothing", "nothing packed", "packed twice", "luks", "luks packed", "vhd", "dmg", "dmg packed"],
)
def test_what_cannot_be_taken_from_a_pipe_leaves_nothing(store: Store, data: bytes, said: str) -> None:
    with pipe_of(data) as pipe, pytest.raises(FormatError, match=said):
        import_image(store, pipe, "web")
    assert store.volumes() == []


def test_without_the_program_it_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pipe_of(PACK["xz"](DISK)) as pipe, pytest.raises(OnionskinError, match="xz is not installed"):
        import_image(store, pipe, "web")


def test_a_name_that_was_taken_meanwhile_is_kept_and_no_program_is_left(store: Store) -> None:
    def take(done: int, total: int) -> None:
        if not store.volumes():
            store.create("web", size=BLOCK).close()

    with pipe_of(gzip.compress(DISK)) as pipe, pytest.raises(VolumeExistsError):
        import_image(store, pipe, "web", progress=take)
    assert [volume.size_bytes for volume in store.volumes()] == [BLOCK]


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_an_interrupt_ends_the_program_that_unpacks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        return started[-1]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    packed = gzip.compress(os.urandom(16 << 20), 1)
    monkeypatch.setattr("onionskin.exchange.programs.subprocess.Popen", start)
    (tmp_path / "packed").write_bytes(packed)
    with open(tmp_path / "packed", "rb") as file, pipe_of(packed) as pipe, pytest.raises(KeyboardInterrupt):
        import_image(store, file if way == "file" else pipe, "web", progress=stop)
    assert [process.returncode for process in started] == [-9]
    assert not [thread for thread in threading.enumerate() if thread.name == "onionskin unpack"]
    assert store.volumes() == []


def test_progress_of_a_compressed_file_is_that_of_the_file(store: Store, tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(gzip.compress(os.urandom(9 << 20), 1))
    seen: list[tuple[int, int]] = []
    import_image(store, tmp_path / "packed", "web", progress=lambda done, total: seen.append((done, total)))
    size_bytes = (tmp_path / "packed").stat().st_size
    assert {total for _, total in seen} == {size_bytes}
    assert seen[-1][0] == size_bytes
    assert seen == sorted(seen)


def test_a_source_that_cannot_be_read_is_named() -> None:
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)  # a read at 0 fails
    try:
        with pytest.raises(OSError, match="the disk"):
            Source(descriptor, "the disk").peek(1)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["raw", "gzip"])
def test_a_pipe_that_has_nothing_yet_has_not_ended(store: Store, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    disk = os.urandom(40960)
    data = gzip.compress(disk) if kind == "gzip" else disk
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    late = [data[:20], data[20:30], data[30:]]

    def poll() -> Any:
        if late:
            os.write(writer, late.pop(0))
            if not late:
                os.close(writer)
        return made()

    made = select.poll
    monkeypatch.setattr("onionskin.exchange.streams.select.poll", poll)
    with open(reader, "rb", buffering=0) as pipe:
        assert import_image(store, pipe, "new") == len(disk)
    with store.open("new", mode="r") as volume:
        assert volume.read(0, len(disk)) == disk


def look_and_go_back(file: IO[bytes]) -> None:
    file.read(4)
    file.seek(0)


TOUCHED: dict[str, tuple[Callable[[Any], object], slice]] = {
    "peeked at": (lambda file: file.peek(4), slice(0, None)),
    "read and put back": (look_and_go_back, slice(0, None)),
    "read a little": (lambda file: file.read(4), slice(4, None)),
}


@pytest.mark.parametrize("kind", ["raw", "zstd"])
@pytest.mark.parametrize("how", TOUCHED)
def test_what_a_file_has_in_its_buffer_is_not_left_out(store: Store, tmp_path: Path, how: str, kind: str) -> None:
    touch, rest = TOUCHED[how]
    (tmp_path / "image").write_bytes(DISK[: rest.start] + PACK[kind](DISK[rest]) if kind in PACK else DISK)
    with open(tmp_path / "image", "rb") as file:
        touch(file)
        import_image(store, file, "web")
    assert contents(store, "web") == DISK[rest]


@pytest.mark.parametrize("kind", ["raw", "gzip"])
def test_a_pipe_that_was_looked_at_is_imported_from_its_beginning(store: Store, kind: str) -> None:
    with pipe_of(PACK[kind](DISK) if kind in PACK else DISK) as pipe, open(pipe.fileno(), "rb", closefd=False) as file:
        assert file.peek(4)
        import_image(store, file, "web")
    assert contents(store, "web") == DISK


def test_a_file_of_text_is_no_image(store: Store, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(DISK)
    with open(tmp_path / "image") as file, pytest.raises(TypeError, match="binary"):
        import_image(store, file, "web")  # type: ignore[arg-type]


def test_no_program_is_left_where_no_thread_can_be_started(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(*arguments, **options))
        return started[-1]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reader, writer = os.pipe()
    os.write(writer, PACK["gzip"](DISK[:9999]))
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        store.finish_work()  # which has files open
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr("onionskin.exchange.programs.subprocess.Popen", start)
        monkeypatch.setattr("onionskin.exchange.streams.SureThread.start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            import_image(store, pipe, "web")
        monkeypatch.undo()
        assert [program.poll() for program in started] == [-9]
        store.finish_work()
        assert len(os.listdir("/proc/self/fd")) <= before  # what earlier tests left is closed at any moment


@pytest.mark.parametrize(("kind", "variable"), [("xz", "XZ_OPT"), ("xz", "XZ_DEFAULTS"), ("bzip2", "BZIP2")])
def test_what_the_environment_says_to_the_program_does_not_matter(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(subprocess.run([kind, "-c"], input=b"a" * BLOCK, capture_output=True, check=True).stdout)
    monkeypatch.setenv(variable, "--no-such-option")
    import_image(store, image, "new")
    with store.open("new") as disk:
        assert disk[:] == b"a" * BLOCK
