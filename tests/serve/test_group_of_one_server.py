"""Groups whose volumes one server has: it takes them itself, and its caller knows in the end what was taken."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import Serve, stop

import onionskin
from onionskin.catalog.tree import Snapshot
from onionskin.control import frames, groups, lost_answers
from onionskin.control.client import LiveVolume
from onionskin.nbd.server import Limits, Server
from onionskin.operations import seal, snapshots

MIB = 1 << 20
NAMES = ("web", "db", "log")
SECONDS = 300.0  # for which a test waits for what must come


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store with three empty volumes."""
    with onionskin.Store(tmp_path / "vms") as store:
        for name in NAMES:
            store.create(name, size=MIB).close()
        yield store


@pytest.fixture
def server(store: onionskin.Store) -> Iterator[Server]:
    """Serve all volumes in this process, with a store of their own."""
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    try:
        for name in NAMES:
            server.exports.add_volume(store.path, name)
        yield server
    finally:
        server.close()


def volume_of(server: Server, name: str) -> onionskin.Volume:
    return server.exports.table.served[name].volume


def stamp(server: Server, number: int) -> None:
    for name in NAMES:
        volume_of(server, name).write(0, number.to_bytes(8, "little"))


def numbers_in(store: onionskin.Store, snapshot: str) -> set[int]:
    found = set()
    for name in NAMES:
        with store.open(name, snapshot=snapshot) as view:
            found.add(int.from_bytes(view.read(0, 8), "little"))
    return found


def names_in(store: onionskin.Store) -> list[list[str]]:
    return [[one.name for one in store.snapshots(name)] for name in NAMES]


def everything_goes_on(store: onionskin.Store, server: Server) -> None:
    """Check that all volumes have the heads of the catalog, and take writes and snapshots."""
    stamp(server, 9)
    before = names_in(store)
    store.snapshot_group(dict.fromkeys(NAMES, "after"))
    assert numbers_in(store, "after") == {9}
    assert names_in(store) == [[*names, "after"] for names in before]
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


def test_the_server_of_all_volumes_takes_their_snapshots_itself(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp(server, 1)
    monkeypatch.delattr(groups, "seal_for_caller")
    taken = store.snapshot_group({"web": "s", "db": "s", "log": None}, note="all")
    stamp(server, 2)
    assert list(taken) == ["web", "db", "log"]
    assert {name: [one] for name, one in taken.items()} == {name: store.snapshots(name) for name in NAMES}
    assert {one.note for one in taken.values()} == {"all"}
    store.rename_snapshot("log", taken["log"].name, "s")
    assert numbers_in(store, "s") == {1}
    everything_goes_on(store, server)


def test_more_snapshots_than_a_frame_holds_are_all_returned(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onionskin.control.server.SNAPSHOTS_IN_FRAME", 1)
    taken = store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert [*taken.values()] == [store.snapshots(name)[0] for name in NAMES]


def test_a_name_that_is_taken_in_one_volume_is_given_to_none(store: onionskin.Store, server: Server) -> None:
    with onionskin.connect(store, "db") as live:
        live.snapshot("s")
    with pytest.raises(onionskin.SnapshotExistsError, match="'db'"):
        store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert names_in(store) == [[], ["s"], []]
    everything_goes_on(store, server)


def test_a_server_that_does_not_know_the_verb_is_led_step_by_step(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = frames.checked_request

    def check_as_before(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return checked(request | {"verb": request["verb"].replace("snapshot_group", "a verb of later")})

    monkeypatch.setattr(frames, "checked_request", check_as_before)
    stamp(server, 1)
    assert list(store.snapshot_group(dict.fromkeys(NAMES, "s"))) == list(NAMES)
    assert numbers_in(store, "s") == {1}


def test_a_server_that_has_more_descriptors_than_select_takes_takes_snapshots_of_a_group_too(
    store: onionskin.Store, server: Server, many_descriptors: None
) -> None:
    stamp(server, 1)
    store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert numbers_in(store, "s") == {1}


def test_the_log_of_a_server_names_a_few_volumes_of_a_group_and_no_ids(tmp_path: Path) -> None:
    lines: list[str] = []
    names = [f"web-{number:02}" for number in range(12)]
    with onionskin.Store(tmp_path / "vms") as store:
        for name in names:
            store.create(name, size=MIB).close()
        server = Server(limits=Limits(), allow_revert=False, log=lines.append)
        try:
            for name in names:
                server.exports.add_volume(store.path, name)
            lines.clear()
            store.snapshot_group(dict.fromkeys(names, "s"), note="all" + "." * 1000)
        finally:
            server.close()
    (line,) = [line for line in lines if "snapshot_group" in line]
    assert f"snapshot_group {', '.join(f'{name}@s' for name in names[:10])} and 2 more all..." in line
    assert len(line) < 500


# ---- a caller that does not hear the outcome ----


class Meeting:
    """A step of the server that reaches a point, and goes on when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self._real: Callable[..., Any] = getattr(seal, step)
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(seal, step, self._meet)

    def _meet(self, *arguments: Any) -> Any:
        self.is_reached.set()
        assert self.may_go_on.wait(SECONDS)
        return self._real(*arguments)


def lose_patience(monkeypatch: pytest.MonkeyPatch, at: threading.Event) -> None:
    """Have the caller wait for its server only until then."""
    receive = LiveVolume._receive

    def receive_or_not(live: LiveVolume, deadline: float | None = None) -> dict[str, Any]:
        if threading.current_thread() is not threading.main_thread() or not live._is_greeted_here:
            return receive(live, deadline)
        assert at.wait(SECONDS)
        raise onionskin.StateError("it has not answered")

    greeted = LiveVolume._greeted

    def note(live: LiveVolume, deadline: float | None = None) -> None:
        greeted(live, deadline)
        live._is_greeted_here = True

    monkeypatch.setattr(LiveVolume, "_is_greeted_here", False, raising=False)
    monkeypatch.setattr(LiveVolume, "_greeted", note)
    monkeypatch.setattr(LiveVolume, "_receive", receive_or_not)


def all_sessions_end(server: Server) -> None:
    for name in NAMES:
        server.exports.table.served[name].control.join(SECONDS)


def test_a_server_that_wakes_up_after_its_caller_gave_up_takes_nothing(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp(server, 1)
    with monkeypatch.context() as patch:
        meeting = Meeting(patch, "sync_heads")  # behind the cut, and before the transaction
        lose_patience(patch, meeting.is_reached)
        with pytest.raises(onionskin.StateError, match="it has not answered"):
            store.snapshot_group(dict.fromkeys(NAMES, "s"))
        assert names_in(store) == [[], [], []]
        meeting.may_go_on.set()
        all_sessions_end(server)
    assert names_in(store) == [[], [], []]
    everything_goes_on(store, server)


def test_a_server_that_wakes_up_after_its_caller_gave_up_takes_no_single_snapshot_either(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp(server, 1)
    with monkeypatch.context() as patch:
        meeting = Meeting(patch, "sync_heads")
        lose_patience(patch, meeting.is_reached)
        with onionskin.connect(store, "web") as live, pytest.raises(onionskin.StateError, match="it has not answered"):
            live.snapshot("s")
        meeting.may_go_on.set()
        all_sessions_end(server)
    assert names_in(store) == [[], [], []]
    everything_goes_on(store, server)


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_caller_that_gives_up_inside_the_transaction_of_its_server_finds_its_one_snapshot(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, is_closed: bool
) -> None:
    """Also one that gave the path of the store, which nobody has open here then."""
    stamp(server, 1)
    with monkeypatch.context() as patch:
        meeting = Meeting(patch, "write_sealed")
        lose_patience(patch, meeting.is_reached)
        hang_up = LiveVolume._hang_up

        def hang_up_and_tell(live: LiveVolume) -> None:
            hang_up(live)
            meeting.may_go_on.set()

        patch.setattr(LiveVolume, "_hang_up", hang_up_and_tell)
        with onionskin.connect(store.path if is_closed else store, "web") as live:
            taken = live.snapshot("s", "a note")
        all_sessions_end(server)
    assert [taken] == store.snapshots("web") and taken.note == "a note"
    everything_goes_on(store, server)


def test_a_server_that_fails_behind_its_commit_has_taken_the_one_snapshot(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_together = snapshots.take_together

    def take_and_fail(*arguments: Any, **named: Any) -> None:
        take_together(*arguments, **named)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with onionskin.connect(store, "web") as live:
        with monkeypatch.context() as patch:
            patch.setattr(snapshots, "take_together", take_and_fail)
            assert live.snapshot("s") == store.snapshots("web")[0]
        with pytest.raises(onionskin.SnapshotExistsError, match="'s'"):
            live.snapshot("s")
        assert live.snapshot("t").name == "t"  # the connection goes on
    assert names_in(store) == [["s", "t"], [], []]


def test_a_server_that_knows_no_guid_of_a_snapshot_takes_it_all_the_same(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = frames.checked_request

    def check_as_before(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if "guid" in request["arguments"]:
            raise ValueError("snapshot takes exactly these arguments: name, note")
        return checked(request)

    monkeypatch.setattr(frames, "checked_request", check_as_before)
    with onionskin.connect(store, "web") as live:
        assert live.snapshot("s") == store.snapshots("web")[0]


def test_a_caller_that_gives_up_inside_the_transaction_of_its_server_finds_what_was_taken(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp(server, 1)
    with monkeypatch.context() as patch:
        meeting = Meeting(patch, "write_sealed")
        lose_patience(patch, meeting.is_reached)
        hang_up = LiveVolume._hang_up

        def hang_up_and_tell(live: LiveVolume) -> None:
            hang_up(live)
            meeting.may_go_on.set()

        patch.setattr(LiveVolume, "_hang_up", hang_up_and_tell)
        taken = store.snapshot_group(dict.fromkeys(NAMES, "s"))
        all_sessions_end(server)
    assert {name: [one] for name, one in taken.items()} == {name: store.snapshots(name) for name in NAMES}
    assert numbers_in(store, "s") == {1}
    everything_goes_on(store, server)


@pytest.mark.parametrize("error", [onionskin.StateError, OSError, KeyboardInterrupt])
def test_snapshots_whose_answer_is_lost_are_there_all_the_same(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    have_taken, heard = groups._have_taken, list[Snapshot]()

    def lose(*arguments: Any) -> None:
        heard.extend(have_taken(*arguments) or [])
        raise error("lost")

    with monkeypatch.context() as patch:
        patch.setattr(groups, "_have_taken", lose)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                store.snapshot_group(dict.fromkeys(NAMES, "s"))
        else:
            assert [*store.snapshot_group(dict.fromkeys(NAMES, "s")).values()] == heard
    assert [store.snapshots(name) for name in NAMES] == [[one] for one in heard]
    everything_goes_on(store, server)


def test_a_caller_is_told_of_which_volumes_others_dropped_the_snapshots_whose_answer_is_lost(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_taken = groups._have_taken

    def lose(*arguments: Any) -> None:
        have_taken(*arguments)
        with onionskin.connect(store, "db") as live:
            live.merge("s")
        raise onionskin.StateError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(groups, "_have_taken", lose)
        with pytest.raises(onionskin.StateError, match="lost; the snapshots were taken, but others dropped that of db"):
            store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert names_in(store) == [["s"], [], ["s"]]
    everything_goes_on(store, server)


def test_a_caller_believes_what_its_server_raised_where_the_disk_is_too_full_for_a_transaction(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onionskin.connect(store, "db") as live:
        live.snapshot("s")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store._opened, "change", fail)
        with pytest.raises(onionskin.SnapshotExistsError, match="'db'"):
            store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert names_in(store) == [[], ["s"], []]


def test_a_caller_that_can_ask_nobody_says_that_it_does_not_know(
    store: onionskin.Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise onionskin.StateError("no word")

    with monkeypatch.context() as patch:
        patch.setattr(groups, "_have_taken", fail)
        patch.setattr(lost_answers, "snapshots_with", fail)
        with pytest.raises(onionskin.StateError, match="is not known"):
            store.snapshot_group(dict.fromkeys(NAMES, "s"))


def test_a_server_that_is_stopped_fails_the_group_and_takes_nothing_later(
    store: onionskin.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [store.path / name for name in NAMES]
    with Serve(*everything, "--socket", tmp_path / "s", log=tmp_path / "log") as other:
        stop(other)
        with monkeypatch.context() as patch:
            patch.setattr(groups, "SILENCE_SECONDS", 0.5)
            with pytest.raises(onionskin.StateError, match=f"process {other.process.pid}"):
                store.snapshot_group(dict.fromkeys(NAMES, "s"))
        other.process.send_signal(signal.SIGCONT)
        store.snapshot_group(dict.fromkeys(NAMES, "t"))
    assert names_in(store) == [["t"], ["t"], ["t"]]
