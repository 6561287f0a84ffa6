"""Groups whose volumes others serve: one cut, all or none, and an end to every wait, whoever stops or dies at which step."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.servers import Serve

import onionskin
from onionskin.base.sockets import UnixListener, connect_unix
from onionskin.catalog import SegmentRow, VolumeRow, new_id
from onionskin.control import frames, groups
from onionskin.control.groups import ServedHead, find_served_head
from onionskin.kernels._volume import cut_heads
from onionskin.nbd.server import Limits, Server
from onionskin.operations import group_member, seal
from onionskin.operations.seal import write_sealed
from onionskin.operations.snapshots import _Naming
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_store import OpenStore

MIB = 1 << 20
BLOCK = 4096
NAMES = ("web", "db", "log")


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A store with three empty volumes."""
    with onionskin.Store(tmp_path / "vms") as store:
        for name in NAMES:
            store.create(name, size=MIB).close()
    return tmp_path / "vms"


@pytest.fixture
def store(at: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(at) as store:
        yield store


Here = Callable[..., Server]


@pytest.fixture
def here(at: Path) -> Iterator[Here]:
    """Serve volumes in this process, with a store of their own."""
    with ExitStack() as stack:

        def start(*names: str) -> Server:
            server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)
            stack.callback(server.close)
            for name in names:
                server.exports.add_volume(at, name)
            return server

        yield start


def volume_of(server: Server, name: str) -> onionskin.Volume:
    return server.exports.table.served[name].volume


def number_in(store: onionskin.Store, name: str, snapshot: str) -> int:
    with store.open(name, snapshot=snapshot) as view:
        return int.from_bytes(view.read(0, 8), "little")


def stamp(volume: Any, number: int) -> None:
    volume.write(0, number.to_bytes(8, "little"))


def goes_on(store: onionskin.Store, server: Server, name: str) -> None:
    """Check that a volume has its old head, takes writes and flushes, and can be snapshot."""
    volume = volume_of(server, name)
    before = number_in_head(volume)
    stamp(volume, before + 1)
    volume.flush()
    with onionskin.connect(store, name) as live:
        live.snapshot("after")
    assert number_in(store, name, "after") == before + 1
    assert [one.name for one in store.snapshots(name)] == ["after"]


def number_in_head(volume: onionskin.Volume) -> int:
    return int.from_bytes(volume.read(0, 8), "little")


# ---- what comes out ----


def test_open_served_and_closed_volumes_are_cut_together(store: onionskin.Store, here: Here) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    with store.open("db") as db:
        stamp(db, 2)
        taken = store.snapshot_group({"web": "s", "db": None, "log": "s"}, note="all")
        stamp(db, 7)
    stamp(volume_of(server, "web"), 7)
    assert list(taken) == ["web", "db", "log"]
    assert {one.note for one in taken.values()} == {"all"}
    assert number_in(store, "web", "s") == 1
    assert number_in(store, "db", taken["db"].name) == 2
    assert number_in_head(volume_of(server, "web")) == 7
    assert store.info("log").holder is None


def test_volumes_of_one_server_and_of_two_are_cut_together(store: onionskin.Store, here: Here) -> None:
    one, other = here("web", "db"), here("log")
    for turn in ("a", "b"):
        assert set(store.snapshot_group(dict.fromkeys(NAMES, turn))) == set(NAMES)
    for server, name in ((one, "web"), (one, "db"), (other, "log")):
        stamp(volume_of(server, name), 5)
        volume_of(server, name).flush()
        assert [snapshot.name for snapshot in store.snapshots(name)] == ["a", "b"]
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


def test_a_name_that_is_taken_in_one_volume_is_given_to_none(store: onionskin.Store, here: Here) -> None:
    server = here("web", "db")
    with onionskin.connect(store, "db") as live:
        live.snapshot("s")
    with pytest.raises(onionskin.SnapshotExistsError, match="db"):
        store.snapshot_group({"web": "s", "db": "s"})
    assert store.snapshots("web") == []
    goes_on(store, server, "web")


def test_a_volume_that_is_held_and_not_served_is_refused_with_its_holder(
    at: Path, store: onionskin.Store, here: Here
) -> None:
    server = here("web")
    with onionskin.Store(at) as other, other.open("db"), pytest.raises(onionskin.StateError, match=str(os.getpid())):
        store.snapshot_group({"web": "s", "db": "s"})
    goes_on(store, server, "web")


def test_groups_that_meet_both_end(store: onionskin.Store, here: Here) -> None:
    here("web"), here("db"), here("log")
    ended: list[str] = []

    def take(names: list[str], prefix: str) -> None:
        with onionskin.Store(store.path) as mine:
            for number in range(5):
                mine.snapshot_group(dict.fromkeys(names, f"{prefix}{number}"))
        ended.append(prefix)

    threads = [threading.Thread(target=take, args=args) for args in ((["web", "db"], "a"), (["log", "db", "web"], "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["a", "b"]
    assert len(store.snapshots("db")) == 10


@pytest.mark.parametrize("renamed_at", [2, 3])
def test_the_connection_to_a_volume_that_is_renamed_while_it_is_sought_is_closed(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, renamed_at: int
) -> None:
    here("web")
    catalog, connections, asked = store._opened.catalog, [], 0
    volume = catalog.volume

    def note(*args: Any, **more: Any) -> socket.socket:
        connections.append(connect_unix(*args, **more))
        return connections[-1]

    def rename(name: str) -> VolumeRow:
        nonlocal asked
        asked += 1
        return volume(name if asked < renamed_at else "another name")

    monkeypatch.setattr("onionskin.control.client.connect_unix", note)
    monkeypatch.setattr(catalog, "volume", rename)
    with pytest.raises(onionskin.VolumeNotFoundError):
        find_served_head(store, "web", "g")
    assert [one.fileno() for one in connections] == [-1]


# ---- the cut is exact ----


@contextmanager
def stamping(clients: list[Any]) -> Iterator[None]:
    """Stamp a counter on each in turn, each after the one before was answered."""
    stop, begun = threading.Event(), threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for client in clients:
                stamp(client, number)
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def two_servers(at: Path, tmp_path: Path) -> Iterator[list[NbdClient]]:
    with ExitStack() as stack:
        clients = []
        for name in ("web", "db"):
            server = stack.enter_context(Serve(at / name, "--socket", tmp_path / name, log=tmp_path / "log"))
            clients.append(stack.enter_context(server.client(name)))
        yield clients


def cut_again_and_again(store: onionskin.Store, cuts: int) -> None:
    for number in range(cuts):
        store.snapshot_group({"web": f"s{number}", "db": f"s{number}"})
        ahead = number_in(store, "web", f"s{number}") - number_in(store, "db", f"s{number}")
        assert ahead in (0, 1)


def test_no_volume_is_ahead_in_a_cut_of_two_servers(at: Path, store: onionskin.Store, tmp_path: Path) -> None:
    with two_servers(at, tmp_path) as clients, stamping(clients):
        cut_again_and_again(store, 10)


@pytest.mark.slow
def test_no_volume_is_ahead_in_many_cuts_of_two_servers_with_fio_beside(
    at: Path, store: onionskin.Store, tmp_path: Path
) -> None:
    import subprocess

    with two_servers(at, tmp_path) as clients, stamping(clients):
        job = ["--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--offset=64k", "--size=512k", "--rate_iops=500"]
        load = [
            subprocess.Popen(
                ["fio", f"--name={name}", f"--uri=nbd+unix:///{name}?socket={tmp_path / name}", *job, "--time_based",
                 "--runtime=600"], stdout=subprocess.DEVNULL, cwd=tmp_path
            )
            for name in ("web", "db")
        ]  # fmt: skip
        try:
            cut_again_and_again(store, 200)
        finally:
            for one in load:
                one.terminate()
                one.wait()


def test_a_server_that_says_too_early_that_its_writers_wait_puts_one_volume_ahead(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("db")
    monkeypatch.setattr(groups, "HOLD_SECONDS", 60)
    with store.open("web") as web:

        def cut_late(paths: Any, names: Any, peer: int, words: Any, _: float) -> int:
            """Hold nothing, and cut when the writers of web have gone on."""
            with socket.socket(fileno=os.dup(peer)) as caller:
                caller.setblocking(True)
                hold, held, cut, done, _ = words
                assert caller.recv(len(hold), socket.MSG_WAITALL) == hold
                caller.sendall(held)
                assert caller.recv(len(cut), socket.MSG_WAITALL) == cut
                while web._path.has_spare:  # until it is cut
                    time.sleep(0.001)
                stamp(web, 1)
                stamp(volume_of(server, "db"), 1)
                cut_heads(paths, names)
                caller.sendall(done)
            return 0

        monkeypatch.setattr(groups, "cut_when_told", cut_late)
        store.snapshot_group({"web": "s", "db": "s"})
        assert (number_in(store, "web", "s"), number_in(store, "db", "s")) == (0, 1)  # which the test above looks for


# ---- a caller that is gone or stopped ----


class Caller:
    """The caller of a group of one volume, which goes through the steps one by one."""

    STEPS = ("entered", "begun", "leading", "held", "done", "synced")

    def __init__(self, store: onionskin.Store, name: str, group: str | None = None) -> None:
        self.store = store
        head = find_served_head(store, name, group or new_id().hex())
        assert head is not None
        self.head: ServedHead = head
        self._stack = ExitStack()

    def go_to(self, last: str) -> None:
        """Go on until the server has said this."""
        for step in self.STEPS[: self.STEPS.index(last) + 1]:
            self.go_on(step)

    def go_on(self, step: str) -> None:
        """Do what has the server say this, and hear it."""
        getattr(self, f"_{step}")()

    def _entered(self) -> None:
        self._stack.enter_context(self.head.operation(during_merge=True, within=None))

    def _begun(self) -> None:
        self.head.ask_to_begin()
        self.head.begun()

    def _leading(self) -> None:
        self.head.ask_to_lead([self.head])
        self.head.leads()

    def _word(self, said: bytes, answer: bytes) -> None:
        connection = self.head._live._connection
        connection.sendall(said)
        assert connection.recv(100) == answer

    def _held(self) -> None:
        self._word(self.head.words[0], self.head.words[1])

    def _done(self) -> None:
        self._word(self.head.words[2], self.head.words[3])

    def _synced(self) -> None:
        numbers = self.store._opened.change(lambda: self.store._opened.catalog.take_lock_bytes(2))
        self.head.ask_to_sync(*numbers)
        self.head.synced()

    def commit(self, name: str = "s") -> None:
        """Write the rows of what was sealed, and name it."""
        opened = self.store._opened
        naming = _Naming(opened, self.head, name, "", new_id())
        opened.change(lambda: write_sealed(opened, self.head.sealed, naming.write))

    def close(self) -> None:
        self._stack.close()
        self.head.close()


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_volume_goes_on_whose_caller_is_gone_at_a_step(store: onionskin.Store, here: Here, step: str) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    caller = Caller(store, "web")
    caller.go_to(step)
    caller.close()
    goes_on(store, server, "web")


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_volume_goes_on_whose_caller_says_nothing_at_a_step(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    monkeypatch.setattr(groups, "STEP_SECONDS", 0.5)
    caller.go_to(step)
    goes_on(store, server, "web")
    with pytest.raises(onionskin.StateError, match="group"):
        caller.head._hear("nothing more")
    caller.close()


def test_a_volume_goes_on_whose_caller_takes_nothing(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    monkeypatch.setattr(groups, "STEP_SECONDS", 0.5)
    caller.go_to("done")
    pack = groups.pack_sealed
    monkeypatch.setattr(groups, "pack_sealed", lambda what: pack(what) | {"more": "x" * (4 << 20)})
    monkeypatch.setattr(caller.head, "synced", lambda: None)
    caller.go_on("synced")
    goes_on(store, server, "web")
    caller.close()


@contextmanager
def forked_child() -> Iterator[int]:
    """A child of this process that has all of its descriptors, and does nothing until it is killed."""
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_volume_goes_on_whose_caller_left_and_has_a_forked_child(store: onionskin.Store, here: Here) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("synced")
    flush = threading.Thread(target=volume_of(server, "web").flush, daemon=True)
    with forked_child():
        caller.close()
        flush.start()
        flush.join(groups.STEP_SECONDS / 2)
        assert not flush.is_alive()
    goes_on(store, server, "web")


def test_a_forked_child_that_closes_its_copy_of_a_group_leaves_the_group_alone(
    store: onionskin.Store, here: Here
) -> None:
    here("web")
    caller = Caller(store, "web")
    caller.go_to("done")
    child = os.fork()
    if not child:
        try:
            caller.head.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    caller.go_on("synced")
    caller.commit()
    caller.close()
    assert number_in(store, "web", "s") == 0


def test_a_flush_does_not_wait_for_a_caller_that_never_ends_its_step(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    monkeypatch.setattr(groups, "STEP_SECONDS", 1)
    caller.go_to("synced")
    flush = threading.Thread(target=volume_of(server, "web").flush)
    flush.start()
    connection = caller.head._live._connection
    connection.sendall((1 << 20).to_bytes(4, "big"))
    for _ in range(100):  # each byte comes well within the time that the server waits for something
        with suppress(BrokenPipeError):
            connection.sendall(b" ")
        flush.join(0.2)
        if not flush.is_alive():
            break
    waits = flush.is_alive()
    caller.close()
    flush.join()
    assert not waits
    goes_on(store, server, "web")


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_volume_goes_on_whose_caller_says_something_else_at_a_step(
    store: onionskin.Store, here: Here, step: str
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to(step)
    caller.head._say("nonsense", volumes=[1], map_byte=-1)
    goes_on(store, server, "web")
    caller.close()


def test_a_write_that_begins_while_writers_wait_is_not_in_the_cut(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "HOLD_SECONDS", 60)
    volume = volume_of(here("web"), "web")
    stamp(volume, 1)
    caller = Caller(store, "web")
    caller.go_to("held")
    late = threading.Thread(target=stamp, args=(volume, 2))
    late.start()
    late.join(0.1)  # it has the time to come through, if nothing holds it
    caller.go_on("done")
    late.join()
    caller.go_on("synced")
    caller.commit()
    caller.close()
    assert (number_in(store, "web", "s"), number_in_head(volume)) == (1, 2)


def test_writers_that_wait_go_on_soon_and_the_volume_is_not_cut_then(store: onionskin.Store, here: Here) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("held")
    stamp(volume_of(server, "web"), 1)  # waits until the server has waited long enough
    caller.head._live._connection.sendall(caller.head.words[2])
    with pytest.raises(onionskin.StateError, match="not cut in time"):
        caller.head._hear("done")
    caller.close()
    goes_on(store, server, "web")


def test_a_volume_whose_caller_was_gone_after_its_commit_goes_on_with_the_new_head(
    store: onionskin.Store, here: Here
) -> None:
    server = here("web")
    volume = volume_of(server, "web")
    stamp(volume, 1)
    caller = Caller(store, "web")
    caller.go_to("synced")
    stamp(volume, 2)
    caller.commit()
    caller.close()
    volume.flush()
    assert volume._opened.head == caller.head.sealed.next.head
    server.close()
    with store.open("web") as again:
        assert number_in_head(again) == 2


def test_a_caller_that_was_stopped_before_its_commit_cannot_commit_any_more(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "STEP_SECONDS", 0.3)
    server = here("web")
    volume = volume_of(server, "web")
    stamp(volume, 1)
    caller = Caller(store, "web")
    caller.go_to("synced")
    stamp(volume, 2)
    volume.flush()  # it waits until the volume goes on with its old head
    with pytest.raises(onionskin.StateError, match="went on with its old head"):
        caller.commit()
    caller.close()
    goes_on(store, server, "web")
    server.close()
    with store.open("web") as again:
        assert number_in_head(again) == 3


def test_a_full_disk_fails_the_group_and_the_volumes_go_on(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web", "db")
    stamp(volume_of(server, "web"), 1)

    def be_full(*_: object) -> None:
        raise OSError(ENOSPC, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_sealed", be_full)  # the caller's transaction
        patch.setattr(group_member, "replace_spare", be_full)  # the server's
        with pytest.raises(OSError, match="full"):
            store.snapshot_group({"web": "s", "db": "s", "log": "s"})
        volume_of(server, "web").flush()  # waits until the seal has ended
        volume_of(server, "db").flush()
    for name in ("web", "db"):
        goes_on(store, server, name)


def test_a_caller_whose_error_came_behind_its_commit_does_not_give_up(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    change = OpenStore.change

    def change_and_fail(opened: OpenStore, what: Callable[[], Any]) -> Any:
        result = change(opened, what)
        if opened is store._opened and store.snapshots("web"):
            raise StopIteration("a handler of a signal raised this")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(OpenStore, "change", change_and_fail)
        with pytest.raises(StopIteration):
            store.snapshot_group({"web": "s"})
    volume = volume_of(server, "web")
    stamp(volume, 2)
    volume.flush()
    assert store._opened.catalog.head_of(volume._opened.row) == volume._opened.head
    assert (number_in(store, "web", "s"), number_in_head(volume)) == (1, 2)


def test_a_volume_whose_connection_is_lost_is_held_on_as_long_as_another_one_cuts_it(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "HOLD_SECONDS", 60)
    server = here("web", "db")
    callers = [Caller(store, "web", group="g"), Caller(store, "db", group="g")]
    for caller in callers:
        caller.go_to("begun")
    leader = callers[0]
    leader.head.ask_to_lead([caller.head for caller in callers])
    leader.head.leads()
    leader.go_on("held")
    callers[1].close()
    late = threading.Thread(target=stamp, args=(volume_of(server, "db"), 1))
    late.start()
    late.join(0.2)
    assert late.is_alive()
    leader.go_on("done")
    late.join()
    leader.close()
    for name in ("web", "db"):
        goes_on(store, server, name)


def test_the_files_of_the_next_head_are_locked_before_the_catalog_names_them(
    store: onionskin.Store, here: Here
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("synced")
    new = caller.head.sealed.next
    with closing(ByteLocks(store._opened.layout.lock)) as others:
        for lock_byte in (new.map_byte, new.spare_byte):
            assert others.take_exclusive([lock_byte]) == lock_byte
    caller.close()
    goes_on(store, server, "web")


@pytest.mark.parametrize("numbers", [(0, 1), (7, 7), (True, 8), (-1, 8), ("7", 8), (7, 1 << 62)])
def test_lock_bytes_that_cannot_be_are_refused(store: onionskin.Store, here: Here, numbers: tuple[Any, Any]) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("done")
    caller.head.ask_to_sync(*numbers)
    with pytest.raises(onionskin.FormatError, match="lock bytes"):
        caller.head.synced()
    caller.close()
    goes_on(store, server, "web")


def test_a_description_that_claims_the_segments_of_another_volume_is_refused(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    (row,) = store._opened.catalog.rows(VolumeRow, "name = 'db'")
    stolen = [[one.id.hex(), 1] for one in store._opened.catalog.rows(SegmentRow, "layer = ?", row.head)]
    pack = groups.pack_sealed
    monkeypatch.setattr(groups, "pack_sealed", lambda what: pack(what) | {"segments": stolen})
    with pytest.raises(onionskin.FormatError, match="is not what the catalog has"):
        store.snapshot_group({"web": "s", "log": "s"})
    monkeypatch.undo()
    goes_on(store, server, "web")


def test_a_volume_waits_for_a_caller_inside_its_transaction(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "STEP_SECONDS", 0.2)
    server = here("web")
    volume = volume_of(server, "web")
    caller = Caller(store, "web")
    caller.go_to("synced")
    flushed = threading.Thread(target=volume.flush)
    opened = store._opened
    with opened.catalog.transaction():
        write_sealed(opened, caller.head.sealed, lambda sealed, head: None)
        flushed.start()
        stamp(volume, 3)  # writers do not wait
        time.sleep(0.6)  # the server's patience is over, and it waits for this transaction
        assert flushed.is_alive()
    flushed.join()
    assert volume._opened.head == caller.head.sealed.next.head
    caller.close()


# ---- a server that is killed or stopped ----


@pytest.mark.parametrize("committed", [True, False])
def test_a_volume_whose_server_was_killed_is_opened_with_the_head_of_the_catalog(
    at: Path, store: onionskin.Store, tmp_path: Path, committed: bool
) -> None:
    with Serve(at / "web", "--socket", tmp_path / "s", log=tmp_path / "log") as server, server.client() as client:
        stamp(client, 1)
        caller = Caller(store, "web")
        caller.go_to("synced")
        stamp(client, 2)
        server.kill()
        if committed:
            caller.commit()
        caller.close()
    with store.open("web") as web:
        assert number_in_head(web) == 2
        assert (web._opened.head == caller.head.sealed.next.head) is committed
        web.snapshot("after")
    assert number_in(store, "web", "after") == 2
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


def test_a_server_that_was_stopped_fails_the_group_and_all_go_on(
    at: Path, store: onionskin.Store, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(frames, "WORD_SECONDS", 0.05)
    monkeypatch.setattr(frames, "SILENCE_SECONDS", 0.3)
    server = here("web")
    with Serve(at / "db", "--socket", tmp_path / "s", log=tmp_path / "log") as other:
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(onionskin.StateError, match=f"process {other.process.pid}"):
            store.snapshot_group({"web": "s", "db": "s"})
        goes_on(store, server, "web")
        other.process.send_signal(signal.SIGCONT)
        monkeypatch.undo()
        store.snapshot_group({"web": "s", "db": "s"})


class Phony:
    """Holds a volume and speaks the protocol up to a step; then it says nothing, or is gone."""

    def __init__(self, at: Path, name: str, last: str, *, is_gone: bool) -> None:
        self._stack = ExitStack()
        store = self._stack.enter_context(onionskin.Store(at))
        volume = self._stack.enter_context(store.open(name))
        self._id = volume._opened.row.id
        self._listener = UnixListener(store._opened.layout.volume_control(self._id), mode=0o600)
        self._last, self._is_gone = last, is_gone
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        with suppress(OSError):
            self._listener.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._stack.close()

    def _serve(self) -> None:
        connection, _ = self._listener.socket.accept()
        with connection, suppress(OSError):
            greeting = {"onionskin": "control", "version": frames.VERSION, "volume": "db", "alive_seconds": 2}
            frames.send(connection, greeting, bytes_max=1 << 20)
            for step in ("entered", "begun", "leading", "held", "done", "synced"):
                if step == self._last:
                    break
                if frames.receive(connection, bytes_max=1 << 20) is None:
                    return
                reply = {"step": step, "volume": self._id.hex(), "process": "phony"}
                if step in ("held", "done"):
                    reply = {"step": step}
                frames.send(connection, reply, bytes_max=1 << 20)
            if not self._is_gone:
                self._ending.wait()


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_server_that_stops_at_a_step_fails_the_group_and_the_others_go_on(
    at: Path, store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, step: str, is_gone: bool
) -> None:
    monkeypatch.setattr(groups, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(frames, "WORD_SECONDS", 0.05)
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    phony = Phony(at, "db", step, is_gone=is_gone)
    with store.open("log") as log:
        try:
            with pytest.raises(onionskin.StateError, match="'db'"):
                store.snapshot_group({"web": "s", "db": "s", "log": "s"})
        finally:
            phony.close()
        stamp(log, 1)
        log.flush()
        assert log.snapshots == []
        log.snapshot("t")
    goes_on(store, server, "web")


@pytest.mark.parametrize(
    "change",
    [
        {"head": "00" * 16},
        {"volume": "00" * 16},
        {"head": 5},
        {"size_bytes": -1},
        {"map_frames": 1 << 63},
        {"map_crc": True},
        {"wipe": "burn"},
        {"segments": [["00" * 16]]},
        {"segments": [["00" * 16, 1]] * (groups.SEGMENTS_MAX + 1)},
        {"to_reclaim": "all"},
        {"next_head": "xy"},
    ],
)
def test_a_description_that_cannot_be_is_refused(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    server = here("web")
    pack = groups.pack_sealed
    monkeypatch.setattr(groups, "pack_sealed", lambda what: pack(what) | change)
    with pytest.raises((onionskin.OnionskinError, OSError)):
        store.snapshot_group({"web": "s", "db": "s"})
    monkeypatch.undo()
    goes_on(store, server, "web")


def test_a_description_that_has_a_segment_twice_is_refused(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    pack = groups.pack_sealed

    def pack_twice(what: seal.SealedHead) -> dict[str, Any]:
        described = pack(what)
        return described | {"segments": described["segments"] + [[id, 0] for id, _ in described["segments"]]}

    stamp(volume_of(server, "web"), 1)
    with monkeypatch.context() as patch:
        patch.setattr(groups, "pack_sealed", pack_twice)
        with pytest.raises(onionskin.FormatError, match="cannot be read"):
            store.snapshot_group({"web": "s"})
    goes_on(store, server, "web")


@pytest.mark.parametrize(
    "call", [lambda store: store.snapshot_group({"web": "s", "db": "s"}), lambda store: store.fork("web")]
)
def test_a_server_of_an_older_version_is_named(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, call: Callable[[onionskin.Store], object]
) -> None:
    here("web")
    checked = frames.checked_request

    def check_as_before(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return checked(request | {"verb": f"{request['verb']} of another version"})

    monkeypatch.setattr(frames, "checked_request", check_as_before)
    with pytest.raises(onionskin.StateError, match="older version"):
        call(store)
