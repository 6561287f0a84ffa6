"""The system may give a part of what a call asks for: on a network file system, or a full disk."""

import os
from pathlib import Path

import pytest
from support.listing import found_in

import onionskin
from onionskin.base.files import read_all, write_all
from onionskin.exchange.image_formats import QCOW2, format_of
from onionskin.machine import qemu
from onionskin.operations.reclaim import wants_zeros


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each call move a third of what it is asked for."""
    read, write = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda descriptor, length, at: read(descriptor, -(-length // 3), at))
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, data, at: write(descriptor, memoryview(data)[: -(-len(data) // 3)], at)
    )


@pytest.mark.usefixtures("parts")
def test_all_of_a_file_is_read_and_written(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_all(descriptor, b"0123456789", 5)
    assert read_all(descriptor, 100) == bytes(5) + b"0123456789"
    assert read_all(descriptor, 3, 6) == b"123"
    os.close(descriptor)


@pytest.mark.usefixtures("parts")
def test_a_header_that_comes_in_parts_is_no_damage_and_is_wiped_as_it_says(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M", wipe="zero") as web:
            web.write(0, b"x" * 4096)
            web.snapshot("s")
        assert store.check() == []
        (segment,) = [path for path, status in found_in(store.path / "segments") if status.st_size > 4096]
    descriptor = os.open(segment, os.O_RDONLY)
    assert wants_zeros(descriptor)
    os.close(descriptor)


@pytest.mark.usefixtures("parts")
def test_the_format_of_an_image_is_seen_in_parts_too(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"QFI\xfb" + bytes(1000))
    descriptor = os.open(tmp_path / "image", os.O_RDONLY)
    assert format_of(descriptor) is QCOW2
    os.close(descriptor)


@pytest.mark.usefixtures("parts")
def test_the_ram_of_a_machine_is_copied_as_a_whole(tmp_path: Path) -> None:
    """Where memory was nearly full, the last part of it could be missing without an error."""
    (tmp_path / "ram").write_bytes(os.urandom(3 << 20))
    copied, descriptor = qemu._copy(tmp_path / "ram", tmp_path)
    try:
        assert copied.read_bytes() == (tmp_path / "ram").read_bytes()
    finally:
        os.close(descriptor)
        copied.unlink()  # it lies in /dev/shm
