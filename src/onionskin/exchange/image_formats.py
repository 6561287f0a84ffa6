"""Recognizes the format of an image file by its magic bytes.

What must hold: a file of a known format is never silently taken for a raw disk. A raw disk may begin with the same
bytes (a guest can write anything, and may encrypt all of its disk with LUKS), so a caller that knows it can say that a
file is raw.
"""

import os
import re
import struct
from collections.abc import Sequence
from typing import Final

from onionskin.base.files import name_of, read_all
from onionskin.base.records import record
from onionskin.errors import FormatError

START_BYTES: Final = 512
VHD_FOOTER_BYTES: Final = 512
VHD_COOKIE: Final = b"conectix"
_DMG_START_OF_END: Final = b"koly\0\0\0\4"  # of its last 512 bytes


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


def _archive(name: str, title: str, command: str) -> ImageFormat:
    return ImageFormat(name, title, f"unpack it with '{command}'")


QCOW2 = _converted("qcow2", "a qcow2 image")
VMDK = _converted("vmdk", "a VMDK image")
VHD = _converted("vhd", "a VHD image", "vpc")
VHDX = _converted("vhdx", "a VHDX image")
VDI = _converted("vdi", "a VDI image")
DMG = _converted("dmg", "a DMG image")
LZMA = _unpacked("lzma", "lzma", "xz")
ZSTD = _unpacked("zstd", "zstd", "zstd")
LZ4 = _unpacked("lz4", "lz4", "lz4")
TAR = _archive("tar", "a tar archive, as an OVA is", "tar -xf")

_FILE_OF_STORE: Final = "a file of a store of onionskin"
_NAME_VOLUME: Final = "export the volume with 'onionskin export'"

# Offset, magic bytes, format. They come from the formats' specifications. Those of the compressed formats are RFC 1952
# (gzip), RFC 8878 (zstd), the .xz file format 1.2.1, the LZ4 frame format 1.6.1, and bzip2's own documentation.
_MAGICS: Final = (
    (0, b"QFI\xfb\0\0\0\1", _converted("qcow", "a qcow image of version 1")),
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
    (0, b"\x28\xb5\x2f\xfd", ZSTD),
    # Frames to skip, of which there are sixteen kinds; pzstd begins with the first.
    *((0, bytes([0x50 + kind]) + b"\x2a\x4d\x18", ZSTD) for kind in range(16)),
    (0, b"BZh", _unpacked("bzip2", "bzip2", "bzip2")),
    (0, b"\x04\x22\x4d\x18", LZ4),
    (0, b"\x02\x21\x4c\x18", LZ4),  # of lz4 -l
    (0, b"LZIP", _unpacked("lzip", "lzip", "lzip")),
    (0, b"\x89LZO\0\r\n\x1a\n", _unpacked("lzop", "lzop", "lzop")),
    (0, b"\x1f\x9d", ImageFormat("compress", "compressed with compress", "unpack it with 'uncompress'")),
    (0, b"PK\3\4", _archive("zip", "a zip archive", "unzip")),
    (0, b"7z\xbc\xaf\x27\x1c", _archive("7z", "a 7z archive", "7z x")),
    (257, b"ustar", TAR),
    (0, b"Rar!\x1a\x07", _archive("rar", "a RAR archive", "unrar x")),
    (0, b"MSWIM\0\0\0", _archive("wim", "a WIM archive", "wimlib-imagex apply")),
    (0, b"LRZI", _unpacked("lrzip", "lrzip", "lrzip")),
    (0, b"rbd image v2\n", ImageFormat("rbd", "an export of rbd", "import it with 'rbd import'")),
    (0, b"rbd diff v", ImageFormat("rbd", "a diff of rbd", "import it with 'rbd import-diff'")),
    (0, b"ONIONDLT", ImageFormat("delta", "a stream of changes", "apply it to a volume with 'onionskin apply'")),
    (0, b"ONIONSEG", ImageFormat("store", _FILE_OF_STORE, _NAME_VOLUME)),
    (0, b"ONIONMAP", ImageFormat("store", _FILE_OF_STORE, _NAME_VOLUME)),
    (0, b"VMA\0", _archive("vma", "a VMA archive", "vma extract")),
    (0, b"Bochs Virtual HD Image", _converted("bochs", "a Bochs image")),
    (0, b"#!/bin/sh\n#V2.0 Format\n", _converted("cloop", "a cloop image")),
    (0, b"\x3a\xff\x26\xed", ImageFormat("simg", "an Android sparse image", "convert it with 'simg2img'")),
    (0, b"EVF\x09\x0d\x0a\xff\0", ImageFormat("ewf", "an EWF image", "convert it with 'ewfexport'")),
)
# The formats that suffixes of file names mean, where the suffix is not itself the name of a format.
SUFFIXES: Final = {
    **{"vpc": "vhd", "img": "raw", "bin": "raw", "ova": "tar", "e01": "ewf"},
    **{"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "lz": "lzip", "lzo": "lzop", "z": "compress"},
    **{"lrz": "lrzip", "hdd": "parallels", "hds": "parallels"},
    **dict.fromkeys(("tgz", "txz", "tzst", "tbz2", "tlz4"), "tar"),
    **dict.fromkeys(("avhd", "avhdx", "vhds"), "differencing"),
}
NOT_MADE: Final = frozenset({"differencing"})  # of Hyper-V: what changed over another image
KNOWN: Final = frozenset(format.name for format in (*(format for _, _, format in _MAGICS), DMG, LZMA))
READ: Final = ("raw", QCOW2.name, VMDK.name, VHD.name, VHDX.name, VDI.name)  # read and written; all but raw by qemu-img


# What may be said of the images that are written. Left out is what would have the image refer to other files, or not hold
# the whole disk.
OPTIONS: Final = {
    "raw": (),
    "qcow2": (
        "cluster_size",
        "compression_type",
        "compat",
        "extended_l2",
        "lazy_refcounts",
        "refcount_bits",
        "preallocation",
    ),
    "vmdk": ("subformat", "adapter_type", "hwversion", "toolsversion"),
    "vhd": ("subformat",),
    "vhdx": ("subformat", "block_size", "log_size"),
    "vdi": ("static",),
}
_VALUE: Final = re.compile(r"[A-Za-z0-9._-]+")  # a comma begins another option, and a new line another line of a VMDK
_COMPRESSED_BY: Final = ("qcow2", "vmdk")
_IN_ONE_FILE: Final = ("monolithicSparse", "streamOptimized")


def refuse_options(kind: str, options: Sequence[str], *, compress: bool) -> None:
    """Raise ValueError where options cannot be said of an image of a format, or data is not compressed there."""
    if compress and kind not in _COMPRESSED_BY:
        raise ValueError(f"a {kind} image is not compressed: one of {' and '.join(_COMPRESSED_BY)} can be")
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in OPTIONS[kind] or not _VALUE.fullmatch(value):
            those = f"those of {kind} are {', '.join(OPTIONS[kind])}" if OPTIONS[kind] else f"{kind} has none"
            raise ValueError(f"{option!r} is no option here: write KEY=VALUE; {those}")
        if (kind, key) == ("vmdk", "subformat") and value not in _IN_ONE_FILE:
            raise ValueError(f"{option!r} makes several files; the subformats of one are {' and '.join(_IN_ONE_FILE)}")
        if compress and key == "preallocation" and value != "off":
            raise ValueError("an image that is compressed has no preallocation: leave one of them out")
        if compress and (kind, key, value) == ("vmdk", "subformat", "monolithicSparse"):
            raise ValueError("a VMDK image that is compressed has subformat=streamOptimized")


def format_of(descriptor: int) -> ImageFormat | None:
    """Return the format of an open image file, or None if it has the magic bytes of no known format.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    try:
        return _format_of(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or name_of(descriptor)) from None


def _format_of(descriptor: int) -> ImageFormat | None:
    found = format_of_start(read_all(descriptor, START_BYTES))
    if found:
        return found
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if size_bytes >= VHD_FOOTER_BYTES:
        end = read_all(descriptor, len(VHD_COOKIE), size_bytes - VHD_FOOTER_BYTES)
        if end == VHD_COOKIE:
            return VHD
        if end == _DMG_START_OF_END:
            return DMG
    return None


def format_of_start(start: bytes) -> ImageFormat | None:
    """Return the format by the first `START_BYTES` of an image. A fixed VHD and a DMG are not found: only their ends tell."""
    for offset, magic, format in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return format
    # The .lzma files of xz: the usual properties, any size of the dictionary, and no size of what is packed.
    if start.startswith(b"\x5d\0\0") and start[5:13] == b"\xff" * 8:
        return LZMA
    return None


def refuse_as_raw(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Raise FormatError if a file that is to be used as a raw disk is an image of another format."""
    found = format_of(descriptor)
    if found:
        advice = "import it with 'onionskin import'" if found.name in READ else found.advice
        raise FormatError(
            f"{os.fspath(path)} is {found.title}, and not a raw disk: {advice}, or say that it is the disk: format raw"
        )
