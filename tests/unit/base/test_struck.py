"""Interrupts at each call and return of what holds what other threads wait for. The exception is kept, as debuggers do."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.strikes import Strikes

import onionskin
from onionskin.base.background import Background
from onionskin.base.held import held
from onionskin.base.keyed_locks import KeyedLocks
from onionskin.base.paths import FilePath
from onionskin.base.signals import DeferredInterrupt
from onionskin.catalog import Catalog, new_id
from onionskin.operations import snapshots, staged_volumes
from onionskin.storage.locks import ByteLocks, locked_directory
from onionskin.storage.open_head import OpenHead

SECONDS = 1  # for which a thread is waited for that should not wait at all


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
        for last in range(-1, 24):  # counted from the end, since it flushes before
            write()
            strikes.begin(0)
            stop()
            events = strikes.end()
            write()
            interrupt = strikes.interrupted(events - last, stop)
            raised += interrupt is not None
            assert ends_in_another_thread(write), interrupt
        assert raised > 10
