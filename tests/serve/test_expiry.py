"""Volumes whose lifetime is over while a whole store is served: the server drops them, and only when nobody uses them.

All in this process but for one; a lifetime is over because the catalog says so, and never because a test waited.
"""

import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.servers import onionskin

import onionskin as library
from onionskin.nbd import server as server_module
from onionskin.nbd.server import Limits, Server
from onionskin.operations import expiry

MIB = 1 << 20
NAMES = ["job-1", "job-2", "job-3"]


class Logged(list[str]):
    """The lines that a server wrote, and who waits for some."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._changed:
            self.append(line)
            self._changed.notify_all()

    def wait_for(self, *lines: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(lines) <= set(self), 300), f"{lines} are not in {list(self)}"


@pytest.fixture
def log() -> Logged:
    return Logged()


@pytest.fixture
def server(log: Logged) -> Iterator[Server]:
    found = Server(limits=Limits(), allow_revert=True, log=log)
    yield found
    found.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[library.Store]:
    with library.Store(tmp_path / "vms") as store:
        with store.create("web", size=MIB) as web:
            web.write(0, b"clean")
            web.snapshot("clean")
        yield store


def expired_forks(store: library.Store) -> None:
    store.fork("web@clean", names=NAMES, lifetime="1h")
    end_lifetime(store, *NAMES)


def end_lifetime(store: library.Store, *names: str) -> None:
    with closing(sqlite3.connect(store.path / "catalog.db", timeout=300)) as catalog:
        catalog.executemany("UPDATE volumes SET expires_ns = 1 WHERE name = ?", [(name,) for name in names])
        catalog.commit()


def client_of(server: Server, export: str) -> NbdClient:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs, "test")
    return NbdClient(ours, export)


def said(name: str) -> str:
    return f"{name}: dropped, because its lifetime is over"


@contextmanager
def running(server: Server) -> Iterator[None]:
    thread = threading.Thread(target=server.run, args=(lambda: None,))
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join()


def test_a_running_server_drops_what_is_over_and_says_so(store: library.Store, server: Server, log: Logged) -> None:
    server.exports.add_store(store.path)
    expired_forks(store)
    with running(server):
        log.wait_for(*map(said, NAMES))
        assert list(store) == ["web"]
    assert store.check() == []


def test_all_that_the_server_holds_for_nobody_go_in_one_transaction(
    store: library.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@clean", names=[*NAMES, "open"], lifetime="1h")
    server.exports.add_store(store.path)
    store.fork("web@clean", names=["unserved"], lifetime="1h")
    end_lifetime(store, *NAMES, "open", "unserved")
    dropped: list[list[str]] = []
    drop = expiry._drop

    def noted(*given: Any) -> Any:
        found = drop(*given)
        dropped.append(found[0])
        return found

    monkeypatch.setattr(expiry, "_drop", noted)
    with client_of(server, "open"):
        server.exports.tidy()
        assert [sorted(names) for names in dropped] == [[*NAMES, "unserved"]]
        assert set(server.exports.table.served) == set(store) == {"web", "open"}


def test_a_volume_whose_export_is_being_made_just_now_stays_where_others_go(
    store: library.Store, server: Server
) -> None:
    store.fork("web@clean", names=NAMES, lifetime="1h")
    server.exports.add_store(store.path)
    end_lifetime(store, *NAMES)
    with server.exports.table.being_made("job-2"):
        server.exports.tidy()
        assert set(server.exports.table.served) == set(store) == {"web", "job-2"}
    server.exports.tidy()
    assert list(store) == list(server.exports.table.served) == ["web"]


def test_what_the_server_holds_for_nobody_is_closed_and_dropped(
    store: library.Store, server: Server, log: Logged
) -> None:
    store.fork("web@clean", names=NAMES, lifetime="1h")
    server.exports.add_store(store.path)
    assert set(server.exports.table.served) == {*NAMES, "web"}
    server.exports.tidy()
    assert len(store) == 4
    end_lifetime(store, *NAMES)
    server.exports.tidy()
    assert list(store) == list(server.exports.table.served) == ["web"] and set(map(said, NAMES)) <= set(log)
    with pytest.raises(ConnectionRefusedError):
        client_of(server, "job-1")
    with client_of(server, "web") as client:
        assert client.read(0, 5) == b"clean"


def test_a_volume_stays_as_long_as_a_client_has_it(
    store: library.Store, server: Server, log: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.exports.add_store(store.path)
    expired_forks(store)
    with client_of(server, "job-2") as client:
        server.exports.tidy()
        assert list(store) == ["job-2", "web"]
        client.write(0, b"still")
        assert client.read(0, 5) == b"still"
    monkeypatch.setattr(
        server_module, "TIDY_SECONDS", 0.01
    )  # it is seen that the client has left, some time after that
    with running(server):
        log.wait_for(said("job-2"))
    assert list(store) == ["web"]


def test_a_volume_stays_as_long_as_a_program_is_connected_to_it(store: library.Store, server: Server) -> None:
    store.fork("web@clean", names=NAMES, lifetime="1h")
    server.exports.add_store(store.path)
    end_lifetime(store, *NAMES)
    with library.connect(store, "job-2") as live:
        live.flush()
        server.exports.tidy()
        assert list(store) == ["job-2", "web"]


def test_what_has_snapshots_forks_or_is_open_elsewhere_stays(store: library.Store, server: Server) -> None:
    server.exports.add_store(store.path)
    store.fork("web@clean", names=NAMES, lifetime="1h")
    with store.open("job-1") as job:
        job.snapshot("failed")
    store.fork("job-2", names=["child"])
    end_lifetime(store, *NAMES)
    with store.open("job-3"):
        server.exports.tidy()
        assert list(store) == ["child", *NAMES, "web"]
    server.exports.tidy()
    assert list(store) == ["child", "job-1", "job-2", "web"]


def test_who_asks_for_a_volume_that_is_being_dropped_waits_and_hears_that_it_is_gone(
    store: library.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fork("web@clean", names=NAMES, lifetime="1h")
    server.exports.add_store(store.path)
    end_lifetime(store, "job-1")
    asked, answers = threading.Event(), list[str]()
    real, wait_for = expiry.drop, server.exports.table.changed.wait_for

    def ask() -> None:
        try:
            client_of(server, "job-1").close()
            answers.append("there")
        except ConnectionRefusedError:
            answers.append("gone")

    def waits(condition: Callable[[], bool], *more: float) -> bool:
        asked.set()
        return wait_for(condition, *more)

    def drop(*arguments: object) -> list[str]:
        if not arguments[1]:
            return real(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(server.exports.table.changed, "wait_for", waits)
        client.start()
        assert asked.wait(300)
        return real(*arguments)  # type: ignore[arg-type]

    client = threading.Thread(target=ask)
    monkeypatch.setattr(expiry, "drop", drop)
    server.exports.tidy()
    client.join()
    assert answers == ["gone"] and "job-1" not in store


def test_many_go_some_at_a_time(store: library.Store, server: Server, log: Logged) -> None:
    server.exports.add_store(store.path)
    names = store.fork("web@clean", count=150, lifetime="1h")
    end_lifetime(store, *names)
    server.exports.tidy()
    assert len(store) == 151 - expiry._AT_ONCE and server._tidying.is_set()
    with running(server):
        log.wait_for(*map(said, names))
    assert list(store) == ["web"]


def test_a_server_keeps_them_where_it_is_told_to_and_where_it_does_not_serve_the_whole_store(
    store: library.Store,
) -> None:
    for whole in (True, False):
        server = Server(limits=Limits(), allow_revert=True, log=Logged(), expire=not whole)
        if whole:
            server.exports.add_store(store.path)
            expired_forks(store)
        else:
            server.exports.add_volume(store.path, "web")
        server.exports.tidy()
        server.close()
        assert len(store) == 4


def test_the_command_has_an_option_for_it(store: library.Store) -> None:
    assert "--no-expire" in onionskin("serve", "--help").stdout
