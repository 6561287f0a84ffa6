"""A guest that counts: each tick it writes the count to its disk, and says it on its console with a secret and a random one.

    tick 000000017 secret 5c0f... random 1b2e...

The secret is drawn when the system starts, and is in its memory alone. Before each tick it reads the count from the disk,
past its cache, and says so where that is not the count in its memory. It lives on an ext4 disk; `install` on its console
has it replaced, byte for byte, by the system on the second disk, which then starts:

    installed
    second system: up
"""

import os
import re
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from onionskin.errors import OnionskinError
from onionskin.guests.initramfs import write_initramfs
from onionskin.guests.packages import Kernel

APPEND = "console=ttyS0 quiet panic=-1"
_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "vmgenid")
_APPLETS = (
    "sh",
    "cp",
    "mount",
    "umount",
    "mkdir",
    "insmod",
    "stty",
    "dd",
    "cut",
    "cmp",
    "sleep",
    "usleep",
    "head",
    "xxd",
    "chroot",
)
_PIECE_BYTES = 8 << 20  # is drawn, which is slow, and copied
_INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
stty -echo
mkdir /fill; mount -t tmpfs fill /fill
head -c {piece} /dev/urandom > /fill/1
for copy in {copies}; do cp /fill/1 /fill/$copy; done
up() {{
    mount -t ext4 /dev/vda /disk
    mount -t devtmpfs dev /disk/dev
    chroot /disk /system &
    system=$!
}}
up
while read -r word; do
    if [ "$word" = install ]; then
        kill -9 $system; wait $system 2> /dev/null
        until umount /disk/dev 2> /dev/null; do usleep 20000; done
        until umount /disk 2> /dev/null; do usleep 20000; done
        dd if=/dev/vdb of=/dev/vda bs=1M conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        if cmp /dev/vda /dev/vdb; then echo "installed"; fi
        up
    fi
done
"""
_FIRST = """\
#!/bin/sh
secret=$(head -c 8 /dev/urandom | xxd -p)
count=000000000
printf '%0511d\\n' 0 | dd of=/count bs=512 conv=fsync 2> /dev/null
while :; do
    there=$(dd if=/count iflag=direct bs=512 count=1 2> /dev/null | cut -c 503-511)
    if [ "$there" != $count ]; then echo "wrong: the disk says $there, and memory $count"; fi
    number=$((number + 1))
    count=$(printf '%09d' $number)
    printf '%0511d\\n' $number | dd of=/count oflag=direct conv=notrunc,fsync bs=512 count=1 2> /dev/null
    echo "tick $count secret $secret random $(head -c 8 /dev/urandom | xxd -p)"
done
"""
_SECOND = """\
#!/bin/sh
echo "second system: up"
while :; do sleep 1; done
"""
# Not only at the begin of a line: where a machine is put back in the middle of one, the next begins behind that.
_TICK = re.compile(r"tick (\d{9}) secret ([0-9a-f]{16}) random ([0-9a-f]{16})\r?\n")


@dataclass(frozen=True, slots=True)
class Tick:
    """What the guest said once."""

    count: int
    secret: str
    random: str


def ticks(text: str) -> list[Tick]:
    """Return all ticks that a console said whole."""
    return [Tick(int(count), secret, random) for count, secret, random in _TICK.findall(text)]


def build_initramfs(path: Path, kernel: Kernel, busybox: bytes, *, filled_bytes: int) -> None:
    """Write what the kernel starts: it fills so much of its memory, mounts the first disk, and starts the system on it."""
    modules = kernel.modules(_MODULES)
    copies = " ".join(str(number) for number in range(2, filled_bytes // _PIECE_BYTES + 1))
    init = _INIT.format(modules=" ".join(modules), piece=_PIECE_BYTES, copies=copies).encode()
    files = {"init": init, "bin/busybox": busybox} | {f"modules/{name}.ko": one for name, one in modules.items()}
    links = {f"bin/{name}": "busybox" for name in _APPLETS}
    path.write_bytes(write_initramfs(("bin", "dev", "proc", "sys", "modules", "disk"), files, links))


def build_disk(image: Path, mkfs: str, size_bytes: int, busybox: bytes, *, first: bool) -> str:
    """Make an ext4 disk with the system that counts, or with the other one. Returns the UUID of its file system."""
    files = image.with_suffix(".files")
    for name in ("bin", "dev"):
        (files / name).mkdir(parents=True)
    (files / "bin/busybox").write_bytes(busybox)
    (files / "bin/busybox").chmod(0o755)
    for name in _APPLETS:
        (files / "bin" / name).symlink_to("busybox")
    (files / "system").write_text(_FIRST if first else _SECOND)
    (files / "system").chmod(0o755)
    mark = str(uuid.uuid4())
    command = [mkfs, "-q", "-F", "-L", "first" if first else "second", "-U", mark, "-d", files, image]
    ended = subprocess.run(
        [*command, f"{size_bytes >> 10}k"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_ENGLISH
    )
    if ended.returncode:
        raise OnionskinError(f"mkfs.ext4 failed: {ended.stderr.strip() or f'exit status {ended.returncode}'}")
    return mark


_ENGLISH = os.environ | {"LC_ALL": "C"}
