"""A client that could not be given an export just now is not told that there is none: it may make one in its place."""

import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.phony_client import GO, POLICY, SHUTDOWN, UNKNOWN

from onionskin import Store
from onionskin.nbd.server import Limits, Server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "vms") as store:
        with store.create("web", size="1M") as web:
            web.snapshot("clean")
        yield store


@pytest.fixture
def server(store: Store) -> Iterator[Server]:
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    server.exports.add_store(store.path)
    yield server
    server.close()


class Haggling(NbdClient):
    """A client that has not chosen an export yet."""

    def __init__(self, server: Server) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(300)
        server.serve(theirs, "test")
        super().__init__(ours, "")

    def go(self, export: str) -> None:
        pass

    def answer(self, export: str) -> int:
        name = export.encode()
        return self.option(GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))[-1][0]


@contextmanager
def _no_descriptor_left() -> Iterator[None]:
    """Have no number of a descriptor left: those between others too, of which a thread may have let go just now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def test_a_fork_for_which_there_is_no_descriptor_is_there_when_there_is_one(store: Store, server: Server) -> None:
    store.fork("web@clean", names=["job"])
    with Haggling(server) as client, Haggling(server) as user:
        assert client.answer("none") == UNKNOWN
        assert user.answer("web") == 1  # what somebody uses is not closed to have descriptors
        with _no_descriptor_left():
            assert client.answer("job") == POLICY
        assert client.answer("job") == 1


def test_a_volume_that_nobody_uses_is_closed_where_there_is_no_descriptor_for_a_fork(
    store: Store, server: Server
) -> None:
    store.fork("web@clean", names=["job"])
    with Haggling(server) as client:
        assert client.answer("none") == UNKNOWN
        with _no_descriptor_left():
            assert client.answer("job") == 1
        assert set(server.exports.table.served) == {"job"}


def test_a_volume_that_another_handle_holds_is_there_when_it_is_closed(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onionskin.nbd.opening.WAIT_SECONDS", 0.0)
    store.fork("web@clean", names=["job"])
    with Haggling(server) as client:
        with store.open("job"):
            assert client.answer("job") == POLICY
        assert client.answer("job") == 1


def test_a_server_that_is_stopping_says_that_it_is(store: Store, server: Server) -> None:
    store.fork("web@clean", names=["job"])
    with Haggling(server) as client:
        server.exports._stopping.set()
        assert client.answer("job") == SHUTDOWN
