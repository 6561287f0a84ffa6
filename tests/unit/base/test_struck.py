"""Interrupts at each call and return of what holds what other threads wait for. The exception is kept, as debuggers do."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.strikes import Strikes

from onionskin import Store
from onionskin.base.background import Background
from onionskin.base.paths import FilePath
from onionskin.base.signals import DEFERRED, DeferredInterrupt
from onionskin.catalog import Catalog, new_id
from onionskin.errors import StateError
from onionskin.operations import export
from onionskin.storage.layout import Layout
from onionskin.storage.locks import BaseLock, ByteLocks, SharedFile, VolumeLock, is_being_merged_into

SECONDS = 20  # for which a thread is waited for that should not wait at all


def at_each_event(call: Callable[[], object], number: int = signal.SIGINT) -> Iterator[KeyboardInterrupt | None]:
    """Interrupt a call at its first event, then at its second, until it ends before."""
    strikes = Strikes()
    strikes.begin(0)
    call()
    events = strikes.end()
    assert events > 5
    for at in range(1, events + 1):
        yield strikes.interrupted(at, call, number)


def ends_in_another_thread(call: Callable[[], object]) -> bool:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return not thread.is_alive()


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
    with Store(tmp_path / "store") as store:
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
