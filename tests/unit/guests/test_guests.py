"""The parts of a guest, and the archive that its kernel unpacks."""

import io
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest

from onionskin.errors import FormatError
from onionskin.guests import packages
from onionskin.guests.counting import Tick, ticks
from onionskin.guests.initramfs import write_initramfs
from onionskin.guests.packages import find_kernel


def bzimage(release: bytes) -> bytes:
    return bytes(0x202) + b"HdrS" + bytes(8) + (0x10).to_bytes(2, "little") + release + b"\0"


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def write_package(path: Path, files: dict[str, bytes]) -> None:
    """Write a package as dpkg-deb does: ar, and a tar in it."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", inner.getvalue())]
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members:
            file.write(name.ljust(48).encode() + str(len(content)).ljust(10).encode() + b"`\n")
            file.write(content + b"\n" * (len(content) % 2))


def test_the_newest_package_is_taken_with_the_modules_in_the_order_of_loading(tmp_path: Path) -> None:
    tree = "lib/modules/6.12.1/kernel/"
    files = {
        "boot/vmlinuz-6.12.1": bzimage(b"6.12.1-cloud (me)"),
        tree + "drivers/block/virtio_blk.ko.xz": lzma.compress(module("virtio", "virtio_ring")),
        tree + "drivers/virtio/virtio.ko": module("virtio_ring"),
        tree + "drivers/virtio/virtio_ring.ko": module(),
        tree + "net/other.ko": module(),
    }
    write_package(tmp_path / "linux-image-6.12.1-cloud-amd64_6.12.1-1_amd64.deb", files)
    write_package(
        tmp_path / "linux-image-6.2.9-cloud-amd64_6.2.9-1_amd64.deb", {"boot/vmlinuz-6.2.9": bzimage(b"6.2.9")}
    )
    found = find_kernel(tmp_path)
    assert found is not None and found.release == "6.12.1-cloud"
    assert list(found.modules(("virtio_blk", "ext4"))) == ["virtio_ring", "virtio", "virtio_blk"]


def test_a_directory_without_a_package_has_no_kernel(tmp_path: Path) -> None:
    assert find_kernel(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"!<arch>\n", b"!<arch>\n" + b"data.tar.xz".ljust(60) + b"no", b"none of this"]
)
def test_a_package_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "linux-image-6.9_1_amd64.deb").write_bytes(content)
    with pytest.raises(FormatError, match=r"linux-image-6\.9_1_amd64\.deb"):
        find_kernel(tmp_path)


def test_a_busybox_that_needs_libraries_is_not_taken() -> None:
    assert not packages._needs_nothing(Path("/bin/ls").read_bytes())
    assert not packages._needs_nothing(b"#!/bin/sh\n")
    assert not packages._needs_nothing(b"\x7fELF\x02\x01" + bytes(4))


def test_cpio_reads_what_the_kernel_will(tmp_path: Path) -> None:
    made = write_initramfs(("bin", "dev"), {"init": b"#!/bin/sh\n", "bin/busybox": b"odd"}, {"bin/sh": "busybox"})
    ended = subprocess.run(["cpio", "-t", "-v", "--quiet"], input=made, capture_output=True, check=True)
    lines = [line.split() for line in ended.stdout.decode().splitlines()]
    assert [(words[0], words[4 if words[0][0] != "c" else 5]) for words in lines][:4] == [
        ("drwxr-xr-x", "0"),
        ("drwxr-xr-x", "0"),
        ("-rwxr-xr-x", "10"),
        ("-rwxr-xr-x", "3"),
    ]
    assert " ".join(lines[4][-3:]) == "bin/sh -> busybox"
    assert lines[5][0] == "crw-------" and lines[5][-1] == "dev/console"


def test_a_tick_counts_also_where_the_line_before_it_was_never_ended() -> None:
    whole = "tick 000000007 secret 0123456789abcdef random fedcba9876543210\r\n"
    assert ticks("tick 0000tick 0000" + whole + whole[:40]) == [Tick(7, "0123456789abcdef", "fedcba9876543210")]
