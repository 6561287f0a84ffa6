"""What the file of a Linux kernel for x86 (a bzImage) says of itself: its release, such as "6.12.95-cloud-amd64"."""

import os
import re
import struct

_MAGIC_OFFSET, _MAGIC = 0x202, b"HdrS"
_VERSION_OFFSET = 0x20E  # where the text is, less 0x200; from version 2.00 of the boot protocol on
_HEAD_BYTES = 0x10000 + 0x200 + 256  # the offset has 16 bits
RELEASE_BYTES_MAX = 255


def release_of(head: bytes) -> str:
    """Return the release of a kernel from the first bytes of its file; empty if it is no kernel, or does not say it."""
    if head[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] != _MAGIC or len(head) < _VERSION_OFFSET + 2:
        return ""
    (offset,) = struct.unpack_from("<H", head, _VERSION_OFFSET)
    text = head[0x200 + offset :][:RELEASE_BYTES_MAX] if offset else b""
    found = re.match(rb"[0-9]+\.[0-9][!-~]*", text)
    return found[0].decode() if found else ""


def release_of_file(path: "str | os.PathLike[str]") -> str:
    """Return the release of the kernel in a file; empty if it is no kernel, or cannot be read."""
    try:
        with open(path, "rb") as file:
            return release_of(file.read(_HEAD_BYTES))
    except OSError:
        return ""


def numbers_of(release: str) -> tuple[int, int]:
    """Return the two numbers that a release begins with, or (0, 0) if it does not begin so."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
