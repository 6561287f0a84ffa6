"""A thread whose client has gone waits for a later one: for a bounded time, and with a bounded number of others."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.nbd_client import NbdClient

from onionskin import Store, Volume
from onionskin.base.waiting import within
from onionskin.nbd._nbd import NbdServer

KEPT_MAX = 128
FUTEX_WAIT_BITSET = 9


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Volume]:
    with Store(tmp_path / "vms") as store, store.create("web", size="1M") as volume:
        yield volume


@contextmanager
def _server(web: Volume, *, kept_seconds: float = 300) -> Iterator[tuple[NbdServer, list[int]]]:
    """A server, and the threads that asked for each client's export, in order."""
    asked: list[int] = []
    server = NbdServer(connections_max=256, turn_seconds=300, kept_seconds=kept_seconds)
    server.add_export("web", web._path, read_only=True)
    server.on_known_export = lambda name: asked.append(threading.get_native_id()) or True
    try:
        yield server, asked
    finally:
        server.stop(grace_seconds=0)


def _connected(server: NbdServer) -> socket.socket:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs.detach(), "test")
    return ours


def _come_and_go(server: NbdServer) -> None:
    others = len(server.connections())
    with NbdClient(_connected(server), "web") as client:
        assert client.read(0, 1) == b"\0"
    assert within(300, lambda: len(server.connections()) == others)


def _threads() -> set[int]:
    return {int(one) for one in os.listdir("/proc/self/task")}


def test_a_later_client_gets_the_thread_of_a_former_one(web: Volume) -> None:
    with _server(web) as (server, asked):
        for _ in range(5):
            before = len(asked)
            _come_and_go(server)
            # It is gone from the list a moment before its thread waits.
            assert len(asked) == before + 1 and within(300, lambda: _is_asleep(asked[-1]))
    assert len(set(asked)) == 1


def _is_asleep(thread: int) -> bool:
    return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def _waits_for_client(thread: int) -> bool:
    """Whether it waits as `onion_nbd_await` does: for a lock, which it takes before that, a thread waits in another way."""
    what = Path(f"/proc/self/task/{thread}/syscall").read_text().split()
    return len(what) > 2 and int(what[2], 16) & 0x7F == FUTEX_WAIT_BITSET


def test_clients_that_say_nothing_keep_no_thread_from_others(web: Volume) -> None:
    with _server(web) as (server, asked), ExitStack() as stack:
        _come_and_go(server)
        for _ in range(20):
            stack.enter_context(_connected(server))
        _come_and_go(server)
        assert len(asked) == 2 and len(server.connections()) == 20


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_a_thread_ends_where_no_client_comes(web: Volume, seconds: float) -> None:
    with _server(web, kept_seconds=seconds) as (server, asked):
        for _ in range(3):
            _come_and_go(server)
            assert within(300, lambda: asked[-1] not in _threads())


def test_no_more_than_so_many_threads_wait(web: Volume) -> None:
    with _server(web) as (server, _), ExitStack() as stack:
        before = _threads()
        for _ in range(KEPT_MAX + 20):
            stack.enter_context(NbdClient(_connected(server), "web"))
        assert len(_threads() - before) == KEPT_MAX + 20
        stack.close()
        assert within(300, lambda: len(_threads() - before) == KEPT_MAX)


def test_threads_that_were_begun_before_serve_the_clients_that_come(web: Volume) -> None:
    with _server(web) as (server, asked), ExitStack() as stack:
        before = _threads()
        server.begin_threads(6)
        assert within(
            300, lambda: len(_threads() - before) == 6
        )  # those that were begun only to be left to others have ended
        begun = _threads() - before
        server.begin_threads(6)  # they are there
        assert _threads() - before == begun
        assert within(300, lambda: all(map(_waits_for_client, begun)))
        for _ in range(6):
            stack.enter_context(NbdClient(_connected(server), "web"))
        assert {*asked} == begun
        stack.enter_context(NbdClient(_connected(server), "web"))  # and one more gets a thread of its own
        assert len({*asked}) == 7


_WITH_LITTLE_MEMORY = """
import resource, threading
from onionskin.nbd._nbd import NbdServer
server, end = NbdServer(), threading.Event()
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = taken + 5 * (stack if stack > 0 else 2 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
server.begin_threads(128)
threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
end.set()
server.stop()
"""


def test_where_the_system_gives_few_threads_the_rest_of_the_process_can_still_start_some() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _WITH_LITTLE_MEMORY],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # a thread takes its stack, and not more
        capture_output=True,
        timeout=300,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_so_many_threads_as_are_to_be_ready_wait_however_long_no_client_comes(web: Volume, seconds: float) -> None:
    with _server(web, kept_seconds=seconds) as (server, _), ExitStack() as stack:
        before = _threads()
        server.begin_threads(3)
        for _ in range(9):
            stack.enter_context(NbdClient(_connected(server), "web"))
        assert len(_threads() - before) >= 9  # and one for each client that came before all of the three waited
        stack.close()
        assert within(300, lambda: len(_threads() - before) == 3)  # the time of the last one is over, and so is theirs
        left = _threads() - before
        for _ in range(3):
            assert within(300, lambda: all(map(_waits_for_client, left)))
            _come_and_go(server)
        assert _threads() - before == left


def test_a_stopped_server_and_the_child_of_a_fork_begin_no_threads(web: Volume) -> None:
    with _server(web) as (server, _):
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            try:
                server.begin_threads(3)
                os._exit(len(_threads()) != 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        server.begin_threads(3)
        server.stop()
        before = _threads()
        server.begin_threads(3)
        assert not _threads() - before


def test_a_stop_ends_the_threads_that_wait_and_refuses_later_clients(web: Volume) -> None:
    with _server(web) as (server, asked):
        _come_and_go(server)
        server.stop()
        assert within(300, lambda: asked[-1] not in _threads())
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(Exception, match="stopped"):
            server.serve(theirs.detach(), "test")


def test_the_child_of_a_fork_stops_a_server_whose_threads_are_its_parents(web: Volume) -> None:
    with _server(web) as (server, asked):
        _come_and_go(server)
        assert within(300, lambda: _is_asleep(asked[-1]))
        _stop_in_a_child(server)
        _come_and_go(server)
    assert len(set(asked)) == 1


def test_the_child_of_a_fork_that_stops_a_server_leaves_its_parents_clients_alone(web: Volume) -> None:
    with _server(web) as (server, _), NbdClient(_connected(server), "web") as client:
        _stop_in_a_child(server)
        assert client.read(0, 1) == b"\0"


def _stop_in_a_child(server: NbdServer) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        try:
            server.stop(grace_seconds=0)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
