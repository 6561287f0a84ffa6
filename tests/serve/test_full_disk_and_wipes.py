"""What a server does at once, and not in some seconds: room for a flush on a full disk, and wipes of what a flush freed."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.listing import files_with
from support.nbd_client import NbdClient
from support.servers import Serve, in_this_process, onionskin, short_socket

import onionskin as library
from onionskin.base.paths import FilePath
from onionskin.nbd import server as serving
from onionskin.nbd.server import Limits, Server
from onionskin.operations import reclaim
from onionskin.storage.open_store import OpenStore

BLOCK = 4096
Start = Callable[..., Serve]


def fill(directory: Path) -> None:
    for length in (1 << 20, 1 << 12):
        with suppress(OSError), (directory / f"filler-{length}").open("wb", buffering=0) as file:
            while file.write(bytes(length)):
                pass
    os.sync()


@pytest.fixture
def full(ext4_mount, serve: Start) -> tuple[Path, Serve]:
    """A server of a volume with three thousand lonely blocks that are not flushed, and no room for where they are."""
    root = ext4_mount(96 << 20)
    with library.Store(root / "vms") as store:
        store.create("web", size="64M").close()
    server = serve(f"{root}/vms/web")
    with server.client() as client:
        client.write(0, b"0" * BLOCK)
        client.flush()
        onionskin("snapshot", f"{root}/vms/web@a")
        for block in range(1, 6000, 2):
            client.write(block * BLOCK, block.to_bytes(2, "little") * (BLOCK // 2))
    fill(root)
    return root, server


def test_a_clients_flush_on_a_full_disk_gets_the_reserve(full: tuple[Path, Serve]) -> None:
    root, server = full
    with server.client() as client:
        client.flush()
        server.kill()
    with library.Store(root / "vms") as store, store.open("web") as web:
        for block in range(1, 6000, 2):
            assert web.read(block * BLOCK, BLOCK) == block.to_bytes(2, "little") * (BLOCK // 2)


def test_verbs_through_the_server_on_a_full_disk_get_the_reserve(full: tuple[Path, Serve]) -> None:
    root, server = full
    onionskin("trim", f"{root}/vms/web", 0, 8 * BLOCK)  # which flushes
    onionskin("merge", f"{root}/vms/web@a")
    for filler in root.glob("filler-*"):
        filler.unlink()
    assert server.terminate() == 0
    with library.Store(root / "vms") as store, store.open("web") as web:
        assert web.read(0, 8 * BLOCK) == bytes(8 * BLOCK)
        assert web.read(9 * BLOCK, 2) == (9).to_bytes(2, "little")
        assert store.check() == []


def test_a_server_on_a_full_disk_ends_with_all_data_and_status_zero(full: tuple[Path, Serve]) -> None:
    root, server = full
    assert server.terminate() == 0
    with library.Store(root / "vms") as store, store.open("web") as web:
        assert web.read(5999 * BLOCK, 2) == (5999).to_bytes(2, "little")


def test_nobody_takes_the_room_back_before_the_flush_has_used_it(
    ext4_mount: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = ext4_mount(96 << 20)
    with library.Store(root / "vms") as store:
        store.create("web", size="64M").close()
    server = Server(limits=Limits(), allow_revert=False, log=print)
    server.exports.add_volume(root / "vms", "web")
    unlink = FilePath.unlink
    socket = short_socket(tmp_path)
    with (
        library.Store(root / "vms") as other,
        in_this_process(server, socket),
        NbdClient.unix(socket, "web") as client,
    ):
        for block in range(1, 6000, 2):
            client.write(block * BLOCK, block.to_bytes(2, "little") * (BLOCK // 2))
        fill(root)
        is_overtaken = []

        def unlink_and_be_overtaken(path: FilePath, missing_ok: bool = False) -> None:
            unlink(path, missing_ok=missing_ok)
            if path.name == "reserve":
                other._opened.reserve.make()
                is_overtaken.append(path.exists())

        monkeypatch.setattr(FilePath, "unlink", unlink_and_be_overtaken)
        client.flush()
        assert is_overtaken[0] is False  # it was needed, and what the flush left of it is set aside again


def test_an_export_that_gets_another_name_on_a_full_disk_is_flushed_itself(
    ext4_mount: Callable[..., Path], tmp_path: Path
) -> None:
    root = ext4_mount(96 << 20)
    with library.Store(root / "vms") as store:
        for name in ("web", "db"):
            store.create(name, size="64M").close()
    server = Server(limits=Limits(), allow_revert=False, log=print)
    exports, asked = server.exports, []
    for name in ("web", "db"):
        exports.add_volume(root / "vms", name)

    def make_room(name: str) -> bool:
        asked.append(name)
        if len(asked) == 1:  # another process has let the two exchange their names
            with exports.table.guard:
                table = exports.table
                table._relabel({"web": "db", "db": "web"}, table.served.keys(), table._move_volume)
        return exports._make_room(name)

    server._nbd.on_full_disk = make_room
    socket = short_socket(tmp_path)
    with in_this_process(server, socket), NbdClient.unix(socket, "web") as client:
        for block in range(1, 6000, 2):
            client.write(block * BLOCK, block.to_bytes(2, "little") * (BLOCK // 2))
        fill(root)
        client.flush()
        assert asked == ["web", "db"]
        assert not exports.table.served["db"].volume._path.unflushed


def test_what_a_clients_flush_freed_is_wiped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = b"never to be found again!" * (BLOCK // 24)
    with library.Store(tmp_path / "vms") as store, store.create("web", size="1M", wipe="zero") as web:
        web.write(0, secret + b"x" * BLOCK)
        web.snapshot("a")
        web.merge(
            "a"
        )  # the head inherits the segment, which another handle may be reading: its slots are reclaimed, not reused
    (segment,) = files_with(tmp_path / "vms" / "segments", secret)
    monkeypatch.setattr(serving, "TIDY_SECONDS", 3600)
    wiped = threading.Event()
    reclaim_slots = reclaim.reclaim_slots

    def reclaim_and_tell(store: OpenStore, segments: Any, wipe: str) -> None:
        reclaim_slots(store, segments, wipe)
        wiped.set()

    server = Server(limits=Limits(), allow_revert=False, log=print)
    server.exports.add_volume(tmp_path / "vms", "web")
    with in_this_process(server, short_socket(tmp_path)), NbdClient.unix(short_socket(tmp_path), "web") as client:
        monkeypatch.setattr(reclaim, "reclaim_slots", reclaim_and_tell)
        client.trim(0, BLOCK)
        client.flush()
        assert wiped.wait(300)
        assert secret[:24] not in segment.read_bytes()
        assert client.read(BLOCK, 1) == b"x"
