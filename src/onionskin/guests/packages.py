"""The parts of a guest: a kernel with its modules, and busybox, from what is installed or from packages of Debian.

What must hold: nothing of a package is unpacked to the disk, and nothing in it is run here. What cannot be used is said with
its path; what is missing, with what gets it.
"""

import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onionskin.base.linux_kernel import release_of
from onionskin.errors import FormatError, StateError

CACHE = Path("/var/cache/apt/archives")
BOOT, MODULES = Path("/boot"), Path("/lib/modules")
HOW_KERNEL = (
    "a kernel: in a new directory, apt-get download $(apt-cache depends linux-image-cloud-amd64 | "
    "sed -n 's/.*Depends: //p'), and --packages DIRECTORY"
)
HOW_BUSYBOX = "busybox, linked statically: apt-get install busybox-static"
_AR = b"!<arch>\n"
# Where the modules lie that a guest may need, of whatever name: those of disks, of ext4, and of the identity of a machine.
_MODULE = re.compile(
    r"/kernel/(?:arch/x86/crypto|crypto|lib|drivers/(?:virtio|block|virt)|fs/(?:ext4|jbd2)|fs)/([^/]+)\.ko(\.xz|\.zst)?$"
)
_EM_X86_64, _PT_INTERP = 62, 3


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and its modules.

    Attributes
    ----------
    release : str
        Such as "6.1.0-53-cloud-amd64".
    image : bytes
        What boots.
    """

    release: str
    image: bytes
    _modules: Mapping[str, "bytes | Path"]

    def modules(self, wanted: tuple[str, ...]) -> dict[str, bytes]:
        """Return modules and those that they need, in the order in which they are loaded; what is built in has none."""
        found: dict[str, bytes] = {}

        def add(name: str) -> None:
            kept = self._modules.get(name)
            if kept is None or name in found:
                return
            content = _unpacked(kept) if isinstance(kept, bytes) else _unpacked(kept.read_bytes())
            needs = re.search(rb"\0depends=([^\0]*)\0", content)
            for other in needs[1].decode().split(",") if needs else ():
                add(other.replace("-", "_"))
            found[name] = content

        for name in wanted:
            add(name)
        return found


def _unpacked(content: bytes) -> bytes:
    """Return a module that may be compressed."""
    if content.startswith(b"\xfd7zXZ"):
        return lzma.decompress(content)
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        zstd = shutil.which("zstd")
        if zstd is None:
            raise StateError(
                "the modules of the kernel are compressed by zstd, which is not here: apt-get install zstd"
            )
        return subprocess.run([zstd, "-dc"], input=content, capture_output=True, check=True).stdout
    return content


# ---- finding ----


def find_kernel(packages: Path | None) -> Kernel | None:
    """Return the newest kernel of packages in a directory, or else of those that apt keeps here and that are installed."""
    debs = sorted((packages or CACHE).glob("linux-image-[0-9]*_amd64.deb"), key=_age, reverse=True)
    installed = [] if packages else sorted(BOOT.glob("vmlinuz-*"), key=_age, reverse=True)
    for image in installed:
        modules = MODULES / image.name.removeprefix("vmlinuz-")
        if modules.is_dir() and os.access(image, os.R_OK) and not (debs and _age(debs[0]) > _age(image)):
            return _installed(image, modules)
    return _of_package(debs[0]) if debs else None


def _age(path: Path) -> list[int]:
    """Return the numbers in the name of a kernel's file, by which the newer one is found."""
    name = path.name.removeprefix("linux-image-").removeprefix("vmlinuz-").partition("_")[0]
    return [int(number) for number in re.findall(r"\d{1,9}", name)]


def _installed(image: Path, modules: Path) -> Kernel:
    found: dict[str, bytes | Path] = {}
    for path in modules.rglob("*.ko*"):
        if named := _MODULE.search(path.as_posix()):
            found[named[1].replace("-", "_")] = path
    return _checked(image, image.read_bytes(), found)


def _of_package(deb: Path) -> Kernel:
    image, modules = b"", dict[str, bytes | Path]()
    for name, content in read_package(deb, lambda name: "/boot/vmlinuz-" in name or bool(_MODULE.search(name))):
        if named := _MODULE.search(name):
            modules[named[1].replace("-", "_")] = content
        else:
            image = content
    return _checked(deb, image, modules)


def _checked(where: Path, image: bytes, modules: Mapping[str, "bytes | Path"]) -> Kernel:
    release = release_of(image)
    if not release:
        raise FormatError(f"{where} has no Linux kernel for x86")
    return Kernel(release, image, modules)


def find_busybox(packages: Path | None) -> bytes | None:
    """Return a busybox for x86-64 that needs no library: of a package in a directory, or the one that is installed."""
    debs = sorted(packages.glob("busybox-static_*_amd64.deb")) if packages else []
    for deb in debs:
        for _, content in read_package(deb, lambda name: name.endswith("/bin/busybox")):
            return content
    installed = shutil.which("busybox")
    content = Path(installed).read_bytes() if installed else b""
    return content if _needs_nothing(content) else None


def _needs_nothing(program: bytes) -> bool:
    """Whether a program is one for x86-64 that names no loader of libraries."""
    if program[:6] != b"\x7fELF\x02\x01" or len(program) < 64:
        return False
    (machine,) = struct.unpack_from("<H", program, 18)
    (table,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    ends = [table + number * size for number in range(count)]
    kinds = {struct.unpack_from("<I", program, at)[0] for at in ends if at + 4 <= len(program)}
    return machine == _EM_X86_64 and _PT_INTERP not in kinds


# ---- a package of Debian: an archive of ar with an archive of tar in it ----


def read_package(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a package whose names are wanted, and what they hold."""
    try:
        with open(deb, "rb") as file:
            _find_data(file)
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    name = "/" + member.name.removeprefix("./")
                    if member.isreg() and wanted(name) and (content := archive.extractfile(member)) is not None:
                        yield name, content.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise FormatError(f"{deb} cannot be read as a package of Debian: {error}") from None


def _find_data(file: BinaryIO) -> None:
    """Go to the begin of a package's files."""
    if file.read(len(_AR)) != _AR:
        raise ValueError("it is no archive of ar")
    while len(header := file.read(60)) == 60:
        if header[:9] == b"data.tar.":
            return
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data")
