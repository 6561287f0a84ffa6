"""A server that does what it was asked for, and whose answer does not come: the caller finds what was done.

To be told of a failure, and to ask again, may do harm: a second revert drops what was written behind the first one.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.control import server as control_server
from onionskin.control.client import LiveVolume
from onionskin.nbd.server import Limits, Server

SECONDS = 300.0  # for which a test waits for what must come

CHANGES: dict[str, Callable[[LiveVolume], None]] = {
    "revert": lambda live: live.revert("a"),
    "discard": lambda live: live.discard("b"),
    "discard of what it stands on": lambda live: live.discard("a", recursive=True),
    "merge": lambda live: live.merge(["a", "b"]),
    "rename": lambda live: live.rename("www"),
}
DONE = {
    "revert": ("web", ["a", "b"], b"a"),
    "discard": ("web", ["a"], b"b"),
    "discard of what it stands on": ("web", [], b"a"),
    "merge": ("web", [], b"c"),
    "rename": ("www", ["a", "b"], b"c"),
}
BEFORE = ("web", ["a", "b"], b"c")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "vms") as store:
        with store.create("web", size="64K") as web:
            for name in "ab":
                web.write(0, name.encode())
                web.snapshot(name)
            web.write(0, b"c")
        yield store


@pytest.fixture
def server(store: onionskin.Store) -> Iterator[Server]:
    """Serve the volume in this process, with a store of its own."""
    server = Server(limits=Limits(), allow_revert=True, log=lambda line: None)
    try:
        server.exports.add_volume(store.path, "web")
        yield server
    finally:
        server.close()


def state_of(store: onionskin.Store, server: Server) -> tuple[str, list[str], bytes]:
    (name,) = store
    (served,) = server.exports.table.served.values()
    return name, [one.name for one in store.snapshots(name)], served.volume.read(0, 1)


def lose_answers(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> None:
    """Have servers end in place of each answer, as one does that is killed."""
    send = control_server._Session._send

    def go_away(session: Any, value: dict[str, Any]) -> None:
        if not value.keys() & {"result", "error"}:
            return send(session, value)
        before()
        session._connection.close()
        raise OSError("it is gone")

    monkeypatch.setattr(control_server._Session, "_send", go_away)


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_whose_answer_is_lost_is_known_to_be_done(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, what: str, is_closed: bool
) -> None:
    lose_answers(monkeypatch)
    with onionskin.connect(store.path if is_closed else store, "web") as live:
        CHANGES[what](live)
        assert live.name == DONE[what][0]
    assert state_of(store, server) == DONE[what]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_a_server_did_not_get_to_is_a_failure(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise OSError("it dies")

    lose_answers(monkeypatch)
    monkeypatch.setattr(control_server._Session, what.split()[0], die)
    with onionskin.connect(store, "web") as live, pytest.raises(onionskin.StateError, match="went away"):
        CHANGES[what](live)
    assert state_of(store, server) == BEFORE


@pytest.mark.parametrize("what", ["revert", "merge"])
def test_a_change_that_others_went_on_from_is_not_said_to_be_done_or_not(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (served,) = server.exports.table.served.values()

    def take_one_more() -> None:
        served.volume.snapshot("later")

    if what == "merge":  # one of two is dropped by somebody else, and the server does nothing
        monkeypatch.setattr(control_server._Session, "merge", lambda session, name, guid: served.volume.merge("a"))
        lose_answers(monkeypatch)
    else:
        lose_answers(monkeypatch, take_one_more)
    with onionskin.connect(store, "web") as live, pytest.raises(onionskin.StateError, match="cannot be told; look at"):
        CHANGES[what](live)


@pytest.mark.parametrize("what", CHANGES)
def test_a_server_that_goes_on_after_its_caller_gave_up_changes_nothing(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As one that was stopped (SIGSTOP) for longer than a caller waits, and is let go on later."""
    has_begun, may_go_on = threading.Event(), threading.Event()
    verb = what.split()[0]
    real, hang_up = getattr(control_server._Session, verb), LiveVolume._hang_up

    def wait(session: Any, **given: Any) -> Any:
        has_begun.set()
        assert may_go_on.wait(SECONDS)
        return real(session, **given)

    def lose_patience(live: LiveVolume, deadline: float | None = None) -> dict[str, Any]:
        assert has_begun.wait(SECONDS)
        raise onionskin.StateError("it has not answered")

    def hang_up_and_tell(live: LiveVolume) -> None:
        hang_up(live)
        may_go_on.set()

    with onionskin.connect(store, "web") as live, monkeypatch.context() as patch:
        patch.setattr(control_server._Session, verb, wait)
        patch.setattr(LiveVolume, "_receive", lose_patience)
        patch.setattr(LiveVolume, "_hang_up", hang_up_and_tell)
        with pytest.raises(onionskin.StateError, match="it has not answered"):
            CHANGES[what](live)
        (served,) = server.exports.table.served.values()
        served.control.join(SECONDS)
    assert state_of(store, server) == BEFORE


def test_a_snapshot_that_is_not_there_is_refused_by_the_server_as_before(
    store: onionskin.Store, server: Server
) -> None:
    with onionskin.connect(store, "web") as live:
        for act in (live.revert, live.discard, live.merge):
            with pytest.raises(onionskin.SnapshotNotFoundError):
                act("none")
        with pytest.raises(onionskin.VolumeExistsError):
            live.rename("web")
        live.merge("a")  # the connection goes on
