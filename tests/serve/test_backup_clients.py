"""Backup clients that were written for QEMU read from our server what changed, with no word about us in them.

ovirt-imageio is what backup programs of oVirt read disks through: its NBD client lists the dirty bitmaps of an export, takes
the one that is there, and reads in it what changed.
"""

import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from support.servers import Serve

import onionskin

nbd = pytest.importorskip("ovirt_imageio._internal.nbd")  # .ci/run has it
Start = Callable[..., Serve]

MIB = 1 << 20


def incremental_backup(url: str, image: bytearray) -> int:
    """Bring an image up to date by the one dirty bitmap of an export; return the bytes that were read for it."""
    taken = 0
    with nbd.open(urllib.parse.urlparse(url), dirty=True) as client:
        assert client.dirty_bitmap is not None
        extents = client.extents(0, client.export_size)
        offset = 0
        for extent in extents[client.dirty_bitmap]:
            if extent.dirty:
                image[offset : offset + extent.length] = client.read(offset, extent.length)
                taken += extent.length
            offset += extent.length
        assert offset == client.export_size
    return taken


def test_ovirt_imageio_takes_an_incremental_backup(tmp_path: Path, serve: Start) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="16M") as volume:
        for number, name in enumerate(["sunday", "monday", "tuesday"]):
            volume.write(number * 2 * MIB, os.urandom(MIB))
            volume.snapshot(name)
        before, after = bytearray(), b""
        with store.open("web", snapshot="monday") as view:
            before += view.read(0, view.size_bytes)
        with store.open("web", snapshot="tuesday") as view:
            after = view.read(0, view.size_bytes)
    server = serve(tmp_path / "vms" / "web", "--dirty-bitmap", "monday")
    assert incremental_backup(f"nbd:unix:{server.socket}:exportname=web@tuesday", before) == MIB
    assert before == after


def test_without_a_bitmap_that_is_named_a_client_that_wants_one_takes_none_of_several(
    tmp_path: Path, serve: Start
) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="16M") as volume:
        for name in ("sunday", "monday", "tuesday"):
            volume.snapshot(name)
    server = serve(tmp_path / "vms" / "web")
    url = urllib.parse.urlparse(f"nbd:unix:{server.socket}:exportname=web@tuesday")
    with nbd.open(url, dirty=True) as client:
        assert client.dirty_bitmap is None


@pytest.mark.parametrize("name", ["sunday", "nothing"])
def test_one_bitmap_is_listed_and_each_can_be_asked_for(tmp_path: Path, serve: Start, name: str) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="16M") as volume:
        for snapshot in ("sunday", "monday", "tuesday"):
            volume.snapshot(snapshot)
    server = serve(tmp_path / "vms" / "web", "--dirty-bitmap", name)
    url = urllib.parse.urlparse(f"nbd:unix:{server.socket}:exportname=web@tuesday")
    with nbd.open(url, dirty=True) as client:
        assert client.dirty_bitmap == (f"qemu:dirty-bitmap:{name}" if name == "sunday" else None)
