"""A block device as a base: what of it is noticed, by which path it is known, and what it is refused for."""

import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.loop_devices import MakeDevice, loop_devices

import onionskin
from onionskin.storage import locks
from onionskin.storage.base_looks import looks_of

MIB = 1 << 20
SIZE = 16 * MIB + 512  # it ends with a sector, and not with a page


@pytest.fixture
def device() -> Iterator[MakeDevice]:
    with loop_devices() as make:
        yield make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        yield store


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_volume_reads_a_device_to_its_last_sector_and_never_writes_it(
    store: onionskin.Store, disk: Path, device: MakeDevice
) -> None:
    before = disk.read_bytes()
    at = device(disk, "--read-only")
    with store.create("web", base=at) as web:
        assert web.read(0, SIZE) == before
        web.write(SIZE - 100, b"new" * 30)
        web.snapshot("a")
        web.write(0, b"head")
    with store.open("web") as web:
        assert web.read(0, SIZE) == b"head" + before[4:-100] + b"new" * 30 + before[-10:]
    assert store.check() == []
    store.delete("web", recursive=True)
    assert at.read_bytes() == disk.read_bytes() == before


# The beginning, a block between, and the last sector.
@pytest.mark.parametrize("offset", [0, MIB - 1, SIZE * 32 // 65 // 4096 * 4096, SIZE - MIB, SIZE - 1])
def test_a_write_to_a_place_that_is_looked_at_is_noticed(
    store: onionskin.Store, disk: Path, device: MakeDevice, offset: int
) -> None:
    at = device(disk)
    store.create("web", base=at).close()
    overwrite(at, offset, bytes([at.read_bytes()[offset] ^ 1]))
    with pytest.raises(onionskin.ChainError, match="its size differs, or what the device holds"):
        store.open("web")
    assert [problem.severity for problem in store.check()] == ["error"]
    with pytest.raises(onionskin.ChainError, match="its size differs, or what the device holds"):
        store.layering("web")
    store.relocate("web", base=at, trust=True)
    store.open("web").close()


def mbr(first: int) -> bytes:
    return bytes(446) + struct.pack("<8xII", first // 512, 2048) + bytes(48) + b"\x55\xaa"


def gpt(first: int) -> bytes:
    header = b"EFI PART" + bytes(64) + struct.pack("<QII", 2, 128, 128)
    return bytes(512) + header.ljust(512, b"\0") + bytes(32) + struct.pack("<Q", first // 512)


@pytest.mark.parametrize("table", [mbr, gpt])
def test_a_write_where_a_partition_begins_is_noticed(
    store: onionskin.Store, disk: Path, device: MakeDevice, table: Callable[[int], bytes]
) -> None:
    overwrite(disk, 0, table(5 * MIB))
    at = device(disk)
    store.create("web", base=at).close()
    overwrite(at, 5 * MIB + 1024, b"superblock")
    with pytest.raises(onionskin.ChainError, match="has changed"):
        store.open("web")


def test_a_write_elsewhere_is_noticed_by_the_digest_only(
    store: onionskin.Store, disk: Path, device: MakeDevice
) -> None:
    at = device(disk)
    store.create("web", base=at, digest=True).close()
    overwrite(at, 5 * MIB, b"elsewhere")
    store.open("web").close()
    with pytest.raises(onionskin.VerifyError):
        store.open("web", verify=True)


def test_a_write_past_pages_that_a_volume_has_read_is_noticed(
    store: onionskin.Store, disk: Path, device: MakeDevice
) -> None:
    """As a file system writes that is mounted from the device."""
    at = device(disk)
    with store.create("web", base=at) as web:
        assert web.read(0, SIZE) == disk.read_bytes()
        overwrite(disk, 0, b"written past the device's own pages")
        with pytest.raises(onionskin.ChainError, match="has changed"):
            web.export(disk.with_name("out.raw"))


def test_the_digest_of_a_device_is_not_that_of_pages_that_a_volume_has_read(
    store: onionskin.Store, disk: Path, device: MakeDevice
) -> None:
    at = device(disk)
    with store.create("web", base=at, digest=True) as web:
        web.snapshot("a")
        assert web.read(0, SIZE) == disk.read_bytes()
        store.open("web", snapshot="a", verify=True).close()
        overwrite(disk, 5 * MIB, b"written past the device's own pages")
        with pytest.raises(onionskin.VerifyError):
            store.open("web", snapshot="a", verify=True)


def test_a_device_of_another_size_is_another_base(store: onionskin.Store, disk: Path, device: MakeDevice) -> None:
    at = device(disk)
    store.create("web", base=at).close()
    os.truncate(disk, SIZE - 512)
    subprocess.run(["losetup", "--set-capacity", at], check=True)
    with pytest.raises(onionskin.ChainError, match="has changed"):
        store.open("web")


def test_a_device_that_becomes_shorter_is_an_io_error_and_never_a_hole(
    store: onionskin.Store, disk: Path, device: MakeDevice
) -> None:
    at = device(disk)
    with store.create("web", base=at) as web:
        os.truncate(disk, MIB)
        subprocess.run(["losetup", "--set-capacity", at], check=True)
        with pytest.raises(OSError) as caught:
            web.read(8 * MIB, 4096)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(at))
        assert web.read(0, MIB) == disk.read_bytes()


def test_a_link_to_a_device_is_kept_and_may_lead_to_another_node_later(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    """A logical volume is such a link. It leads to /dev/dm-3 now, and may lead to /dev/dm-5 after a restart."""
    (tmp_path / "vg").mkdir()
    (tmp_path / "by-group").symlink_to("vg")
    link = tmp_path / "vg" / "lv"
    link.symlink_to(device(disk))
    store.create("web", base=tmp_path / "by-group" / "lv").close()
    assert store.info("web").base == str(link)
    link.unlink()
    link.symlink_to(device(disk))
    with store.open("web") as web:
        assert web.read(0, SIZE) == disk.read_bytes()


def test_a_link_to_a_descriptor_of_this_process_is_not_kept_but_what_it_leads_to(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    """As /dev/stdin is one."""
    at = device(disk)
    with at.open("rb") as file:
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{file.fileno()}")
        (tmp_path / "link to that").symlink_to("link")
        for number, base in enumerate([tmp_path / "link", tmp_path / "link to that", f"/dev/fd/{file.fileno()}"]):
            store.create(f"web{number}", base=base).close()
            assert store.info(f"web{number}").base == str(at)


def test_a_file_in_the_place_of_a_device_is_another_base_until_somebody_says_that_it_is_the_same(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    at, link = device(disk), tmp_path / "link"
    link.symlink_to(at)
    store.create("web", base=link, digest=True).close()
    link.unlink()
    link.symlink_to(disk)
    with pytest.raises(onionskin.ChainError, match="has changed"):
        store.open("web")
    with pytest.raises(onionskin.ChainError, match="is a block device and the other a file"):
        store.relocate("web", base=link)
    store.relocate("web", base=link, verify=True)
    store.open("web", verify=True).close()
    store.relocate("web", base=at, verify=True)
    store.open("web", verify=True).close()
    overwrite(at, 0, b"other")
    with pytest.raises(onionskin.VerifyError):
        store.relocate("web", base=at, verify=True)
    with pytest.raises(onionskin.ChainError, match="holds other bytes than the base"):
        store.relocate("web", base=at)


def test_a_device_that_is_mounted_is_no_base(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    at, directory = device(disk), tmp_path / "mounted here"
    directory.mkdir()
    subprocess.run(["mount", at, directory], check=True)
    try:
        with pytest.raises(onionskin.StateError, match=f"{at} is in use \\(mounted at {directory}\\)"):
            store.create("web", base=at)
    finally:
        subprocess.run(["umount", directory], check=True)
    store.create("web", base=at).close()


def test_a_mount_for_writing_is_noticed_at_the_next_opening(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    at, directory = device(disk), tmp_path / "mounted"
    directory.mkdir()
    store.create("web", base=at).close()
    subprocess.run(["mount", at, directory], check=True)
    subprocess.run(["umount", directory], check=True)
    with pytest.raises(onionskin.ChainError, match="has changed"):
        store.open("web")


def test_a_device_that_a_program_claims_is_no_base(store: onionskin.Store, disk: Path, device: MakeDevice) -> None:
    at = device(disk)
    claim = os.open(at, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(onionskin.StateError, match="claimed by a program"):
            store.create("web", base=at)
    finally:
        os.close(claim)
    store.create("web", base=at).close()


def test_nothing_is_merged_into_a_device(store: onionskin.Store, disk: Path, device: MakeDevice) -> None:
    before, at = disk.read_bytes(), device(disk)
    with store.create("web", base=at) as web:
        web.write(0, b"new")
        web.snapshot("a")
        for upto in "a", None:
            with pytest.raises(onionskin.StateError, match="is a block device, and a merge writes only to a file"):
                web.merge_into_base(upto)
        assert [snapshot.name for snapshot in web.snapshots] == ["a"]
        assert web.read(0, SIZE) == b"new" + before[3:]
    assert at.read_bytes() == before


def test_a_volume_over_a_device_is_copied_whole(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    before = disk.read_bytes()
    with store.create("web", base=device(disk)) as web:
        web.write(4096, b"new")
        web.snapshot("a")
        expected = before[:4096] + b"new" + before[4099:]
        web.export(tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == expected
    store.clone("web", "a", "other")
    with store.open("other") as other:
        other.flatten()
        assert other.read(0, SIZE) == expected
    assert store.info("other").base is None


def test_what_a_device_looks_like_does_not_depend_on_reads_past_the_page_cache(
    disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every device can be read so, nor every descriptor opened again."""
    with device(disk).open("rb") as file:
        found = looks_of(file.fileno())
        assert found[:2] == (0, SIZE)
        monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)
        assert looks_of(file.fileno()) == found


def test_what_a_device_looks_like_stays_the_same_for_ever(tmp_path: Path, device: MakeDevice) -> None:
    """Catalogs keep it: see docs/format.md."""
    disk = tmp_path / "disk"
    disk.write_bytes(np.arange(SIZE // 4, dtype="<u4").tobytes())
    overwrite(disk, 0, gpt(5 * MIB))
    with device(disk).open("rb") as file:
        assert looks_of(file.fileno()) == (0, SIZE, 4136661591532467289)


def test_a_half_merged_file_is_not_exchanged_for_a_device(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    """The merge could not go on in it, and the layers hide only what was merged into the file."""

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with store.create("web", base=disk) as web:
        web.write(0, b"new")
        with pytest.raises(KeyboardInterrupt):
            web.merge_into_base(progress=cancel)
    shutil.copy(disk, tmp_path / "copy")
    with pytest.raises(onionskin.StateError, match="was begun and has not ended, and it goes on only in a file"):
        store.relocate("web", base=device(tmp_path / "copy"), trust=True)
    with store.open("web") as web:
        web.merge_into_base()
    assert disk.read_bytes()[:3] == b"new"


def test_nothing_is_merged_into_the_file_below_a_device_that_is_a_base(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    before, at = disk.read_bytes(), device(disk)
    store.create("over", base=at).close()
    with store.create("web", base=disk) as web, onionskin.Store(tmp_path / "other") as other:
        web.write(5 * MIB, b"new")
        with pytest.raises(onionskin.StateError, match="is needed as it is by over"):
            web.merge_into_base()
        store.delete("over")
        with (
            other.create("over", base=at) as over,
            pytest.raises(onionskin.StateError, match="close the volumes and views that stand on it"),
        ):
            web.merge_into_base()
        assert over.closed
        assert disk.read_bytes() == before
        web.merge_into_base()
    assert disk.read_bytes()[5 * MIB :][:3] == b"new"


def test_a_device_over_a_half_merged_file_is_no_base(store: onionskin.Store, disk: Path, device: MakeDevice) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with store.create("web", base=disk) as web:
        web.write(0, b"new")
        with pytest.raises(KeyboardInterrupt):
            web.merge_into_base(progress=cancel)
    with pytest.raises(onionskin.StateError, match="was begun and has not ended"):
        store.create("over", base=device(disk))


def test_a_file_of_the_store_is_no_base_by_another_name_nor_below_a_device(
    store: onionskin.Store, tmp_path: Path, disk: Path, device: MakeDevice
) -> None:
    with store.create("web", base=disk) as web:
        web.write(0, os.urandom(SIZE))
        web.snapshot("a")
    own = max(tmp_path.joinpath("vms/segments").iterdir(), key=lambda path: path.stat().st_size)
    os.link(own, tmp_path / "link")
    for base in tmp_path / "link", device(own), device(device(own)):
        with pytest.raises(onionskin.ChainError, match="is, or stands on, a file of the store itself"):
            store.create("over", base=base, base_format="raw")
        with pytest.raises(onionskin.ChainError, match="is, or stands on, a file of the store itself"):
            store.relocate("web", base=base, trust=True)


def test_a_device_that_cannot_be_read_is_named(store: onionskin.Store, disk: Path, device: MakeDevice) -> None:
    at = device(disk)
    os.truncate(disk, MIB)
    with pytest.raises(OSError, match="Input/output error") as caught:
        store.create("web", base=at)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(at))


def test_a_loop_device_over_a_file_that_cannot_be_locked_is_a_base(
    store: onionskin.Store, disk: Path, device: MakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = disk.stat().st_ino
    set_lock = locks._set_lock

    def set_lock_elsewhere(descriptor: int, *given: int) -> bool:
        if os.fstat(descriptor).st_ino == own:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return set_lock(descriptor, *given)

    at = device(disk)
    monkeypatch.setattr(locks, "_set_lock", set_lock_elsewhere)
    with store.create("web", base=at) as web:
        assert web.read(0, SIZE) == disk.read_bytes()
