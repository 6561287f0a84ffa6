"""Names that come to mean something else while a server runs: whoever asks by a name gets what it means, or nothing.

All in this process: what is changed from outside is changed through another handle on the store.
"""

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.listing import files_with
from support.nbd_client import NbdClient

import onionskin as library
from onionskin.errors import FormatError, SnapshotNotFoundError, StateError, VolumeExistsError
from onionskin.nbd import exports
from onionskin.nbd.server import Limits, Server

MIB = 1 << 20
SECRET = b"never to be found again!" * 1024


@pytest.fixture
def server() -> Iterator[Server]:
    said: list[str] = []
    found = Server(limits=Limits(), allow_revert=True, log=said.append)
    found.said = said  # type: ignore[attr-defined]
    yield found
    found.close()


def client_of(server: Server, export: str) -> NbdClient:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs, "test")
    return NbdClient(ours, export)


def is_refused(server: Server, export: str) -> bool:
    try:
        client_of(server, export).close()
    except (AssertionError, ConnectionError):
        return True
    return False


def write(store: library.Store, name: str, data: bytes, snapshot: str | None = None) -> None:
    with store.open(name) as volume:
        volume.write(0, data)
        if snapshot:
            volume.snapshot(snapshot)


def retake(store: library.Store, name: str, snapshot: str, data: bytes) -> None:
    """Drop a snapshot, and take another of that name."""
    with store.open(name) as volume:
        volume.merge(snapshot)
        volume.write(0, data)
        volume.snapshot(snapshot)


# ---- volumes ----


def test_a_server_renames_the_volume_that_it_holds_and_not_the_one_that_took_its_name(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        server.exports.add_volume(tmp_path / "vms", "web")
        store.rename("web", "moved")
        store.create("web", size=2 * MIB).close()
        with library.connect(store, "moved") as served:
            served.rename("prod")
        assert {about.name: about.size_bytes for about in store.volumes()} == {"prod": MIB, "web": 2 * MIB}
        assert not is_refused(server, "prod")


def test_a_rename_to_a_name_that_is_taken_changes_nothing(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        store.create("db", size=MIB).close()
        server.exports.add_volume(tmp_path / "vms", "web")
        with library.connect(store, "web") as served:
            with pytest.raises(VolumeExistsError):
                served.rename("db")
            with pytest.raises(ValueError, match="cannot be the name"):
                served.rename("a/b")
        with client_of(server, "web") as client:
            assert client.read(0, 1) == b"\0"


def test_a_volume_that_took_the_name_of_a_served_one_is_not_served_as_that(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"the one that is served")
        server.exports.add_volume(tmp_path / "vms", "web")
        with client_of(server, "web"):  # its name is known to the C server
            store.rename("web", "moved")
            store.create("web", size=MIB).close()
            assert is_refused(server, "web")
            with client_of(server, "moved") as client:
                assert client.read(0, 10) == b"the one th"


def test_two_volumes_that_changed_their_names_for_each_others_are_served_by_the_new_ones(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store:
        for name in ("a", "b", "c"):
            store.create(name, size=MIB).close()
            write(store, name, name.encode())
        server.exports.add_store(tmp_path / "vms")
        for old, new in [("a", "x"), ("b", "a"), ("c", "b"), ("x", "c")]:
            store.rename(old, new)
        for name, data in [("a", b"b"), ("b", b"c"), ("c", b"a")]:
            with client_of(server, name) as client:
                assert client.read(0, 1) == data


def test_a_label_does_not_change_under_an_operation_and_nobody_gets_the_volume_by_it(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        server.exports.add_volume(tmp_path / "vms", "web")
        served = server.exports.table.served["web"]
        with served.without_views({"a"}):
            store.rename("web", "moved")
            store.create("web", size=MIB).close()
            assert is_refused(server, "web")
            with pytest.raises(StateError, match="under way"):
                served.rename("prod")
        assert not is_refused(server, "moved")


def test_a_volume_of_a_store_that_cannot_be_opened_keeps_no_other_from_being_served(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store:
        for name in ("good", "held"):
            store.create(name, size=MIB).close()
        with store.open("held"):
            server.exports.add_store(tmp_path / "vms")
            assert is_refused(server, "held")
        assert not is_refused(server, "good")
        assert not is_refused(server, "held")  # it is free now
    assert any("held" in line for line in server.said)  # type: ignore[attr-defined]


def test_a_store_of_which_nothing_can_be_served_is_refused(tmp_path: Path, server: Server) -> None:
    with (
        library.Store(tmp_path / "vms") as store,
        store.create("web", size=MIB),
        pytest.raises(StateError, match="open for writing"),
    ):
        server.exports.add_store(tmp_path / "vms")


# ---- snapshots ----


def test_a_snapshot_that_was_dropped_and_taken_again_is_not_served_as_the_old_one(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"old", "clean")
        server.exports.add_snapshot(tmp_path / "vms", "web", "clean")
        with client_of(server, "web@clean") as before:
            retake(store, "web", "clean", b"new")
            assert is_refused(server, "web@clean")
            assert before.read(0, 3) == b"old"  # it goes on with what it has


def test_a_snapshot_that_changes_while_it_is_opened_is_opened_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"old", "clean")
        opened = library.Store.open
        changes = iter([lambda: retake(store, "web", "clean", b"new")])

        def open_late(self: library.Store, *arguments: Any, **options: Any) -> library.Volume:
            view = opened(self, *arguments, **options)
            if options.get("snapshot"):
                next(changes, lambda: None)()
            return view

        monkeypatch.setattr(library.Store, "open", open_late)
        server.exports.add_snapshot(tmp_path / "vms", "web", "clean")
        with client_of(server, "web@clean") as client:
            assert client.read(0, 3) == b"new"


def test_a_snapshot_of_a_served_volume_that_comes_back_is_opened_anew(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"old", "clean")
        server.exports.add_volume(tmp_path / "vms", "web")
        with client_of(server, "web@clean") as client:
            assert client.read(0, 3) == b"old"
        volume = server.exports.table.served["web"].volume
        volume.merge("clean")  # past the server, which keeps the view of the old one open
        volume.write(0, b"new")
        volume.snapshot("clean")
        with client_of(server, "web@clean") as client:
            assert client.read(0, 3) == b"new"


def test_a_snapshot_that_is_gone_is_not_served(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        server.exports.add_volume(tmp_path / "vms", "web")
        assert is_refused(server, "web@none")
        with pytest.raises(SnapshotNotFoundError):
            server.exports.add_snapshot(tmp_path / "vms", "web", "none")


def test_snapshots_whose_volumes_exchanged_their_names_are_served_by_the_new_ones(
    tmp_path: Path, server: Server
) -> None:
    with library.Store(tmp_path / "vms") as store, ExitStack() as clients:
        for name in ("a", "b", "c"):
            store.create(name, size=MIB).close()
            write(store, name, name.encode(), "s")
        server.exports.add_store(tmp_path / "vms")
        for name in ("a", "b", "c"):
            clients.enter_context(client_of(server, f"{name}@s"))  # which keep the views open
        for old, new in [("a", "x"), ("b", "a"), ("c", "b"), ("x", "c")]:
            store.rename(old, new)
        for name, data in [("a", b"b"), ("b", b"c"), ("c", b"a")]:
            with client_of(server, f"{name}@s") as client:
                assert client.read(0, 1) == data


def test_a_label_that_has_to_wait_does_not_grow(tmp_path: Path, server: Server) -> None:
    table = server.exports.table
    with library.Store(tmp_path / "vms") as store:
        store.create("a", size=MIB).close()
        server.exports.add_store(tmp_path / "vms")
        served = table.served["a"]
        server._nbd.add_export("x", served.volume._path, read_only=True)  # as one that is just being made
        store.rename("a", "x")
        for _ in range(600):
            table.follow_names()
        assert [name for name, _ in server.exports.names_behind("")] == ["x"]
        server._nbd.remove_export("x")
        table.follow_names()
        assert table.served == {"x": served}


# ---- volumes and servers that are gone ----


def test_verbs_that_run_while_the_server_ends_are_done_or_refused_in_its_terms(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"old", "s")
        server.exports.add_volume(tmp_path / "vms", "web")
        served = server.exports.table.served["web"]
        assert server.exports._changed_blocks.find("web", "onionskin:changed-since:s")
        with served.paused():
            server._nbd.stop(grace_seconds=0)
        served.rename("moved")
        assert [*store] == ["moved"]
        with served.without_views({"s"}):
            pass
        for verb in (served.stats, served.paused().__enter__):
            with pytest.raises(StateError, match="does not serve the volume any more"):
                verb()


def test_what_is_done_to_a_volume_that_was_taken_away_is_not_done_to_another_of_its_label(
    tmp_path: Path, server: Server
) -> None:
    table = server.exports.table
    with library.Store(tmp_path / "vms") as store:
        for name in ("web", "db"):
            store.create(name, size=MIB).close()
            write(store, name, name.encode())
        server.exports.add_store(tmp_path / "vms")
        web = table.served["web"]
        with table.taken_away([web]):
            for old, new in (("web", "moved"), ("db", "web")):
                store.rename(old, new)
            table.follow_names()
            for verb in (web.stats, web.paused().__enter__):
                with pytest.raises(StateError, match="does not serve the volume any more"):
                    verb()
            web._switch(web.volume._path)
            with client_of(server, "web") as client:
                assert client.read(0, 2) == b"db"
            web.give_up()


def test_a_volume_whose_disk_is_just_replaced_is_not_taken_away(tmp_path: Path, server: Server) -> None:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        server.exports.add_volume(tmp_path / "vms", "web")
        served, table = server.exports.table.served["web"], server.exports.table
        path = served.volume._path
        looked, go_on = threading.Event(), threading.Event()

        class Late:
            def __getattr__(self, name: str) -> Any:
                return getattr(server._nbd, name)

            def replace_path(self, label: str, path: Any) -> None:
                looked.set()
                assert go_on.wait(300)
                server._nbd.replace_path(label, path)

        served._nbd = Late()  # type: ignore[assignment]
        thread, results = in_thread(lambda: served._switch(path))
        assert looked.wait(300)
        assert not table.take_served(served)
        go_on.set()
        thread.join()
        assert results == [None]


# ---- the guard ----


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch, snapshot: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Make the opening of one snapshot wait: (that it began, let it go on)."""
    began, go_on = threading.Event(), threading.Event()
    opened = library.Store.open

    def open_slowly(self: library.Store, name: str, **options: Any) -> library.Volume:
        if options.get("snapshot") == snapshot:
            began.set()
            assert go_on.wait(300)
        return opened(self, name, **options)

    monkeypatch.setattr(library.Store, "open", open_slowly)
    try:
        yield began, go_on
    finally:
        go_on.set()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.fixture
def slow(tmp_path: Path, server: Server) -> Server:
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"slow", "slow")
        write(store, "web", b"fast", "fast")
        server.exports.add_volume(tmp_path / "vms", "web")
    return server


def test_a_view_that_takes_long_to_open_delays_no_other_client(slow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_up(monkeypatch, "slow") as (began, go_on):
        thread, results = in_thread(lambda: client_of(slow, "web@slow"))
        assert began.wait(300)
        with client_of(slow, "web") as volume, client_of(slow, "web@fast") as fast:
            assert volume.read(0, 4) == fast.read(0, 4) == b"fast"
        assert slow.exports.names() == ["web", "web@fast", "web@slow"]
        go_on.set()
        thread.join()
    (client,) = results
    assert isinstance(client, NbdClient)
    assert client.read(0, 4) == b"slow"
    client.close()


def test_two_clients_that_ask_for_one_snapshot_at_once_get_one_view(
    slow: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch, "slow") as (began, go_on):
        threads = [in_thread(lambda: client_of(slow, "web@slow")) for _ in range(2)]
        assert began.wait(300)
        go_on.set()
        for thread, results in threads:
            thread.join()
            (client,) = results
            assert isinstance(client, NbdClient), client
            assert client.read(0, 4) == b"slow"
            client.close()
    assert list(slow.exports.table.views) == ["web@slow"]


def test_a_merge_waits_for_a_view_that_is_just_being_opened_and_that_is_refused_then(
    slow: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        held_up(monkeypatch, "slow") as (began, go_on),
        library.connect(slow.exports.table.served["web"].volume.store, "web") as web,
    ):
        opening, refused = in_thread(lambda: client_of(slow, "web@slow"))
        assert began.wait(300)
        barred = threading.Event()
        wait_for = slow.exports.table.changed.wait_for

        def wait_and_tell(*arguments: Any) -> Any:
            barred.set()
            return wait_for(*arguments)

        monkeypatch.setattr(slow.exports.table.changed, "wait_for", wait_and_tell)
        merging, merged = in_thread(lambda: web.merge("slow"))
        assert barred.wait(300)
        assert merging.is_alive()
        go_on.set()
        merging.join()
        opening.join()
    assert merged == [None]
    assert isinstance(refused[0], (AssertionError, ConnectionError))


def test_a_merge_that_a_reading_client_is_in_the_way_of_is_refused(slow: Server) -> None:
    with library.connect(slow.exports.table.served["web"].volume.store, "web") as web:
        with client_of(slow, "web@slow"), pytest.raises(StateError, match="clients are reading web@slow"):
            web.merge("slow")
        assert [snapshot.name for snapshot in web.snapshots] == ["slow", "fast"]


def test_a_discard_that_changes_the_disk_is_known_to_by_what_holds_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the question whether the disk stands on a snapshot and its discard another caller reverts to it."""
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB).close()
        write(store, "web", b"1", "a")
        write(store, "web", b"2", "b")
        with store.open("web") as volume:
            volume.revert("a")
        server.exports.add_volume(tmp_path / "vms", "web")
        volume = server.exports.table.served["web"].volume
        looked = vars(library.Volume)["parent"].fget
        reverted: list[tuple[threading.Thread, list[object]]] = []

        def look_and_be_overtaken(self: library.Volume) -> Any:
            found = looked(self)
            if not reverted:
                reverted.append(in_thread(lambda: volume.revert("b")))
                reverted[0][0].join(0.2)  # it cannot end before the discard, which holds the volume
            return found

        monkeypatch.setattr(library.Volume, "parent", property(look_and_be_overtaken))
        with library.connect(store, "web") as web:
            web.discard("b")  # the disk does not stand on it: nothing under the clients changes
        reverted[0][0].join()
    assert isinstance(reverted[0][1][0], SnapshotNotFoundError)
    server.close()


# ---- what waits for a view to be closed ----


def merged_away(tmp_path: Path, server: Server, export: str) -> tuple[Path, NbdClient]:
    """A volume of policy zero of which a client of the server holds a snapshot that another handle drops."""
    with library.Store(tmp_path / "vms") as store:
        store.create("web", size=MIB, wipe="zero").close()
        write(store, "web", SECRET, "clean")
        server.exports.add_snapshot(tmp_path / "vms", "web", "clean")
        client = client_of(server, export)
        with store.open("web") as volume:
            volume.write(0, bytes(len(SECRET)))
            volume.snapshot("after")
            volume.merge("clean")
        (segment,) = files_with(tmp_path / "vms" / "segments", SECRET[:24])
    return segment, client


def test_what_waited_for_a_view_is_wiped_when_the_server_ends(tmp_path: Path, server: Server) -> None:
    segment, client = merged_away(tmp_path, server, "web@clean")
    client.close()
    server.close()
    assert not segment.exists() or SECRET[:24] not in segment.read_bytes()


def test_what_waited_for_a_view_is_wiped_when_that_is_idle(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, client = merged_away(tmp_path, server, "web@clean")
    server.exports.table.views["web@clean"].is_kept = False
    monkeypatch.setattr(exports, "VIEW_IDLE_SECONDS", -1.0)
    client.close()
    while server.exports.clients_of("web@clean"):
        assert select.select([server._nbd.event_fd], [], [], 60)[0]
        server._nbd.events()
    server.exports.tidy()
    assert not server.exports.table.views
    assert not segment.exists() or SECRET[:24] not in segment.read_bytes()


# ---- a server whose catalog fails ----


def test_a_catalog_that_cannot_be_read_for_a_while_ends_neither_the_server_nor_its_clients(
    slow: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(slow, "web") as client:
        with monkeypatch.context() as broken:

            def fail(*arguments: object) -> None:
                raise FormatError("the catalog is damaged")

            broken.setattr(type(slow.exports.table.served["web"].volume._opened.store.catalog), "rows", fail)
            slow.exports.tidy()
            assert is_refused(slow, "web")
            assert client.read(0, 4) == b"fast"
        assert not is_refused(slow, "web")


def test_the_mark_behind_which_all_counts_as_changed_is_that_of_the_volume_that_is_compared(
    tmp_path: Path, server: Server
) -> None:
    exports = server.exports
    with library.Store(tmp_path / "vms") as store:
        for name in ("web", "db"):
            store.create(name, size=MIB).close()
            write(store, name, b"a" * 4096, "s")
            exports.add_volume(tmp_path / "vms", name)
        web, nbd = exports.table.served["web"], server._nbd
        meant: list[bool] = []

        class Marks:
            def __getattr__(self, name: str) -> Any:
                return getattr(nbd, name)

            def change_mark(self, label: str) -> int:
                for old, new in (("web", "t"), ("db", "web"), ("t", "db")):
                    store.rename(old, new)
                exports.table.follow_names()  # as for another client that asks for a name just now
                meant.append(exports.table.served[label] is web)
                return nbd.change_mark(label)

        exports._changed_blocks._nbd = Marks()  # type: ignore[assignment]
        with pytest.raises(StateError, match="ask again"):  # its name is another one by now
            exports._changed_blocks.find("web", "onionskin:changed-since:s")
        assert meant == [True]
