"""Forks of a store that is served: each can be had at once by its name, and has no files before it is written to."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.servers import Serve, onionskin, onionskin_json

from onionskin import Store
from onionskin.nbd.server import Limits, Server

Start = Callable[..., Serve]

MIB = 1 << 20


def files(vms: Path) -> set[str]:
    """The map files and segments of a store."""
    return {str(path.relative_to(vms)) for folder in ("layers", "segments") for path in (vms / folder).iterdir()}


def test_a_fork_that_another_process_makes_is_served_at_once_and_has_no_files_before_its_first_write(
    vms: Path, serve: Start
) -> None:
    onionskin("snapshot", f"{vms}/web@clean")
    server = serve(vms)
    before = files(vms)
    assert onionskin_json("fork", f"{vms}/web@clean", "-n", 3, "--pattern", "job-{n}")["forks"] == [
        "job-1",
        "job-2",
        "job-3",
    ]
    with server.client("job-1") as first, server.client("job-2") as second:
        for client in (first, second):
            assert client.read(5 * MIB, 4096) == bytes([5]) * 4096
        first.flush()
        assert files(vms) == before
        first.write(5 * MIB, b"mine" * 1024)
        first.flush()
        made = files(vms) - before
        assert {path.partition("/")[0] for path in made} == {"layers", "segments"} and len(made) == 2
        assert second.read(5 * MIB, 4096) == bytes([5]) * 4096
    with server.client("job-3") as third:
        assert third.read(0, 1) == b"\0"
    assert server.terminate() == 0
    assert files(vms) == before | made


def fork(vms: Path, count: int = 4) -> list[str]:
    onionskin("snapshot", f"{vms}/web@clean")
    return list(onionskin_json("fork", f"{vms}/web@clean", "-n", count, "--pattern", "job-{n}")["forks"])


def test_clients_that_write_to_a_fork_first_at_once_lose_nothing(vms: Path, serve: Start) -> None:
    server = serve(vms)
    fork(vms)
    clients = [server.client("job-1") for _ in range(8)]
    ready = threading.Barrier(len(clients))
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            ready.wait()
            clients[number].write(number * MIB, bytes([100 + number]) * 4096)
            assert clients[number].read(number * MIB, 4096) == bytes([100 + number]) * 4096
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    clients[0].flush()
    for client in clients:
        client.close()
    assert server.terminate() == 0
    with Store(vms) as store, store.open("job-1") as volume, store.open("job-2") as other:
        assert [volume.read(number * MIB, 1)[0] for number in range(8)] == list(range(100, 108))
        assert [other.read(number * MIB, 1)[0] for number in range(8)] == list(range(8))


def test_the_first_change_may_be_a_trim_or_zeros_and_a_flush_before_it_answers(vms: Path, serve: Start) -> None:
    server = serve(vms)
    fork(vms)
    with server.client("job-1") as client, server.client("job-2") as other:
        client.flush()
        client.trim(5 * MIB, MIB)
        assert client.read(5 * MIB, 4096) == bytes(4096)
        assert other.read(5 * MIB, 4096) == bytes([5]) * 4096
        client.flush()
    assert server.terminate() == 0
    with Store(vms) as store, store.open("job-1") as volume:
        assert volume.read(5 * MIB, 1) == b"\0" and volume.read(6 * MIB, 1) == b"\6"


def test_a_served_fork_is_worked_on_before_its_first_write(vms: Path, serve: Start) -> None:
    """Each operation opens the head, under a client that reads, and the client's first write goes to that head."""
    server = serve(vms, "--allow-revert")
    names = fork(vms)
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client(name)) for name in names]
        for client in clients:
            assert client.read(5 * MIB, 1) == bytes([5])
        onionskin("snapshot", f"{vms}/job-1@own")
        onionskin("resize", f"{vms}/job-2", str(65 * MIB))
        onionskin("rename", f"{vms}/job-3", "task")
        assert onionskin_json("fork", f"{vms}/job-4", "-n", 1)["forks"] == ["job-4-1"]
        for number, client in enumerate(clients):
            client.write(5 * MIB, bytes([200 + number]))
            client.flush()
        onionskin("revert", f"{vms}/job-1@own", "--yes")
        assert clients[0].read(5 * MIB, 1) == bytes([5])
        clients[0].write(5 * MIB, bytes([210]))
        with server.client("job-4-1") as client:
            assert client.read(5 * MIB, 1) == bytes([5])
    assert server.terminate() == 0
    with Store(vms) as store:
        for name, value in {"job-1": 210, "job-2": 201, "task": 202, "job-4": 203, "job-4-1": 5}.items():
            with store.open(name) as volume:
                assert volume.read(5 * MIB, 1) == bytes([value]), name
        assert store.check() == []


def test_a_killed_server_loses_no_write_that_was_first(vms: Path, serve: Start) -> None:
    server = serve(vms)
    fork(vms)
    with server.client("job-1") as client:
        client.write(5 * MIB, b"mine")
        server.process.kill()
        server.process.wait()
    with Store(vms) as store, store.open("job-1") as volume:
        assert volume.read(5 * MIB, 5) == b"mine\5"


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A store with forks that nothing was written to."""
    with Store(tmp_path / "vms") as store:
        with store.create("web", size=MIB) as web:
            web.write(0, b"a" * 4096)
            web.snapshot("clean")
        store.fork("web@clean", names=["job-1", "job-2"])
    return tmp_path / "vms"


@pytest.fixture
def here() -> Iterator[Server]:
    """A server in this process."""
    with closing(Server(limits=Limits(), allow_revert=False, log=lambda line: None)) as server:
        yield server


def client_of(server: Server, export: str) -> NbdClient:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    server.serve(theirs, "test")
    return NbdClient(ours, export)


def test_a_server_that_ends_says_nothing_of_forks_that_nothing_was_written_to(at: Path) -> None:
    said: list[str] = []
    with closing(Server(limits=Limits(), allow_revert=False, log=said.append)) as server:
        server.exports.add_store(at)
        assert server.exports.table.served["job-1"].opened.is_unwritten
    assert said == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_first_write_over_a_base_that_changed_is_answered_with_an_error_and_logged(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(MIB))
    with Store(tmp_path / "vms") as store:
        with store.create("web", base=base) as web:
            web.snapshot("clean")
        store.fork("web@clean", names=["job-1"])
    said: list[str] = []
    with closing(Server(limits=Limits(), allow_revert=False, log=said.append)) as server:
        server.exports.add_volume(tmp_path / "vms", "job-1")
        base.write_bytes(bytes(2 * MIB))
        with client_of(server, "job-1") as client, pytest.raises(OSError, match="error 5"):
            client.write(0, b"b")
    assert [line for line in said if "could not be opened to be written: the base" in line]


def test_to_tidy_opens_no_fork_before_its_first_write(at: Path, here: Server) -> None:
    here.exports.add_store(at)
    here.exports.tidy()
    assert here.exports.table.served["job-1"].opened.is_unwritten


def test_a_fork_that_is_renamed_while_its_first_write_opens_it_goes_on_with_its_own_disk(
    at: Path, here: Server
) -> None:
    here.exports.add_store(at)
    served = here.exports.table.served["job-1"]
    nbd = served._nbd

    class Renaming:
        """Has the volume renamed before its disk is replaced."""

        def replace_path(self, name: str, path: Any) -> None:
            served.volume.store.rename("job-1", "task")
            here.exports.table.follow_names()
            nbd.replace_path(name, path)

        def __getattr__(self, name: str) -> Any:
            return getattr(nbd, name)

    with client_of(here, "job-1") as client:
        served._nbd = Renaming()  # type: ignore[assignment]
        served.volume.write(0, b"b")
        served._nbd = nbd
        assert client.read(0, 2) == b"ba"
        client.write(1, b"c")
    with client_of(here, "task") as client:
        assert client.read(0, 3) == b"bca"


def lock_files(vms: Path, names: list[str]) -> set[int]:
    """The inodes of the lock files and control sockets of volumes."""
    with Store(vms, create=False) as store:
        layout, ids = store._opened.layout, [store._opened.catalog.volume(name).id for name in names]
        return {path(id).stat().st_ino for id in ids for path in (layout.volume_lock, layout.volume_control)}


def test_forks_that_share_their_files_are_worked_on_each_by_itself(vms: Path, serve: Start) -> None:
    server = serve(vms)
    names = fork(vms)
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client(name)) for name in names]
        assert len(lock_files(vms, names)) == 2
        for number, (name, client) in enumerate(zip(names, clients, strict=True)):
            client.write(0, bytes([100 + number]) * 4096)
            onionskin("snapshot", f"{vms}/{name}@own")
        onionskin("snapshot", *(f"{vms}/{name}@together" for name in names))
    with Store(vms, create=False) as store:
        for number, name in enumerate(names):
            for snapshot in ("own", "together"):
                with store.open(name, snapshot=snapshot) as view:
                    assert view.read(0, 4096) == bytes([100 + number]) * 4096
    assert onionskin("check", vms).stdout.endswith(": no problem found\n")


def test_what_a_killed_server_left_for_many_forks_keeps_nobody_out(vms: Path, serve: Start) -> None:
    server = serve(vms)
    names = fork(vms)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(server.client(name)).write(0, name.encode())
        server.kill()
    assert len(lock_files(vms, names)) == 2
    with Store(vms, create=False) as store:
        with store.open(names[0]) as first, store.open(names[1]) as second:
            assert (first.read(0, 5), second.read(0, 5)) == (b"job-1", b"job-2")
        store.delete(names[1])
    again = serve(vms)
    with again.client(names[0]) as first, again.client(names[2]) as third, again.client(names[3]) as fourth:
        assert (first.read(0, 5), third.read(0, 5), fourth.read(0, 5)) == (b"job-1", b"job-3", b"job-4")
        onionskin("snapshot", f"{vms}/{names[3]}@again")
