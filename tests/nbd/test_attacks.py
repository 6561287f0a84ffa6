"""Clients that mean harm, or are only broken: the server goes on for the others, and keeps nothing of them."""

import collections
import os
import random
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from support.phony_client import (
    ACK,
    GO,
    INVALID,
    LIST_META,
    META_CONTEXT,
    READ,
    SET_META,
    UNKNOWN,
    WRITE,
    Client,
)
from support.serving import Serving, served_volume

MIB = 1 << 20
SIZE = 64 * MIB
Served = tuple[Serving, Any]


def wait_for_the_end_of_all(at: Serving) -> None:
    """Return when no connection is left."""
    while at.server.connections():
        select.select([at.server.event_fd], [], [], 0.1)
        at.server.events()


def silent(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def test_thousands_of_half_open_connections_keep_nobody_out(served: Served) -> None:
    at, _ = served
    half_open: collections.deque[socket.socket] = collections.deque()
    with Client(at.path) as early:
        early.go()
        for number in range(3000):
            half_open.append(silent(at.path))
            if len(half_open) > 200:
                half_open.popleft().close()
            if number % 1000 == 999:
                half_open[-1].recv(1)  # a greeting, or the end: the server has accepted all of them
                with Client(at.path) as client:
                    assert client.go().size == SIZE
                assert early.read(0, 512).error == 0
        assert len(at.server.connections()) <= 2 * 64
    for connection in half_open:
        connection.close()
    wait_for_the_end_of_all(at)


def test_a_client_waits_until_one_that_gives_way_to_another_is_gone(tmp_path: Path) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def find(name: str) -> bool:
        is_asked.set()
        return may_answer.wait()

    with served_volume(tmp_path, size=SIZE, connections_max=1) as (at, _), Client(at.path) as busy:
        at.server.on_unknown_export = find
        busy.send_option(GO, struct.pack(">I7sH", 7, b"unknown", 0))
        is_asked.wait()
        with silent(at.path):
            while len(at.server.connections()) < 2:
                select.select([at.server.event_fd], [], [], 0.01)
            answers = threading.Timer(0.2, may_answer.set)
            answers.start()
            with Client(at.path) as third:
                assert third.go("web").size == SIZE
            answers.join()


def test_clients_that_use_an_export_do_not_give_way(tmp_path: Path) -> None:
    with (
        served_volume(tmp_path, size=SIZE, connections_max=2) as (at, _),
        Client(at.path) as first,
        Client(at.path) as second,
    ):
        first.go(), second.go()
        for _ in range(20):
            with silent(at.path) as third:
                assert third.recv(1) == b""
        assert first.read(0, 1).error == second.read(0, 1).error == 0


@pytest.mark.parametrize("length", [4096, 4097, 60_000])
def test_names_of_any_length_are_unknown_or_invalid_and_haggling_goes_on(at: Path, length: int) -> None:
    with Client(at) as client:
        answer = UNKNOWN if length <= 4096 else INVALID
        client.start_structured()
        assert client.info(GO, "x" * length)[-1][0] == answer
        assert client.meta(SET_META, "x" * length, "base:allocation")[-1][0] == answer
        assert client.go("web", structured=False).size == SIZE


def test_as_many_context_queries_as_fit_an_option_are_answered(at: Path) -> None:
    with Client(at) as client:
        client.start_structured()
        many = ["base:"] * ((65536 - 12) // 9)
        replies = client.meta(LIST_META, "web", *many)
        assert [kind for kind, _ in replies] == [META_CONTEXT, ACK]  # what many queries list is listed once
        one = client.meta(SET_META, "web", *["base:allocation"] * 3000, "x" * 4096)
        assert [kind for kind, _ in one] == [META_CONTEXT, ACK]
        assert client.go("web", structured=False).size == SIZE


@pytest.mark.parametrize("structured", [False, True])
def test_disconnects_in_the_middle_of_replies_cost_nothing(served: Served, structured: bool) -> None:
    at, volume = served
    volume.write(0, os.urandom(16 * MIB))
    rng = random.Random(8)
    volume.store.finish_work()  # which has files open
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Client(at.path) as client:
            client.go(structured=structured)
            requests = [client.encode(READ, 0, 16 * MIB) for _ in range(8)]
            requests += [client.encode(WRITE, 32 * MIB, 4096, payload=bytes(4096))[: rng.randrange(28, 4124)]]
            client.socket.sendall(b"".join(requests))
            client.receive(rng.randrange(1, 1 << 20))
    wait_for_the_end_of_all(at)
    volume.store.finish_work()
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # what earlier tests left is closed at any moment
    assert volume._path.wait_for_readers() is None


@pytest.mark.parametrize("structured", [False, True])
def test_the_last_byte_is_served_and_the_one_behind_it_is_not(at: Path, structured: bool) -> None:
    with Client(at) as client:
        client.go(structured=structured)
        assert client.write(SIZE - 1, b"e") == 0
        assert client.read(SIZE - 1, 1).data == b"e"
        assert client.read(SIZE - 4096, 4096).data == bytes(4095) + b"e"
        for offset, length in ((SIZE - 1, 2), (SIZE, 1), (SIZE - 4096, 4097), (2**64 - 1, 1), (2**64 - 1, 2**32 - 1)):
            assert client.read(offset, length).error
        assert client.write(SIZE - 1, b"xx") and client.read(SIZE - 1, 1).data == b"e"


def test_noise_instead_of_a_client_is_hung_up_on(served: Served) -> None:
    at, _ = served
    rng = random.Random(9)
    for _ in range(200):
        with silent(at.path) as connection:
            connection.settimeout(300)
            flags = struct.pack(">I", 3) if rng.random() < 0.5 else b""
            try:
                connection.sendall(flags + rng.randbytes(rng.randrange(1, 200)))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except ConnectionError:
                pass
    wait_for_the_end_of_all(at)
    with Client(at.path) as client:
        assert client.go().size == SIZE
