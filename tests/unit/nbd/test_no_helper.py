"""A slow request, for which a connection begins a second thread, is done also where there is none to be had."""

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.nbd_client import NbdClient

from onionskin import Store
from onionskin.nbd._nbd import NbdServer

ROOM_BYTES = 4 << 20  # less than the stack of a thread


@contextmanager
def _no_room_for_a_thread() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_client_is_answered_where_there_is_no_thread_for_its_flush(tmp_path: Path) -> None:
    with Store(tmp_path / "vms") as store, store.create("web", size="1M") as web:
        server = NbdServer()
        server.add_export("web", web._path, read_only=False)
        ours, theirs = socket.socketpair()
        ours.settimeout(300)
        server.serve(theirs.detach(), "test")
        with NbdClient(ours, "web") as client:
            client.write(0, b"x" * 4096)
            with _no_room_for_a_thread():
                client.flush()
                client.write(4096, b"y" * 4096)
                client.flush()
            client.flush()
            assert client.read(0, 8192) == b"x" * 4096 + b"y" * 4096
            counters = server.counters("web")
            assert counters["requests"]["flush"] == 3 and counters["errors"] == 0
        server.stop()
