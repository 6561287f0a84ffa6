"""Runs qemu-img, which knows the formats of images that other programs write.

What must hold: qemu-img never guesses a format, because each file is passed to it with its format. An image that names
other files is recognized. A file's name is never taken for a protocol, an option or a json: description. qemu-img
reaches a disk of this process over NBD, through a socket whose descriptor it inherits.
"""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from onionskin.errors import FormatError, OnionskinError
from onionskin.exchange.image_formats import VHD_COOKIE, VHD_FOOTER_BYTES
from onionskin.exchange.programs import running, status_of
from onionskin.exchange.whole_images import lacks_data

AnyPath = str | os.PathLike[str]
Percent = Callable[[float], object]

EXPORT: Final = "disk"  # the name of the export that is served to qemu-img
_DRIVERS: Final = {"vhd": "vpc"}  # formats that have another name in qemu-img
# Exit statuses of qemu-img check: the image has space that nothing uses, and the format cannot be checked.
_ONLY_LEAKS, _NO_CHECK = 3, 63
_DIFFERENT = 1  # an exit status of qemu-img compare
_VHD_TYPE_OFFSET, _VHD_FIXED, _VHD_DYNAMIC = 60, 2, 3
_VDI_HEADER_BYTES = 512
_SAID_BYTES_MAX = 1 << 16
_NOT_MADE = re.compile(
    r"error while converting [a-z0-9]+: (.*); look at the image", re.DOTALL
)  # before anything is written
_OF_THIS_PROCESS: Final = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|thread-self)/fd/\d+")
_PERCENT = re.compile(rb"\(([\d.]+)/100%\)")


def program() -> str:
    """Return the path of qemu-img; raise OnionskinError if it is not installed."""
    found = shutil.which("qemu-img")
    if found is None:
        raise OnionskinError(
            "qemu-img is not installed, and formats other than raw need it; "
            "install the package qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, Arch, Alpine), or use raw"
        )
    return found


class Image:
    """An image file of a known format, as qemu-img reads it.

    Parameters
    ----------
    path : path or None
        The file. None if only its descriptor is known; a path that stands for a descriptor of this process, as /dev/stdin and
        /dev/fd/5 do, is none for qemu-img.
    kind : str
        Its format, by the name that it has here.
    name : str
        Its name in messages.
    descriptor : int
        The file, open.

    Attributes
    ----------
    keep : tuple of int
        The descriptors that qemu-img inherits, since `description` names them.
    """

    def __init__(self, path: AnyPath | None, kind: str, name: str, descriptor: int) -> None:
        self.kind, self.name = kind, name
        is_own = path is None or _OF_THIS_PROCESS.fullmatch(str(path)) is not None
        self._path = f"/proc/self/fd/{descriptor}" if path is None or is_own else str(Path(path).absolute())
        self._driver = _DRIVERS.get(kind, kind)
        self._descriptor = descriptor
        self.keep = (descriptor,) if is_own else ()
        self._before = Path(self._path).stat()
        self._facts: dict[str, Any] = json.loads(self._run("info", "--output=json", "-f", self._driver, self._path))

    @property
    def size_bytes(self) -> int:
        """The size of the disk in the image."""
        return int(self._facts["virtual-size"])

    def refuse_other_files(self) -> None:
        """Raise FormatError if the image names other files that it reads from."""
        specific = self._facts.get("format-specific", {}).get("data", {})
        others = [self._facts.get("full-backing-filename"), self._facts.get("backing-filename")]
        others += [specific.get("data-file"), *(extent.get("filename") for extent in specific.get("extents", []))]
        named = [other for other in others if other and other != self._path]
        if named:
            raise FormatError(
                f"{self.name}: this {self.kind} image reads from another file, {named[0]}; "
                f"if you trust the image, import it with --format {self.kind}"
            )

    def refuse_cut_short(self) -> None:
        """Raise FormatError if the end of the image is missing: tables and blocks there would silently read zero."""
        checked = self._run("check", "--output=json", "-f", self._driver, self._path, fine=(_ONLY_LEAKS, _NO_CHECK))
        size_bytes = _size_of(self._path)
        missing = False
        if self.kind == "qcow2":
            behind = json.loads(checked).get("image-end-offset", 0) - size_bytes
            missing = behind >= self._facts.get("cluster-size", 1 << 16)
            missing = missing or (behind > 0 and lacks_data(self._descriptor, self.kind))
        if self.kind == "vmdk":
            missing = lacks_data(self._descriptor, self.kind)
        if self.kind == "vdi":  # qemu-img check does not notice it
            with open(self._path, "rb") as file:
                header = file.read(_VDI_HEADER_BYTES)
            (first_block,) = struct.unpack_from("<I", header, 0x158)
            block_size, blocks_allocated = struct.unpack_from("<I8xI", header, 0x178)
            missing = first_block + block_size * blocks_allocated > size_bytes
        if self.kind == "vhd":
            missing = self._is_vhd_cut_short()
        if missing:
            raise FormatError(f"{self.name}: this {self.kind} image was cut short: its end is missing; fetch it again")

    def _is_vhd_cut_short(self) -> bool:
        """Return whether the footer at the end is missing. Refuse a differencing disk, because its parent is another
        file.

        qemu-img takes a differencing disk for a dynamic one. The source for the footer is Microsoft, Virtual Hard Disk
        Image Format Specification, 1.0.
        """
        with open(self._path, "rb") as file:
            file.seek(-VHD_FOOTER_BYTES, os.SEEK_END)
            footer = file.read(VHD_FOOTER_BYTES)
        if not footer.startswith(VHD_COOKIE):
            return True
        (disk_type,) = struct.unpack_from(">I", footer, _VHD_TYPE_OFFSET)
        if disk_type not in (_VHD_FIXED, _VHD_DYNAMIC):
            raise FormatError(
                f"{self.name}: this VHD has only what changed over another one (type {disk_type}); merge it into its "
                "parent with the program that made it, and import that"
            )
        return False

    @property
    def description(self) -> str:
        """The image's description for `first_difference`."""
        return file_of(self._driver, self._path)

    def copy_to(self, disk: int, percent: Percent | None) -> None:
        """Write the image's contents to the disk that is served through a descriptor, which reads zero everywhere."""
        # -n means that the target exists already.
        options = ("convert", "-n", "--target-is-zero", "-f", self._driver, "--target-image-opts")
        self._run(*options, self._path, served_disk(disk), keep=(disk,), percent=percent)
        self._refuse_changed()

    def _refuse_changed(self) -> None:
        before, after = self._before, Path(self._path).stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise FormatError(
                f"{self.name}: the image changed while it was read (size or time differ); import it again"
            )

    def _run(
        self, *arguments: str, keep: Sequence[int] = (), fine: Sequence[int] = (), percent: Percent | None = None
    ) -> str:
        return run(*arguments, about=self.name, keep=(*self.keep, *keep), fine=fine, percent=percent)


def served_disk(descriptor: int) -> str:
    """Return qemu-img's description of the disk that is served through a descriptor."""
    return f"driver=raw,file.driver=nbd,file.server.type=fd,file.server.str={descriptor},file.export={EXPORT}"


def _size_of(path: str) -> int:
    with open(path, "rb", buffering=0) as file:  # a block device tells its size only so
        return file.seek(0, os.SEEK_END)


def file_of(driver: str, path: str) -> str:
    """Return qemu-img's description of a file, or of a block device."""
    kind = "host_device" if Path(path).is_block_device() else "file"
    return f"driver={driver},file.driver={kind},file.filename={path.replace(',', ',,')}"


def first_difference(a: str, b: str, *, keep: Sequence[int], percent: Percent | None) -> int | None:
    """Return the offset of the first difference of two disks, or None.

    Parameters
    ----------
    a, b : str
        The descriptions of the disks, made by `served_disk` or `file_of`.
    keep : sequence of int
        The descriptors that the descriptions contain.
    percent : callable, optional
        Called with the part that is done, in percent.
    """
    said = run("compare", "--image-opts", a, b, about="compare", keep=keep, fine=(_DIFFERENT,), percent=percent)
    found = re.search(r"mismatch at offset (\d+)", said)
    if found is None and "identical" not in said:
        raise FormatError(f"qemu-img compare did not say whether they are the same: {said.strip()}")
    return int(found[1]) if found else None


def write_image(
    disk: int,
    target: int,
    kind: str,
    *,
    about: AnyPath,
    percent: Percent | None,
    compress: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Write the disk that is served through a descriptor as an image to an empty file.

    Parameters
    ----------
    disk, target : int
        The descriptors of the socket and of the file.
    kind : str
        The image's format, by the name that it has here.
    about : path
        The file's name in messages.
    percent : callable, optional
        Called with the part that is done, in percent.
    compress : bool
        Whether the data is compressed.
    options : sequence of str
        Options of the format, which `image_formats.refuse_options` has let pass.

    Raises
    ------
    ValueError
        qemu-img does not take the value of an option, or the format does not hold such a disk.
    """
    said = list(options)
    if kind == "vhd":
        said.append("force_size=on")  # without it, qemu-img rounds the size of a VHD to cylinders and heads
    if kind == "vmdk" and compress and not any(one.startswith("subformat=") for one in said):
        said.append("subformat=streamOptimized")
    flags = [*(["-c"] if compress else []), *(word for one in said for word in ("-o", one))]
    driver = _DRIVERS.get(kind, kind)
    arguments = ("convert", "--image-opts", served_disk(disk), "-O", driver, *flags, f"/proc/self/fd/{target}")
    try:
        run(*arguments, about=about, keep=(disk, target), percent=percent)
    except FormatError as error:
        refused = _NOT_MADE.search(str(error))
        if refused is None:
            raise
        which, advice = (f"with {', '.join(options)}", "") if options else ("of this disk", "; choose another format")
        raise ValueError(f"qemu-img makes no {kind} image {which}: {refused[1]}{advice}") from None


def run(
    *arguments: str,
    about: AnyPath,
    keep: Sequence[int] = (),
    fine: Sequence[int] = (),
    percent: Percent | None = None,
) -> str:
    """Run qemu-img and return what it printed. It is in this process group, so that Ctrl-C stops it too.

    Parameters
    ----------
    *arguments : str
    about : path
        The file that messages name.
    keep : sequence of int
        The descriptors that qemu-img inherits.
    fine : sequence of int
        Exit statuses besides 0 that are no error.
    percent : callable, optional
        Called with the part that qemu-img reports as done, in percent.

    Raises
    ------
    OSError
        ENOSPC: the disk is full.
    FormatError
        qemu-img failed; the message contains its own.
    """
    verb, *rest = arguments
    command = [program(), verb, *(["-p"] if percent else []), *rest]
    environment = os.environ | {"LC_ALL": "C"}
    with (
        tempfile.TemporaryFile() as said,
        # Stdin may be what it has to read.
        running(
            command, stdin=None if 0 in keep else subprocess.DEVNULL, stderr=said, env=environment, pass_fds=keep
        ) as process,
    ):
        printed = _printed_by(process, percent)
        status = status_of(process)
        said.seek(0)
        errors = said.read(_SAID_BYTES_MAX).decode(errors="replace").strip()
    if status and status not in fine:
        if os.strerror(errno.ENOSPC) in errors:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(about))
        last = (errors.splitlines()[-1:] or [f"exit status {status}"])[0].removeprefix("qemu-img: ")
        raise FormatError(f"{os.fspath(about)}: qemu-img {verb} failed: {last}; look at the image with qemu-img check")
    return printed


def _printed_by(process: "subprocess.Popen[bytes]", percent: Percent | None) -> str:
    """Return all that qemu-img prints; pass the percents on as they come."""
    assert process.stdout is not None
    pieces = []
    while piece := os.read(process.stdout.fileno(), _SAID_BYTES_MAX):
        pieces.append(piece)
        found = _PERCENT.findall(piece)
        if percent and found:
            percent(float(found[-1]))
    return b"".join(pieces).decode(errors="replace")
