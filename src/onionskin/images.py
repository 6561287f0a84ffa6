"""Import and export of disk images: raw by onionskin itself; qcow2, vmdk, vhd, vhdx and vdi through qemu-img.

What must hold:

- qemu-img never guesses the format of an image, because a guest can write a qcow2 header into its raw disk that names
any
  file of the host as its backing file. The format comes from the magic bytes, which are read here, or from the caller.
  An image that names other files is refused unless the caller named its format and so vouches for it.
- Holes stay holes: only the data that SEEK_DATA finds in a raw file is read, and blocks of zeros are not stored.
- A conversion makes no copy: qemu-img reads or writes the disk itself, which this process serves to it alone.
- An import is staged until all of it is durable. An import that fails or is killed leaves no volume, and an import that
is
  under way deletes nothing by name. An export that fails leaves no file.
- An image that ends early, or becomes shorter while it is read, is an error, because the missing part is not zeros. A
pipe
  does not show whether it ended early. A program that unpacks knows, and its exit status is relied on.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Literal

from onionskin.base.files import data_ranges, refuse_shorter
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.base.naming import check_name
from onionskin.base.paths import FilePath
from onionskin.base.progress import Progress
from onionskin.errors import FormatError
from onionskin.exchange.image_formats import (
    END_BYTES,
    READ,
    START_BYTES,
    VHD,
    ImageFormat,
    format_of,
    format_of_end,
    format_of_start,
    refuse_options,
)
from onionskin.exchange.streams import COMPRESSED, Source, hides_size, is_rewindable, is_seekable, unpacked
from onionskin.storage.base_looks import BaseLooks, looks_of

if TYPE_CHECKING:
    from onionskin.exchange.block_devices import BlockDevice
    from onionskin.kernels._volume import DataPath
    from onionskin.operations.staged_volumes import StagedVolume
    from onionskin.store import Store
    from onionskin.volume import Volume

AnyPath = str | os.PathLike[str]
ImageKind = Literal["raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi"]
FORMATS = READ
_CHUNK_BYTES = 4 << 20
ZERO_UNIT_BYTES = 4096  # a multiple of the sectors of all devices
_FIRST_SIZE_BYTES = 1 << 30  # the first size of a disk that is written from a stream of unknown length


def detect_format(path: AnyPath) -> str:
    """Return the format of an image by its magic bytes, or ``raw`` if they are not known.

    Parameters
    ----------
    path : path-like
        The image.

    Returns
    -------
    str
        One of `FORMATS`, as `import_image` takes it, or the name of another known format, such as ``qed``, ``luks`` or
        ``gzip``.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        found = format_of(file.fileno())
    return found.name if found else "raw"


# ---- import ----


def import_image(
    store: "Store",
    path: AnyPath | IO[bytes],
    name: str,
    *,
    format: ImageKind | None = None,
    block_size: int | None = None,
    wipe: Literal["release", "zero"] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], object] | None = None,
) -> int:
    """Make a volume without a base that holds the data of an image.

    Parameters
    ----------
    store : Store
        The store in which the volume is made.
    path : path-like or file
        The path of a file or a block device, or an open binary file that has a descriptor. An open file is read from
        its position on; it may be a pipe, and may have a buffer. An image that is compressed with gzip, xz, zstd, bzip2 or
        lz4 is unpacked by the system's program. The image is not written to.
    name : str
        The name of the new volume.
    format : str, optional
        One of `FORMATS`; with None, the magic bytes tell the format. A caller that names the format vouches for the
        image. ``raw`` takes the bytes as they are, even those of a compressed file.
    block_size, wipe
        Block size and wipe policy of the new volume; with None, those that `Store.defaults` returns.
    progress : callable, optional
        Called with the bytes copied so far and in all; the total is 0 if it is not known.
    note : callable, optional
        Called with a few words about an additional step, such as ``unpacked with zstd``.

    Returns
    -------
    int
        The size of the disk, in bytes. The data is durable.

    Raises
    ------
    FormatError
        The image is damaged, or has a known format that cannot be imported, or names other files and `format` is None.
    OnionskinError
        A program that is needed is not installed.
    VolumeExistsError
        The store has a volume of that name.
    """
    from onionskin.operations.properties import with_defaults
    from onionskin.operations.volumes import refuse_taken  # imported late: the command line imports this for FORMATS

    check_name("volume", name)
    refuse_taken(store._opened, name)
    if format is not None and format not in FORMATS:
        raise ValueError(f"{format!r} is not a format: it is one of {', '.join(FORMATS)}")
    chosen = with_defaults(store._opened, block_size, wipe)
    with contextlib.ExitStack() as stack:
        descriptor, called = stack.enter_context(_opened(path))
        refuse_endless(descriptor, called)
        ahead = b"" if isinstance(path, str | os.PathLike) else _read_ahead(path)
        made = _Import(stack, store, name, called, format, *chosen, progress)
        if not ahead and is_seekable(descriptor) and not hides_size(descriptor):
            kind = made.kind_of(format_of(descriptor))
            if kind in COMPRESSED:
                disk = made.from_compressed(Source(descriptor, called), kind, note)
            else:
                is_named = isinstance(path, str | os.PathLike)
                disk = made.from_file(descriptor, kind, FilePath(path) if is_named else None)  # type: ignore[arg-type]
        else:
            source = Source(descriptor, called, ahead)
            kind = made.kind_of(format_of_start(source.peek(START_BYTES)))
            disk = made.from_compressed(source, kind, note) if kind in COMPRESSED else made.from_stream(source, kind)
        made.publish()
        return disk.size_bytes


def refuse_endless(descriptor: int, called: AnyPath) -> None:
    """Raise FormatError for a character device: most of them have no end, and are no disks."""
    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        raise FormatError(
            f"{os.fspath(called)} is a character device, and not a file, a block device or a pipe; give one of these, or a "
            "program's output to 'import -'"
        )


@contextlib.contextmanager
def _opened(image: AnyPath | IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the descriptor of an image, and the name that messages give it."""
    if isinstance(image, str | os.PathLike):
        with open(image, "rb", buffering=0) as file:
            yield file.fileno(), os.fspath(image)
    else:
        called = getattr(image, "name", None)
        yield image.fileno(), called if isinstance(called, str) else "the image"


def _read_ahead(file: IO[bytes]) -> bytes:
    """Return what a file object has read of its descriptor and not given out. A file that can be is put at its position."""
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"an image is read from a binary file, and {file!r} is one of text")
    if getattr(file, "raw", None) is None:  # it has no buffer
        return b""
    if file.writable():
        file.flush()
    if file.seekable():
        os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
        return b""
    return bytes(file.peek())  # type: ignore[attr-defined]


class _Import:
    """One import: it makes a staged volume and fills it from an image of any kind.

    The resources that it opens are closed with the stack.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        store: "Store",
        name: str,
        called: str,
        format: str | None,
        block_size: int,
        wipe: str,
        progress: Progress | None,
    ) -> None:
        self._stack, self._store, self._name, self._called = stack, store, name, called
        self._format, self._block_size, self._wipe = format, block_size, wipe
        self._progress = progress
        self._made: StagedVolume | None = None

    def publish(self) -> None:
        """Give the filled disk its name, which makes it a volume."""
        assert self._made is not None
        self._made.publish()

    def kind_of(self, found: ImageFormat | None) -> str:
        """Return the format or the compression of an image, by its magic bytes and by what the caller said."""
        if self._format == "raw":
            return "raw"
        if found and found.name in COMPRESSED:
            return found.name
        if self._format:
            return self._format
        if found and found.name not in FORMATS:
            raise FormatError(
                f"{self._called} is {found.title}, which is not read here: {found.advice} first, or import its bytes as "
                "they are with format raw"
            )
        return found.name if found else "raw"

    def _stage(self, size_bytes: int) -> "Volume":
        from onionskin.operations import staged_volumes
        from onionskin.volume import Volume

        if size_bytes == 0:
            raise FormatError(f"{self._called}: the image is empty; give one that holds a disk")
        self._refuse_larger(size_bytes)
        self._made = self._stack.enter_context(
            staged_volumes.stage(
                self._store._opened, self._name, size=size_bytes, block_size=self._block_size, wipe=self._wipe
            )
        )
        return Volume(self._made.head)

    def _refuse_larger(self, size_bytes: int) -> None:
        if size_bytes > VOLUME_BYTES_MAX:
            raise FormatError(
                f"{self._called}: the image has {size_bytes} bytes, and a disk at most {VOLUME_BYTES_MAX} (64 TiB)"
            )

    def from_file(self, descriptor: int, kind: str, path: FilePath | None = None) -> "Volume":
        """Import an image that can be read at any offset. Without a path, it is read through its descriptor."""
        before = looks_of(descriptor)
        if kind == "raw":
            disk = self._stage(os.lseek(descriptor, 0, os.SEEK_END))
            copy_into(disk, descriptor, path=self._called, progress=self._progress)
            refuse_changed(descriptor, before, self._called)
            return disk
        from onionskin.exchange import qemu_img
        from onionskin.nbd.for_program import served_to_program

        image = qemu_img.Image(path, kind, self._called, descriptor)
        if self._format is None:
            image.refuse_other_files()
        image.refuse_cut_short()
        disk = self._stage(image.size_bytes)
        with served_to_program(disk._opened.path, qemu_img.EXPORT, writable=True) as address:
            image.copy_to(address, _percents(self._progress, image.size_bytes))
        refuse_changed(descriptor, before, self._called)
        return disk

    def from_compressed(self, source: Source, kind: str, note: Callable[[str], object] | None) -> "Volume":
        """Import what the system's program makes of a compressed image; if the image is not whole, import nothing."""
        report = self._report(_position_of(source.descriptor))
        disk: Volume | None = None
        with unpacked(source, kind) as inner:
            within = self.kind_of(format_of_start(inner.peek(START_BYTES)))
            if within in COMPRESSED:
                raise FormatError(
                    f"{self._called} is compressed with {kind}, and with {within} within; unpack it first"
                )
            is_stored = within == "raw" and inner.peek(1) != b""
            if is_stored:
                disk = self._from_raw_stream(inner, report)
            else:  # it has to be read at any offset, so it is kept in a file and read after the program has ended well
                file = self._spool(inner, report)
        if note:
            note(f"unpacked with {kind}")
        return disk or self.from_file(file.fileno(), within)

    def from_stream(self, source: Source, kind: str) -> "Volume":
        """Import an image that can be read only once."""
        report = self._report(lambda done: (done, 0))
        if kind == "raw" and source.peek(1):
            return self._from_raw_stream(source, report)
        return self.from_file(self._spool(source, report).fileno(), kind)

    def _report(self, measure: Callable[[int], tuple[int, int]]) -> Callable[[int], object]:
        """Return a function that takes the number of bytes read and reports what `measure` makes of it."""
        progress = self._progress
        return (lambda done: progress(*measure(done))) if progress else (lambda done: None)

    def _spool(self, source: Source, report: Callable[[int], object]) -> IO[bytes]:
        """Copy a stream to a file without a name, because the tables of an image may be anywhere in it."""
        from onionskin.operations.export import passing_file

        file = self._stack.enter_context(passing_file(self._store._opened, self._store.path, [self._wipe]))
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        done = 0
        while length := source.readinto(buffer):
            file.write(buffer[:length])
            done += length
            report(done)
        file.flush()
        return file

    def _from_raw_stream(self, source: Source, report: Callable[[int], object]) -> "Volume":
        """Write a stream to a disk, which grows as data arrives."""
        from onionskin.kernels._copy import split_zeros

        disk = self._stage(_FIRST_SIZE_BYTES)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        end = b""  # the last bytes so far, which tell some formats
        done = 0
        while length := source.readinto(buffer):
            self._refuse_larger(done + length)
            if done + length > disk.size_bytes:
                disk.resize(min(max(2 * disk.size_bytes, done + length), VOLUME_BYTES_MAX))
            for first, last, is_zero in split_zeros(buffer[:length], disk.block_size):
                if not is_zero:
                    disk.write(done + first, buffer[first:last])
            end = (end + buffer[max(0, length - END_BYTES) : length].tobytes())[-END_BYTES:]
            done += length
            report(done)
        if self._format is None and self.kind_of(format_of_end(end)) == VHD.name:
            raise FormatError(
                f"{self._called} is {VHD.title} of fixed size, which only its end tells: save it as a file and import that, "
                "or import its bytes as they are with format raw"
            )
        disk.resize(done, force=True)
        return disk


def _percents(progress: Progress | None, size_bytes: int) -> Callable[[float], object] | None:
    """Return a function that takes percents of a disk and reports them as bytes."""
    if progress is None:
        return None
    return lambda percent: progress(int(size_bytes * percent / 100), size_bytes)


def _position_of(descriptor: int) -> Callable[[int], tuple[int, int]]:
    """Return a function that measures progress by the descriptor's position, which the unpacking program moves.

    For a pipe, the function returns the bytes unpacked so far, and 0 as the total.
    """
    if not is_seekable(descriptor):
        return lambda done: (done, 0)
    total = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return lambda _: (os.lseek(descriptor, 0, os.SEEK_CUR), total)


def refuse_changed(descriptor: int, before: BaseLooks, called: str) -> None:
    """Raise FormatError where a file or a device was written to while it was read: that is no disk that there was then.

    Of a device, only writes to the places that `looks_of` looks at are found.
    """
    if looks_of(descriptor) != before and is_rewindable(descriptor):
        raise FormatError(
            f"{called}: the image changed while it was read (its size differs, its time, or what a device holds at the "
            "places that are looked at); read it again"
        )


def copy_into(
    volume: "Volume", descriptor: int, *, path: AnyPath | None = None, progress: Progress | None = None
) -> None:
    """Write the data of a raw image, without its zeros, into a volume that reads zero. The volume is not flushed.

    Raises
    ------
    OSError
        EIO: the image was cut short meanwhile. `path` is its name in the message.
    """
    from onionskin.kernels._copy import split_zeros

    size_bytes = min(volume.size_bytes, os.lseek(descriptor, 0, os.SEEK_END))
    ranges = list(data_ranges(descriptor, 0, size_bytes))
    total = sum(stop - start for start, stop in ranges)
    done = 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for start, stop in ranges:
        at = start
        while at < stop:
            # The first piece of a range ends on a multiple of the chunk, so that the other pieces are whole blocks.
            wanted = min(stop - at, _CHUNK_BYTES - at % _CHUNK_BYTES)
            length = os.preadv(descriptor, [buffer[:wanted]], at)
            if length == 0:
                refuse_shorter(descriptor, size_bytes, path)
                raise OSError(errno.EIO, f"the image cannot be read from byte {at} on", os.fspath(path or "image"))
            for first, last, is_zero in split_zeros(buffer[:length], volume.block_size):
                if not is_zero:
                    volume.write(at + first, buffer[first:last])
            at += length
            done += length
            if progress is not None:
                progress(done, total)
    refuse_shorter(descriptor, size_bytes, path)  # a part that was cut off now looks like a hole


def export_image(
    volume: "Volume",
    path: AnyPath,
    *,
    format: ImageKind = "raw",
    progress: Progress | None = None,
    compress: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Write what a volume, or a view of a snapshot, reads as an image; durable on return.

    Parameters
    ----------
    volume : Volume
        It is open. If it is a head, the image holds all that was written before the call.
    path : path
        It must not exist.
    format : str
        One of `FORMATS`.
    progress : callable, optional
        Called with the bytes copied so far and in all. For a conversion, these are bytes of the disk, and holes count
        too.
    compress : bool
        Whether the data of a qcow2 or VMDK image is compressed.
    options : sequence of str
        Options that qemu-img has for the format, such as ``"compression_type=zstd"``. Those that would have the image
        refer to other files are refused.

    Raises
    ------
    FileExistsError
        There is a file at `path`.
    OnionskinError
        qemu-img is needed and is not installed.
    """
    from onionskin.operations import export

    if format not in FORMATS:
        raise ValueError(f"{format!r} is not a format: it is one of {', '.join(FORMATS)}")
    refuse_options(format, options, compress=compress)
    target = FilePath(path)
    if format == "raw":
        export.export(volume._opened, target, replace=False, progress=progress)
        return
    # Imported late: a raw image needs no server.
    from onionskin.exchange import qemu_img
    from onionskin.nbd.for_program import served_to_program
    from onionskin.operations import copy
    from onionskin.operations.pinned import pinned
    from onionskin.storage.shared_paths import refuse_changed_base

    store = volume._opened.store
    export.refuse_target(store, target, replace=False)
    qemu_img.program()
    with pinned(volume._opened) as opened, export.new_image(store, target, opened, replace=False) as made:
        if not compress:  # how much is left of compressed data, nobody knows before
            copy.check_room_for_copy(store, opened, target.absolute().parent)
        with served_to_program(opened.path, qemu_img.EXPORT, writable=False) as disk:
            percent = _percents(progress, volume.size_bytes)
            qemu_img.write_image(disk, made, format, about=path, percent=percent, compress=compress, options=options)
        refuse_changed_base(opened)


def export_to_device(volume: "Volume", device: "BlockDevice", *, progress: Progress | None = None) -> None:
    """Write what a volume, or a view of a snapshot, reads over the beginning of a block device; durable on return.

    The device keeps what it holds past the size of the disk. If this fails, a part of the device was overwritten.

    Parameters
    ----------
    volume : Volume
        It is open. What was written to a head before the call is on the device.
    device : BlockDevice
        It is open.
    progress : callable, optional
        Called with the bytes written so far and in all.

    Raises
    ------
    StateError
        The device is a base, of a volume of this store or of an open volume, or shares bytes with one, as a loop device
        over a file that is a base does.
    OSError
        ENOSPC: the device is smaller than the disk, and nothing was written. Or an error of the device.
    ChainError
        The base changed meanwhile.
    """
    from onionskin.kernels._copy import split_zeros
    from onionskin.storage.locks import written_over

    refuse_device(volume, device)  # before what takes time
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with written_over(device.fileno(), device.path), reading(volume) as disk:
        refuse_device(volume, device, is_held=True)  # a file below may have become a base meanwhile
        size_bytes = int(disk.size_bytes)
        for at in range(0, size_bytes, _CHUNK_BYTES):
            piece = buffer[: min(_CHUNK_BYTES, size_bytes - at)]
            disk.readinto(at, piece)
            for first, last, is_zero in split_zeros(piece, ZERO_UNIT_BYTES):
                if is_zero:
                    device.zero(at + first, last - first)
                else:
                    device.write(at + first, piece[first:last])
            if progress is not None:
                progress(at + len(piece), size_bytes)
        device.sync()


@contextlib.contextmanager
def reading(volume: "Volume") -> "Iterator[DataPath]":
    """Give a whole disk to read, as it is at one instant; an image that goes away as it is read has no other guard.

    Parameters
    ----------
    volume : Volume
        Open; for a head, what was written before the call is read.

    Yields
    ------
    DataPath
        What to read from.

    Raises
    ------
    ChainError
        The base was written to meanwhile: at the end, so before the end of the block nothing that was read is good.
    """
    from onionskin.operations.pinned import pinned
    from onionskin.storage.shared_paths import refuse_changed_base

    with pinned(volume._opened) as opened:
        yield opened.path
        refuse_changed_base(opened)


def refuse_device(volume: "Volume", device: "BlockDevice", *, is_held: bool = False) -> None:
    """Raise if a disk may not be written to a block device; `export_to_device` lists the errors. Nothing is written.

    `is_held` says that the caller is within `locks.written_over` of the device.
    """
    from onionskin.operations.export import refuse_needed_device

    refuse_needed_device(volume._opened.store, device.number, device.path, is_held=is_held)
    if device.size_bytes < volume.size_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the device has {device.size_bytes} bytes, and the disk {volume.size_bytes}; choose a larger device",
            str(device.path),
        )
