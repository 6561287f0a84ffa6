"""A served disk that is written: the files that its first snapshot needs are made from the first write on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import ENOSPC
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.servers import in_this_process, short_socket

import onionskin
from onionskin.nbd.server import Limits, Server
from onionskin.storage.open_head import OpenHead

MIB = 1 << 20
BLOCK = 4096
Connect = Callable[[str], NbdClient]


def files(at: Path) -> set[str]:
    """The segments and maps of a store."""
    return {path.name for kind in ("segments", "layers") for path in (at / kind).iterdir()}


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A store with two disks to which nothing was written."""
    with onionskin.Store(tmp_path / "vms") as store:
        for name in ("web", "db"):
            store.create(name, size=MIB).close()
    return tmp_path / "vms"


@pytest.fixture
def server(at: Path, tmp_path: Path) -> Iterator[Server]:
    """A server of both disks, in this process."""
    server = Server(limits=Limits(), allow_revert=True, log=print)
    for name in ("web", "db"):
        server.exports.add_volume(at, name)
    with in_this_process(server, short_socket(tmp_path)):
        yield server


@pytest.fixture
def connect(server: Server, tmp_path: Path) -> Iterator[Connect]:
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(NbdClient.unix(short_socket(tmp_path), name))


def finish_work(server: Server) -> None:
    """Wait until the background of the server's store has done what it was asked for."""
    server.exports.table.served["web"].opened.store.finish_work()


def test_a_write_has_the_files_of_the_next_head_made_and_a_read_has_none(
    at: Path, server: Server, connect: Connect
) -> None:
    web, db = connect("web"), connect("db")
    assert db.read(0, BLOCK) == bytes(BLOCK)
    db.flush()
    web.write(0, b"1" * BLOCK)
    finish_work(server)
    assert len(files(at)) == 4


def test_writers_behind_the_first_group_make_no_file(at: Path, server: Server, connect: Connect) -> None:
    clients = [connect("web"), connect("db")]
    for client in clients:
        client.write(0, b"1" * BLOCK)
    finish_work(server)
    before = files(at)
    assert len(before) == 8
    with onionskin.Store(at) as store:
        store.snapshot_group({"web": "s", "db": "s"})
        finish_work(server)
        made = files(at)  # with those of the heads after these
        assert len(made) == 12
        for client in clients:
            client.write(0, b"2" * BLOCK)
            client.flush()
        assert files(at) == made > before
        for name in ("web", "db"):
            with store.open(name, snapshot="s") as view:
                assert view.read(0, 1) == b"1"


def test_only_the_first_write_to_a_disk_asks_for_files_also_behind_a_revert(
    at: Path, server: Server, connect: Connect
) -> None:
    client = connect("web")
    with onionskin.Store(at) as store, onionskin.connect(store, "web") as live:
        live.snapshot("empty")
        client.write(0, b"1" * BLOCK)
        finish_work(server)
        assert len(files(at)) == 4
        live.revert("empty")
        client.write(0, b"2" * BLOCK)
        client.flush()
        finish_work(server)
        assert len(files(at)) == 2  # those of the head itself
        assert client.read(0, BLOCK) == b"2" * BLOCK


def test_a_disk_whose_files_could_not_be_made_is_written_and_has_its_snapshot(
    at: Path, server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(head: OpenHead) -> None:
        tried.append(head.name)
        raise OSError(ENOSPC, "no room is left for files that nobody needs yet")

    monkeypatch.setattr(OpenHead, "prepare_if_wanted", fail)
    client = connect("web")
    client.write(0, b"1" * BLOCK)
    finish_work(server)
    assert "web" in tried and len(files(at)) == 1
    with onionskin.Store(at) as store:
        store.snapshot_group({"web": "s", "db": "s"})
        client.write(0, b"2" * BLOCK)
        client.flush()
        with store.open("web", snapshot="s") as view:
            assert view.read(0, 1) == b"1"
        assert client.read(0, 1) == b"2"
