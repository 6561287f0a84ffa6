"""Exports that come and go, slow clients, limits, failing files, and the end."""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.phony_client import EIO, ERROR, ESHUTDOWN, FLUSH, FUA, OFFSET_DATA, READ, WRITE, Client
from support.serving import Serving, served_volume, serving

from onionskin.errors import StateError
from onionskin.nbd._nbd import NbdServer
from onionskin.store import Store

MIB = 1 << 20
Served = tuple[Serving, Any]


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def ask_and_take_nothing(client: Client, reads: int) -> dict[int, tuple[int, int, int]]:
    """Send reads of 4 MiB each; when this returns the first bytes have come and most cannot be sent."""
    asked = {}
    for _ in range(reads):
        client.socket.sendall(client.encode(READ, 0, 4 * MIB))
        asked[client._cookie] = (READ, 0, 4 * MIB)
    assert select.select([client.socket], [], [], 300)[0]
    return asked


def wait_for_event(server: NbdServer, text: str) -> str:
    while True:
        for event in server.events():
            if text in event:
                return event
        assert select.select([server.event_fd], [], [], 300)[0], f"no event with {text!r}"


# ---- exports ----


def test_a_removed_export_answers_that_it_is_shut_down(served: Served) -> None:
    at, _ = served
    with Client(at.path) as client:
        client.go()
        at.server.remove_export("web")
        assert client.read(0, 4096).error == ESHUTDOWN
        assert client.write(0, b"x" * 4096) == ESHUTDOWN
        assert client.write(0, b"x" * 300_000) == ESHUTDOWN
        assert client.simple(FLUSH) == ESHUTDOWN
    with pytest.raises(KeyError):
        at.server.remove_export("web")


def test_a_name_is_given_once(served: Served) -> None:
    at, volume = served
    with pytest.raises(FileExistsError):
        at.server.add_export("web", volume._path, read_only=True)
    with pytest.raises(KeyError):
        at.server.set_default("none")
    with pytest.raises(TypeError, match="DataPath"):
        at.server.add_export("new", volume, read_only=True)  # type: ignore[arg-type]


def test_a_closed_volume_answers_that_it_is_shut_down(served: Served) -> None:
    at, volume = served
    volume.snapshot("clean")
    view = volume.store.open("web", snapshot="clean")
    at.server.add_export("web@clean", view._path, read_only=True)
    with Client(at.path) as client:
        client.go("web@clean")
        assert client.read(0, 4096).data == bytes(4096)
        view.close()
        assert client.read(0, 4096).error == ESHUTDOWN


def test_requests_wait_while_an_export_is_paused_and_then_use_the_new_path(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store, store.create("web", size=MIB) as old, store.create("new", size=MIB) as new:
        old.write(0, b"old")
        new.write(0, b"new")
        server = NbdServer()
        server.add_export("web", old._path, read_only=False)
        with serving(server, tmp_path / "s") as at, Client(at.path) as client:
            client.go("web")
            server.pause("web")
            client.socket.sendall(client.encode(READ, 0, 3))
            assert not select.select([client.socket], [], [], 0.05)[0]
            server.replace_path("web", new._path)
            assert not select.select([client.socket], [], [], 0.05)[0]
            server.resume("web")
            assert client.reply({client._cookie: (READ, 0, 3)})[1].data == b"new"


def test_a_grown_disk_has_its_new_size_for_who_connects_again(served: Served) -> None:
    at, volume = served
    with Client(at.path) as before:
        before.go()
        volume.resize(128 * MIB)
        with Client(at.path) as after:
            assert after.go().size == 128 * MIB
            assert after.read(100 * MIB, 10).data == bytes(10)
        assert before.read(0, 10).data == bytes(10)


# ---- slow clients ----


def test_a_client_that_takes_no_replies_delays_neither_flush_nor_removal(served: Served) -> None:
    at, volume = served
    data = os.urandom(4 * MIB)
    volume.write(0, data)
    with Client(at.path) as slow, Client(at.path) as other:
        slow.go(), other.go()
        asked = ask_and_take_nothing(slow, 8)
        # A flush that frees slots waits for every read that holds a ticket.
        volume.trim(8 * MIB, MIB)
        volume.write(8 * MIB, b"x" * MIB)
        volume.trim(8 * MIB, MIB)
        assert other.simple(FLUSH) == 0
        volume._path.wait_for_readers()
        at.server.remove_export("web")
        # What had been begun ends in an error, and what had not is refused.
        replies = dict(slow.reply(asked) for _ in asked)
        assert {reply.error for reply in replies.values()} >= {ESHUTDOWN}
        for reply in replies.values():
            assert reply.error or reply.data == data


def test_a_read_that_was_sent_in_part_never_mixes_two_disks(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store, store.create("a", size="8M") as old, store.create("b", size="8M") as new:
        old.write(0, b"o" * (4 * MIB))
        new.write(0, b"n" * (4 * MIB))
        server = NbdServer()
        server.add_export("web", old._path, read_only=False)
        with serving(server, tmp_path / "s") as at, Client(at.path) as client:
            client.go("web")
            asked = ask_and_take_nothing(client, 8)
            server.replace_path("web", new._path)
            replies = [reply for _, reply in sorted(client.reply(asked) for _ in asked)]
            begun = [reply for reply in replies if reply.error]
            assert [reply.error for reply in begun] == [EIO]
            assert begun[0].chunks == [(OFFSET_DATA, 4 * MIB), (ERROR, 0)]  # zeros complete what was begun
            assert {reply.data for reply in replies if not reply.error} <= {b"o" * (4 * MIB), b"n" * (4 * MIB)}
            assert replies[-1].data == b"n" * (4 * MIB)


def test_an_idle_client_is_closed_and_so_is_one_that_takes_nothing(tmp_path: Path) -> None:
    with served_volume(tmp_path, size="8M", idle_seconds=1) as (at, volume):
        volume.write(0, b"x" * (4 * MIB))
        while True:  # on a busy host this client is as idle
            try:
                with Client(at.path) as idle:
                    idle.go()
                    assert idle.is_closed()
                with Client(at.path) as slow:
                    slow.go()
                    ask_and_take_nothing(slow, 8)
                    wait_for_event(at.server, "takes no replies")
                break
            except (ConnectionError, EOFError):
                continue


def test_connections_beyond_the_limit_are_closed(tmp_path: Path) -> None:
    with served_volume(tmp_path, size="8M", connections_max=2) as (at, _):
        with Client(at.path) as first, Client(at.path) as second:
            first.go(), second.go()
            third = socket.socket(socket.AF_UNIX)
            third.connect(str(at.path))
            assert third.recv(1) == b""
            third.close()
            wait_for_event(at.server, "refused: 2 connections")
            assert first.read(0, 1).data == b"\0"
        wait_for_event(at.server, "closed")


def test_more_durable_bytes_than_may_wait_are_still_written(tmp_path: Path) -> None:
    with served_volume(tmp_path, size="64M", bytes_in_flight_max=MIB, request_bytes_max=MIB) as (at, volume):
        with Client(at.path) as client:
            client.go()
            asked = {}
            for i in range(32):
                client.socket.sendall(client.encode(WRITE, i * MIB, MIB, flags=FUA, payload=bytes([i]) * MIB))
                asked[client._cookie] = (WRITE, i * MIB, MIB)
            assert not any(client.reply(asked)[1].error for _ in asked)
        assert all(volume.read(i * MIB, MIB) == bytes([i]) * MIB for i in range(32))


@pytest.mark.parametrize("options", [{"connections_max": 0}, {"request_bytes_max": 4096}, {"bytes_in_flight_max": 1}])
def test_limits_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        NbdServer(**options)


# ---- files that fail ----


def truncate_segments(tmp_path: Path, keep: int) -> None:
    for segment in (tmp_path / "store" / "segments").iterdir():
        os.truncate(segment, keep)


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("length", [512, 4096, 65_536, MIB, 7 * MIB])
def test_a_truncated_segment_is_eio_and_the_server_lives(tmp_path: Path, structured: bool, length: int) -> None:
    with served_volume(tmp_path, size="64M") as (at, volume):
        volume.write(0, os.urandom(16 * MIB))
        kept = volume.read(0, MIB)
        truncate_segments(tmp_path, 4096 + MIB)
        with Client(at.path) as client:
            client.go(structured=structured)
            assert client.read(8 * MIB, length).error == EIO
            assert client.read(max(0, MIB - length // 2), length).error == EIO
            assert client.read(0, MIB).data == kept
            assert client.read(32 * MIB, 4096).data == bytes(4096)
        wait_for_event(at.server, "failed with error 5")


def test_replies_around_a_failed_one_are_right(tmp_path: Path) -> None:
    with served_volume(tmp_path, size="64M") as (at, volume):
        volume.write(0, os.urandom(2 * MIB))
        kept = volume.read(0, MIB)
        truncate_segments(tmp_path, 4096 + MIB)
        with Client(at.path) as client:
            client.go()
            places = [(0, 4096), (MIB, 4096), (4096, 200_000), (MIB - 70_000, 140_000), (8192, 4096)]
            asked, stream = {}, b""
            for offset, length in places:
                stream += client.encode(READ, offset, length)
                asked[client._cookie] = (READ, offset, length)
            client.socket.sendall(stream)
            replies = [client.reply(asked)[1] for _ in asked]
        assert [reply.error for reply in replies] == [0, EIO, 0, EIO, 0]
        assert [r.data for r in replies if not r.error] == [
            kept[o : o + n] for o, n in (places[0], places[2], places[4])
        ]


# ---- the end ----


def test_stop_answers_what_arrived_flushes_and_is_idempotent(tmp_path: Path) -> None:
    with served_volume(tmp_path, size="8M") as (at, _), Client(at.path) as client:
        client.go()
        asked, stream = {}, b""
        for i in range(100):
            stream += client.encode(WRITE, i * 4096, 4096, payload=b"z" * 4096)
            asked[client._cookie] = (WRITE, i * 4096, 4096)
        client.socket.sendall(stream)
        at.server.stop(grace_seconds=300)
        assert not any(client.reply(asked)[1].error for _ in asked)
        assert client.is_closed()
        (map_file,) = (tmp_path / "store" / "layers").iterdir()
        assert map_file.stat().st_size > 4096  # the frame that names what was written
        at.server.stop(grace_seconds=0)
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(StateError):
            at.server.serve(theirs.detach(), "late")


def test_stop_does_not_wait_for_a_slow_client_beyond_its_grace(served: Served) -> None:
    at, volume = served
    volume.write(0, b"x" * (4 * MIB))
    with Client(at.path) as client:
        client.go()
        ask_and_take_nothing(client, 8)
        at.server.stop(grace_seconds=0.1)
        assert at.server.connections() == []


def test_stop_ends_clients_that_negotiate_and_exports_that_are_paused(served: Served) -> None:
    at, _ = served
    with Client(at.path) as negotiating, Client(at.path) as paused:
        paused.go()
        at.server.pause("web")
        paused.socket.sendall(paused.encode(READ, 0, 4096))
        at.server.stop(grace_seconds=0.1)
        assert negotiating.is_closed()


def test_a_server_that_is_forgotten_lets_its_clients_go(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store, store.create("web", size=MIB) as volume:
        server = NbdServer()
        server.add_export("web", volume._path, read_only=False)
        ours, theirs = socket.socketpair()
        server.serve(theirs.detach(), "test")
        assert len(ours.recv(18)) == 18
        del server
        assert ours.recv(1) == b""
        ours.close()


def test_connections_tell_who_is_there_and_what_they_did(served: Served) -> None:
    at, _ = served
    with Client(at.path) as client:
        client.go("web")
        client.write(0, b"x" * 5000)
        client.read(0, 100)
        client.read(1 << 40, 100)
        (connection,) = at.server.connections()
        assert (connection["peer"], connection["export"], connection["tls"]) == ("test", "web", False)
        assert connection["requests"]["write"] == 1 and connection["bytes"]["write"] == 5000
        assert connection["requests"]["read"] == 2 and connection["errors"] == 1
    wait_for_event(at.server, "closed")
    assert at.server.counters()["bytes"]["write"] == 5000


def test_events_that_nobody_reads_are_dropped_and_counted(served: Served) -> None:
    at, _ = served
    for _ in range(1030):
        with Client(at.path) as bad:
            bad.socket.sendall(struct.pack(">QII", 1, 1, 1))
            assert bad.is_closed()
    at.server.stop(grace_seconds=5)
    events = at.server.events()
    assert len(events) == 1025 and events[0] == "6 events were dropped"
    assert at.server.events() == []
