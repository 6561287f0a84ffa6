"""Turns on the processor: whoever works on a snapshot gives way to writers, and holds them no longer than it must."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.serving import served_volume
from support.turns import turn_ns

import onionskin
from onionskin.control import groups
from onionskin.kernels._volume import LongTurns, ShortTurns, cut_heads
from onionskin.nbd.server import Limits, Server
from onionskin.operations import reclaim, seal

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def long() -> int:
    """How long long turns are here; older kernels know none, and say 0."""
    before = turn_ns()
    with LongTurns():
        found = turn_ns()
    assert turn_ns() == before
    assert found > before or found == 0
    return found


@pytest.fixture
def short() -> int:
    """How long short turns are here; older kernels know none, and say 0."""
    before = turn_ns()
    with ShortTurns():
        found = turn_ns()
    assert turn_ns() == before
    assert found < before or found == 0
    return found


Noted = Callable[[Any, str], list[int]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """Note the turns of the thread that makes a call."""

    def note(owner: Any, name: str) -> list[int]:
        found: list[int] = []
        call = getattr(owner, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            found.append(turn_ns())
            return call(*arguments, **named)

        monkeypatch.setattr(owner, name, noting)
        return found

    return note


def test_turns_end_with_what_they_were_taken_for(short: int, long: int) -> None:
    before = turn_ns()
    with ShortTurns():
        with LongTurns():
            assert turn_ns() == long
        assert turn_ns() == short
    assert turn_ns() == before


def test_the_thread_that_answers_a_client_has_short_turns(tmp_path: Path, short: int) -> None:
    with served_volume(tmp_path, size=MIB) as (at, _):
        answering: list[int] = []
        at.server.on_known_export = lambda name: answering.append(threading.get_native_id()) or True
        with NbdClient.unix(at.path, "web") as client:
            client.write(0, bytes(BLOCK))
            assert turn_ns(answering[0]) == short


def test_a_group_is_taken_in_short_turns_at_both_ends(tmp_path: Path, short: int, noted: Noted) -> None:
    before = turn_ns()
    here, there = noted(seal, "begin_heads"), noted(groups, "cut_when_told")
    finding = noted(groups, "reach")
    with onionskin.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
        try:
            server.exports.add_volume(tmp_path / "vms", "web")
            with store.create("db", size=MIB):
                store.snapshot_group({"web": "s", "db": "s"})
        finally:
            server.close()
    assert (set(here), set(there), set(finding)) == ({short}, {short}, {short})
    assert turn_ns() == before


def test_who_holds_the_writers_of_a_group_has_short_turns_whatever_it_had(short: int, long: int) -> None:
    words = (b"hold", b"held", b"cut", b"done", 300.0)
    here, there = socket.socketpair()
    leading: list[int] = []

    def lead() -> None:
        leading.append(threading.get_native_id())
        with LongTurns():
            assert cut_heads([], [], [here.fileno()], words) is None
            leading.append(turn_ns())

    with here, there:
        there.settimeout(300)
        thread = threading.Thread(target=lead)
        thread.start()
        assert there.recv(4) == b"hold"
        while_held = turn_ns(leading[0])
        there.sendall(b"held")
        assert there.recv(3) == b"cut"
        there.sendall(b"done")
        thread.join()
    assert (while_held, leading[1]) == (short, long)


def test_a_snapshot_waits_in_short_turns_and_computes_in_long_ones(
    tmp_path: Path, short: int, long: int, noted: Noted
) -> None:
    before = turn_ns()
    waiting, computing = noted(seal, "begin_heads"), noted(seal, "write_sealed")
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size=MIB) as web:
        web.snapshot("s")
    assert (set(waiting), set(computing)) == ({short}, {long})
    assert turn_ns() == before


def test_work_in_the_background_is_done_in_long_turns(tmp_path: Path, long: int, noted: Noted) -> None:
    found = noted(reclaim, "do_work")
    with onionskin.Store(tmp_path / "vms") as store:
        reclaim.work_in_background(store._opened)
    assert set(found) == {long}


def test_a_server_that_has_all_volumes_of_a_group_need_not_wait_between_hold_and_cut() -> None:
    here, there = socket.socketpair()

    def follow() -> None:
        said = b""
        while said != b"holdcut":  # before it has answered anything
            said += there.recv(7 - len(said))
        there.sendall(b"helddone")

    with here, there:
        there.settimeout(300)
        thread = threading.Thread(target=follow)
        thread.start()
        assert cut_heads([], [], [here.fileno()], (b"hold", b"held", b"cut", b"done", 300.0)) is None
        thread.join()
