"""Groups whose volumes others serve: one cut, all or none, and an end to every wait, whoever stops or dies at which step."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.nbd_client import NbdClient
from support.servers import Serve, stop

import onionskin
from onionskin.base.sockets import UnixListener, connect_unix
from onionskin.catalog import SegmentRow, VolumeRow, new_id
from onionskin.control import frames, groups
from onionskin.control.client import reach
from onionskin.control.groups import ServedHead, find_served_heads
from onionskin.kernels._volume import cut_heads
from onionskin.nbd.server import Limits, Server
from onionskin.operations import group_member, seal
from onionskin.operations.seal import refuse_untrue, write_sealed
from onionskin.operations.snapshots import _Naming, _write_names
from onionskin.storage.chain import replace_spare
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


@pytest.fixture(autouse=True)
def long_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the servers in this process, which is busy with both ends, time for a cut."""
    monkeypatch.setattr(groups, "HOLD_SECONDS", 300)


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


def test_one_connection_seals_all_volumes_that_a_server_has(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web", "db")
    reached: list[str] = []

    def note(opened: OpenStore, row: VolumeRow, name: str) -> socket.socket | None:
        reached.append(name)
        return reach(opened, row, name)

    monkeypatch.setattr(groups, "reach", note)
    store.snapshot_group(dict.fromkeys(NAMES, "s"))
    assert len(reached) == 1
    for name in ("web", "db"):
        stamp(volume_of(server, name), 1)
        volume_of(server, name).flush()


def test_volumes_of_servers_of_which_the_process_is_not_known_are_cut_together(
    store: onionskin.Store, here: Here
) -> None:
    here(*NAMES)
    with ExitStack() as stack:
        assert set(find_served_heads(store, dict.fromkeys(NAMES, 0), stack)) == set(NAMES)


def test_a_volume_that_is_held_and_not_served_is_refused_with_its_holder(
    at: Path, store: onionskin.Store, here: Here
) -> None:
    server = here("web")
    with onionskin.Store(at) as other, other.open("db"), pytest.raises(onionskin.StateError, match=str(os.getpid())):
        store.snapshot_group({"web": "s", "db": "s"})
    goes_on(store, server, "web")


@pytest.mark.parametrize("apart", [0, 1, 3])
def test_groups_that_meet_both_end(at: Path, store: onionskin.Store, here: Here, tmp_path: Path, apart: int) -> None:
    """By one server; by one that has the first and the last by id, so that the order goes back and forth; by one each."""
    by_id = sorted(NAMES, key=lambda name: store._opened.catalog.volume(name).id)
    others = by_id[1:2] if apart == 1 else by_id[:apart]
    with ExitStack() as stack:
        for name in others:
            stack.enter_context(Serve(at / name, "--socket", tmp_path / f"{name}.s", log=tmp_path / "log"))
        here(*(name for name in NAMES if name not in others))
        groups_meet(store)


def groups_meet(store: onionskin.Store) -> None:
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


def test_the_connection_to_a_volume_that_is_renamed_while_it_is_sought_is_closed(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here("web")
    catalog, connections, asked = store._opened.catalog, [], 0
    volumes = catalog.volumes_called

    def note(*args: Any, **more: Any) -> socket.socket:
        connections.append(connect_unix(*args, **more))
        return connections[-1]

    def rename(names: Any) -> dict[str, VolumeRow]:
        nonlocal asked
        asked += 1
        return volumes(names if asked < 2 else ["another name"])

    monkeypatch.setattr("onionskin.control.client.connect_if_listening", note)
    monkeypatch.setattr(catalog, "volumes_called", rename)
    with pytest.raises(onionskin.VolumeNotFoundError):
        Caller(store, "web")
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


def cut_in_the_end(store: onionskin.Store, name: str) -> None:
    """Take a group. One for which servers were too slow, as the host is busy, took nothing: it is tried again."""
    while True:
        try:
            store.snapshot_group({"web": name, "db": name})
            return
        except onionskin.StateError as error:
            if not re.search("did not cut it within|not cut in time", str(error)):
                raise


def cut_again_and_again(store: onionskin.Store, cuts: int) -> None:
    for number in range(cuts):
        cut_in_the_end(store, f"s{number}")
        ahead = number_in(store, "web", f"s{number}") - number_in(store, "db", f"s{number}")
        assert ahead in (0, 1)


def test_no_volume_is_ahead_in_a_cut_of_two_servers(at: Path, store: onionskin.Store, tmp_path: Path) -> None:
    with two_servers(at, tmp_path) as clients, stamping(clients):
        cut_again_and_again(store, 10)


def test_no_volume_is_ahead_in_a_cut_of_one_server(at: Path, store: onionskin.Store, tmp_path: Path) -> None:
    with (
        Serve(at / "web", at / "db", "--socket", tmp_path / "s", log=tmp_path / "log") as server,
        server.client("web") as web,
        server.client("db") as db,
        stamping([web, db]),
    ):
        cut_again_and_again(store, 10)


@pytest.mark.slow
def test_no_volume_is_ahead_in_many_cuts_of_two_servers_with_fio_beside(
    at: Path, store: onionskin.Store, tmp_path: Path
) -> None:
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
    """The caller of a group, which goes through the steps one by one."""

    STEPS = ("entered", "begun", "held", "done", "synced")

    def __init__(self, store: onionskin.Store, *names: str) -> None:
        self.store = store
        self._stack = ExitStack()
        found = find_served_heads(store, dict.fromkeys(names, os.getpid()), self._stack)
        self.heads: list[ServedHead] = sorted(found.values(), key=lambda head: head.row.id)
        (self.server,) = {head.process for head in self.heads}

    @property
    def head(self) -> ServedHead:
        (head,) = self.heads
        return head

    @property
    def connection(self) -> socket.socket:
        return self.server._live._connection

    def go_to(self, last: str) -> None:
        """Go on until the server has said this."""
        for step in self.STEPS[: self.STEPS.index(last) + 1]:
            self.go_on(step)

    def go_on(self, step: str) -> None:
        """Do what has the server say this, and hear it."""
        getattr(self, f"_{step}")()

    def _entered(self) -> None:
        self.server.enter(self.heads, None)
        self.server.entered()

    def _begun(self) -> None:
        self.server.ask_to_begin()
        self.server.begun()

    def _word(self, said: bytes, answer: bytes) -> None:
        self.connection.sendall(said)
        assert self.connection.recv(100) == answer

    def _held(self) -> None:
        self._word(self.server.words(is_alone=False)[0], self.server.words(is_alone=False)[1])

    def _done(self) -> None:
        self._word(self.server.words(is_alone=False)[2], self.server.words(is_alone=False)[3])

    def draw(self) -> dict[bytes, tuple[int, int]]:
        """Draw the lock bytes of the next heads."""
        catalog = self.store._opened.catalog
        numbers = iter(self.store._opened.change(lambda: catalog.take_lock_bytes(2 * len(self.heads))))
        return {head.row.id: (next(numbers), next(numbers)) for head in self.heads}

    def _synced(self) -> None:
        self.server.ask_to_sync(self.draw())
        self.server.synced()

    def commit(self, name: str = "s") -> None:
        """Write the rows of what was sealed, and name it."""
        opened = self.store._opened

        def change() -> None:
            refuse_untrue(opened, self.heads)
            for head, rows in zip(self.heads, write_sealed(opened, [head.sealed for head in self.heads]), strict=True):
                naming = _Naming(opened, head, name, "", new_id())
                naming.number(*rows)
                _write_names(opened, [naming])

        opened.change(change)

    def close(self) -> None:
        self._stack.close()


def lose_patience_at(monkeypatch: pytest.MonkeyPatch, step: str, seconds: float = 0.3) -> None:
    """Have servers wait for a moment only for what a caller says behind a step; all before it may take its time."""
    hear, cut = groups.Talk.hear, groups.cut_when_told
    heard: list[str] = []
    behind = {
        "entered": ["enter", "enter"],
        "done": ["enter", "begin", "sync"],
        "synced": ["enter", "begin", "sync", "end"],
    }

    def hear_soon(self: groups.Talk, *steps: str) -> dict[str, Any]:
        heard.append(steps[0])
        if step in behind and len(heard) == len(behind[step]):
            monkeypatch.setattr(groups, "STEP_SECONDS", seconds)
        return hear(self, *steps)

    def cut_soon(paths: Any, names: Any, peer: int, words: Any, within: float) -> int:
        words = (*words[:4], seconds if step == "held" else words[4])
        return cut(paths, names, peer, words, seconds if step == "begun" else within)

    monkeypatch.setattr(groups.Talk, "hear", hear_soon)
    monkeypatch.setattr(groups, "cut_when_told", cut_soon)


def lose_patience_with(monkeypatch: pytest.MonkeyPatch, volume: str) -> None:
    """Have callers wait for a moment only for the server of one volume; all others may take their time."""
    monkeypatch.setattr(frames, "WORD_SECONDS", 0.05)
    begin = groups.GroupServer.__init__

    def begin_in_haste(self: groups.GroupServer, opened: OpenStore, live: Any, candidates: Any) -> None:
        begin(self, opened, live, candidates)
        if live.name == volume:
            self._deadline = time.monotonic() + 0.5

    monkeypatch.setattr(groups.GroupServer, "__init__", begin_in_haste)


def test_a_caller_that_holds_nothing_more_again_and_again_is_stopped(store: onionskin.Store, here: Here) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("entered")
    with pytest.raises(onionskin.FormatError, match="no volume"):
        caller.server.enter([], None)
        caller.server.entered()
    caller.close()
    goes_on(store, server, "web")


def test_a_caller_that_takes_too_long_to_hold_its_volumes_is_stopped(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web", "db")
    caller = Caller(store, "web", "db")
    monkeypatch.setattr(groups, "GROUP_SECONDS", -1.0)
    with pytest.raises(onionskin.StateError, match="has not begun"):
        caller.server.enter(caller.heads, None)
        caller.server.entered()
    caller.close()
    goes_on(store, server, "web")


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_volume_goes_on_whose_caller_is_gone_at_a_step(store: onionskin.Store, here: Here, step: str) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    caller = Caller(store, "web")
    caller.go_to(step)
    caller.close()
    goes_on(store, server, "web")


def test_a_group_is_cut_after_one_that_failed_while_the_volume_was_written_to(
    store: onionskin.Store, here: Here
) -> None:
    server = here("web")
    web = volume_of(server, "web")
    stamp(web, 1)
    caller = Caller(store, "web")
    caller.go_to("synced")
    stamp(web, 2)  # over what was sealed, whose slots count as freed from then on, though the head goes on with them
    caller.close()
    web.flush()
    store.snapshot_group({"web": "s", "log": "s"})
    stamp(web, 3)
    assert number_in(store, "web", "s") == 2
    server.close()
    store.open("web").close()
    assert number_in(store, "web", "s") == 2
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_group_that_was_given_up_at_a_step_may_be_tried_again_at_once(
    store: onionskin.Store, here: Here, step: str
) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    caller = Caller(store, "web")
    caller.go_to(step)
    caller.close()
    stamp(volume_of(server, "web"), 2)
    store.snapshot_group({"web": "again", "db": "again"})
    assert number_in(store, "web", "again") == 2
    store.finish_work()
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_volume_goes_on_whose_caller_says_nothing_at_a_step(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    server = here("web")
    lose_patience_at(monkeypatch, step)
    caller = Caller(store, "web")
    caller.go_to(step)
    goes_on(store, server, "web")
    with pytest.raises(onionskin.StateError, match="group"):
        caller.server._hear("nothing more")
    caller.close()


def test_a_volume_goes_on_whose_caller_takes_nothing(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("done")
    pack, say = groups.pack_sealed, groups.Talk.say

    def say_soon(self: groups.Talk, step: str, **values: Any) -> None:
        self._connection.settimeout(0.5)
        say(self, step, **values)

    monkeypatch.setattr(groups.Talk, "say", say_soon)
    monkeypatch.setattr(groups, "pack_sealed", lambda what: pack(what) | {"more": "x" * (4 << 20)})
    monkeypatch.setattr(caller.server, "synced", lambda: None)
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


def test_a_volume_goes_on_whose_caller_left_and_has_a_forked_child(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "STEP_SECONDS", 3600)
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("synced")
    flush = threading.Thread(target=volume_of(server, "web").flush, daemon=True)
    with forked_child():
        caller.close()
        flush.start()
        flush.join(300)
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
            caller.server.close()
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
    lose_patience_at(monkeypatch, "synced", 1)
    caller = Caller(store, "web")
    caller.go_to("synced")
    flush = threading.Thread(target=volume_of(server, "web").flush)
    flush.start()
    connection = caller.connection
    connection.sendall((1 << 20).to_bytes(4, "big"))
    for _ in range(1000):  # each byte comes well within the time that the server waits for something
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
    caller.server._say("nonsense", volumes=[1], map_byte=-1)
    goes_on(store, server, "web")
    caller.close()


def test_a_write_that_begins_while_writers_wait_is_not_in_the_cut(store: onionskin.Store, here: Here) -> None:
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


def test_writers_that_wait_go_on_soon_and_the_volume_is_not_cut_then(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_patience_at(monkeypatch, "held")
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("held")
    stamp(volume_of(server, "web"), 1)  # waits until the server has waited long enough
    caller.connection.sendall(caller.server.words(is_alone=False)[2])
    with pytest.raises(onionskin.StateError, match="not cut in time"):
        caller.server._hear("done")
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
    lose_patience_at(monkeypatch, "synced")
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

    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_sealed", be_full)  # the caller's transaction
        patch.setattr(group_member, "replace_spare", be_full)  # the server's
        with pytest.raises(OSError, match="full"):
            store.snapshot_group({"web": "s", "db": "s", "log": "s"})
        volume_of(server, "web").flush()  # waits until the seal has ended
        volume_of(server, "db").flush()
    for name in ("web", "db"):
        goes_on(store, server, name)


def be_full(*_: object) -> None:
    raise OSError(ENOSPC, "the disk is full")


def test_a_volume_whose_caller_died_goes_on_though_the_disk_is_too_full_for_a_fence(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    with monkeypatch.context() as patch:
        patch.setattr(group_member, "replace_spare", be_full)
        patch.setattr(groups.Caller, "is_dead", lambda self: True)
        caller = Caller(store, "web")
        caller.go_to("synced")
        caller.close()
        volume_of(server, "web").flush()  # waits until the seal has ended
        stamp(volume_of(server, "web"), 2)
        volume_of(server, "web").flush()
    goes_on(store, server, "web")
    server.close()
    with store.open("web") as web:
        assert number_in_head(web) == 3


def test_a_fence_for_which_there_is_no_room_is_tried_again(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_member, "_FENCE_AGAIN_SECONDS", 0.001)
    server = here("web")
    tries: list[bytes] = []

    def be_full_for_a_while(catalog: Any, head: bytes) -> SegmentRow:
        tries.append(head)
        if len(tries) < 20:
            be_full()
        return replace_spare(catalog, head)

    monkeypatch.setattr(group_member, "replace_spare", be_full_for_a_while)
    caller = Caller(store, "web")
    caller.go_to("synced")
    caller.close()
    goes_on(store, server, "web")
    with pytest.raises(onionskin.StateError, match="went on with its old head"):
        caller.commit()


def test_a_caller_is_known_to_be_dead_once_its_process_has_ended(tmp_path: Path) -> None:
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()"
    with closing(UnixListener(tmp_path / "s")) as listener:
        process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "s"], stdin=subprocess.PIPE)
        connection, _ = listener.socket.accept()
        with connection, closing(groups.Caller(connection)) as caller:
            assert not caller.is_dead()
            process.communicate()
            assert caller.is_dead()


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
            store.snapshot_group({"web": "s", "db": "s"})
    volume = volume_of(server, "web")
    stamp(volume, 2)
    volume.flush()
    assert store._opened.catalog.head_of(volume._opened.row) == volume._opened.head
    assert (number_in(store, "web", "s"), number_in_head(volume)) == (1, 2)


def test_a_volume_counts_as_used_while_it_is_one_of_a_group_on_another_socket(
    store: onionskin.Store, here: Here
) -> None:
    server = here("web", "db")
    caller = Caller(store, "web", "db")
    caller.go_to("entered")
    table = server.exports.table
    assert [table.take_served(table.served[name]) for name in ("web", "db")] == [False, False]
    caller.close()
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


@pytest.mark.parametrize(
    "numbers", [(0, 1), (1, 1), (True, 2), (-1, 2), ("1", 2), (1, 1 << 62), (1, 1000), (1,), (1, 2, 3), None]
)
def test_lock_bytes_that_cannot_be_are_refused(store: onionskin.Store, here: Here, numbers: Any) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("done")
    caller.draw()
    caller.server.ask_to_sync({caller.head.row.id: numbers})
    with pytest.raises(onionskin.FormatError, match="lock bytes"):
        caller.server.synced()
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
    lose_patience_at(monkeypatch, "synced", 0.2)
    server = here("web")
    volume = volume_of(server, "web")
    caller = Caller(store, "web")
    caller.go_to("done")
    numbers = caller.draw()
    flushed = threading.Thread(target=volume.flush)
    opened = store._opened
    with opened.catalog.transaction():  # before the server's patience begins, which on a busy host is over at once
        caller.server.ask_to_sync(numbers)
        caller.server.synced()
        write_sealed(opened, [caller.head.sealed])
        flushed.start()
        stamp(volume, 3)  # writers do not wait
        time.sleep(0.6)  # the server's patience is over, and it waits for this transaction
        assert flushed.is_alive()
    flushed.join()
    assert volume._opened.head == caller.head.sealed.next.head
    caller.close()


# ---- a server that is killed or stopped ----


def caller_that_was_quick(store: onionskin.Store, name: str, step: str) -> Caller:
    """A caller that has come to a step, quickly enough for a server of its own, which is said by its answer."""
    while True:
        caller = Caller(store, name)
        try:
            caller.go_to(step)
        except (AssertionError, ConnectionError):
            caller.close()
        else:
            return caller


@pytest.mark.parametrize("committed", [True, False])
def test_a_volume_whose_server_was_killed_is_opened_with_the_head_of_the_catalog(
    at: Path, store: onionskin.Store, tmp_path: Path, committed: bool
) -> None:
    with Serve(at / "web", "--socket", tmp_path / "s", log=tmp_path / "log") as server, server.client() as client:
        stamp(client, 1)
        caller = caller_that_was_quick(store, "web", "synced")
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
    lose_patience_with(monkeypatch, "db")
    server = here("web")
    with Serve(at / "db", "--socket", tmp_path / "s", log=tmp_path / "log") as other:
        stop(other)
        with pytest.raises(onionskin.StateError, match=f"process {other.process.pid}"):
            store.snapshot_group({"web": "s", "db": "s"})
        goes_on(store, server, "web")
        other.process.send_signal(signal.SIGCONT)
        monkeypatch.undo()
        cut_in_the_end(store, "s")


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("step", Caller.STEPS)
def test_a_group_is_tried_again_whose_server_was_stopped_or_died_at_a_step(
    at: Path,
    store: onionskin.Store,
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    is_killed: bool,
) -> None:
    server = here("web")
    with Serve(at / "db", "--socket", tmp_path / "s", log=tmp_path / "log") as other, other.client("db") as client:
        stamp(client, 1)
        caller = caller_that_was_quick(store, "db", step)
        stop(other)
        caller.close()
        with monkeypatch.context() as patch:
            lose_patience_with(patch, "db")
            for _ in range(2):  # as long as it is stopped
                with pytest.raises(onionskin.StateError, match=f"process {other.process.pid}"):
                    store.snapshot_group({"web": "s", "db": "s"})
        goes_on(store, server, "web")
        other.process.send_signal(signal.SIGKILL if is_killed else signal.SIGCONT)
        if is_killed:
            other.process.wait()
        cut_in_the_end(store, "s")
        if not is_killed:
            stamp(client, 2)  # which goes on
    assert number_in(store, "db", "s") == 1
    store.finish_work()
    assert [problem for problem in store.check() if problem.severity != "notice"] == []


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
            for step in ("here", "entered", "begun", "held", "done", "synced"):
                if step == self._last:
                    break
                if frames.receive(connection, bytes_max=1 << 20) is None:
                    return
                reply = {"step": step, "volumes": [self._id.hex()]}
                if step in ("held", "done"):
                    reply = {"step": step}
                frames.send(connection, reply, bytes_max=1 << 20)
            if not self._is_gone:
                self._stop(connection)

    def _stop(self, connection: socket.socket) -> None:
        self._ending.wait()


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("step", ["here", *Caller.STEPS])
def test_a_server_that_stops_at_a_step_fails_the_group_and_the_others_go_on(
    at: Path, store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, step: str, is_gone: bool
) -> None:
    lose_patience_with(monkeypatch, "db")
    if step in ("held", "done"):
        monkeypatch.setattr(groups, "HOLD_SECONDS", 1)
    server = here("web")
    stamp(volume_of(server, "web"), 1)
    phony = Phony(at, "db", step, is_gone=is_gone)
    with store.open("log") as log:
        try:
            with pytest.raises(onionskin.StateError, match=r"'db'|'web', did not cut it within"):
                store.snapshot_group({"web": "s", "db": "s", "log": "s"})
        finally:
            phony.close()
        stamp(log, 1)
        log.flush()
        assert log.snapshots == []
        log.snapshot("t")
    goes_on(store, server, "web")


def test_a_server_that_has_all_volumes_of_a_group_keeps_nobody_waiting_and_is_waited_for(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "HOLD_SECONDS", 0)  # of a busy host: neither end gets a processor in time
    server = here("web", "db")
    stamp(volume_of(server, "web"), 1)
    store.snapshot_group({"web": "s", "db": "s"})
    assert [one.name for one in store.snapshots("web")] == ["s"]


class Trickling(Phony):
    """A server that gives signs of life for ever, or a frame that never ends, and never does its part."""

    TRICKLE: ClassVar = {"signs": frames.packed({"alive": True}), "bytes": b"\0"}

    def __init__(self, at: Path, name: str, last: str, *, what: str) -> None:
        self._what = self.TRICKLE[what]
        super().__init__(at, name, last, is_gone=False)

    def _stop(self, connection: socket.socket) -> None:
        if len(self._what) == 1:
            connection.sendall((1 << 22).to_bytes(4, "big"))
        while not self._ending.wait(0.01):
            connection.sendall(self._what)


@pytest.mark.parametrize("what", Trickling.TRICKLE)
@pytest.mark.parametrize("step", ["here", "entered", "begun", "synced"])
def test_a_server_that_trickles_fails_the_group_in_the_end(
    at: Path, store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, step: str, what: str
) -> None:
    lose_patience_with(monkeypatch, "db")
    server = here("web")
    phony = Trickling(at, "db", step, what=what)
    try:
        with pytest.raises(onionskin.StateError, match="'db'"):
            store.snapshot_group({"web": "s", "db": "s"})
    finally:
        phony.close()
    goes_on(store, server, "web")


@pytest.mark.parametrize("lie", ["volume", "head", "reclaims"])
def test_a_server_that_answers_for_another_volume_is_refused(
    store: onionskin.Store, here: Here, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    server = here("web")
    catalog = store._opened.catalog
    with store.open("log") as log:
        stamp(log, 1)
        log.snapshot("old")
    other = catalog.volume("log")
    spare, (own,) = catalog.spare_of(other.head), catalog.segments_of_layer(catalog.snapshots_of(other.id)[0].layer)
    lies: dict[str, dict[str, Any]] = {
        "volume": {"volume": other.id.hex(), "head": other.head.hex(), "spare": spare.id.hex(), "segments": []},
        "head": {"head": other.head.hex(), "spare": spare.id.hex(), "segments": []},
        "reclaims": {"to_reclaim": [own.id.hex()]},
    }
    pack = groups.pack_sealed
    with monkeypatch.context() as patch:
        patch.setattr(groups, "pack_sealed", lambda what: pack(what) | lies[lie])
        with pytest.raises((onionskin.FormatError, onionskin.StateError)):
            store.snapshot_group({"web": "s", "db": "s"})
    assert [snapshot.name for snapshot in store.snapshots("log")] == ["old"]
    assert catalog.volume("log").head == other.head
    goes_on(store, server, "web")


def test_what_a_server_described_is_checked_again_in_the_transaction(store: onionskin.Store, here: Here) -> None:
    server = here("web")
    caller = Caller(store, "web")
    caller.go_to("synced")
    described = caller.head.sealed
    caller.head.described = replace(described, block_size=2 * described.block_size)
    with pytest.raises(onionskin.FormatError, match="is not what the catalog has"):
        caller.commit()
    caller.close()
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
            store.snapshot_group({"web": "s", "db": "s"})
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
