"""Volumes that a server opens for its clients share one control socket, under the name of each."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import onionskin
from onionskin.base.sockets import connect_unix, short_path
from onionskin.control import frames, server
from onionskin.control.server import ControlSocket


class _Served:
    """What a control socket asks of a volume."""

    allow_revert = False

    def __init__(self, volume: onionskin.Volume) -> None:
        self.volume = volume

    def info(self) -> dict[str, object]:
        return {"name": self.volume.name}


@pytest.fixture
def served(tmp_path: Path):
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            web.snapshot("clean")
        store.fork("web@clean", names=["a", "b"])
        made = {}
        for name in ("a", "b"):
            volume = store.open(name)
            path = store._opened.layout.volume_control(volume._opened.row.id)
            made[name] = ControlSocket(path, _Served(volume), lambda line: None, is_shared=True)
        yield store, made
        for control in made.values():
            control.close()


def _path(store: onionskin.Store, name: str) -> Path:
    return Path(store._opened.layout.volume_control(store._opened.catalog.volume(name).id))


def test_a_caller_reaches_the_volume_that_it_means(served) -> None:
    store, _ = served
    assert _path(store, "a").samefile(_path(store, "b"))
    for name in ("a", "b"):
        with onionskin.connect(store, name) as live:
            assert live.info() == {"name": name}


def test_one_volume_that_leaves_is_reached_no_more_and_the_other_is(served) -> None:
    store, made = served
    made["a"].close()
    assert not _path(store, "a").exists()
    with onionskin.connect(store, "b") as live:
        assert live.info() == {"name": "b"}
    with connect_unix(_path(store, "b")) as connection:
        assert frames.receive(connection, bytes_max=1 << 20)["version"] == frames.SHARED_VERSION
        frames.send(connection, {"volume": store._opened.catalog.volume("a").id.hex()}, bytes_max=1 << 20)
        reply = frames.receive(connection, bytes_max=1 << 20)
        assert "does not serve the volume any more" in reply["error"]["message"]


def test_a_request_that_comes_before_the_choice_is_answered(served) -> None:
    store, _ = served
    with connect_unix(_path(store, "b")) as connection:
        frames.send(connection, frames.request("info", {}), bytes_max=1 << 20)
        assert frames.receive(connection, bytes_max=1 << 20)["version"] == frames.SHARED_VERSION
        frames.send(connection, {"volume": store._opened.catalog.volume("b").id.hex()}, bytes_max=1 << 20)
        assert frames.receive(connection, bytes_max=1 << 20)["volume"] == "b"
        assert frames.receive(connection, bytes_max=1 << 20) == {"result": {"name": "b"}}


def test_the_time_to_choose_is_for_all_of_the_choice_and_not_for_each_byte(
    served, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = served
    has_come = threading.Event()

    def begin() -> float:
        assert has_come.wait(300)  # the first byte: else it would be sent to one who is gone
        return time.monotonic() - 3600

    monkeypatch.setattr(server, "CHOICE_SECONDS", 3600)  # by the clock of the listener all of it is over at once
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=begin))
    with connect_unix(_path(store, "b")) as connection:
        connection.settimeout(300)
        connection.sendall(b"\0")
        has_come.set()
        assert frames.receive(connection, bytes_max=1 << 20)["version"] == frames.SHARED_VERSION
        assert frames.receive(connection, bytes_max=1 << 20) is None


def test_a_socket_that_a_killed_server_left_is_replaced(served) -> None:
    store, made = served
    made["a"].close()
    with socket.socket(socket.AF_UNIX) as dead, short_path(_path(store, "a")) as short:
        dead.bind(short)
    path = store._opened.layout.volume_control(store._opened.catalog.volume("a").id)
    made["a"] = ControlSocket(path, made["a"]._served, lambda line: None, is_shared=True)
    with onionskin.connect(store, "a") as live:
        assert live.info() == {"name": "a"}


def _refuses(*_: Any, **__: Any) -> None:
    raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))


def _makes_another_inode(source: str, path: Path, **_: Any) -> None:
    with socket.socket(socket.AF_UNIX) as dead, short_path(path) as short:
        dead.bind(short)


@pytest.mark.parametrize("link", [_refuses, _makes_another_inode])
def test_a_volume_has_a_socket_of_its_own_where_one_socket_cannot_have_another_name(
    served, monkeypatch: pytest.MonkeyPatch, link: Callable[..., None]
) -> None:
    store, made = served
    path = store._opened.layout.volume_control(store._opened.catalog.volume("a").id)
    made["a"].close()
    monkeypatch.setattr(os, "link", link)
    made["a"] = ControlSocket(path, made["a"]._served, lambda line: None, is_shared=True)
    assert not path.samefile(_path(store, "b"))
    for name in ("a", "b"):
        with onionskin.connect(store, name) as live:
            assert live.info() == {"name": name}


def test_the_child_of_a_fork_takes_no_name_from_its_parent(served) -> None:
    store, made = served
    if (child := os.fork()) == 0:
        try:
            for control in made.values():
                control.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for name in ("a", "b"):
        with onionskin.connect(store, name) as live:
            assert live.info() == {"name": name}


def test_a_file_that_took_the_place_of_a_name_is_left_where_it_is(served) -> None:
    store, made = served
    _path(store, "a").unlink()
    with socket.socket(socket.AF_UNIX) as other, short_path(_path(store, "a")) as short:
        other.bind(short)
    for control in made.values():
        control.close()
    assert _path(store, "a").is_socket()
    assert not _path(store, "b").exists()


def test_the_child_of_a_fork_listens_at_a_socket_of_its_own(served) -> None:
    store, made = served
    path = store._opened.layout.volume_control(bytes(16))
    if (child := os.fork()) == 0:
        try:
            ControlSocket(path, made["a"]._served, lambda line: None, is_shared=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.is_socket()
    assert not path.samefile(_path(store, "b"))
