"""Disk images: raw in and out by onionskin itself; qcow2, vmdk, vhd, vhdx and vdi through qemu-img.

What must hold:

- The format of an image is never guessed by qemu-img: a guest can write a qcow2 header into its raw disk that
  names any file of the host as its backing file. Here the format comes from the magic bytes, or from the
  caller; an image that names other files is refused unless the caller named its format and so vouches for it.
- Holes stay holes: of a raw file only what SEEK_DATA finds is read, and blocks of zeros are not stored.
- A conversion goes through a raw file, since qemu-img needs a target that it can seek in. For an import that
  file has no name (it vanishes with the process, however that ends) and lies in the store's file system,
  where there must be room for the data anyhow.
- An import is a draft until all of it is durable: one that fails, or is killed, leaves no volume, and one that is under
  way deletes nothing by a name. An export that fails leaves no file.
- An image that ends early, or becomes shorter while it is read, is an error: what is missing is not zeros.
"""

import contextlib
import errno
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from onionskin.base.files import data_ranges, refuse_shorter
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.base.naming import check_name
from onionskin.base.progress import Progress
from onionskin.errors import FormatError, OnionskinError
from onionskin.exchange.image_formats import READ, VHD_COOKIE, VHD_FOOTER_BYTES, format_of

if TYPE_CHECKING:
    from onionskin.store import Store
    from onionskin.volume import Volume

AnyPath = str | os.PathLike[str]
FORMATS = READ
_DRIVERS = {"vhd": "vpc"}  # where qemu-img has another name for it

# Exit statuses of qemu-img check: space that nothing uses, and a format that it cannot check.
_ONLY_LEAKS, _NO_CHECK = 3, 63
_VDI_HEADER_BYTES = 512
_VHD_TYPE_OFFSET, _VHD_FIXED, _VHD_DYNAMIC = 60, 2, 3
_CHUNK_BYTES = 4 << 20


def detect_format(path: AnyPath) -> str:
    """Tell the format of an image by its magic bytes, ``raw`` where none are known.

    Parameters
    ----------
    path : path-like
        The image.

    Returns
    -------
    str
        One of `FORMATS`, as `import_image` takes it; or the name of another format that is known and not read, such as
        ``qed``, ``luks`` or ``gzip``.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        found = format_of(file.fileno())
    return found.name if found else "raw"


def _format_to_import(path: AnyPath) -> str:
    """Tell the format of an image, which must be one that is read here."""
    with open(path, "rb", buffering=0) as file:
        found = format_of(file.fileno())
    if found and found.name not in FORMATS:
        raise FormatError(
            f"{os.fspath(path)} is {found.title}, which is not read here: {found.advice} first, or import its bytes as they "
            "are with format raw"
        )
    return found.name if found else "raw"


def import_image(
    store: "Store",
    path: AnyPath,
    name: str,
    *,
    format: str | None = None,
    block_size: int = 4096,
    wipe: Literal["release", "zero"] = "release",
    progress: Progress | None = None,
) -> int:
    """Make a volume without a base that holds the data of an image.

    Parameters
    ----------
    store : Store
        Where the volume is made.
    path : path
        The image, a file or a block device. It is not written to.
    name : str
        Of the new volume.
    format : str, optional
        One of `FORMATS`; None tells it by the magic bytes. Naming it vouches for the image.
    block_size, wipe
        Of the new volume.
    progress : callable, optional
        Called with the bytes copied so far and in all.

    Returns
    -------
    int
        The size of the disk, in bytes. The data is durable.

    Raises
    ------
    FormatError
        The image is damaged, or of a format that is known and not read here, or names other files and `format` is None.
    VolumeExistsError
        The store has a volume of that name.
    """
    # Here, as the command line comes to this module for a list of formats.
    from onionskin.operations import staged_volumes
    from onionskin.operations.export import passing_file
    from onionskin.operations.volumes import refuse_taken
    from onionskin.volume import Volume

    check_name("volume", name)
    refuse_taken(store._opened, name)
    if format is not None and format not in FORMATS:
        raise ValueError(f"{format!r} is not a format: it is one of {', '.join(FORMATS)}")
    kind = format or _format_to_import(path)
    with contextlib.ExitStack() as stack:
        if kind == "raw":
            source: IO[bytes] = stack.enter_context(open(path, "rb", buffering=0))
        else:
            source = stack.enter_context(passing_file(store._opened, store.path, [wipe]))
            _convert_to_raw(path, kind, source, vouched=format is not None)
        size_bytes = os.lseek(source.fileno(), 0, os.SEEK_END)
        if size_bytes == 0:
            raise FormatError(f"{os.fspath(path)}: the image is empty; give one that holds a disk")
        if size_bytes > VOLUME_BYTES_MAX:
            raise FormatError(
                f"{os.fspath(path)}: the image has {size_bytes} bytes, and a disk at most {VOLUME_BYTES_MAX} (64 TiB)"
            )
        draft = stack.enter_context(
            staged_volumes.draft(store._opened, name, size=size_bytes, block_size=block_size, wipe=wipe)
        )
        copy_into(Volume(draft.head), source.fileno(), path=path, progress=progress)
        draft.publish()
    return size_bytes


def copy_into(
    volume: "Volume", descriptor: int, *, path: AnyPath | None = None, progress: Progress | None = None
) -> None:
    """Write the data of a raw image into a volume that reads zero, but not its zeros. No flush.

    Raises
    ------
    OSError
        EIO: the image was cut short meanwhile; `path` is its name in the message.
    """
    import numpy as np

    from onionskin.base.zero_runs import split_zeros

    size_bytes = min(volume.size_bytes, os.lseek(descriptor, 0, os.SEEK_END))
    ranges = list(data_ranges(descriptor, 0, size_bytes))
    total = sum(stop - start for start, stop in ranges)
    done = 0
    buffer = np.empty(_CHUNK_BYTES, dtype=np.uint8)
    for start, stop in ranges:
        at = start
        while at < stop:
            # The first piece of a range ends on a boundary, so that the others are whole blocks.
            wanted = min(stop - at, _CHUNK_BYTES - at % _CHUNK_BYTES)
            length = os.preadv(descriptor, [buffer[:wanted].data], at)
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
    refuse_shorter(descriptor, size_bytes, path)  # what was cut may have begun in a hole


def export_image(volume: "Volume", path: AnyPath, *, format: str = "raw", progress: Progress | None = None) -> None:
    """Write what a volume, or a view of a snapshot, reads as an image; durable on return.

    Parameters
    ----------
    volume : Volume
        Open; for a head, what was written before the call is in the image.
    path : path
        Must not exist.
    format : str
        One of `FORMATS`.
    progress : callable, optional
        Called with the bytes copied so far and in all, of the copy out of the volume.

    Raises
    ------
    FileExistsError
        There is a file at `path`.
    OnionskinError
        qemu-img is wanted and is not installed.
    """
    from onionskin.operations import copy, export
    from onionskin.operations.pinned import pinned

    if format not in FORMATS:
        raise ValueError(f"{format!r} is not a format: it is one of {', '.join(FORMATS)}")
    target = Path(path)
    if format == "raw":
        export.export(volume._opened, target, replace=False, progress=progress)
        return
    store, parent = volume._opened.store, target.absolute().parent
    export.refuse_target(store, target, replace=False)
    _qemu_img()
    with pinned(volume._opened) as opened, export.new_image(store, target, opened, replace=False) as made:
        copy.check_room_for_copy(store, opened, parent)
        with export.passing_file(store, parent, export.policies_of(opened)) as raw:
            copy.copy_disk(store, opened, raw.fileno(), progress=progress)
            way = [f"/proc/self/fd/{descriptor}" for descriptor in (raw.fileno(), made)]
            options = (
                ("-o", "force_size=on") if format == "vhd" else ()
            )  # else the size is one that has cylinders and heads
            driver = _DRIVERS.get(format, format)
            _run("convert", "-f", "raw", "-O", driver, *options, *way, about=path, keep=(raw.fileno(), made))


def _convert_to_raw(path: AnyPath, kind: str, raw: IO[bytes], *, vouched: bool) -> None:
    source = _absolute(path)
    before = Path(source).stat()
    driver = _DRIVERS.get(kind, kind)
    facts = json.loads(_run("info", "--output=json", "-f", driver, source, about=path))
    if not vouched:
        _refuse_other_files(path, kind, source, facts)
    _refuse_cut_short(path, kind, source, facts)
    os.ftruncate(raw.fileno(), facts["virtual-size"])
    # -n: the target is there already, and all of it is a hole; qemu-img finds it by its descriptor.
    target = f"/proc/self/fd/{raw.fileno()}"
    options = ("-n", "--target-is-zero", "-f", driver, "-O", "raw")
    _run("convert", *options, source, target, about=path, keep=(raw.fileno(),))
    after = Path(source).stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise FormatError(
            f"{os.fspath(path)}: the image changed while it was read (size or time differ); import it again"
        )


def _refuse_other_files(path: AnyPath, kind: str, source: str, facts: dict[str, Any]) -> None:
    specific = facts.get("format-specific", {}).get("data", {})
    others = [facts.get("full-backing-filename"), facts.get("backing-filename"), specific.get("data-file")]
    others += [extent.get("filename") for extent in specific.get("extents", [])]
    named = [other for other in others if other and other != source]
    if named:
        raise FormatError(
            f"{os.fspath(path)}: this {kind} image reads from another file, {named[0]}; "
            f"if you trust the image, import it with --format {kind}"
        )


def _refuse_cut_short(path: AnyPath, kind: str, source: str, facts: dict[str, Any]) -> None:
    """qemu-img would convert what is left without a word: tables and blocks behind the end of the file read zero."""
    driver = _DRIVERS.get(kind, kind)
    checked = _run("check", "--output=json", "-f", driver, source, about=path, also_fine=(_ONLY_LEAKS, _NO_CHECK))
    size_bytes = Path(source).stat().st_size
    missing = False
    if kind == "qcow2":
        missing = json.loads(checked).get("image-end-offset", 0) - size_bytes >= facts.get("cluster-size", 1 << 16)
    if kind == "vdi":  # qemu-img check does not look
        with open(source, "rb") as file:
            header = file.read(_VDI_HEADER_BYTES)
        (first_block,) = struct.unpack_from("<I", header, 0x158)
        block_size, blocks_allocated = struct.unpack_from("<I8xI", header, 0x178)
        missing = first_block + block_size * blocks_allocated > size_bytes
    if kind == "vhd":
        missing = _is_vhd_cut_short(path, source)
    if missing:
        raise FormatError(f"{os.fspath(path)}: this {kind} image was cut short: its end is missing; fetch it again")


def _is_vhd_cut_short(path: AnyPath, source: str) -> bool:
    """Whether the end is missing, where the footer is. A differencing disk is refused: its parent is another file.

    Microsoft, Virtual Hard Disk Image Format Specification, 1.0: qemu-img takes such a disk for a dynamic one.
    """
    with open(source, "rb") as file:
        file.seek(-VHD_FOOTER_BYTES, os.SEEK_END)
        footer = file.read(VHD_FOOTER_BYTES)
    if not footer.startswith(VHD_COOKIE):
        return True
    (disk_type,) = struct.unpack_from(">I", footer, _VHD_TYPE_OFFSET)
    if disk_type not in (_VHD_FIXED, _VHD_DYNAMIC):
        raise FormatError(
            f"{os.fspath(path)}: this VHD has only what changed over another one (type {disk_type}); merge it into its "
            "parent with the program that made it, and import that"
        )
    return False


def _absolute(path: AnyPath) -> str:
    """Name a file so that qemu-img cannot take the name for a protocol, an option or a json: description."""
    return str(Path(path).absolute())


def _qemu_img() -> str:
    program = shutil.which("qemu-img")
    if program is None:
        raise OnionskinError(
            "qemu-img is not installed, and formats other than raw need it; "
            "install the package qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, Arch, Alpine), or use raw"
        )
    return program


def _run(*arguments: str, about: AnyPath, keep: tuple[int, ...] = (), also_fine: tuple[int, ...] = ()) -> str:
    """Run qemu-img and give what it printed; its process group is ours, so that Ctrl-C stops it too."""
    ended = subprocess.run(
        [_qemu_img(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C"},
        pass_fds=keep,
    )
    if ended.returncode and ended.returncode not in also_fine:
        if os.strerror(errno.ENOSPC) in ended.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(about))
        said = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
        raise FormatError(
            f"{os.fspath(about)}: qemu-img {arguments[0]} failed: {said[0].removeprefix('qemu-img: ')}; "
            "look at the image with qemu-img check"
        )
    return ended.stdout
