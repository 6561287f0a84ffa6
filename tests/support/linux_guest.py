"""A guest of Debian's kernel and busybox that runs counter.c, with an agent: kernel and initramfs from packages.

The kernel is downloaded, or taken from ONIONSKIN_GUEST_PACKAGES, a directory with the package of a kernel. Its console says
`ready` first, and then what counter.c says each tick, whose arguments are behind `counter=` on the kernel's command line. For
each further CPU there is one more counter, which says nothing but what is wrong.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.guests import SOURCES

MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("virtio_console", "crc16", "mbcache", "jbd2", "crc32c_generic", "ext4", "vmgenid", "button", "evdev"),
)
_INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in {modules}; do if [ -e /modules/$module.ko ]; then insmod /modules/$module.ko; fi; done
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
ip link set lo up
for port in /dev/vport*; do if [ -c $port ]; then agent $port /mnt & fi; done
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\\necho "goodbye" > /dev/ttyS0\\nsync\\npoweroff -f\\n' > /etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
acpid -d -l /dev/null > /dev/null 2>&1 &
for word in $(cat /proc/cmdline); do case $word in counter=*) counts=$(echo ${{word#counter=}} | tr , ' ');; esac; done
(while :; do echo "host $(hostname) at $(date +%s)" > /dev/ttyS0; sleep 1; done) &
echo "cpus $(nproc)" > /dev/ttyS0
for cpu in $(seq 2 $(nproc)); do (counter 8 4000 5 /mnt/count$cpu | grep -e wrong -e failed > /dev/ttyS0) & done
second=; if [ -b /dev/vdb ]; then second=/dev/vdb; fi
echo "ready" > /dev/ttyS0
exec counter $counts /mnt/count $second > /dev/ttyS0
"""


_LZ4 = bytes.fromhex("02214c18")  # how a kernel begins that was packed with it


@dataclass(frozen=True)
class LinuxGuest:
    """What QEMU boots.

    Attributes
    ----------
    kernel, initramfs : Path
        As Debian packs them.
    elf : Path
        The kernel unpacked. QEMU takes it for a ROM, which each reset copies over RAM.
    """

    kernel: Path
    initramfs: Path
    elf: Path


def _run(*command: object, cwd: Path | None = None) -> str:
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def _need(tool: str, package: str) -> None:
    assert shutil.which(tool), f"{tool} is missing, of which the guest is made: apt-get install {package}"


def kernel_package(directory: Path) -> Path:
    """Return the package of a kernel: one that is there, or the newest of Debian's cloud kernels."""
    if there := os.environ.get("ONIONSKIN_GUEST_PACKAGES"):
        found = sorted(Path(there).glob("linux-image-[0-9]*.deb"))
        assert found, (
            f"{there} has no linux-image-*.deb: apt-get download linux-image-cloud-amd64 and what it depends on"
        )
        return found[0]
    _run("apt-get", "download", "-q", "linux-image-cloud-amd64", cwd=directory)
    (meta,) = directory.glob("linux-image-cloud-amd64_*.deb")
    name = re.search(r"linux-image-[0-9][^ ,]*", _run("dpkg-deb", "--field", meta, "Depends"))
    assert name, f"{meta} names no kernel"
    _run("apt-get", "download", "-q", name[0], cwd=directory)
    (package,) = directory.glob(f"{name[0]}_*.deb")
    return package


def build_linux_guest(directory: Path) -> LinuxGuest:
    """Make kernel and initramfs."""
    for tool, package in (("dpkg", "dpkg"), ("busybox", "busybox-static"), ("cpio", "cpio"), ("cc", "build-essential")):
        _need(tool, package)
    _run("dpkg", "-x", kernel_package(directory), directory / "kernel")
    (kernel,) = (directory / "kernel/boot").glob("vmlinuz-*")
    root = directory / "root"
    for name in ("bin", "dev", "proc", "sys", "etc", "modules", "mnt"):
        (root / name).mkdir(parents=True)
    for name in MODULES:
        for module in (directory / "kernel").rglob(f"{name}.ko*"):
            shutil.copy(module, root / "modules")
            if module.suffix == ".xz":
                _run("xz", "-d", root / "modules" / module.name)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for applet in _run("busybox", "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for program in ("counter", "agent"):
        _run("cc", "-O2", "-static", "-o", root / "bin" / program, SOURCES / f"{program}.c")
    _copy_program("/sbin/mke2fs", root, "bin/mkfs.ext4")
    shutil.copy("/etc/mke2fs.conf", root / "etc")
    (root / "init").write_text(_INIT.format(modules=" ".join(MODULES)))
    (root / "init").chmod(0o755)
    initramfs = directory / "initramfs"
    _run("sh", "-c", f"find . | cpio --quiet -o -H newc > {initramfs}", cwd=root)
    kept = directory / "vmlinuz"
    shutil.copy(kernel, kept)
    for made in (root, directory / "kernel"):
        shutil.rmtree(made)
    return LinuxGuest(kept, initramfs, _unpacked(kept))


def _unpacked(kernel: Path) -> Path:
    """Unpack a kernel into a file beside it."""
    _need("lz4", "lz4")
    packed = kernel.read_bytes()
    assert _LZ4 in packed, f"{kernel} is not packed with lz4"
    # Other parts of the kernel are behind what was packed, so lz4 fails at the end of it.
    ended = subprocess.run(["lz4", "-dc"], input=packed[packed.index(_LZ4) :], capture_output=True)
    assert ended.stdout.startswith(b"\x7fELF"), ended.stderr
    elf = kernel.with_name("vmlinux")
    elf.write_bytes(ended.stdout)
    return elf


def _copy_program(program: str, root: Path, to: str) -> None:
    """Copy a program and the libraries that it is linked with."""
    shutil.copy(program, root / to)
    for library in re.findall(r"(/\S+)", _run("ldd", program)):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])


def counts(text: str) -> list[int]:
    """Return what counter.c counted so far on a console. A machine that was put back within a line does not end it."""
    return [int(one) for one in re.findall(r"tick (\d+) secret \w+ random \w+\r?$", text, re.MULTILINE)]


def wait_counts(console: object, more: int) -> int:
    """Return the last count, once so many more have come."""
    text: Callable[[], str] = lambda: console.text  # type: ignore[attr-defined]  # noqa: E731
    goal = len(counts(text())) + more
    console.wait(lambda: len(counts(text())) >= goal)  # type: ignore[attr-defined]
    assert "is wrong" not in text() and "failed" not in text(), text()[-400:]
    return counts(text())[-1]
