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
from onionskin.base.limits import VOLUME_BYTES_MAX
from onionskin.base.records import record
from onionskin.errors import FormatError

START_BYTES: Final = 512
VHD_FOOTER_BYTES: Final = 512
VHD_COOKIE: Final = b"conectix"
END_BYTES: Final = 512
_DMG_START_OF_END: Final = b"koly\0\0\0\4"  # of its last 512 bytes
# A description of a VMDK image, which is a text, as QEMU knows it: comments and blank lines, and then the version.
_VMDK_TEXT: Final = rb"(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n"
_WEB_PAGE: Final = rb"(?i)\s*<(?:!doctype html|html)\b"


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


def _decrypted(name: str, command: str) -> ImageFormat:
    return ImageFormat(name, f"encrypted with {name}", f"decrypt it with '{command}'")


def _sent(name: str, command: str) -> ImageFormat:
    return ImageFormat(name, f"a stream of '{command} send'", f"import it with '{command} receive'")


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
_ZFS = _sent("zfs-stream", "zfs")
_XML = ImageFormat("xml", "an XML file, as an OVF is", "import the image that it names")
_HTML = ImageFormat("html", "a web page", "fetch the image itself")

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
    *((0, bytes([0x22 + version]) + b"\xb5\x2f\xfd", ZSTD) for version in range(6)),  # of versions before 0.8
    # Frames to skip, of which there are sixteen kinds; pzstd begins with the first.
    *((0, bytes([0x50 + kind]) + b"\x2a\x4d\x18", ZSTD) for kind in range(16)),
    (0, b"BZh", _unpacked("bzip2", "bzip2", "bzip2")),
    (0, b"\x04\x22\x4d\x18", LZ4),
    (0, b"\x02\x21\x4c\x18", LZ4),  # of lz4 -l
    (0, b"LZIP", _unpacked("lzip", "lzip", "lzip")),
    (0, b"\x89LZO\0\r\n\x1a\n", _unpacked("lzop", "lzop", "lzop")),
    (0, b"\x1f\x9d", ImageFormat("compress", "compressed with compress", "unpack it with 'uncompress'")),
    *((0, magic, _archive("zip", "a zip archive", "unzip")) for magic in (b"PK\3\4", b"PK\5\6", b"PK\7\x08")),
    *((0, magic, _archive("cpio", "a cpio archive", "cpio -i")) for magic in (b"070701", b"070702", b"070707")),
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
    *(
        (0, magic, ImageFormat("ewf", "an EWF image", "convert it with 'ewfexport'"))
        for magic in (b"EVF\x09\x0d\x0a\xff\0", b"LVF\x09\x0d\x0a\xff\0", b"EVF2\x0d\x0a\x81\0")
    ),
    (0, b"AFF10\r\n\0", ImageFormat("aff", "an AFF image", "convert it with 'affconvert -r'")),
    (0, b"encrcdsa", ImageFormat("dmg", "an encrypted DMG image", "convert it with 'hdiutil convert'")),
    (0, b"sprs\0\0\0\3", ImageFormat("dmg", "a sparse DMG image", "convert it with 'hdiutil convert'")),
    (0, b"MComprHD", ImageFormat("chd", "a CHD image", "convert it with 'chdman extracthd'")),
    (
        0,
        b"\xbe\xba\xfe\xca\0\0\0\0",
        ImageFormat(
            "sesparse",
            "a data file of a VMDK image",
            "convert it with 'qemu-img convert -f vmdk -O raw' and the small .vmdk file that names it",
        ),
    ),
    (
        0,
        b"partclone-image",
        ImageFormat("partclone", "an image of partclone", "convert it with 'partclone.restore -W'"),
    ),
    (0, b"PaRtImAgE-VoLuMe", ImageFormat("partimage", "an image of partimage", "unpack it with 'partimage restore'")),
    (
        0,
        b"\0ntfsclone-image",
        ImageFormat("ntfsclone", "an image of ntfsclone", "convert it with 'ntfsclone --restore-image'"),
    ),
    (8, struct.pack("<Q", 0x2F5BACBAC), _ZFS),
    (8, struct.pack(">Q", 0x2F5BACBAC), _ZFS),
    (0, b"btrfs-stream\0", _sent("btrfs-stream", "btrfs")),
    (0, b"\xff\x06\0\0sNaPpY", _unpacked("snappy", "snappy", "snzip")),
    (0, b"Salted__", _decrypted("openssl", "openssl enc -d")),
    (0, b"age-encryption.org/", _decrypted("age", "age -d")),
    (0, b"-----BEGIN AGE ENCRYPTED FILE", _decrypted("age", "age -d")),
    (0, b"-----BEGIN PGP MESSAGE", _decrypted("gpg", "gpg -d")),
    # What is found in the place of an image: the description of a machine, a pointer, the answer of a server.
    (0, b"<?xml", _XML),
    (0, b"\xef\xbb\xbf<?xml", _XML),
    (0, b'.encoding = "', ImageFormat("vmx", "a configuration of VMware", "import the image that it names")),
    (0, b"version https://git-lfs", ImageFormat("lfs", "a pointer of Git LFS", "fetch the image with 'git lfs pull'")),
)
# The formats that suffixes of file names mean, where the suffix is not itself the name of a format.
SUFFIXES: Final = {
    **{"vpc": "vhd", "img": "raw", "bin": "raw", "ova": "tar", "xva": "tar", "e01": "ewf", "ex01": "ewf", "l01": "ewf"},
    **{"ovf": "xml", "sparseimage": "dmg", "asc": "gpg", "pgp": "gpg", "esd": "wim", "swm": "wim"},
    **{"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "lz": "lzip", "lzo": "lzop", "z": "compress"},
    **{"lrz": "lrzip", "hdd": "parallels", "hds": "parallels"},
    **dict.fromkeys(("tgz", "txz", "tzst", "tbz2", "tlz4"), "tar"),
    **dict.fromkeys(("avhd", "avhdx", "vhds"), "differencing"),
}
NOT_MADE: Final = frozenset({"differencing"})  # of Hyper-V: what changed over another image
KNOWN: Final = frozenset(format.name for format in (*(format for _, _, format in _MAGICS), DMG, LZMA, _HTML))
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
    if size_bytes >= END_BYTES:
        return format_of_end(read_all(descriptor, END_BYTES, size_bytes - END_BYTES))
    return None


def format_of_end(end: bytes) -> ImageFormat | None:
    """Return the format by the last `END_BYTES` of an image: a fixed VHD and a DMG have nothing else that tells."""
    if end.startswith(VHD_COOKIE):
        return VHD
    return DMG if end.startswith(_DMG_START_OF_END) else None


def format_of_start(start: bytes) -> ImageFormat | None:
    """Return the format by the first `START_BYTES` of an image, but for those of which `format_of_end` knows."""
    if _is_old_tar(start):
        return TAR
    for offset, magic, format in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return format
    if start[:1] in b"#v <\r\n\t":  # of all others no pattern needs to be compiled
        if re.match(_VMDK_TEXT, start):
            return VMDK
        if re.match(_WEB_PAGE, start):
            return _HTML
    return LZMA if _is_lzma(start) else None


def _is_old_tar(start: bytes) -> bool:
    """Whether the first block is the header of a tar archive that has no magic bytes, but a sum of its bytes."""
    digits = start[148:156].strip(b" \0")
    if len(start) < START_BYTES or not digits.isdigit() or start[0] == 0:
        return False
    return int(digits) > 0 and b"%o" % (sum(start) - sum(start[148:156]) + 8 * ord(" ")) == digits.lstrip(b"0")


def _is_lzma(start: bytes) -> bool:
    """Whether a file may be one of .lzma, which have no magic bytes: the usual properties, a size of the dictionary as
    programs choose it, and no size of what is packed, or one that a disk may have.
    """
    if len(start) < 14 or not start.startswith(b"\x5d\0\0"):
        return False
    dictionary, size_bytes = struct.unpack_from("<IQ", start, 1)
    is_of_a_disk: bool = 0 < size_bytes <= VOLUME_BYTES_MAX and dictionary & (dictionary - 1) == 0 < dictionary
    says_no_size: bool = size_bytes == (1 << 64) - 1
    return says_no_size or is_of_a_disk


def refuse_as_raw(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Raise FormatError if a file that is to be used as a raw disk is an image of another format."""
    found = format_of(descriptor)
    if found:
        advice = "import it with 'onionskin import'" if found.name in READ else found.advice
        raise FormatError(
            f"{os.fspath(path)} is {found.title}, and not a raw disk: {advice}, or say that it is the disk: format raw"
        )
