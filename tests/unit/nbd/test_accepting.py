"""Clients are accepted in C, all that wait at once; but whoever accepts them is never kept from ending, or from its log."""

import select
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from support.nbd_client import NbdClient

from onionskin.base.sockets import UnixListener
from onionskin.base.waiting import within
from onionskin.nbd._nbd import NbdServer


def _is_waited_for(listener: UnixListener) -> bool:
    poll = select.poll()
    poll.register(listener.socket, select.POLLIN)
    return bool(poll.poll(0))


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(300)
    connection.connect(str(path))
    return connection


def test_a_client_that_waits_for_room_is_the_last_that_is_taken(tmp_path: Path) -> None:
    ended, asked = threading.Event(), threading.Semaphore(0)

    def find(name: str) -> bool:
        asked.release()
        return not ended.wait(300)

    def ask() -> None:
        with suppress(OSError):
            NbdClient(_connected(tmp_path / "nbd"), "web")

    server, listener = NbdServer(connections_max=1, turn_seconds=0), UnixListener(tmp_path / "nbd")
    server.on_unknown_export = find
    listener.socket.setblocking(False)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    try:
        # As many as may be: one has the only place, and one gave way to it and is not gone yet.
        for thread in threads:
            thread.start()
            assert within(300, lambda: _is_waited_for(listener))
            server.accept(listener.socket.fileno())
            assert asked.acquire(timeout=300)
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(_connected(tmp_path / "nbd"))
            server.accept(listener.socket.fileno())
            assert _is_waited_for(listener)
    finally:
        ended.set()
        listener.close()
        server.stop()
        for thread in threads:
            thread.join()


def test_more_than_a_hundred_clients_that_do_not_wait_may_come_before_one_is_accepted(tmp_path: Path) -> None:
    count = min(300, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    listener = UnixListener(tmp_path / "nbd")
    with ExitStack() as stack:
        stack.callback(listener.close)
        for _ in range(count):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)  # as libnbd's
            connection.connect(str(tmp_path / "nbd"))
