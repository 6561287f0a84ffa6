"""Forks of one snapshot that clients ask for at once are opened together, and only those that can be."""

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient

import onionskin
from onionskin import StateError, Store, Volume
from onionskin.base.waiting import within
from onionskin.nbd import exported, exports, opening
from onionskin.nbd import server as servers
from onionskin.nbd.server import Limits, Server
from onionskin.storage import locks
from onionskin.storage.locks import VolumeLock, WritersOpening, volume_holder

NAMES = [f"job-{number}" for number in range(8)]


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A store with forks of a snapshot, and two of another one."""
    with Store(tmp_path / "vms") as store:
        with store.create("web", size="1M") as web:
            web.write(0, b"a" * 4096)
            web.snapshot("clean")
            web.write(0, b"b" * 4096)
            web.snapshot("later")
        store.fork("web@clean", names=["first", *NAMES])
        store.fork("web@later", names=["later-1", "later-2"])
    return tmp_path / "vms"


@pytest.fixture
def store(at: Path) -> Iterator[Store]:
    with Store(at) as opened:
        yield opened


def open_beside(first: Volume, names: Iterable[str]) -> dict[str, Volume]:
    """Return what is opened, once all of it is."""
    opened: dict[str, Volume] = {}
    opening.open_beside(first, names, opened.update)
    return opened


def _together(store: Store, *names: str) -> set[str]:
    """Open volumes beside `first`; those that were opened read as it does."""
    with ExitStack() as stack:
        first = stack.enter_context(store._open_to_write("first", is_one_of_many=True))
        opened = open_beside(first, names)
        for name, volume in opened.items():
            stack.enter_context(volume)
            assert volume.name == name
            assert volume.read(0, 4096) == b"a" * 4096
            with pytest.raises(StateError, match="open for writing"):
                store.open(name)
        for name in {*names} & {*store._opened.catalog.volume_names()} - opened.keys():
            assert volume_holder(store._opened.layout.volume_lock(store._opened.catalog.volume(name).id)) is None
    return set(opened)


def test_forks_of_the_same_snapshot_are_opened_and_can_be_written(store: Store) -> None:
    with store._open_to_write("first", is_one_of_many=True) as first, ExitStack() as stack:
        for name, volume in open_beside(first, NAMES).items():
            stack.enter_context(volume).write(0, name.encode())
        assert first.read(0, 4096) == b"a" * 4096
    for name in NAMES:
        with store.open(name) as volume:
            assert volume.read(0, 6) == name.encode() + b"a"


def test_what_stands_elsewhere_or_is_not_there_or_was_written_to_is_left_out(store: Store) -> None:
    with store.open("job-1") as written:
        written.write(0, b"mine")
    assert _together(store, "job-0", "job-1", "later-1", "web", "nobody", "\udcff") == {"job-0"}


def test_what_a_dead_writer_left_or_a_machine_owns_is_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = store._opened.catalog
    Path(store._opened.layout.dirty_file(catalog.volume("job-0").id)).write_bytes(b"left")
    owned = {catalog.volume("job-1").id}
    monkeypatch.setattr(catalog, "owned_volumes", lambda: owned)
    assert _together(store, "job-0", "job-1", "job-2") == {"job-2"}


def test_what_a_writer_left_that_knows_no_bytes_just_before_its_file_was_locked_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path(store._opened.layout.dirty_file(store._opened.catalog.volume("job-0").id))
    lock_files = opening._with_files

    def lock_after_another_one(*given: Any) -> set[VolumeLock]:
        written.write_bytes(b"left")
        return lock_files(*given)

    monkeypatch.setattr(opening, "_with_files", lock_after_another_one)
    assert _together(store, "job-0", "job-1") == {"job-1"}


def test_a_disk_of_a_machine_that_came_between_two_questions_is_left_out(
    store: Store, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = store._opened.catalog
    owned: set[bytes] = set()

    def ask_and_be_overtaken() -> set[bytes]:
        before = set(owned)
        with Store(at) as other:
            other.fork(
                "web@clean", names=[f"job-{len(NAMES) + len(other)}"]
            )  # which changes the version of the catalog
        owned.add(catalog.volume("job-1").id)
        return before

    monkeypatch.setattr(catalog, "owned_volumes", ask_and_be_overtaken)
    assert _together(store, "job-0", "job-1") == {"job-0"}


def test_nothing_is_opened_beside_the_volume_whose_snapshot_it_is(store: Store) -> None:
    with store.open("web") as web:
        web.revert("clean")
    assert _together(store, "job-0", "web") == set()


def test_what_another_handle_holds_is_left_out(store: Store) -> None:
    with store.open("job-1"):
        first = store._open_to_write("first", is_one_of_many=True)
        with first:
            opened = open_beside(first, ["job-0", "job-1"])
            assert set(opened) == {"job-0"}
            opened["job-0"].close()


def test_a_name_that_means_another_volume_once_it_is_locked_is_left_out(
    store: Store, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(VolumeLock):
        def __init__(self, layout: Any, id: bytes, name: str, **how: Any) -> None:
            with Store(at) as other:
                other.rename("job-0", "renamed")
                other.fork("web@clean", names=["job-0"])
                other.delete("job-1")
            monkeypatch.setattr(opening, "VolumeLock", VolumeLock)
            super().__init__(layout, id, name, **how)

    monkeypatch.setattr(opening, "VolumeLock", Late)
    assert _together(store, "job-0", "job-1", "job-2") == {"job-2"}


def test_where_one_cannot_be_opened_the_others_are_as_they_should_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], store._unwritten_head

    def fail_third(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 3:
            raise OSError(5, "Input/output error")
        return make(*arguments)

    with store.open("first") as first:
        monkeypatch.setattr(store, "_unwritten_head", fail_third)
        opened = open_beside(first, NAMES)
        assert len(opened) == 2
        monkeypatch.undo()
        for name in NAMES:
            (opened.get(name) or store.open(name)).close()
    assert not store._opened.views._open


def test_an_interrupt_leaves_what_was_given_and_holds_none_of_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], store._unwritten_head
    given: dict[str, Volume] = {}

    def interrupt_third(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(*arguments)

    with store.open("first") as first:
        monkeypatch.setattr(store, "_unwritten_head", interrupt_third)
        with pytest.raises(KeyboardInterrupt):
            opening.open_beside(first, NAMES, given.update)
        monkeypatch.undo()
        assert len(given) == 2
        for name in NAMES:
            with given.get(name) or store.open(name) as volume:
                volume.write(0, b"mine")
    assert not store._opened.views._open


def test_where_one_cannot_be_taken_those_behind_it_are_left_to_others(store: Store) -> None:
    taken: dict[str, Volume] = {}

    def take(volumes: dict[str, Volume]) -> None:
        if taken:
            for volume in volumes.values():
                volume.close()
            raise StateError("the server is stopping")
        taken.update(volumes)

    with store.open("first") as first:
        opening.open_beside(first, NAMES, take)
        assert len(taken) == 1
        for name in NAMES:
            (taken.get(name) or store.open(name)).close()
    assert not store._opened.views._open


def test_a_client_is_answered_while_the_fork_of_the_next_one_is_opened(
    at: Path, by_themselves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, made = threading.Event(), []
    monkeypatch.setattr(servers, "TURN_SECONDS", 300)
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(at) as store:
            store.delete("later-1", "later-2", *NAMES)
            server.exports.add_store(at)
            store.fork("web@clean", names=NAMES)
        whole = server.exports._whole_stores[0]
        make = whole._unwritten_head
        by_themselves.clear()

        def make_when_answered(*arguments: Any) -> Any:
            if len(made) == 2:  # the first is opened by itself, the next one is told as soon as it is open
                made.append(answered.wait(300))
            else:
                made.append(True)
            return make(*arguments)

        monkeypatch.setattr(whole, "_unwritten_head", make_when_answered)
        _read_when_all_wait(server, NAMES, lambda name: name in by_themselves or answered.set())
    assert made == [True] * len(NAMES)


def _read_when_all_wait(
    server: Server, asked: list[str], then: Callable[[str], object] = lambda name: None, *, may_fail: bool = False
) -> dict[str, bytes]:
    """Read from exports for which all clients wait at once. What was read is followed by `then`."""
    found: dict[str, bytes] = {}
    nbd = server._nbd
    find = nbd.on_unknown_export

    def find_when_all_wait(name: str) -> bool:
        nbd.on_unknown_export = find
        assert find
        return within(300, lambda: len(nbd.asked()[0]) == len(asked) - 1) and find(name)

    def read(name: str) -> None:
        try:
            found[name] = _read(server, name)
        except OSError:
            if not may_fail:
                raise
        then(name)

    nbd.on_unknown_export = find_when_all_wait
    threads = [threading.Thread(target=read, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _read(server: Server, name: str) -> bytes:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs, "test")
    with NbdClient(ours, name) as client:
        return client.read(0, 4096)


@pytest.fixture
def by_themselves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of volumes that a server opened each by itself."""
    names: list[str] = []
    open_it = exports.open_to_serve

    def note(store: Store, name: str, **how: bool) -> Volume:
        names.append(name)
        return open_it(store, name, **how)

    monkeypatch.setattr(exports, "open_to_serve", note)
    return names


def test_clients_that_wait_are_served_by_one_opening_of_all_their_forks(
    at: Path, by_themselves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "TURN_SECONDS", 300)
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(at) as store:
            store.delete("later-1", "later-2", *NAMES)
            server.exports.add_store(at)
            store.fork("web@clean", names=NAMES)
            store.fork("web@later", names=["later-1"])
        by_themselves.clear()
        found = _read_when_all_wait(server, [*NAMES, "later-1"])
        assert found == dict.fromkeys(NAMES, b"a" * 4096) | {"later-1": b"b" * 4096}
        assert len(by_themselves) == 2  # one of each snapshot
        assert set(NAMES) <= server.exports.table.served.keys()
        for name in NAMES:
            with onionskin.connect(at, name) as live:
                live.snapshot("mine")
    with Store(at) as store:
        for name in NAMES:
            with store.open(name, snapshot="mine") as view:
                assert view.read(0, 4096) == b"a" * 4096


def _give_name_away(at: Path, name: str) -> None:
    """Have a name mean the volume of the other snapshot, and the one that had it another."""
    with Store(at) as other:
        other.rename(name, "renamed")
        other.rename("later-1", name)


@pytest.fixture
def renaming(at: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has opened the fork `first` for a client, and not yet the others."""
    monkeypatch.setattr(servers, "TURN_SECONDS", 300)
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(at) as store:
            names = ["first", "later-1", "later-2", *NAMES]
            store.delete(*names)
            server.exports.add_store(at)
            store.fork("web@clean", names=["first", *NAMES])
            store.fork("web@later", names=["later-1"])
        assert _read(server, "first") == b"a" * 4096
        yield server


@pytest.mark.parametrize("suffix", ["lock", "control"])
def test_what_is_in_the_way_of_a_file_of_one_keeps_none_of_the_others_from_being_opened_together(
    renaming: Server, by_themselves: list[str], suffix: str
) -> None:
    store = renaming.exports._whole_stores[0]
    in_the_way = Path(store._opened.layout.volumes, f"{store._opened.catalog.volume('job-3').id.hex()}.{suffix}")
    in_the_way.mkdir()
    by_themselves.clear()
    found = _read_when_all_wait(renaming, NAMES, may_fail=True)
    assert found == {name: b"a" * 4096 for name in NAMES if name != "job-3"}
    assert by_themselves == ["job-3"]
    for name in found:
        with onionskin.connect(store.path, name) as live:
            live.snapshot("mine")
    in_the_way.rmdir()
    assert _read(renaming, "job-3") == b"a" * 4096


def test_where_the_lock_of_one_cannot_be_made_all_others_are_opened_by_the_same_call(store: Store) -> None:
    Path(store._opened.layout.volume_lock(store._opened.catalog.volume("job-3").id)).mkdir()
    with store._open_to_write("first", is_one_of_many=True) as first, ExitStack() as stack:
        opened = open_beside(first, NAMES)
        for volume in opened.values():
            stack.callback(volume.close)
        assert opened.keys() == {*NAMES} - {"job-3"}


def test_where_the_control_socket_of_one_cannot_be_made_all_others_are_served_by_the_same_call(
    renaming: Server,
) -> None:
    table, store = renaming.exports.table, renaming.exports._whole_stores[0]
    store._opened.layout.volume_control(store._opened.catalog.volume("job-3").id).mkdir()
    volumes = open_beside(table.served["first"].volume, NAMES)
    assert (
        {*renaming.exports._offer_together(volumes)} == {*NAMES} - {"job-3"} == table.served.keys() - {"web", "first"}
    )
    assert [name for name, volume in volumes.items() if volume.closed] == ["job-3"]
    table.served.pop("first").close()  # the socket that all share is left by the one that made it
    for name in {*NAMES} - {"job-3"}:
        with onionskin.connect(store.path, name) as live:
            live.snapshot("mine")


def test_what_a_killed_server_left_at_the_control_sockets_of_some_is_replaced(
    renaming: Server, by_themselves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = renaming.exports._whole_stores[0]
    monkeypatch.chdir(store._opened.layout.volumes)  # the path of a socket is short
    for name in ("job-1", "job-5"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{store._opened.catalog.volume(name).id.hex()}.control")
    by_themselves.clear()
    assert _read_when_all_wait(renaming, NAMES) == dict.fromkeys(NAMES, b"a" * 4096)
    assert not by_themselves
    for name in NAMES:
        with onionskin.connect(store.path, name) as live:
            live.snapshot("mine")


def test_no_name_of_a_file_is_left_of_what_was_opened_together_and_closed(renaming: Server) -> None:
    store = renaming.exports._whole_stores[0]
    assert _read_when_all_wait(renaming, NAMES) == dict.fromkeys(NAMES, b"a" * 4096)
    volumes = Path(store._opened.layout.volumes)
    suffixes = [path.suffix for path in volumes.iterdir()]
    assert suffixes.count(".lock") == suffixes.count(".control") == len(NAMES) + 2  # and `first` and `web`
    renaming.close()
    assert not [path for path in volumes.iterdir() if path.suffix == ".control" or path.stat().st_nlink > 1]


def test_where_a_file_system_makes_another_file_of_a_second_name_each_has_files_of_its_own(
    renaming: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, paths: list[str], *, replaces: bool = False) -> list[int]:
        return [errno.EMLINK] * len(paths)

    monkeypatch.setattr("onionskin.base._names.link_all", refuse)
    assert _read_when_all_wait(renaming, NAMES) == dict.fromkeys(NAMES, b"a" * 4096)
    for name in NAMES:
        with onionskin.connect(renaming.exports._whole_stores[0].path, name) as live:
            live.snapshot("mine")


def test_threads_wait_for_the_clients_of_a_whole_store_before_there_are_any(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[set[str]] = []
    server = Server(limits=Limits(connections_max=9), allow_revert=False, log=lambda line: None)
    server.exports.add_store(at)

    def stop() -> None:
        threads.append({*os.listdir("/proc/self/task")})
        server.stop()

    monkeypatch.setattr(server.exports, "tidy", stop)
    server.run(lambda: threads.append({*os.listdir("/proc/self/task")}))
    assert len(threads[1] - threads[0]) >= 9


class _Asking(threading.Thread):
    """A client that asks for an export."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__()
        self._server, self._name = server, name
        self.found = b""

    def run(self) -> None:
        self.found = _read(self._server, self._name)

    def waits(self) -> bool:
        """Whether it waits for its turn, and has not got what another client is just given."""
        assert within(300, lambda: self._name in self._server._nbd.asked()[0] or not self.is_alive())
        return self.is_alive()


def test_a_client_that_asks_once_a_name_means_another_volume_is_not_told_of_the_one_that_had_it(
    renaming: Server, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = renaming.exports._whole_stores[0]
    make, later = whole._unwritten_head, _Asking(renaming, "job-0")

    def make_late(*arguments: Any) -> Any:
        monkeypatch.setattr(whole, "_unwritten_head", make)
        _give_name_away(at, "job-0")
        later.start()
        assert later.waits()
        return make(*arguments)

    monkeypatch.setattr(whole, "_unwritten_head", make_late)
    assert _read(renaming, "job-0")[:1] in (b"a", b"b")  # it meant both while it was asked for
    later.join()
    assert later.found == b"b" * 4096


def test_a_client_that_asks_while_an_export_is_made_under_a_name_that_went_to_another_gets_that(
    renaming: Server, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_of, later = exported.ControlSocket, _Asking(renaming, "job-0")

    def made_late(*arguments: Any, **how: Any) -> Any:
        monkeypatch.setattr(exported, "ControlSocket", socket_of)
        _give_name_away(at, "job-0")
        later.start()
        assert later.waits()
        return socket_of(*arguments, **how)

    monkeypatch.setattr(exported, "ControlSocket", made_late)
    assert _read(renaming, "job-0")[:1] in (b"a", b"b")
    later.join()
    assert later.found == b"b" * 4096


def test_a_volume_that_got_the_name_of_one_that_is_just_being_opened_gets_its_label_when_that_is_done(
    renaming: Server, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_of, table = exported.ControlSocket, renaming.exports.table
    followed: list[set[str]] = []

    def made_late(*arguments: Any, **how: Any) -> Any:
        monkeypatch.setattr(exported, "ControlSocket", socket_of)
        with Store(at) as other:
            other.rename("job-0", "renamed")
            other.rename("first", "job-0")
            other.rename("web", "another")
        table.follow_names()
        followed.append({*table.served})
        return socket_of(*arguments, **how)

    monkeypatch.setattr(exported, "ControlSocket", made_late)
    assert _read(renaming, "job-0") == b"a" * 4096
    assert len(followed) == 1 and "another" in followed[0]  # what keeps one from its label keeps no other from its own
    assert _read(renaming, "renamed") == b"a" * 4096
    for name in ("job-0", "renamed", "another"):
        assert table.served[name].volume.name == name


def test_a_client_without_a_turn_that_waits_for_an_export_gets_what_its_name_means_then(
    renaming: Server, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exposed, table, open_it = renaming.exports, renaming.exports.table, exports.open_to_serve
    found: list[Any] = []

    class Later(threading.Thread):
        def run(self) -> None:
            found.append(exposed._open_export("job-0") and table.served["job-0"].volume.read(0, 4096))

    later, being_made = Later(), table.being_made
    begun = threading.Event()

    def noted(label: str) -> Any:
        if threading.current_thread() is later:
            begun.set()
        return being_made(label)

    def open_late(*arguments: Any, **how: Any) -> Volume:
        monkeypatch.setattr(exports, "open_to_serve", open_it)
        volume = open_it(*arguments, **how)
        _give_name_away(at, "job-0")
        later.start()
        assert begun.wait(300)
        return volume

    monkeypatch.setattr(table, "being_made", noted)
    monkeypatch.setattr(exports, "open_to_serve", open_late)
    exposed._serve(exposed._whole_stores[0], "job-0")
    later.join()
    assert found == [b"b" * 4096]


def test_a_fork_is_opened_beside_the_one_that_was_opened_before_if_it_stands_on_the_same_snapshot(
    at: Path, by_themselves: list[str]
) -> None:
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        with Store(at) as store:
            store.delete("first", "later-1", "later-2", *NAMES)
            server.exports.add_store(at)
            store.fork("web@clean", names=["a", "b", "c", "d"])
            store.fork("web@later", names=["e", "f"])
            store.create("own", size="1M").close()
        by_themselves.clear()
        assert [_read(server, name)[:1] for name in ("a", "b", "e", "f", "c", "own", "d")] == [
            *(b"a", b"a", b"b", b"b", b"a", b"\0", b"a")
        ]
        assert by_themselves == ["a", "e", "c", "own", "d"]


def test_one_of_those_that_were_opened_together_is_given_up_without_the_others(store: Store) -> None:
    with store._open_to_write("first", is_one_of_many=True) as first, ExitStack() as stack:
        opened = open_beside(first, NAMES)
        opened.pop("job-3").close()
        for volume in opened.values():
            stack.enter_context(volume)
        for name in NAMES:
            lock = store._opened.layout.volume_lock(store._opened.catalog.volume(name).id)
            lock.unlink(missing_ok=True)  # the byte alone must keep others out
            if name in opened:
                with pytest.raises(StateError, match="open for writing"):
                    store.open(name)
            else:
                store.open(name).close()


def test_an_interrupt_behind_the_locking_of_one_leaves_it_to_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_lock, id = locks._set_lock, store._opened.catalog.volume("job-3").id

    def interrupted(descriptor: int, kind: int, start: int, count: int) -> bool:
        is_set = set_lock(descriptor, kind, start, count)
        if (kind, start) == (fcntl.F_WRLCK, locks._writer_byte(id)):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return is_set

    opening = WritersOpening(store._opened.layout.lock)
    try:
        monkeypatch.setattr(locks, "_set_lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            VolumeLock(store._opened.layout, id, "job-3", opening=opening)
        store.open("job-3").close()
    finally:
        opening.leave()


def test_one_of_two_writers_gets_the_byte_of_an_opening_and_the_other_takes_nothing_away(store: Store) -> None:
    layout, id = store._opened.layout, store._opened.catalog.volume("job-3").id
    opening = WritersOpening(layout.lock)
    try:
        lock = VolumeLock(layout, id, "job-3", opening=opening)
        for _ in range(2):  # a refusal does not make the byte free for the next one
            with pytest.raises(StateError, match="open for writing"):
                VolumeLock(layout, id, "job-3", opening=opening)
        opening.leave()
        with pytest.raises(StateError, match="open for writing"):  # the opening is not closed: the byte is locked
            store.open("job-3")
        lock.close()
        store.open("job-3").close()
    finally:
        opening.leave()


def test_an_interrupt_before_the_unlocking_of_one_leaves_it_to_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_lock, id = locks._set_lock, store._opened.catalog.volume("job-3").id

    def interrupted(descriptor: int, kind: int, start: int, count: int) -> bool:
        if (kind, start) == (fcntl.F_UNLCK, locks._writer_byte(id)):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return set_lock(descriptor, kind, start, count)

    opening = WritersOpening(store._opened.layout.lock)
    try:
        lock = VolumeLock(store._opened.layout, id, "job-3", opening=opening)
        monkeypatch.setattr(locks, "_set_lock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lock.close()
        store.open("job-3").close()
    finally:
        opening.leave()


def test_a_volume_whose_name_another_one_was_given_meanwhile_takes_nothing_away_from_that(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = exports.open_to_serve

    def late(store: Store, name: str, **how: bool) -> Volume:
        volume = open_it(store, name, **how)
        store.rename(name, "renamed")
        store.rename("web", name)
        server.exports.table.follow_names()
        return volume

    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        server.exports.add_volume(at, "web")
        ours, theirs = socket.socketpair()
        ours.settimeout(300)
        server.serve(theirs, "test")
        with NbdClient(ours, "web") as client:
            monkeypatch.setattr(exports, "open_to_serve", late)
            with pytest.raises(FileExistsError):
                server.exports.add_volume(at, "job-0")
            assert client.read(0, 4096) == b"b" * 4096
            assert _read(server, "job-0") == b"b" * 4096
        with Store(at) as store:
            store.open("renamed").close()


def test_many_that_were_opened_together_take_one_descriptor_until_the_last_is_closed(store: Store) -> None:
    locked = store._opened.layout.lock.stat().st_ino

    def count() -> int:  # of this file alone: what earlier tests left is closed at any moment
        return sum(_inode_of(int(number)) == locked for number in os.listdir("/proc/self/fd"))

    with store._open_to_write("first", is_one_of_many=True) as first:
        before = count()
        volumes = list(open_beside(first, NAMES).values())
        assert len(volumes) == len(NAMES)
        assert count() == before + 1
        for volume in volumes:
            assert count() == before + 1
            volume.close()
        assert count() == before


def test_one_opening_lets_no_two_writers_have_one_volume(store: Store) -> None:
    id, opening = store._opened.catalog.volume("job-3").id, WritersOpening(store._opened.layout.lock)
    try:
        lock = VolumeLock(store._opened.layout, id, "job-3", opening=opening)
        with pytest.raises(StateError, match="open for writing"):
            VolumeLock(store._opened.layout, id, "job-3", opening=opening)
        with pytest.raises(StateError, match="open for writing"):
            store.open("job-3")
        lock.close()
        store.open("job-3").close()
    finally:
        opening.leave()


def test_the_child_of_a_fork_leaves_those_that_were_opened_together_locked(store: Store) -> None:
    with store._open_to_write("first", is_one_of_many=True) as first, ExitStack() as stack:
        opened = open_beside(first, NAMES)
        for volume in opened.values():
            stack.enter_context(volume)
        locked = store._opened.layout.lock.stat().st_ino
        child = os.fork()
        if not child:
            is_open = True
            try:
                for volume in opened.values():
                    volume.close()
                is_open = any(_inode_of(int(number)) == locked for number in os.listdir("/proc/self/fd"))
            finally:
                os._exit(is_open)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for name in NAMES:
            store._opened.layout.volume_lock(store._opened.catalog.volume(name).id).unlink()
            with pytest.raises(StateError, match="open for writing"):
                store.open(name)


def test_the_names_of_all_that_are_served_are_followed_by_one_question(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        server.exports.add_store(at)
        with Store(at) as store:
            store.rename("job-0", "kept")
            store.rename("job-1", "job-0")
        asked = []
        catalog = server.exports._whole_stores[0]._opened.catalog
        monkeypatch.setattr(catalog, "rows", lambda *what, rows=catalog.rows: asked.append(what) or rows(*what))
        server.exports.table.follow_names()
        monkeypatch.undo()
        assert len(asked) <= 1
        assert {"kept", "job-0"} < server.exports.table.served.keys()
        assert "job-1" not in server.exports.table.served
        assert server.exports.table.served["kept"].volume.name == "kept"


def _inode_of(descriptor: int) -> int:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:  # the one that listed the directory
        return -1
