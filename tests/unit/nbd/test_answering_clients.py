"""What clients ask for is opened by one thread, for one after the other, and one that hangs keeps no other client out."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.nbd_client import NbdClient

from onionskin import Store, Volume
from onionskin.nbd import exports
from onionskin.nbd.server import Limits, Server

OPENING = "onionskin opening"


@contextmanager
def _running(store: Path) -> Iterator[Server]:
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    server.exports.add_store(store)
    ready = threading.Event()
    running = threading.Thread(target=server.run, args=(ready.set,))
    running.start()
    try:
        assert ready.wait(60)
        yield server
    finally:
        server.stop()
        running.join(60)
    assert not running.is_alive()
    assert OPENING not in [thread.name for thread in threading.enumerate()]


def _read(server: Server, name: str) -> bytes:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    server.serve(theirs, "test")
    with NbdClient(ours, name) as client:
        return client.read(0, 1)


def _fork(store: Path, *names: str) -> None:
    """Make volumes that no server has seen, beside one that it serves."""
    with Store(store) as opened:
        for name in names:
            opened.create(name, size="1M").close()


def test_one_thread_opens_what_clients_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_serve, by = exports.open_to_serve, []
    names = [f"new-{number}" for number in range(16)]
    found: list[bytes] = []

    def open_it(store: Store, name: str) -> Volume:
        by.append(threading.current_thread().name)
        return open_to_serve(store, name)

    _fork(tmp_path / "vms", "web")
    with _running(tmp_path / "vms") as server:
        monkeypatch.setattr(exports, "open_to_serve", open_it)
        _fork(tmp_path / "vms", *names)
        clients = [threading.Thread(target=lambda name=name: found.append(_read(server, name))) for name in names]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert found == [b"\0"] * 16
    assert by.count(OPENING) > 8  # on a host that stands still for long, some may open theirs by themselves


def test_one_that_hangs_keeps_no_other_client_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_serve, hangs, ended = exports.open_to_serve, threading.Event(), threading.Event()
    by: dict[str, str] = {}
    found: list[bytes] = []

    def open_it(store: Store, name: str) -> Volume:
        by[name] = threading.current_thread().name
        if name == "slow":
            hangs.set()
            assert ended.wait(60)
        return open_to_serve(store, name)

    _fork(tmp_path / "vms", "web")
    with _running(tmp_path / "vms") as server:
        monkeypatch.setattr(exports, "open_to_serve", open_it)
        _fork(tmp_path / "vms", "slow", "quick", "other")
        slow = threading.Thread(target=lambda: found.append(_read(server, "slow")))
        slow.start()
        assert hangs.wait(60)
        assert _read(server, "quick") == _read(server, "other") == b"\0"
        ended.set()
        slow.join()
    assert by["slow"] == OPENING
    assert OPENING not in (by["quick"], by["other"])
    assert found == [b"\0"]


def test_a_name_that_nobody_has_is_refused_and_the_next_one_is_found(tmp_path: Path) -> None:
    _fork(tmp_path / "vms", "web")
    with _running(tmp_path / "vms") as server:
        with pytest.raises(OSError):
            _read(server, "nothing")
        _fork(tmp_path / "vms", "new")
        assert _read(server, "new") == b"\0"


def test_a_client_that_waits_behind_one_that_hangs_is_refused_when_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, ended = threading.Event(), threading.Event()

    def open_it(store: Store, name: str) -> Volume:
        hangs.set()
        assert ended.wait(60)
        raise OSError("no disk")

    def refused(name: str) -> None:
        with pytest.raises(OSError):
            _read(server, name)

    _fork(tmp_path / "vms", "web")
    with _running(tmp_path / "vms") as server:
        monkeypatch.setattr(exports, "open_to_serve", open_it)
        _fork(tmp_path / "vms", "slow", "behind")
        clients = [threading.Thread(target=refused, args=(name,)) for name in ("slow", "behind")]
        clients[0].start()
        assert hangs.wait(60)
        clients[1].start()
        server.stop()
        ended.set()
        for client in clients:
            client.join()
