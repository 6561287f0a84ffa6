"""A server of a whole store that has more volumes than descriptors, and one that clients come to and leave for long."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

import pytest
from support.nbd_client import NbdClient
from support.servers import Serve
from support.serving import serving

import onionskin
from onionskin.base.waiting import within
from onionskin.nbd import exports as exports_module
from onionskin.nbd.server import Limits, Server

BLOCK = 4096
DESCRIPTORS = 128
FORKS = 120


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        with store.create("web", size=64 * BLOCK) as web:
            web.write(0, b"clean")
            web.snapshot("clean")
        yield store


def limit_descriptors(soft: int, hard: int) -> Callable[[], None]:
    return lambda: setrlimit(RLIMIT_NOFILE, (soft, hard))


def test_a_server_has_all_descriptors_that_the_system_lets_it_have(
    store: onionskin.Store, serve: Callable[..., Serve]
) -> None:
    hard = getrlimit(RLIMIT_NOFILE)[1]
    server = serve(store.path, preexec_fn=limit_descriptors(256, hard))
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    found = re.search(r"^Max open files\s+(\S+)\s+(\S+)", limits, re.MULTILINE)
    assert found and found[1] == found[2]


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_store_of_more_volumes_than_descriptors_is_served(
    store: onionskin.Store, serve: Callable[..., Serve], when: str
) -> None:
    names: list[str] = []
    if when == "before":
        names = store.fork("web@clean", count=FORKS)
    server = serve(store.path, preexec_fn=limit_descriptors(DESCRIPTORS, DESCRIPTORS))
    names = names or store.fork("web@clean", count=FORKS)
    for name in names:
        with server.client(name) as client:
            assert client.read(0, 5) == b"clean"
            client.write(BLOCK, name.encode())
            client.flush()
    for name in (names[0], names[-1]):
        with server.client(name) as client:
            assert client.read(BLOCK, len(name)) == name.encode()
    assert server.terminate() == 0
    assert store.check() == []


def test_a_fork_that_no_client_has_had_for_a_while_is_given_up_with_all_that_was_written(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    with contextlib.closing(server):
        server.exports.add_store(store.path)
        store.fork("web@clean", names=["job"])
        with serving(server._nbd, tmp_path / "socket"):
            monkeypatch.setattr(exports_module, "IDLE_SECONDS", -1.0)

            def is_served() -> bool:
                server.exports.tidy()
                return "job" in server.exports.table.served

            with NbdClient.unix(tmp_path / "socket", "job") as client:
                client.write(BLOCK, b"written")
                assert is_served()
            assert within(300, lambda: not is_served())  # it is seen that the client has left, some time after that
            with NbdClient.unix(tmp_path / "socket", "job") as client:
                assert client.read(BLOCK, 7) == b"written"
            with onionskin.connect(store, "job") as live:
                live.flush()
                assert is_served()
            assert within(300, lambda: not is_served())
            assert "web" in server.exports.table.served
            store.delete("job")
