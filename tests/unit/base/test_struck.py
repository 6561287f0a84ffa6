"""Interrupts at each call and return of what holds what other threads wait for. The exception is kept, as debuggers do."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.strikes import Strikes

from onionskin.base.background import Background
from onionskin.base.paths import FilePath
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import Catalog, new_id
from onionskin.errors import StateError
from onionskin.storage.layout import Layout
from onionskin.storage.locks import BaseLock, ByteLocks, SharedFile, VolumeLock, is_being_merged_into

SECONDS = 20  # for which a thread is waited for that should not wait at all


def at_each_event(call: Callable[[], object]) -> Iterator[KeyboardInterrupt | None]:
    """Interrupt a call at its first event, then at its second, until it ends before."""
    strikes = Strikes()
    strikes.begin(0)
    call()
    events = strikes.end()
    assert events > 5
    for at in range(1, events + 1):
        yield strikes.interrupted(at, call)


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


def test_an_interrupted_transaction_keeps_no_thread_waiting(catalog: Catalog) -> None:
    def change() -> None:
        with catalog.transaction():
            catalog.take_lock_byte()

    for interrupt in at_each_event(change):
        assert ends_in_another_thread(change), interrupt


def test_an_interrupted_look_undoes_nothing_of_the_next_transaction_when_it_is_forgotten(catalog: Catalog) -> None:
    def look() -> None:
        with catalog.reading():
            catalog.last_lock_byte()

    for interrupt in at_each_event(look):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_handlers_are_put_back_wherever_a_signal_comes(number: int, hangup: None) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def defer() -> None:
        with DeferredInterrupt(), DeferredInterrupt():
            pass

    strikes, numbers = Strikes(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(one, interrupt) for one in numbers]
    try:
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
            assert [signal.getsignal(one) for one in numbers] == [interrupt] * 3, at
        assert raised > 10
    finally:
        for one, handler in zip(numbers, before, strict=True):
            signal.signal(one, handler)


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
