"""A child of os.fork() that opens a store which its parent has open: it is a process like any other."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.catalog import connection

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(path) as store:
        with store.create("v", size=SIZE) as volume:
            volume.snapshot("a")
        yield store


def forked(work: Callable[[], object]) -> int:
    """Do something in a child of this process, which leaves with status 0 if that raised nothing."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # SIGALRM ends one that waits for itself
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_child_commits_stays_where_its_parent_closes_the_store_before(
    store: onionskin.Store, path: Path
) -> None:
    opened, closed = os.pipe(), os.pipe()

    def take_snapshots() -> None:
        with onionskin.Store(path) as own, own.open("v") as volume:
            os.write(opened[1], b".")
            os.read(closed[0], 1)
            volume.write(0, b"b" * 4096)
            volume.snapshot("b")
            volume.write(0, b"c" * 4096)

    child = forked(take_snapshots)
    os.read(opened[0], 1)
    store.close()
    os.write(closed[1], b".")
    assert status(child) == 0
    for descriptor in (*opened, *closed):
        os.close(descriptor)
    with onionskin.Store(path) as again:
        assert [snapshot.name for snapshot in again.snapshots("v")] == ["a", "b"]
        assert again.check() == []
        with again.open("v") as volume:
            assert volume.read(0, 4096) == b"c" * 4096


def test_the_child_of_a_child_can_open_the_store_too(store: onionskin.Store, path: Path) -> None:
    def fork_in_the_child_of_a_child() -> None:
        with onionskin.Store(path):
            assert status(forked(lambda: onionskin.Store(path).fork("v", "a", names=["deep"]))) == 0

    assert status(forked(fork_in_the_child_of_a_child)) == 0
    assert "deep" in store


def test_a_child_waits_for_no_commit_of_its_parent(store: onionskin.Store, path: Path) -> None:
    has_ended = threading.Event()

    def commit() -> None:
        while not has_ended.is_set():
            store.set_note("v", "a", os.urandom(4).hex())

    thread = threading.Thread(target=commit)
    thread.start()
    try:
        children = [forked(lambda: onionskin.Store(path).set_defaults(wipe="zero")) for _ in range(8)]
        assert [status(child) for child in children] == [0] * 8
    finally:
        has_ended.set()
        thread.join()


def test_a_child_that_was_forked_inside_a_transaction_opens_no_store(
    store: onionskin.Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_refused() -> None:
        with pytest.raises(onionskin.StateError, match="spawn"):
            onionskin.Store(path)

    with store._opened.catalog.transaction():
        assert status(forked(be_refused)) == 0
        monkeypatch.setattr(connection, "_BUSY_SECONDS", 0)  # nobody waits for the transaction
        statuses: list[int] = []
        thread = threading.Thread(target=lambda: statuses.append(status(forked(be_refused))))
        thread.start()
        thread.join()
    assert statuses == [0]
    store.set_note("v", "a", "the parent goes on")
