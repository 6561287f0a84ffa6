"""Interrupts at each call and return of what holds what other threads wait for. The exception is kept, as debuggers do."""

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest
from support.strikes import Strikes

import onionskin
from onionskin import delta
from onionskin.base.background import Background
from onionskin.base.held import enter, held, held_together
from onionskin.base.keyed_locks import KeyedLocks
from onionskin.base.paths import FilePath
from onionskin.base.signals import DEFERRED, DeferredInterrupt
from onionskin.catalog import Catalog, VolumeRow, new_id
from onionskin.errors import StateError
from onionskin.exchange.programs import running
from onionskin.operations import expiry, export, group_snapshot, snapshots, staged_volumes
from onionskin.storage.layout import Layout
from onionskin.storage.locks import (
    BaseLock,
    ByteLocks,
    SharedFile,
    VolumeLock,
    WritersOpening,
    is_being_merged_into,
    locked_directory,
)
from onionskin.storage.open_head import OpenHead

SECONDS = 300  # for which a thread is waited for that should not wait at all


def at_each_event(
    call: Callable[[], object], number: int = signal.SIGINT, *, step: int = 1
) -> Iterator[KeyboardInterrupt | None]:
    """Interrupt a call at its first event, then at its second (or so many behind it), until it ends before."""
    strikes = Strikes()
    strikes.begin(0)
    call()
    events = strikes.end()
    assert events > 5
    for at in range(1, events + 1, step):
        yield strikes.interrupted(at, call, number)


def ends_in_another_thread(call: Callable[[], object]) -> bool:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return not thread.is_alive()


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """Keep finalizers of other tests out of what is struck: what is raised in one is only written to stderr."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(FilePath(tmp_path / "catalog.db"), create=True)
    yield catalog
    catalog.close()


@pytest.fixture
def raising() -> Iterator[None]:
    """Have all signals that are held back raise, as alarms do that limit the time of a call."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in DEFERRED]
    yield
    for number, handler in zip(DEFERRED, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM, signal.SIGUSR1])
def test_an_interrupted_transaction_keeps_no_thread_waiting(catalog: Catalog, raising: None, number: int) -> None:
    def change() -> None:
        with catalog.transaction():
            catalog.take_lock_byte()

    for interrupt in at_each_event(change, number):
        assert ends_in_another_thread(change), interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_an_interrupted_look_undoes_nothing_of_the_next_transaction_when_it_is_forgotten(
    catalog: Catalog, raising: None, number: int
) -> None:
    def look() -> None:
        with catalog.reading():
            catalog.last_lock_byte()

    for interrupt in at_each_event(look, number):
        with catalog.transaction():
            first = catalog.add_work("map", new_id(), catalog.take_lock_byte(), "release")
            del interrupt
            second = catalog.add_work("map", new_id(), catalog.take_lock_byte(), "release")
        assert catalog.work_with_ids([first.id, second.id]) == [first, second]


def test_an_interrupted_wait_for_the_background_does_not_keep_it_from_its_end() -> None:
    def work() -> None:
        background = Background(lambda: None, "work")
        background.wake()
        kept.append(background)
        background.finish()

    kept: list[Background] = []
    for interrupt in at_each_event(work):
        for background in kept:
            assert ends_in_another_thread(background.end), interrupt
        kept.clear()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM])
def test_handlers_are_put_back_wherever_a_signal_comes(number: int, hangup: None, raising: None) -> None:
    def defer() -> None:
        with DeferredInterrupt(), DeferredInterrupt():
            pass

    strikes, before = Strikes(), [signal.getsignal(one) for one in DEFERRED]
    strikes.begin(0)
    defer()
    raised = 0
    for at in range(1, strikes.end() + 1):
        try:
            strikes.begin(at, number)
            defer()
            strikes.end()
        except KeyboardInterrupt:
            strikes.end()
            raised += 1
        assert [signal.getsignal(one) for one in DEFERRED] == before, at
    assert raised > 10


def test_each_signal_that_was_held_back_is_handled_once_also_behind_one_that_raises(raising: None) -> None:
    handled = []
    signal.signal(signal.SIGUSR1, lambda number, frame: handled.append((number, frame is not None)))
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR1):
            signal.raise_signal(number)
        assert not handled
    assert handled == [(signal.SIGUSR1, True)]


@pytest.mark.parametrize("is_shared", [False, True])
def test_an_interrupted_close_of_a_lock_keeps_nobody_out(tmp_path: Path, is_shared: bool) -> None:
    layout = Layout(FilePath(tmp_path))
    (tmp_path / "volumes").mkdir()
    shared = SharedFile() if is_shared else None

    def locked(shared: SharedFile | None) -> VolumeLock:
        lock = VolumeLock(layout, bytes(16), "web")
        lock.make_file(shared)
        return lock

    held = [locked(shared)]
    for interrupt in at_each_event(lambda: held[0].close()):
        held[0].close()  # as by a handle that is closed once more
        try:
            locked(None).close()
        except StateError as error:
            pytest.fail(f"{error}, behind {interrupt!r}")
        held[0] = locked(shared)
    held[0].close()


def test_an_interrupt_beside_a_lock_of_several_by_one_opening_leaves_that_volume_free_and_the_others_locked(
    tmp_path: Path,
) -> None:
    layout = Layout(FilePath(tmp_path))
    (tmp_path / "volumes").mkdir()
    opening = WritersOpening(layout.lock)
    other = VolumeLock(layout, bytes([1] * 16), "other", opening=opening)
    held: list[VolumeLock] = []

    def work() -> None:
        held.append(VolumeLock(layout, bytes(16), "web", opening=opening))
        held[0].close()

    for interrupt in at_each_event(work):
        for lock in held:
            lock.close()  # as by a handle that is closed once more
        held.clear()
        del interrupt  # and with it a lock of which only its traceback knows
        VolumeLock(layout, bytes(16), "web").close()
        with pytest.raises(StateError):
            VolumeLock(layout, bytes([1] * 16), "other")
    assert set(opening._users) == {None, other._byte}
    opening.leave()
    other.close()
    assert opening.descriptor == -1
    VolumeLock(layout, bytes([1] * 16), "other").close()


def test_an_interrupted_close_of_byte_locks_keeps_nobody_out(tmp_path: Path) -> None:
    path = FilePath(tmp_path / "lock")

    def locked() -> ByteLocks:
        locks = ByteLocks(path)
        assert locks.take_exclusive([7]) is None
        return locks

    held = [locked()]
    for _ in at_each_event(lambda: held[0].close()):
        held[0].close()
        held[0] = locked()
    held[0].close()


def test_an_interrupted_look_at_where_an_export_goes_closes_no_number_twice(tmp_path: Path) -> None:
    """A second close of the number would close what another thread has opened meanwhile."""
    with onionskin.Store(tmp_path / "store") as store:
        directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        for _ in at_each_event(lambda: export._refuse_directory(store._opened, directory, tmp_path / "out")):
            pass
        os.close(directory)


def test_an_interrupted_wait_for_a_base_keeps_no_merge_from_it(tmp_path: Path) -> None:
    path = FilePath(tmp_path / "base")
    Path(path).write_bytes(bytes(4096))
    held = [BaseLock(path)]

    def merge() -> None:
        held[0].write_alone()
        held[0].close()

    for interrupt in at_each_event(merge):
        held[0].close()
        assert not is_being_merged_into(path), interrupt
        held[0] = BaseLock(path)
    held[0].close()


def test_what_a_context_holds_it_lets_go_of_wherever_an_interrupt_comes() -> None:
    lock = threading.Lock()

    @held
    def holding() -> Iterator[None]:
        with lock:
            yield

    def hold() -> None:
        with holding():
            assert lock.locked()

    raised = 0
    for interrupt in at_each_event(hold):
        raised += interrupt is not None
        assert not lock.locked(), interrupt
    assert raised > 5


def test_a_context_hands_on_what_its_block_raises_and_what_it_raises_itself() -> None:
    ended = []

    @held
    def holding(fails: bool) -> Iterator[str]:
        try:
            if fails:
                raise OSError("not there")
            yield "given"
        finally:
            ended.append(fails)

    with pytest.raises(ValueError, match="of the block"), holding(False) as given:
        assert given == "given"
        raise ValueError("of the block")
    with pytest.raises(OSError, match="not there"), holding(True):
        pass
    assert ended == [False, True]


def test_an_interrupted_holder_of_a_key_keeps_nobody_from_it() -> None:
    locks = KeyedLocks()

    def hold() -> None:
        with locks.holding("key"):
            pass

    for interrupt in at_each_event(hold):
        assert ends_in_another_thread(hold), interrupt


def test_a_byte_or_a_directory_that_was_held_alone_is_free_behind_an_interrupt(tmp_path: Path) -> None:
    locks, others = (ByteLocks(FilePath(tmp_path / "lock")) for _ in range(2))
    directory = FilePath(tmp_path)

    def hold() -> None:
        with locked_directory(directory, alone=True), locks.exclusive(7):
            pass

    for interrupt in at_each_event(hold):
        with others.exclusive(7) as is_free, locked_directory(directory, alone=True) as is_unused:
            assert is_free and is_unused, interrupt
    locks.close()
    others.close()


HOLDERS: dict[str, Callable[[OpenHead, OpenHead], AbstractContextManager[object]]] = {
    "one": lambda web, _: web.operation(),
    "waiting": lambda web, _: web.operation(within=1.0),
    "several": lambda web, data: snapshots.in_operations([data, web]),
}


@pytest.mark.parametrize("how", HOLDERS)
def test_a_volume_is_free_for_other_threads_behind_an_operation_that_was_interrupted(tmp_path: Path, how: str) -> None:
    with (
        onionskin.Store(tmp_path) as store,
        store.create("web", size="1M") as web,
        store.create("data", size="1M") as data,
    ):
        heads = web._opened.to_write(), data._opened.to_write()
        web.flush()

        def hold() -> None:
            with HOLDERS[how](*heads):
                pass

        def use() -> None:
            web.write(0, bytes(4096))
            web.trim(0, 4096)
            with heads[0].operation():
                pass

        for interrupt in at_each_event(hold):
            assert ends_in_another_thread(use), interrupt


def test_a_disk_whose_writers_were_stopped_is_written_again_behind_an_interrupt(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path) as store, store.create("web", size="1M") as web:
        head = web._opened.to_write()

        def stop() -> None:
            with staged_volumes._unchanged(head, None):
                pass

        def write() -> None:
            web.write(0, bytes(4096))
            web.trim(0, 4096)

        strikes, raised = Strikes(), 0
        for _ in range(2):  # the first one imports what it needs
            write()
            strikes.begin(0)
            stop()
            at = strikes.end() + 1
        while raised < 20 and at:  # from the end, since it flushes before; each call may have some events fewer
            write()
            interrupt = strikes.interrupted(at, stop)
            raised += interrupt is not None
            assert ends_in_another_thread(write), interrupt
            at -= 1
        assert raised == 20


def test_what_is_held_together_is_let_go_of_wherever_an_interrupt_comes() -> None:
    held_now: set[int] = set()

    @held
    def one(number: int) -> Iterator[None]:
        held_now.add(number)
        try:
            yield
        finally:
            held_now.discard(number)
            len("an event behind it")

    def hold() -> None:
        with held_together() as stack:
            for number in range(3):
                enter(stack, lambda: one(number))  # noqa: B023
            assert len(held_now) == 3

    raised = 0
    for interrupt in at_each_event(hold):
        raised += interrupt is not None
        assert not held_now, interrupt
    assert raised > 20


def children() -> set[str]:
    """Return the processes that this thread started and that are there, also as zombies."""
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_a_program_has_ended_wherever_an_interrupt_comes() -> None:
    kept = []  # an interrupt in the finalizer of one is only written to stderr
    others = children()  # of tests before this one

    def run() -> None:
        with running(["sleep", "inf"], stdin=subprocess.DEVNULL) as process:
            kept.append(process)

    raised = 0
    for interrupt in at_each_event(run):
        raised += interrupt is not None
        assert children() <= others, interrupt
    assert raised > 5


class Opened:
    """A head that was opened for a group."""

    there: ClassVar[set["Opened"]] = set()

    def __init__(self, row: VolumeRow) -> None:
        self.row = row
        self.there.add(self)

    def close(self) -> None:
        self.there.discard(self)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    with onionskin.Store(tmp_path / "store") as store:
        for name in ("a", "b"):
            with store.create(name, size="1M") as volume:
                volume.write(0, name.encode())
                volume.snapshot("s")
        yield store


def test_what_was_opened_for_a_group_is_closed_wherever_an_interrupt_comes(store: onionskin.Store) -> None:
    def take() -> None:
        opener, finder = (lambda name: Opened(store._opened.catalog.volume(name))), (lambda holders, stack: {})
        with group_snapshot.open_heads(store._opened, ["a", "b"], opener, finder) as found:  # type: ignore[arg-type,return-value]
            assert len(found.heads) == len(Opened.there) == 2

    for interrupt in at_each_event(take):
        assert not Opened.there, interrupt


def _compare(store: onionskin.Store) -> None:
    with delta._ends(store, None, "a@s", "b@s"):
        pass


HOLDERS_OF_SEVERAL: dict[str, Callable[[onionskin.Store], object]] = {
    "a delta": _compare,
    "expire": lambda store: expiry.drop(store._opened, store._opened.catalog.volumes_named(["a", "b"])),
}


# What is raised as a weak reference to something dies is only written to stderr.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", HOLDERS_OF_SEVERAL)
def test_several_volumes_are_free_wherever_an_interrupt_comes(store: onionskin.Store, how: str) -> None:
    layout, rows = store._opened.layout, store._opened.catalog.volumes_named(["a", "b"])
    for interrupt in at_each_event(lambda: HOLDERS_OF_SEVERAL[how](store)):
        for row in rows:
            VolumeLock(layout, row.id, row.name).close()
        assert not store._opened.views._open, interrupt


def test_a_temporary_fork_is_dropped_where_an_interrupt_comes_just_behind_its_block(store: onionskin.Store) -> None:
    strikes = Strikes()
    raised = []
    for at in range(1, 8):  # what follows is its close, which goes on in a second one
        try:
            with store.temporary("a@s") as volume:
                volume.write(0, b"gone")
                strikes.begin(at)
            strikes.end()
        except KeyboardInterrupt as interrupt:
            strikes.end()
            raised.append(interrupt)
        assert [row.name for row in store.volumes()] == ["a", "b"], at
    assert raised


# As above: where something dies at the event, the interrupt is not raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_temporary_fork_is_dropped_wherever_an_interrupt_comes(store: onionskin.Store) -> None:
    def use() -> None:
        with store.temporary("a@s") as volume:
            assert not volume.closed

    with store.open("a", snapshot="s") as view:
        for interrupt in at_each_event(use, step=5):
            assert [row.name for row in store.volumes()] == ["a", "b"], interrupt
            assert view.read(0, 1)  # its use of the view, which the fork is read through, is not given back for it
