"""The control socket itself: who gets in, what it makes of garbage, and what comes back as which error."""

import errno
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.servers import END_SECONDS, Serve, onionskin

import onionskin as library
from onionskin import errors
from onionskin.base.limits import NOTE_BYTES_MAX
from onionskin.base.sockets import connect_unix, may_connect
from onionskin.catalog import new_id
from onionskin.control import client, frames
from onionskin.control.server import Cancelled, _Session


def control_path(vms: Path) -> Path:
    (path,) = (vms / "volumes").glob("*.control")
    return path


def connected(vms: Path) -> socket.socket:
    connection = connect_unix(control_path(vms))
    connection.settimeout(END_SECONDS)
    greeting = frames.receive(connection, bytes_max=frames.REPLY_BYTES_MAX)
    assert greeting is not None
    assert greeting["version"] == frames.VERSION
    return connection


def answer(connection: socket.socket) -> dict[str, object] | None:
    return frames.receive(connection, bytes_max=frames.REPLY_BYTES_MAX)


def test_only_its_owner_can_open_the_control_socket(vms: Path, serve: Callable[..., Serve]) -> None:
    serve(f"{vms}/web", umask=0)
    assert stat.S_IMODE(control_path(vms).stat().st_mode) == 0o600


def test_the_owner_and_root_may_connect_and_nobody_else() -> None:
    assert may_connect(1000, 1000)
    assert may_connect(0, 1000)
    assert not may_connect(1001, 1000)
    assert not may_connect(1000, 0)


def test_another_user_is_refused_even_where_the_mode_would_let_him_in(vms: Path, serve: Callable[..., Serve]) -> None:
    serve(f"{vms}/web")
    path = control_path(vms)
    path.chmod(0o666)
    path.parent.chmod(0o711)
    descriptor = os.open(path.parent, os.O_PATH)
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect('/proc/self/fd/%s/%s' % (sys.argv[1], sys.argv[2])); print(s.recv(4096)[4:].decode())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(descriptor), path.name], capture_output=True, text=True, pass_fds=[descriptor]
    )
    os.close(descriptor)
    assert "of user 65534 may not use it" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack(">I", frames.REQUEST_BYTES_MAX + 1),
        struct.pack(">I", 5) + b"hello",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 200_000) + b"[" * 200_000,
    ],
    ids=["http", "oversized", "no json", "no object", "deeply nested"],
)
def test_garbage_gets_an_error_and_an_end_and_the_server_goes_on(
    vms: Path, serve: Callable[..., Serve], sent: bytes
) -> None:
    serve(f"{vms}/web")
    with connected(vms) as connection:
        connection.sendall(sent)
        reply = answer(connection)
        assert reply is not None
        assert "control socket" in str(reply["error"])
        assert answer(connection) is None
    assert onionskin("snapshots", f"{vms}/web").stdout == ""


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"version": 1, "verb": "__init__", "arguments": {}}, "no verb"),
        ({"version": 1, "verb": ["snapshot"], "arguments": {}}, "no verb"),
        ({"version": 1, "verb": "snapshot", "arguments": {"name": "a"}}, "exactly these arguments"),
        ({"version": 1, "verb": "snapshot", "arguments": {"name": 5, "note": ""}}, "cannot be 5"),
        ({"version": 1, "verb": "merge", "arguments": {"name": [], "guid": None}}, "no list of names"),
        ({"version": 1, "verb": "merge", "arguments": {"name": ["a", 5], "guid": None}}, "no list of names"),
        ({"version": 1, "verb": "merge", "arguments": {"name": ["a", "\0"], "guid": None}}, "zero byte"),
        ({"version": 1, "verb": "trim", "arguments": {"offset": True, "length": 1}}, "cannot be True"),
        ({"version": 1, "verb": "trim", "arguments": {"offset": -1, "length": 1}}, "cannot be -1"),
        ({"version": 1, "verb": "read", "arguments": {"offset": 0, "length": 1 << 30}}, "at a time"),
        ({"version": 2, "verb": "flush", "arguments": {}}, "version"),
        ({}, "version"),
    ],
)
def test_a_malformed_request_is_refused_and_the_connection_goes_on(
    vms: Path, serve: Callable[..., Serve], request_: dict[str, object], said: str
) -> None:
    serve(f"{vms}/web")
    with connected(vms) as connection:
        for request in (request_, {"version": 1, "verb": "head_changed", "arguments": {}}):
            frames.send(connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
        reply = answer(connection)
        assert reply is not None
        assert said in str(reply["error"])
        assert answer(connection) == {"result": False}


@pytest.mark.parametrize(
    "error",
    [
        errors.StateError("busy; wait"),
        errors.FormatError("bad"),
        errors.ChainError("apart"),
        errors.SnapshotExistsError("there"),
        errors.SnapshotNotFoundError("not there"),
        errors.VolumeNotFoundError("not there"),
        errors.OnionskinError("else"),
        ValueError("wrong"),
        OSError(errno.ENOSPC, "No space left on device", "/some/file"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_comes_back_as_what_it_was(error: BaseException) -> None:
    found = frames.unpack_error(frames.pack_error(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(error, OSError) and isinstance(found, OSError):
        assert (found.errno, found.filename) == (error.errno, error.filename)


def test_a_subclass_comes_back_as_its_parent_and_the_unknown_as_a_failure_of_the_server() -> None:
    class Special(errors.StateError):
        pass

    assert type(frames.unpack_error(frames.pack_error(Special("x")))) is errors.StateError
    found = frames.unpack_error(frames.pack_error(ZeroDivisionError("x")))
    assert type(found) is errors.OnionskinError
    assert "the server failed" in str(found)


def test_a_control_socket_that_a_crash_left_is_replaced(vms: Path, serve: Callable[..., Serve]) -> None:
    serve(f"{vms}/web").kill()
    assert control_path(vms).exists()
    with library.Store(vms) as store:
        assert client.find(store, "web") is None
        store.open("web").close()  # the volume is free
    serve(f"{vms}/web")
    onionskin("snapshot", f"{vms}/web@a")


def test_a_store_lies_as_deep_as_it_likes(tmp_path: Path, serve: Callable[..., Serve]) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    onionskin("create", f"{deep}/vms/web", "--size", "1M")
    serve(f"{deep}/vms/web", "--socket", deep / ("s" * 50))
    assert onionskin("snapshot", f"{deep}/vms/web@a").stdout.startswith("took")


def test_the_library_connects_to_a_server_and_says_so_where_there_is_none(
    vms: Path, serve: Callable[..., Serve]
) -> None:
    with pytest.raises(library.StateError, match="nobody serves"):
        library.connect(vms, "web")
    with pytest.raises(library.VolumeNotFoundError):
        library.connect(vms, "db")
    serve(f"{vms}/web")
    with library.connect(vms, "web") as web:
        assert web.snapshot("a", note="by hand").note == "by hand"
        assert [snapshot.name for snapshot in web.snapshots] == ["a"]
        assert web.read(5 << 20, 4) == bytes([5]) * 4
        with pytest.raises(library.SnapshotExistsError):
            web.snapshot("a")
    with library.Store(vms) as store, pytest.raises(library.StateError, match="open for writing in process"):
        store.open("web")


def test_more_connections_than_are_allowed_are_refused_in_words(vms: Path, serve: Callable[..., Serve]) -> None:
    serve(f"{vms}/web")
    held = [connected(vms) for _ in range(16)]
    with connect_unix(control_path(vms)) as connection:
        reply = answer(connection)
        assert reply is not None
        assert "try again later" in str(reply["error"])
    for connection in held:
        connection.close()


def test_who_waits_for_a_server_that_ends_is_told_so_and_not_that_he_cancelled() -> None:
    class OfWeb:
        volume = SimpleNamespace(name="web")

    ours, callers = socket.socketpair()
    with ours, callers:
        session = _Session(ours, OfWeb(), print, "a test")  # type: ignore[arg-type]
        ours.shutdown(socket.SHUT_RD)  # as `ControlSocket.close` does
        with pytest.raises(errors.StateError, match="the server of volume 'web' is ending"):
            session._report(1, 2)
        callers.close()
        with pytest.raises(Cancelled):
            session._report(1, 2)


def test_a_caller_hears_of_progress_and_of_life_by_a_descriptor_that_select_does_not_take(
    many_descriptors: None,
) -> None:
    ours, callers = socket.socketpair()
    with ours, callers, socket.socket(fileno=fcntl(ours, F_DUPFD_CLOEXEC, 1024)) as far:
        callers.settimeout(0)  # what is sent here is there at once
        session = _Session(far, SimpleNamespace(), print, "a test")  # type: ignore[arg-type]
        session._is_busy = True
        session.say_that_we_live()
        assert answer(callers) == {"alive": True}
        session._report(1, 2)
        assert answer(callers) == {"progress": [1, 2]}
        frames.send(callers, {"cancel": True}, bytes_max=frames.REQUEST_BYTES_MAX)
        with pytest.raises(Cancelled):
            session._report(2, 2)


@pytest.mark.parametrize("character", ["\x01", "\u00e9", "\U0001f600"])
def test_snapshots_that_all_have_the_longest_note_come_in_frames_that_are_short_enough(
    vms: Path, serve: Callable[..., Serve], character: str
) -> None:
    note = character * (NOTE_BYTES_MAX // len(character.encode()))
    with library.Store(vms) as store:
        with store.open("web") as web:
            for _ in range(64):
                web.snapshot(note=note)
        serve(f"{vms}/web")
        with library.connect(store, "web") as live:
            assert live.snapshots == store.snapshots("web")


def test_names_for_ten_thousand_forks_are_one_request_in_any_script() -> None:
    names = [f"{'é' * 120}{number:015}" for number in range(10_000)]
    frame = frames.packed({"verb": "fork", "arguments": {"names": names, "ids": [new_id().hex() for _ in names]}})
    assert len(frame) < frames.REQUEST_BYTES_MAX


def test_what_is_no_unicode_is_read_as_it_was_sent() -> None:
    name = os.fsdecode(b"/vms/\xff")
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, {"error": name, "note": "\0é\U0001f600"}, bytes_max=frames.REPLY_BYTES_MAX)
        assert frames.receive(there, bytes_max=frames.REPLY_BYTES_MAX) == {"error": name, "note": "\0é\U0001f600"}
