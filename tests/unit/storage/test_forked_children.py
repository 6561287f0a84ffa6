"""A child of os.fork() that opens a store which its parent has open: it is a process like any other."""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onionskin
from onionskin.base import forking
from onionskin.control import server
from onionskin.machine import fork as machine_fork

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
        signal.alarm(300)  # SIGALRM ends one that waits for itself
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
        monkeypatch.setattr(forking, "_REST_SECONDS", 0)  # nobody waits for the transaction
        statuses: list[int] = []
        thread = threading.Thread(target=lambda: statuses.append(status(forked(be_refused))))
        thread.start()
        thread.join()
    assert statuses == [0]
    store.set_note("v", "a", "the parent goes on")


PARENT_THAT_CLOSES = """
import os, signal, sys, onionskin
path, does_open = sys.argv[1], sys.argv[2] == "opens"
store = onionskin.Store(path)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.read(reader, 1)
    if does_open:
        assert [snapshot.name for snapshot in onionskin.Store(path).snapshots("v")] == ["a", "b"]
    sys.exit()
store.close()
other = os.fork()
if other == 0:
    onionskin.Store(path).open("v").snapshot("b")
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(other, 0)
os.write(writer, b".")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("what", ["opens", "exits"])
def test_a_child_takes_no_log_away_that_another_process_left_when_it_was_killed(path: Path, what: str) -> None:
    with onionskin.Store(path) as store, store.create("v", size=SIZE) as volume:
        volume.snapshot("a")
    subprocess.run([sys.executable, "-c", PARENT_THAT_CLOSES, path, what], check=True)
    with onionskin.Store(path) as store:
        assert [snapshot.name for snapshot in store.snapshots("v")] == ["a", "b"]


# In a process of its own: where concurrent.futures is imported, its own hook of a fork would wait for itself.
FORKS_IN_A_FORK = """
import os, sys, threading
import onionskin
from onionskin.base import forking

def check_child():
    child = os.fork()
    if child == 0:
        try:
            onionskin.Store(sys.argv[1]).close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

class Once:
    is_asked = is_right = False

    def rest(self, seconds):
        if not self.is_asked:
            self.is_asked = True
            check_child()
            self.is_right = True  # what is raised in here goes nowhere
        return True

    def go_on(self):
        pass

with onionskin.Store(sys.argv[1]) as store:
    once = Once()
    forking.register_resting(once)
    check_child()
    assert once.is_right
    thread = threading.Thread(target=store.set_note, args=("v", "a", "nothing is left locked"))
    thread.start()
    thread.join()
"""


def test_a_thread_that_is_about_to_fork_can_fork_in_a_signal_handler(store: onionskin.Store, path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKS_IN_A_FORK, path], check=True, timeout=300)
    assert store.snapshots("v")[0].note == "nothing is left locked"


class Once:
    """Does something the first time that a fork waits for it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work: list[Callable[[], object]] = [work]

    def rest(self, seconds: float) -> bool:
        if self._work:
            self._work.pop()()
        return True

    def go_on(self) -> None:
        pass


def test_a_fork_waits_for_a_store_that_is_opened_meanwhile_too(store: onionskin.Store, path: Path) -> None:
    opened: list[onionskin.Store] = []

    def open_in_a_thread() -> None:
        thread = threading.Thread(target=lambda: opened.append(onionskin.Store(path)))
        thread.start()
        thread.join()

    once = Once(open_in_a_thread)
    forking.register_resting(once)
    assert status(forked(lambda: onionskin.Store(path).close())) == 0
    opened[0].close()


class Side:
    """One of two that rest; the second is busy as long as the first one rests."""

    def __init__(self) -> None:
        self.waits_for: Side | None = None
        self.rests = False

    def rest(self, seconds: float) -> bool:
        if self.waits_for is not None and self.waits_for.rests:
            return False
        self.waits_for = None  # it got what it waited for
        self.rests = True
        return True

    def go_on(self) -> None:
        self.rests = False


def test_a_fork_lets_one_store_go_on_that_the_transaction_of_another_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted((Side(), Side()), key=id)
    second.waits_for = first
    monkeypatch.setattr(forking, "_resting", set())
    forking.register_resting(first)
    forking.register_resting(second)
    assert status(forked(lambda: os._exit(2 * first.rests + second.rests))) == 3
    assert (first.rests, second.rests) == (False, False)


@pytest.mark.parametrize("lock", [machine_fork._guard, server._listening_guard], ids=["machines", "control"])
def test_a_lock_of_a_module_that_a_thread_of_the_parent_holds_is_free_in_a_child(lock: forking.ForkableLock) -> None:
    with lock:
        assert status(forked(lock.__enter__)) == 0


def test_a_child_opens_another_store_where_something_else_is_at_the_path_of_an_inherited_one(
    store: onionskin.Store, path: Path
) -> None:
    catalog = path / "catalog.db"
    moved = catalog.rename(path / "moved")
    for put in (lambda: catalog.symlink_to("nowhere"), lambda: os.mkfifo(catalog)):
        put()
        assert status(forked(lambda: onionskin.Store(path.with_name("other")).close())) == 0
        catalog.unlink()
    moved.rename(catalog)
