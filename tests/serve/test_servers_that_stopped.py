"""A server that does not answer: its caller says so, and who it is; one that is only busy is waited for."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from support.logs import words_of
from support.servers import Serve, onionskin, stop

import onionskin as library
from onionskin.base.sockets import UnixListener, connect_unix
from onionskin.control import client, frames, server
from onionskin.errors import StateError
from onionskin.nbd.server import Limits, Server

MIB = 1 << 20


@contextmanager
def stopped(server: Serve) -> Iterator[int]:
    stop(server)
    try:
        yield server.process.pid
    finally:
        server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "words", [["snapshot", "{}@a"], ["trim", "{}", "0", "4096"], ["stats", "{}"], ["read", "{}", "0", "1"]]
)
def test_a_verb_on_a_server_that_was_stopped_ends_and_says_which_process_it_is(
    vms: Path,
    serve: Callable[..., Serve],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: list[str],
) -> None:
    server = serve(f"{vms}/web")
    monkeypatch.setattr(frames, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(frames, "WORD_SECONDS", 0.05)
    with stopped(server) as pid:
        ended = onionskin(*(word.format(f"{vms}/web") for word in words), status=5)
        assert f"process {pid}, which serves volume 'web', has not answered" in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert words_of(caplog, "onionskin.control.client") == [
            f"waiting for process {pid}, which serves volume 'web': it is stopped; kill -CONT lets it go on (at most 0 s)"
        ]
    monkeypatch.undo()
    onionskin("snapshot", f"{vms}/web@b")


def test_what_only_looks_needs_no_answer_of_a_server_that_was_stopped(vms: Path, serve: Callable[..., Serve]) -> None:
    server = serve(f"{vms}/web")
    onionskin("snapshot", f"{vms}/web@a")
    with stopped(server) as pid:
        assert str(pid) in onionskin("list", vms).stdout
        onionskin("info", f"{vms}/web")
        onionskin("tree", vms)
        onionskin("snapshots", f"{vms}/web")
        onionskin("read", f"{vms}/web@a", "0", "1")


def test_a_server_that_takes_no_more_callers_is_not_waited_for_without_end(tmp_path: Path) -> None:
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(connect_unix(tmp_path / "s", seconds=0.1))
        with pytest.raises(StateError, match="another server listens"):  # and it is not taken for dead
            UnixListener(tmp_path / "s")
    for one in waiting:
        one.close()
    UnixListener(tmp_path / "s").close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    server.exports.add_volume(tmp_path / "vms", "web")
    yield server
    server.close()


def test_a_server_that_is_busy_says_so_until_it_is_done(
    tmp_path: Path, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Semaphore(0)
    received = frames.receive

    def listen(connection: socket.socket, **options: Any) -> Any:
        reply = received(connection, **options)
        if reply and "alive" in reply:
            heard.release()
        return reply

    def flush_slowly(volume: library.Volume) -> None:
        for _ in range(3):
            assert heard.acquire(timeout=300)

    monkeypatch.setattr(client.frames, "receive", listen)
    monkeypatch.setattr(frames, "ALIVE_SECONDS", 0.01)
    with library.connect(tmp_path / "vms", "web") as volume:
        with monkeypatch.context() as slow:
            slow.setattr(library.Volume, "flush", flush_slowly)
            volume.flush()
        assert volume.size_bytes == MIB


def test_a_caller_that_takes_nothing_does_not_hold_the_server_up(tmp_path: Path, served: Server) -> None:
    with library.connect(tmp_path / "vms", "web") as deaf:
        request = frames.request("read", {"offset": 0, "length": MIB})
        for _ in range(3):  # more than its socket holds
            frames.send(deaf._connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
        with library.connect(tmp_path / "vms", "web") as other:
            other.snapshot("a")
            other.merge("a")


@pytest.mark.parametrize(
    ("method", "arguments", "error", "said"),
    [
        ("snapshot", {"name": "a", "note": b"x"}, TypeError, "note is of type bytes"),
        ("snapshot", {"name": 5}, TypeError, "name is of type int"),
        ("snapshot", {"name": "a", "note": None}, TypeError, "note is of type NoneType"),
        ("snapshot", {"name": "a", "note": "x\0"}, ValueError, "zero byte"),
        ("snapshot", {"name": "a", "note": "\ud800"}, ValueError, "not Unicode"),
        ("snapshot", {"name": "a", "note": "x" * (frames.TEXT_BYTES_MAX + 1)}, ValueError, "more than 65536 bytes"),
        ("trim", {"offset": 1.5, "length": 1}, TypeError, "offset is of type float"),
        ("trim", {"offset": True, "length": 1}, TypeError, "offset is of type bool"),
        ("trim", {"offset": -1, "length": 1}, ValueError, "negative"),
        ("discard", {"name": "a", "recursive": 1}, TypeError, "recursive is of type int"),
        ("merge_into_base", {"upto": 5}, TypeError, "give str or None"),
        ("diff", {"a": b"a"}, TypeError, "a is of type bytes"),
    ],
)
def test_an_argument_that_no_row_can_hold_is_refused_by_name_before_anything(
    tmp_path: Path, served: Server, method: str, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with library.connect(tmp_path / "vms", "web") as volume:
        with pytest.raises(error, match=said):
            getattr(volume, method)(**arguments)
        assert volume.snapshots == []
        volume.snapshot("good", note="as installed")  # the connection, the server and the store are well
    with library.Store(tmp_path / "vms") as store:
        assert [one.note for one in store.snapshots("web")] == ["as installed"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "a", "note": "x\0"},
        {"name": "a\0", "note": ""},
        {"name": "a", "note": "\ud800"},
        {"name": "a", "note": "x" * (frames.TEXT_BYTES_MAX + 1)},
        {"name": "a", "note": ["x"]},
        {"name": "a", "note": None},
        {"name": "a/b", "note": ""},
        {"name": "", "note": ""},
    ],
)
def test_a_server_refuses_what_a_caller_of_another_make_sends(
    tmp_path: Path, served: Server, arguments: dict[str, Any]
) -> None:
    with library.connect(tmp_path / "vms", "web") as volume:
        request = {"version": frames.VERSION, "verb": "snapshot", "arguments": arguments}
        frames.send(volume._connection, request, bytes_max=frames.REQUEST_BYTES_MAX)
        reply = frames.receive(volume._connection, bytes_max=frames.REPLY_BYTES_MAX)
        assert reply is not None
        assert reply["error"]["class"] == "ValueError"
        assert len(reply["error"]["message"]) < 300
        assert volume.snapshots == []
    library.Store(tmp_path / "vms").close()


def test_numbers_of_other_kinds_are_taken_for_what_they_are(tmp_path: Path, served: Server) -> None:
    with library.connect(tmp_path / "vms", "web") as volume:
        volume.trim(numpy.int64(4096), numpy.uint32(4096))
        assert volume.read(numpy.int64(0), 1) == b"\0"


def test_more_snapshots_than_a_frame_holds_are_listed(
    tmp_path: Path, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SNAPSHOTS_IN_FRAME", 2)
    with library.connect(tmp_path / "vms", "web") as volume:
        names = [volume.snapshot(f"s{number}", note="x" * 60_000).name for number in range(5)]
        assert [one.name for one in volume.snapshots] == names


def test_an_answer_that_is_too_long_is_an_error_and_the_connection_goes_on(
    tmp_path: Path, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with library.connect(tmp_path / "vms", "web") as volume:
        with monkeypatch.context() as small:
            small.setattr(server, "READ_BYTES_MAX", 1 << 24)
            small.setattr(frames, "REPLY_BYTES_MAX", 1 << 16)
            with pytest.raises(ValueError, match="longer than"):
                volume.read(0, MIB)
        assert volume.read(0, 1) == b"\0"
