"""The terminal of a machine's console, with a guest that takes nothing for a while."""

import os
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from onionskin.cli.console import talk

SECONDS_MAX = 300  # of a busy machine: only what hangs takes so long
TYPED = os.urandom(40_000).replace(b"\x1d", b"")  # less than a pipe holds, and more than the socket does


class Talking(NamedTuple):
    """The ends that the user and the guest have."""

    keys: int
    screen: int
    guest: socket.socket
    thread: threading.Thread


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Talking]:
    (typed, keys), (screen, shown) = os.pipe(), os.pipe()
    here, guest = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    guest.settimeout(SECONDS_MAX)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: typed))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: shown))
    thread = threading.Thread(target=talk, args=(here,), kwargs={"leave": b"\x1d"}, daemon=True)
    thread.start()
    made = Talking(os.dup(keys), screen, guest, thread)
    os.close(keys)
    try:
        yield made
    finally:
        guest.close()
        thread.join(SECONDS_MAX)
        for descriptor in (typed, screen, shown):
            os.close(descriptor)
        here.close()


def test_one_leaves_also_where_the_guest_takes_nothing(talking: Talking) -> None:
    os.write(talking.keys, TYPED + b"\x1d")
    talking.thread.join(SECONDS_MAX)
    assert not talking.thread.is_alive()
    os.close(talking.keys)


def test_what_the_guest_says_is_shown_before_it_takes_what_was_typed_and_nothing_of_that_is_lost(
    talking: Talking,
) -> None:
    os.write(talking.keys, TYPED)
    os.close(talking.keys)
    talking.guest.sendall(b"tick")
    assert os.read(talking.screen, 4) == b"tick"
    got = b""
    while part := talking.guest.recv(65536):
        got += part
        if len(got) == len(TYPED):
            break
    assert got == TYPED
    talking.thread.join(SECONDS_MAX)
    assert not talking.thread.is_alive()
