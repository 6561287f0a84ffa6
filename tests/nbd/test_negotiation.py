"""Option haggling, by a client that speaks the protocol by hand."""

import errno
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.phony_client import (
    ABORT,
    ACK,
    EXPORT_NAME,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    META_CONTEXT,
    OPTION_MAGIC,
    POLICY,
    REP_INFO,
    SERVER,
    SET_META,
    SHUTDOWN,
    STARTTLS,
    STRUCTURED_REPLY,
    TLS_REQD,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    Client,
)
from support.serving import Serving, served_volume, serving

from onionskin.nbd._nbd import NbdServer

SIZE = 64 << 20
Served = tuple[Serving, Any]


def test_export_name_begins_transmission_with_zeroes_for_old_clients(at: Path) -> None:
    with Client(at, client_flags=1) as client:
        client.send_option(EXPORT_NAME, b"web")
        size, flags = struct.unpack(">QH", client.receive(10))
        assert client.receive(124) == bytes(124)
        assert size == SIZE and flags & 1
        assert client.read(0, 10).data == bytes(10)


def test_export_name_leaves_the_zeroes_out_for_who_asked(at: Path) -> None:
    with Client(at) as client:
        client.send_option(EXPORT_NAME, b"web")
        assert struct.unpack(">QH", client.receive(10))[0] == SIZE
        assert client.read(0, 10).data == bytes(10)


def test_export_name_of_an_unknown_export_closes(at: Path) -> None:
    with Client(at) as client:
        client.send_option(EXPORT_NAME, b"none")
        assert client.is_closed()


def test_abort_is_acknowledged_and_closes(at: Path) -> None:
    with Client(at) as client:
        assert client.option(ABORT) == [(ACK, b"")]
        assert client.is_closed()


def test_list_names_every_export_with_its_description(served: Served) -> None:
    serving_at, volume = served
    serving_at.server.add_export("web@clean", volume._path, read_only=True, description="before the update")
    with Client(serving_at.path) as client:
        assert client.option(LIST) == [
            (SERVER, struct.pack(">I3s", 3, b"web")),
            (SERVER, struct.pack(">I9s", 9, b"web@clean") + b"before the update"),
            (ACK, b""),
        ]
        assert client.option(LIST, b"x")[0][0] == INVALID


def test_go_tells_size_flags_name_description_and_block_sizes(served: Served) -> None:
    serving_at, volume = served
    serving_at.server.add_export("web@clean", volume._path, read_only=True, description="notes")
    with Client(serving_at.path) as client:
        *infos, last = client.info(GO, "web@clean", 0, 1, 2, 3)
        by_type = {struct.unpack(">H", body[:2])[0]: body[2:] for kind, body in infos if kind == REP_INFO}
        assert last == (ACK, b"")
        assert by_type[1] == b"web@clean" and by_type[2] == b"notes"
        assert struct.unpack(">III", by_type[3]) == (1, 4096, 32 << 20)
        size, flags = struct.unpack(">QH", by_type[0])
        assert size == SIZE and flags == 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 10


def test_a_writable_export_offers_every_verb(at: Path) -> None:
    with Client(at) as client:
        client.go()
        names = {bit for bit in range(16) if client.flags & 1 << bit}
        assert names == {0, 2, 3, 5, 6, 7, 8, 10, 11}


def test_info_leaves_the_client_in_its_options(at: Path) -> None:
    with Client(at) as client:
        assert client.info(INFO, "web")[-1] == (ACK, b"")
        assert client.info(INFO, "none")[-1][0] == UNKNOWN
        assert client.go("web").size == SIZE


def test_the_empty_name_is_the_default_export(at: Path) -> None:
    with Client(at) as client:
        *infos, last = client.info(GO, "", 1)
        assert (REP_INFO, b"\0\1web") in infos and last == (ACK, b"")


@pytest.mark.parametrize("option", [4, 11, 99, 0xFFFFFFFF])
def test_options_that_are_not_known_are_refused_and_haggling_goes_on(at: Path, option: int) -> None:
    with Client(at) as client:
        assert client.option(option, b"whatever")[0][0] == UNSUP
        assert client.go().size == SIZE


def test_structured_reply_takes_no_data(at: Path) -> None:
    with Client(at) as client:
        assert client.option(STRUCTURED_REPLY, b"x")[0][0] == INVALID


def test_meta_contexts_need_structured_replies(at: Path) -> None:
    with Client(at) as client:
        assert client.meta(SET_META, "web", "base:allocation")[0][0] == INVALID
        assert client.meta(LIST_META, "web")[0][0] == INVALID


def test_contexts_are_listed_all_by_namespace_and_by_name(at: Path) -> None:
    def names(client: Client, *queries: str) -> list[str]:
        return [body[4:].decode() for kind, body in client.meta(LIST_META, "web", *queries) if kind == META_CONTEXT]

    with Client(at) as client:
        client.start_structured()
        assert names(client) == ["base:allocation", "qemu:allocation-depth"]
        assert names(client, "qemu:") == ["qemu:allocation-depth"]
        assert names(client, "base:allocation") == ["base:allocation"]
        assert names(client, "x-none:") == [] and names(client, "base") == []
        assert client.meta(LIST_META, "none")[0][0] == UNKNOWN


def test_contexts_are_selected_once_each_with_ids_of_their_own(at: Path) -> None:
    with Client(at) as client:
        client.start_structured()
        queries = ["base:allocation", "qemu:allocation-depth", "base:allocation", "qemu:", "x:y"]
        *selected, last = client.meta(SET_META, "web", *queries)
        assert last == (ACK, b"")
        assert [body[4:] for _, body in selected] == [b"base:allocation", b"qemu:allocation-depth"]
        assert len({body[:4] for _, body in selected}) == 2


def test_contexts_of_another_export_do_not_hold(served: Served) -> None:
    serving_at, volume = served
    serving_at.server.add_export("other", volume._path, read_only=True)
    with Client(serving_at.path) as client:
        client.start_structured()
        client.meta(SET_META, "web", "base:allocation")
        assert client.info(GO, "other")[-1] == (ACK, b"")
        client.structured = True
        assert client.simple(7, 0, 4096) == 22


def test_starttls_is_refused(at: Path) -> None:
    with Client(at) as client:
        assert client.option(STARTTLS)[0][0] == POLICY


def test_a_server_that_requires_tls_answers_nothing_else(tmp_path: Path) -> None:
    server = NbdServer()
    with serving(server, tmp_path / "s", require_tls=True) as at:
        with Client(at.path) as client:
            assert client.option(LIST)[0][0] == TLS_REQD
            assert client.info(GO, "web")[0][0] == TLS_REQD
            assert client.option(ABORT) == [(ACK, b"")]
        with Client(at.path) as client:
            client.send_option(EXPORT_NAME, b"web")
            assert client.is_closed()


def test_options_go_on_after_tls_without_a_second_greeting(served: Served) -> None:
    serving_at, _ = served
    ours, theirs = socket.socketpair()
    serving_at.server.serve(theirs.detach(), "proxy", tls=True, require_tls=True, resume_options=True, client_flags=3)
    client = Client.__new__(Client)
    client.socket, client.structured, client._cookie = ours, False, 0
    with client:
        assert client.option(STARTTLS)[0][0] == INVALID
        client.go("web")
        assert client.read(0, 4).data == bytes(4)
        (connection,) = serving_at.server.connections()
        assert connection["tls"] and connection["export"] == "web" and connection["peer"] == "proxy"


# ---- hostile bytes ----


def test_an_option_of_more_than_64_kib_is_read_over(at: Path) -> None:
    with Client(at) as client:
        assert client.option(LIST, bytes(70_000))[0][0] == TOO_BIG
        assert client.go().size == SIZE


def test_an_option_of_four_gigabytes_closes(at: Path) -> None:
    with Client(at) as client:
        client.send_option(GO, length=0xFFFFFFFF)
        assert client.is_closed()


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_client_flags_that_are_not_known_close(at: Path, flags: int) -> None:
    with Client(at, client_flags=flags) as client:
        assert client.is_closed()


def test_a_bad_option_magic_closes_and_is_reported(served: Served) -> None:
    with Client(served[0].path) as client:
        client.socket.sendall(struct.pack(">QII", OPTION_MAGIC + 1, GO, 0))
        assert client.is_closed()
    assert any("bad magic" in event for event in served[0].server.events())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 0),
        struct.pack(">IH", 0, 1),
        struct.pack(">IHH", 0, 2, 3),
        struct.pack(">I3sHHH", 3, b"web", 1, 3, 3),
        struct.pack(">I", 0xFFFFFFFF) + b"web",
        struct.pack(">I5000sH", 5000, b"w" * 5000, 0),
    ],
)
def test_a_go_whose_lengths_do_not_add_up_is_invalid(at: Path, data: bytes) -> None:
    with Client(at) as client:
        assert client.option(GO, data)[0][0] == INVALID
        assert client.go().size == SIZE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I3s", 3, b"web"),
        struct.pack(">I3sI", 3, b"web", 1),
        struct.pack(">I3sI", 3, b"web", 0xFFFFFFFF),
        struct.pack(">I3sII", 3, b"web", 1, 5) + b"base",
        struct.pack(">I3sII", 3, b"web", 1, 4) + b"base:",
    ],
)
def test_a_meta_query_whose_lengths_do_not_add_up_is_invalid(at: Path, data: bytes) -> None:
    with Client(at) as client:
        client.start_structured()
        assert client.option(SET_META, data)[0][0] == INVALID
        assert client.go(structured=False).size == SIZE


def test_a_client_that_goes_away_in_the_middle_of_an_option_costs_nothing(served: Served) -> None:
    serving_at, _ = served
    for cut in range(1, 24):
        with Client(serving_at.path) as client:
            client.socket.sendall((struct.pack(">QII", OPTION_MAGIC, GO, 9) + bytes(9))[:cut])
    with Client(serving_at.path) as client:
        assert client.go().size == SIZE


# ---- asking Python ----


def test_an_export_is_added_when_a_client_asks_for_it(served: Served) -> None:
    serving_at, volume = served
    asked = []

    def add(name: str) -> bool:
        asked.append(name)
        if name == "web@clean":
            serving_at.server.add_export(name, volume._path, read_only=True)
        return name == "web@clean"

    serving_at.server.on_unknown_export = add
    with Client(serving_at.path) as client:
        assert client.info(INFO, "web@none")[-1][0] == UNKNOWN
        assert client.go("web@clean").flags & 2
    assert asked == ["web@none", "web@clean"]


def listed(replies: list[tuple[int, bytes]]) -> list[str]:
    assert replies[-1] == (ACK, b"") and {kind for kind, _ in replies[:-1]} == {SERVER}
    return [body[4 : 4 + int.from_bytes(body[:4], "big")].decode() for _, body in replies[:-1]]


def names_behind(names: list[str]) -> Callable[[str], Iterator[tuple[str, str]]]:
    return lambda after: ((name, f"about {name}") for name in names if name > after)


def test_a_list_of_thousands_is_complete_and_can_be_asked_for_again(tmp_path: Path) -> None:
    names = [f"web@{number:05}-{'x' * (number % 200)}" for number in range(5000)]
    with served_volume(tmp_path, size=SIZE, list_exports=names_behind(names)) as (at, _), Client(at.path) as client:
        assert listed(client.option(LIST)) == names
        assert listed(client.option(LIST)) == names
        assert client.go("web").size == SIZE


def test_no_more_is_gathered_than_a_client_takes(tmp_path: Path) -> None:
    taken = 0

    def endless(after: str) -> Iterator[tuple[str, str]]:
        nonlocal taken
        for number in itertools.count(int(after or 0) + 1):
            taken = number
            yield f"{number:0200}", ""

    with served_volume(tmp_path, size=SIZE, list_exports=endless) as (at, _):
        with Client(at.path) as client:
            client.send_option(LIST)
            client.receive(1 << 20)
        with Client(at.path) as other:
            assert other.go("web").size == SIZE
    assert (1 << 20) // 224 < taken < 100_000  # what was read, and what sockets hold


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_list_that_fails_says_so_and_the_connection_goes_on(tmp_path: Path) -> None:
    def broken(after: str) -> Iterator[tuple[str, str]]:
        yield "web", ""
        raise OSError("the catalog cannot be read")

    with served_volume(tmp_path, size=SIZE, list_exports=broken) as (at, _), Client(at.path) as client:
        assert [kind for kind, _ in client.option(LIST)] == [SERVER, POLICY]
        assert client.go("web").size == SIZE


@pytest.mark.parametrize("number, kind", [(errno.EMFILE, POLICY), (errno.ENOMEM, POLICY), (errno.ESHUTDOWN, SHUTDOWN)])
def test_an_export_or_context_that_cannot_be_looked_up_is_not_told_as_unknown(
    served: Served, number: int, kind: int
) -> None:
    def poor(*names: str) -> bool:
        raise OSError(number, os.strerror(number))

    served[0].server.on_unknown_export = served[0].server.on_unknown_context = poor
    with Client(served[0].path) as client:
        assert client.info(GO, "other")[-1][0] == kind
        assert client.info(INFO, "other")[-1][0] == kind
        client.option(STRUCTURED_REPLY)
        wanted = "onionskin:changed-since:s"
        assert client.meta(SET_META, "other", "base:allocation")[-1][0] == kind
        # Without the contexts before it: QEMU and libnbd would take those as selected.
        assert [one for one, _ in client.meta(SET_META, "web", "base:allocation", wanted)] == [kind]
        assert client.go("web").size == SIZE


def test_an_export_that_is_taken_away_again_before_its_client_has_it_is_not_told_as_unknown(served: Served) -> None:
    asked: list[str] = []
    served[0].server.on_unknown_export = lambda name: asked.append(name) or True
    with Client(served[0].path) as client:
        assert client.info(GO, "other")[-1][0] == POLICY
        assert len(asked) > 1  # it may be there at the next try
        assert client.go("web").size == SIZE


def test_names_that_are_no_text_are_unknown_without_asking(served: Served) -> None:
    served[0].server.on_unknown_export = lambda name: pytest.fail(f"asked for {name!r}")
    with Client(served[0].path) as client:
        for name in (b"\xff\xfe", b"web\0"):
            assert client.option(GO, struct.pack(">I", len(name)) + name + b"\0\0")[0][0] == UNKNOWN


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_that_raises_does_not_make_the_export_unknown(served: Served) -> None:
    def broken(name: str) -> bool:
        raise ValueError(name)

    served[0].server.on_unknown_export = broken
    with Client(served[0].path) as client:
        assert client.info(GO, "other")[-1][0] == POLICY
        assert client.go("web").size == SIZE
