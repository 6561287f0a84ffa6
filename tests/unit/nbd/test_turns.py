"""Clients that ask for unknown exports take turns: one after the other, and none is kept out by one that hangs."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from support.nbd_client import NbdClient

from onionskin import Store, Volume
from onionskin.base.waiting import within
from onionskin.nbd import exports
from onionskin.nbd import server as servers
from onionskin.nbd._nbd import NbdServer
from onionskin.nbd.server import Limits, Server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Volume]:
    with Store(tmp_path / "vms") as store, store.create("web", size="1M") as volume:
        yield volume


@contextmanager
def _server(find: Callable[[NbdServer, str], bool], turn_seconds: float = 300) -> Iterator[NbdServer]:
    server = NbdServer(turn_seconds=turn_seconds)
    server.on_unknown_export = lambda name: find(server, name)
    try:
        yield server
    finally:
        server.stop()


def _ask(server: NbdServer, name: str) -> bool:
    """Whether a client gets the export."""
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs.detach(), "test")
    try:
        with NbdClient(ours, name) as client:
            return client.read(0, 1) == b"\0"
    except OSError:
        return False


@contextmanager
def _asking(server: NbdServer, *names: str) -> Iterator[dict[str, bool]]:
    """Have clients ask at once. What they got is complete behind the block."""
    got: dict[str, bool] = {}
    threads = [threading.Thread(target=lambda one=name: got.update({one: _ask(server, one)})) for name in names]
    for thread in threads:
        thread.start()
    with ExitStack() as stack:
        for thread in threads:
            stack.callback(thread.join)
        yield got


def test_one_client_after_the_other_asks() -> None:
    inside, most, names = 0, 0, [f"job-{number}" for number in range(32)]

    def find(server: NbdServer, name: str) -> bool:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        assert within(300, lambda: len(server.asked()[0]) + len(done) == len(names) - 1)
        done.append(name)
        inside -= 1
        return False

    done: list[str] = []
    with _server(find) as server, _asking(server, *names) as got:
        pass
    assert (most, inside) == (1, 0)
    assert sorted(done) == sorted(names) and not any(got.values())


def test_who_waits_for_one_that_hangs_asks_too() -> None:
    hangs, ended = threading.Event(), threading.Event()

    def find(server: NbdServer, name: str) -> bool:
        if name == "slow":
            hangs.set()
            assert ended.wait(300)
        return False

    with _server(find, turn_seconds=0.01) as server, _asking(server, "slow"):
        assert hangs.wait(300)
        for _ in range(3):
            assert not _ask(server, "quick")
        ended.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_turn_ends_where_its_work_fails() -> None:
    def find(server: NbdServer, name: str) -> bool:
        raise ZeroDivisionError

    with _server(find) as server:
        assert not any(_ask(server, "web") for _ in range(3))


def test_who_is_told_that_an_export_was_found_goes_on_while_another_one_has_the_turn(web: Volume) -> None:
    asked: list[str] = []
    has_read = threading.Event()

    def find(server: NbdServer, name: str) -> bool:
        asked.append(name)
        if len(asked) == 1:
            assert within(300, lambda: sorted(server.asked()[0]) == sorted({"one", "two", "three"} - {name}))
            for other in ("one", "two", "three"):
                server.add_export(other, web._path, read_only=True)
            for other in {"one", "two", "three"} - {name}:
                server.found([other], server.asked()[1])
            assert within(300, lambda: len(got) == 2)
            has_read.set()
        return True

    with _server(find) as server, _asking(server, "one", "two", "three") as got:
        assert has_read.wait(300)
    assert got == dict.fromkeys(("one", "two", "three"), True)
    assert len(asked) == 1


def test_who_asks_behind_what_was_found_asks_by_itself(web: Volume) -> None:
    asked: list[str] = []

    def find(server: NbdServer, name: str) -> bool:
        asked.append(name)
        if name == "first":
            before = server.asked()[1]
            begun.set()
            assert within(300, lambda: server.asked()[0] == ["web"])
            server.add_export("web", web._path, read_only=True)
            server.found(["web"], before)
            assert server.asked()[0] == ["web"]
        return name == "web"

    begun = threading.Event()
    with _server(find) as server, _asking(server, "first"):
        assert begun.wait(300)
        assert _ask(server, "web")
    assert asked == ["first", "web"]


def test_an_export_that_has_got_another_name_before_its_client_looked_is_asked_for_again(web: Volume) -> None:
    asked: list[str] = []

    def find(server: NbdServer, name: str) -> bool:
        asked.append(name)
        if len(asked) == 2:
            server.add_export(name, web._path, read_only=True)
        return True

    with _server(find) as server:
        assert _ask(server, "web")
    assert asked == ["web", "web"]


def test_only_names_that_something_can_have_are_said_to_be_asked_for() -> None:
    asked: list[list[str]] = []

    def find(server: NbdServer, name: str) -> bool:
        if name == "first":
            begun.set()
            assert waits.wait(300)
            assert within(300, lambda: len(server.connections()) == 4 and len(server.asked()[0]) == 2)
            asked.append(server.asked()[0])
        return False

    begun, waits = threading.Event(), threading.Event()
    with _server(find) as server, _asking(server, "first"):
        assert begun.wait(300)
        with _asking(server, "web", "web\0web", "web@clean"):
            waits.set()
    assert [sorted(names) for names in asked] == [["web", "web@clean"]]


def test_a_volume_is_opened_in_a_turn_and_one_that_hangs_keeps_no_other_client_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "TURN_SECONDS", 0.01)
    open_to_serve, hangs, ended = exports.open_to_serve, threading.Event(), threading.Event()

    def open_it(store: Store, name: str, **how: bool) -> Volume:
        if name == "slow":
            hangs.set()
            assert ended.wait(300)
        return open_to_serve(store, name, **how)

    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(tmp_path / "vms") as store:
            store.create("web", size="1M").close()
            server.exports.add_store(tmp_path / "vms")
            monkeypatch.setattr(exports, "open_to_serve", open_it)
            for name in ("slow", "quick"):
                store.create(name, size="1M").close()
        with _asking(server._nbd, "slow") as got:
            assert hangs.wait(300)
            assert _ask(server._nbd, "quick")
            ended.set()
        assert got == {"slow": True}
