"""Threads that take turns: one after the other, and none is kept out by one that hangs."""

import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.nbd_client import NbdClient

from onionskin import Store, Volume
from onionskin.nbd import exports, turns
from onionskin.nbd.server import Limits, Server
from onionskin.nbd.turns import Turns


def test_threads_work_one_after_the_other() -> None:
    taken, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with taken.take("web"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0)


def test_who_waits_for_one_that_hangs_goes_on_and_leaves_it_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.01)
    taken = Turns()
    with taken.take("web"):
        for _ in range(2):
            with taken.take("web"):
                pass
        assert taken._taken.locked()
    assert not taken._taken.locked()


def test_a_turn_ends_where_its_work_fails() -> None:
    taken = Turns()
    with pytest.raises(ZeroDivisionError), taken.take("web"):
        raise ZeroDivisionError
    assert not taken._taken.locked()


def test_a_volume_is_opened_in_a_turn_and_one_that_hangs_keeps_no_other_client_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.01)
    open_to_serve, hangs, ended = exports.open_to_serve, threading.Event(), threading.Event()
    had_turn: list[bool] = []

    def open_it(store: Store, name: str, **how: bool) -> Volume:
        if name == "slow":
            had_turn.append(server.exports._turns._taken.locked())
            hangs.set()
            assert ended.wait(300)
        return open_to_serve(store, name, **how)

    def read(name: str) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(300)
        server.serve(theirs, "test")
        with NbdClient(ours, name) as client:
            assert client.read(0, 1) == b"\0"

    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(tmp_path / "vms") as store:
            store.create("web", size="1M").close()
            server.exports.add_store(tmp_path / "vms")
            monkeypatch.setattr(exports, "open_to_serve", open_it)
            for name in ("slow", "quick"):
                store.create(name, size="1M").close()
        slow = threading.Thread(target=read, args=("slow",))
        slow.start()
        assert hangs.wait(300)
        read("quick")
        ended.set()
        slow.join()
    assert had_turn == [True]
