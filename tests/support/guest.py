"""A small real machine: QEMU with Debian's kernel and an initramfs made of Debian packages, its disk over NBD.

The guest makes an ext4 system on its disk, keeps one file rewritten at random, and beside that writes file after file;
when one is synced it says so on its console: "synced N". `content(N)` is what file N holds.
"""

import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SECONDS_MAX = 300  # of a busy machine: only what hangs takes so long
FILE_BYTES = 65536
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("crc16", "mbcache", "jbd2", "crc32c_generic", "ext4"),  # where they are not part of the kernel
)

_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in {modules}; do
    if [ -e /modules/$module.ko ]; then insmod /modules/$module.ko || echo "failed: insmod $module"; fi
done
mkfs.ext4 -q /dev/vda || echo "failed: mkfs.ext4"
mkdir /mnt
mount -t ext4 /dev/vda /mnt || echo "failed: mount"
(while :; do dd if=/dev/urandom of=/mnt/load bs=64k count=32 conv=notrunc 2>/dev/null; done) &
number=0
while [ ! -e /off ]; do
    yes "file $number" | head -c {file_bytes} > /mnt/file-$number
    sync
    echo "synced $number"
    number=$((number + 1))
    if read -t 0 command; then break; fi
done
kill %1
umount /mnt || {{ sync; mount -o remount,ro /mnt; }}
echo "goodbye"
poweroff -f
"""


def content(number: int) -> bytes:
    line = f"file {number}\n".encode()
    return (line * (FILE_BYTES // len(line) + 1))[:FILE_BYTES]


@dataclass(frozen=True)
class GuestImage:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def _run(*command: object, cwd: Path | None = None) -> str:
    ended = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, timeout=SECONDS_MAX
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def build_guest(directory: Path) -> GuestImage:
    """Build kernel and initramfs from Debian packages, which are downloaded."""
    _run("apt-get", "download", "-q", "linux-image-cloud-amd64", cwd=directory)
    (meta,) = directory.glob("linux-image-cloud-amd64_*.deb")
    depends = _run("dpkg-deb", "--field", meta, "Depends")
    found = re.search(r"linux-image-[0-9][^ ,]*", depends)
    assert found, depends
    _run("apt-get", "download", "-q", found[0], cwd=directory)
    (package,) = directory.glob(f"{found[0]}_*.deb")
    _run("dpkg", "-x", package, directory / "kernel")
    (kernel,) = (directory / "kernel/boot").glob("vmlinuz-*")
    root = directory / "root"
    for name in ("bin", "dev", "proc", "sys", "etc", "modules"):
        (root / name).mkdir(parents=True)
    for name in MODULES:
        for module in (directory / "kernel").rglob(f"{name}.ko"):
            shutil.copy(module, root / "modules")
    shutil.copy("/bin/busybox", root / "bin")
    for applet in _run("/bin/busybox", "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    _copy_program("/sbin/mke2fs", root, "bin/mkfs.ext4")
    shutil.copy("/etc/mke2fs.conf", root / "etc")
    init = root / "init"
    init.write_text(_INIT.format(modules=" ".join(MODULES), file_bytes=FILE_BYTES))
    init.chmod(0o755)
    initramfs = directory / "initramfs"
    _run("sh", "-c", f"find . | cpio --quiet -o -H newc > {initramfs}", cwd=root)
    return GuestImage(kernel, initramfs)


def _copy_program(program: str, root: Path, to: str) -> None:
    """Copy a program and the libraries that it is linked with."""
    shutil.copy(program, root / to)
    for library in re.findall(r"(/\S+)", _run("ldd", program)):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])


def has_kvm() -> bool:
    """Whether the processor lets this machine run others; elsewhere QEMU translates."""
    return bool(re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text())) and os.access("/dev/kvm", os.W_OK)


class Guest:
    """A running machine; its console is read all the time."""

    def __init__(self, image: GuestImage, socket: Path, log: Path) -> None:
        accelerator = ("kvm", "host") if has_kvm() else ("tcg", "max")
        disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export=web,reconnect-delay=300"
        self._log = log
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", accelerator[0], "-cpu", accelerator[1], "-m", "256", "-smp", "1"),
                *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
                *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
                *("-append", "console=ttyS0 panic=-1 loglevel=4 random.trust_cpu=on"),
                *("-blockdev", disk, "-device", "virtio-blk-pci,drive=disk"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("w") as log, self.process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").strip()
                log.write(line + "\n")
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._lines.append("the console has ended")
            self._news.notify_all()

    @property
    def console(self) -> str:
        with self._news:
            return "\n".join(self._lines)

    @property
    def synced(self) -> int:
        """The number of the last file that is synced; -1 before the first."""
        with self._news:
            numbers = [line.removeprefix("synced ") for line in self._lines if line.startswith("synced ")]
        return int(numbers[-1]) if numbers else -1

    def wait_for(self, wanted: str) -> None:
        """Return when the guest has said a line."""
        with self._news:
            ended = ("the console has ended", "failed: ")
            self._news.wait_for(
                lambda: wanted in self._lines or any(line.startswith(ended) for line in self._lines), SECONDS_MAX
            )
            assert wanted in self._lines, "\n".join(["the console:", *self._lines[-40:]])

    def power_off(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self.wait_for("goodbye")
        self.process.wait(SECONDS_MAX)
