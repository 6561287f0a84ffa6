"""Every verb, by a client that speaks the protocol by hand."""

import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from support.phony_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    ENOTSUP,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
)
from support.serving import Serving, served_volume

SIZE = 64 << 20
MIB = 1 << 20
Served = tuple[Serving, Any]
both_replies = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


def noise(length: int) -> bytes:
    return os.urandom(length)


@both_replies
@pytest.mark.parametrize("length", [1, 511, 4096, 5000, 300_000, 5 * MIB, 20 * MIB])
@pytest.mark.parametrize("offset", [0, 1, 4095, 1_000_003])
def test_what_was_written_is_read(at: Path, structured: bool, offset: int, length: int) -> None:
    data = noise(length)
    with Client(at) as client:
        client.go(structured=structured)
        assert client.write(offset, data) == 0
        assert client.read(offset, length).data == data
        around = client.read(max(0, offset - 3), length + 6).data
        assert around == bytes(min(3, offset)) + data + bytes(length + 6 - min(3, offset) - length)


@both_replies
def test_a_scattered_disk_is_read_in_one_request(served: Served, structured: bool) -> None:
    serving_at, volume = served
    expected = bytearray(8 * MIB)
    for block in range(0, 2048, 2):  # every other block, in an order that scatters their slots
        at = (block * 1_021 % 2048) * 4096
        expected[at : at + 4096] = piece = noise(4096)
        volume.write(at, piece)
    with Client(serving_at.path) as client:
        client.go(structured=structured)
        assert client.read(0, 8 * MIB).data == expected
        assert client.read(1_234, 5 * MIB).data == expected[1_234 : 1_234 + 5 * MIB]


def test_holes_are_sent_as_holes_to_who_can_take_them(at: Path) -> None:
    with Client(at) as client:
        client.go()
        client.write(MIB, b"x" * 8192)
        reply = client.read(0, 3 * MIB)
        assert reply.data == bytes(MIB) + b"x" * 8192 + bytes(2 * MIB - 8192)
        assert reply.chunks == [(OFFSET_HOLE, MIB), (OFFSET_DATA, 8192), (OFFSET_HOLE, 2 * MIB - 8192)]


def test_dont_fragment_gets_one_content_chunk(at: Path) -> None:
    with Client(at) as client:
        client.go()
        client.write(MIB, b"x" * 8192)
        reply = client.read(0, 3 * MIB, flags=DF)
        assert reply.data == bytes(MIB) + b"x" * 8192 + bytes(2 * MIB - 8192)
        assert reply.chunks == [(OFFSET_DATA, 3 * MIB), (NONE, 0)]


def test_a_read_or_write_of_nothing_succeeds(at: Path) -> None:
    with Client(at) as client:
        client.go()
        assert client.read(4096, 0).error == 0
        assert client.write(4096, b"") == 0
        assert client.write(4096, b"", flags=FUA) == 0


@both_replies
def test_requests_that_arrive_together_are_answered_together(served: Served, structured: bool) -> None:
    serving_at, volume = served
    data = noise(64 * 4096)
    volume.write(0, data)
    with Client(serving_at.path) as client:
        client.go(structured=structured)
        asked, stream = {}, b""
        for block in range(64):
            stream += client.encode(READ, block * 4096, 4096)
            asked[client._cookie] = (READ, block * 4096, 4096)
        client.socket.sendall(stream)
        for cookie in sorted(asked):
            assert client.reply(asked)[0] == cookie  # in order: nothing slow is among them
    counters = serving_at.server.counters()
    assert counters["requests"]["read"] == 64
    assert counters["sends"] < 64


def test_writes_and_reads_in_one_stream_keep_their_bytes_apart(at: Path) -> None:
    with Client(at) as client:
        client.go()
        pieces = [noise(length) for length in (4096, 300_000, 10, 4096, 700_000, 65_536)]
        asked, stream, offset = {}, b"", 0
        for piece in pieces:
            stream += client.encode(WRITE, offset, len(piece), payload=piece)
            asked[client._cookie] = (WRITE, offset, len(piece))
            stream += client.encode(READ, offset, len(piece))
            asked[client._cookie] = (READ, offset, len(piece))
            offset += 1_000_000
        client.socket.sendall(stream)
        replies = dict(client.reply(asked) for _ in asked)
        assert [replies[cookie].data for cookie in sorted(asked) if asked[cookie][0] == READ] == pieces
        assert all(reply.error == 0 for reply in replies.values())


def test_writes_that_arrive_together_end_as_if_they_had_come_one_by_one(served: Served) -> None:
    serving_at, volume = served
    places = [(0, 4096), (4096, 4096), (40960, 4096), (81920, 4096), (40960, 4096), (100, 50), (150, 9000), (77, 4096)]
    places += [(8192 * i % 200_000, 4096) for i in range(60)] + [(0, 0), (SIZE - 4096, 4096), (SIZE - 4096, 4096)]
    expected = bytearray(SIZE)
    with Client(serving_at.path) as client:
        client.go()
        for name in ("a", "b", "c"):  # on new blocks, in place, and after a snapshot
            asked, stream = {}, b""
            for offset, length in places:
                data = noise(length)
                expected[offset : offset + length] = data
                stream += client.encode(WRITE, offset, length, payload=data)
                asked[client._cookie] = (WRITE, offset, length)
            client.socket.sendall(stream)
            assert not any(client.reply(asked)[1].error for _ in asked)
            assert client.read(0, 20 * MIB).data == expected[: 20 * MIB]
            assert client.read(SIZE - 4096, 4096).data == expected[-4096:]
            if name == "b":
                volume.snapshot(name)
    volume.flush()
    assert volume.read(0, SIZE) == expected


def test_a_bad_write_among_good_ones_fails_alone(at: Path) -> None:
    with Client(at) as client:
        client.go()
        asked, stream = {}, b""
        for offset in (0, 4096, SIZE, 8192, SIZE - 1, 65_536):
            stream += client.encode(WRITE, offset, 4096, payload=b"w" * 4096)
            asked[client._cookie] = (WRITE, offset, 4096)
        client.socket.sendall(stream)
        assert [client.reply(asked)[1].error for _ in asked] == [0, 0, ENOSPC, 0, ENOSPC, 0]
        assert client.read(0, 12_288).data == b"w" * 12_288


def test_bytes_that_dribble_in_are_put_together(at: Path) -> None:
    with Client(at) as client:
        client.go()
        for byte in client.encode(WRITE, 5, 40, payload=bytes(range(40))):
            client.socket.sendall(bytes([byte]))
        assert client.reply({client._cookie: (WRITE, 5, 40)})[1].error == 0
        assert client.read(5, 40).data == bytes(range(40))


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("kind", [TRIM, WRITE_ZEROES])
def test_trimmed_and_zeroed_ranges_read_zero_and_are_holes(at: Path, kind: int, flags: int) -> None:
    with Client(at) as client:
        client.go(contexts=("base:allocation",))
        client.write(0, b"x" * (4 * MIB))
        assert client.simple(kind, MIB + 100, 2 * MIB, flags=flags) == 0
        assert client.read(0, 4 * MIB).data == b"x" * (MIB + 100) + bytes(2 * MIB) + b"x" * (MIB - 100)
        assert client.status(0, 4 * MIB)["base:allocation"][:2] == [(MIB + 4096, 0), (2 * MIB - 4096, 3)]


def test_zeroes_without_holes_are_allocated(at: Path) -> None:
    with Client(at) as client:
        client.go(contexts=("base:allocation",))
        assert client.simple(WRITE_ZEROES, 0, 3 * MIB, flags=NO_HOLE) == 0
        assert client.read(0, 4 * MIB).data == bytes(4 * MIB)
        assert client.status(0, 4 * MIB)["base:allocation"] == [(3 * MIB, 0), (MIB, 3)]


def test_fast_zeroes_are_holes_or_refused(at: Path) -> None:
    with Client(at) as client:
        client.go()
        assert client.simple(WRITE_ZEROES, 0, SIZE, flags=FAST_ZERO) == 0
        assert client.simple(WRITE_ZEROES, 0, SIZE, flags=FAST_ZERO | NO_HOLE) == ENOTSUP


def test_trims_of_the_whole_disk_and_caching_go_through_the_helper(at: Path) -> None:
    with Client(at) as client:
        client.go()
        client.write(0, b"x" * MIB)
        assert client.simple(CACHE, 0, SIZE) == 0
        assert client.simple(TRIM, 0, SIZE) == 0
        assert client.simple(FLUSH) == 0
        assert client.read(0, MIB).data == bytes(MIB)


def test_many_durable_writes_at_once_are_all_answered(at: Path) -> None:
    with Client(at) as client:
        client.go()
        asked, stream = {}, b""
        for i in range(200):  # more than the helper's queue holds
            stream += client.encode(WRITE, i * 4096, 4096, flags=FUA, payload=bytes([i]) * 4096)
            asked[client._cookie] = (WRITE, i * 4096, 4096)
        client.socket.sendall(stream)
        replies = dict(client.reply(asked) for _ in asked)
        assert replies.keys() == asked.keys() and not any(reply.error for reply in replies.values())
        assert client.read(0, 200 * 4096).data == b"".join(bytes([i]) * 4096 for i in range(200))


def test_a_flush_covers_what_another_connection_wrote(served: Served, tmp_path: Path) -> None:
    serving_at, volume = served
    with Client(serving_at.path) as writer, Client(serving_at.path) as flusher:
        assert writer.go().flags & 1 << 8
        flusher.go()
        writer.write(0, b"durable" * 1000)
        assert flusher.simple(FLUSH) == 0
    # Nothing is left to flush: the head's map names the block on disk.
    (map_file,) = (tmp_path / "store" / "layers").iterdir()
    length = map_file.stat().st_size
    volume.flush()
    assert map_file.stat().st_size == length > 4096


def test_disc_ends_the_connection_after_what_came_before_it(at: Path) -> None:
    with Client(at) as client:
        client.go()
        stream = client.encode(WRITE, 0, 4096, flags=FUA, payload=b"y" * 4096)
        asked = {client._cookie: (WRITE, 0, 4096)}
        stream += client.encode(FLUSH)
        asked[client._cookie] = (FLUSH, 0, 0)
        client.socket.sendall(stream + client.encode(DISC))
        assert all(client.reply(asked)[1].error == 0 for _ in asked)
        assert client.is_closed()


# ---- errors ----


@both_replies
def test_requests_past_the_end_are_refused_and_the_connection_goes_on(at: Path, structured: bool) -> None:
    with Client(at) as client:
        client.go(structured=structured)
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (1 << 63, 4096), ((1 << 64) - 1, 4096)):
            assert client.read(offset, length).error == EINVAL
            assert client.write(offset, b"x" * length) == ENOSPC
            assert client.simple(WRITE_ZEROES, offset, length) == ENOSPC
            assert client.simple(TRIM, offset, length) == EINVAL
            assert client.simple(CACHE, offset, length) == EINVAL
        assert client.write(SIZE - 1, b"x") == 0
        assert client.read(SIZE - 2, 2).data == b"\0x"


@both_replies
def test_requests_that_are_not_known_are_invalid(at: Path, structured: bool) -> None:
    with Client(at) as client:
        client.go(structured=structured)
        for kind in (8, 9, 255, 65_535):
            assert client.simple(kind, 0, 4096) == EINVAL
        for flags in (1 << 5, 1 << 15):
            assert client.read(0, 4096, flags=flags).error == EINVAL
        assert client.read(0, 4096, flags=NO_HOLE).error == EINVAL
        assert client.write(0, b"x", flags=REQ_ONE) == EINVAL
        assert client.simple(FLUSH, 1, 0) == EINVAL
        assert client.read(0, 1).data == b"\0"


def test_dont_fragment_is_invalid_without_structured_replies(at: Path) -> None:
    with Client(at) as client:
        client.go(structured=False)
        assert client.read(0, 4096, flags=DF).error == EINVAL


def test_requests_larger_than_was_agreed_are_invalid_and_their_payload_is_read_over(at: Path) -> None:
    with Client(at) as client:
        client.go()
        assert client.read(0, (32 << 20) + 1).error == EINVAL
        assert client.write(0, bytes((32 << 20) + 1)) == EINVAL
        assert client.read(0, 1).data == b"\0"


def test_block_status_is_invalid_without_contexts_or_length(at: Path) -> None:
    with Client(at) as client:
        client.go()
        assert client.simple(BLOCK_STATUS, 0, 4096) == EINVAL
    with Client(at) as client:
        client.go(contexts=("base:allocation",))
        assert client.simple(BLOCK_STATUS, 0, 0) == EINVAL
        assert client.simple(BLOCK_STATUS, SIZE - 1, 2) == EINVAL


def test_a_read_only_export_permits_no_change(served: Served) -> None:
    serving_at, volume = served
    serving_at.server.add_export("view", volume._path, read_only=True)
    with Client(serving_at.path) as client:
        client.go("view")
        for flags in (0, FUA):
            assert client.write(0, b"x" * 1000, flags=flags) == EPERM
            assert client.simple(TRIM, 0, 4096, flags=flags) == EPERM
            assert client.simple(WRITE_ZEROES, 0, 4096, flags=flags) == EPERM
        assert client.simple(FLUSH) == 0
        assert client.read(0, 1000).data == bytes(1000)


@pytest.mark.parametrize("magic", [0, 0x25609514, 0xFFFFFFFF])
def test_a_bad_request_magic_closes_and_is_reported(served: Served, magic: int) -> None:
    with Client(served[0].path) as client:
        client.go()
        client.socket.sendall(struct.pack(">IHHQQI", magic, 0, READ, 1, 0, 4096))
        assert client.is_closed()
    assert any("bad magic" in event for event in served[0].server.events())


def test_a_client_that_goes_away_in_the_middle_of_a_write_changes_nothing(served: Served) -> None:
    serving_at, volume = served
    for length, sent in ((4096, 4000), (1 << 20, 1 << 19)):
        with Client(serving_at.path) as client:
            client.go()
            client.socket.sendall(client.encode(WRITE, 0, length) + b"x" * sent)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.is_closed()
    assert volume.read(0, 1 << 20) == bytes(1 << 20)


def test_a_full_disk_is_enospc_and_the_server_goes_on(tmp_path: Path, ext4_mount: Any) -> None:
    directory = ext4_mount(32 << 20)
    with served_volume(directory, size=64 * MIB) as (serving_at, volume), Client(serving_at.path) as client:
        client.go()
        errors = [client.write(at, noise(MIB)) for at in range(0, 40 * MIB, MIB)]
        assert set(errors) == {0, ENOSPC}
        assert client.read(0, 4096).error == 0
        assert client.simple(TRIM, 0, 40 * MIB) == 0
        volume.flush()  # gives up the store's reserve, which is Python's to decide
        assert client.write(0, noise(MIB)) == 0
        assert client.simple(FLUSH) == 0


def test_the_first_change_of_an_export_is_told_once_and_before_it_is_answered(served: Served) -> None:
    at, _ = served
    told: list[str] = []
    at.server.on_written = told.append
    with Client(at.path) as client, Client(at.path) as other:
        client.go()
        other.go()
        client.read(0, 4096)
        assert client.simple(FLUSH) == 0
        assert told == []
        assert client.write(0, b"x") == 0
        assert told == ["web"]
        assert other.write(1, b"y") == 0
        assert client.read(0, 2).data == b"xy"
        assert told == ["web"]
