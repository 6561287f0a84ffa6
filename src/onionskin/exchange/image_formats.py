"""Recognizes the format of an image file by its magic bytes.

What must hold: a file of a known format is never silently taken for a raw disk. A raw disk may begin with the same
bytes (a guest can write anything, and may encrypt all of its disk with LUKS), so a caller that knows it can say that a
file is raw.
"""

import os
import struct
from typing import Final

from onionskin.base.files import read_all
from onionskin.base.records import record
from onionskin.errors import FormatError

START_BYTES: Final = 512
VHD_FOOTER_BYTES: Final = 512
VHD_COOKIE: Final = b"conectix"


@record
class ImageFormat:
    """A format: its name in the interface, its name in messages, and the advice how to make such a file raw."""

    name: str
    title: str
    advice: str


def _converted(name: str, title: str, driver: str | None = None) -> ImageFormat:
    return ImageFormat(name, title, f"convert it with 'qemu-img convert -f {driver or name} -O raw'")


def _unpacked(name: str, title: str, program: str) -> ImageFormat:
    return ImageFormat(name, f"compressed with {title}", f"unpack it with '{program} -d'")


QCOW2 = _converted("qcow2", "a qcow2 image")
VMDK = _converted("vmdk", "a VMDK image")
VHD = _converted("vhd", "a VHD image", "vpc")
VHDX = _converted("vhdx", "a VHDX image")
VDI = _converted("vdi", "a VDI image")

# Offset, magic bytes, format. They come from the formats' specifications. Those of the compressed formats are RFC 1952
# (gzip), RFC 8878 (zstd), the .xz file format 1.2.1, the LZ4 frame format 1.6.1, and bzip2's own documentation.
_MAGICS: Final = (
    (0, b"QFI\xfb", QCOW2),
    (0, b"KDMV", VMDK),
    (0, b"COWD", VMDK),
    (0, b"# Disk DescriptorFile", VMDK),
    (0, b"vhdxfile", VHDX),
    (0, VHD_COOKIE, VHD),  # a dynamic VHD begins with it; a fixed VHD has it only near its end
    (64, struct.pack("<I", 0xBEDA107F), VDI),
    (0, b"QED\0", _converted("qed", "a QED image")),
    (0, b"WithoutFreeSpace", _converted("parallels", "a Parallels image")),
    (0, b"WithouFreSpacExt", _converted("parallels", "a Parallels image")),
    (0, b"LUKS\xba\xbe", _converted("luks", "a LUKS container")),
    (0, b"\x1f\x8b", _unpacked("gzip", "gzip", "gzip")),
    (0, b"\xfd7zXZ\0", _unpacked("xz", "xz", "xz")),
    (0, b"\x28\xb5\x2f\xfd", _unpacked("zstd", "zstd", "zstd")),
    (0, b"BZh", _unpacked("bzip2", "bzip2", "bzip2")),
    (0, b"\x04\x22\x4d\x18", _unpacked("lz4", "lz4", "lz4")),
)
# The formats that suffixes of file names mean, where the suffix is not itself the name of a format.
SUFFIXES: Final = {"vpc": "vhd", "gz": "gzip", "zst": "zstd", "bz2": "bzip2", "lz4": "lz4", "img": "raw", "bin": "raw"}
KNOWN: Final = frozenset(format.name for _, _, format in _MAGICS)
READ: Final = ("raw", QCOW2.name, VMDK.name, VHD.name, VHDX.name, VDI.name)  # read and written; all but raw by qemu-img


def format_of(descriptor: int) -> ImageFormat | None:
    """Return the format of an open image file, or None if it has the magic bytes of no known format.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    found = format_of_start(read_all(descriptor, START_BYTES))
    if found:
        return found
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if size_bytes >= VHD_FOOTER_BYTES:
        end = read_all(descriptor, len(VHD_COOKIE), size_bytes - VHD_FOOTER_BYTES)
        if end == VHD_COOKIE:
            return VHD
    return None


def format_of_start(start: bytes) -> ImageFormat | None:
    """Return the format by the first `START_BYTES` of an image. A fixed VHD is not found: only its end tells."""
    for offset, magic, format in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return format
    return None


def refuse_as_raw(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Raise FormatError if a file that is to be used as a raw disk is an image of another format."""
    found = format_of(descriptor)
    if found:
        advice = "import it with 'onionskin import'" if found.name in READ else found.advice
        raise FormatError(
            f"{os.fspath(path)} is {found.title}, and not a raw disk: {advice}, or say that it is the disk: format raw"
        )
