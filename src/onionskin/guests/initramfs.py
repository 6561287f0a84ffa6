"""Writes an initramfs: an archive (cpio, form "newc") that Linux unpacks into memory, and starts /init of."""

import stat
from collections.abc import Iterable, Mapping

_TRAILER = "TRAILER!!!"


def write_initramfs(directories: Iterable[str], files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    """Return an archive of directories, programs and links: the names, as "bin/busybox", and what is in each."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in directories]
    entries += [(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    entries += [(name, stat.S_IFLNK | 0o777, target.encode()) for name, target in links.items()]
    made = [_entry(number, name, mode, content) for number, (name, mode, content) in enumerate(entries, 1)]
    # The device has to be there before anything is mounted: what /init says goes to it.
    made.append(_entry(0, "dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1)))
    made.append(_entry(0, _TRAILER, 0, b""))
    return b"".join(made)


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    called = name.encode() + b"\0"
    numbers = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(called), 0)
    head = b"070701" + b"".join(b"%08x" % one for one in numbers) + called
    return _padded(head) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
