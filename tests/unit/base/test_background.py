"""The thread for work that nobody waits for."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from support.background import wait_for_background

from onionskin.base import background as background_module
from onionskin.base.background import Background
from onionskin.base.signals import DEFERRED


def test_what_is_asked_for_while_the_work_runs_is_done_once_more() -> None:
    begun, go_on, done = threading.Semaphore(0), threading.Semaphore(0), []

    def work() -> None:
        begun.release()
        go_on.acquire()
        done.append(threading.current_thread())

    background = Background(work, "test")
    background.wake()
    begun.acquire()
    background.wake()
    background.wake()
    go_on.release(2)
    background.finish()
    assert len(done) == 2
    assert done[0] is done[1], "a second thread was started for what the first could do"
    background.end()
    assert not done[0].is_alive()


def test_finish_returns_only_when_what_runs_has_ended() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()
        ended.set()

    background = Background(work, "test")
    background.wake()
    begun.wait()
    waiter = threading.Thread(target=background.finish)
    waiter.start()
    assert waiter.is_alive()
    go_on.set()
    waiter.join()
    assert ended.is_set()
    background.end()


def test_finish_does_not_wait_for_what_is_asked_for_meanwhile() -> None:
    stop, finished = threading.Event(), threading.Event()

    def work() -> None:
        if not stop.is_set():
            background.wake()  # there is always more

    background = Background(work, "test")
    background.wake()
    waiter = threading.Thread(target=lambda: (background.finish(), finished.set()))
    waiter.start()
    assert finished.wait(300)
    stop.set()
    waiter.join()
    background.end()


def test_work_that_raises_keeps_nobody_waiting_and_the_next_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def work() -> None:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise RuntimeError("meant to be seen")

    background = Background(work, "test")
    background.wake()
    background.finish()
    threads[0].join()
    background.wake()
    background.finish()
    background.end()
    assert len(threads) == 2
    assert [str(one.exc_value) for one in seen] == ["meant to be seen"]


def test_nothing_is_begun_after_the_end() -> None:
    calls: list[int] = []
    background = Background(lambda: calls.append(1), "test")
    background.end()
    background.wake()
    background.finish()
    assert calls == []


def interrupted_at(event: int, call: Callable[[], None]) -> bool:
    """Run a call whose nth function raises as it begins, or behind its return to C: there a signal's handler may run."""
    left = [event]

    def profile(frame: object, kind: str, argument: object) -> None:
        left[0] -= kind in ("call", "c_return")
        if left[0] < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    try:
        sys.setprofile(profile)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.fixture
def handlers_are_put_back() -> Iterator[None]:
    """Put the handlers of signals back: what is raised here comes from no signal, also as they are exchanged."""
    handlers = {number: signal.getsignal(number) for number in DEFERRED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("verb", ["finish", "wake"])
def test_a_handler_that_raises_in_a_caller_stops_nobody_else(verb: str, handlers_are_put_back: None) -> None:
    event = 0
    while True:
        done = threading.Event()
        background = Background(done.set, "test")
        background.wake()
        was_interrupted = interrupted_at(event, getattr(background, verb))
        others = threading.Thread(target=lambda: (background.wake(), background.finish()), daemon=True)  # noqa: B023
        others.start()
        others.join(300)
        assert not others.is_alive(), f"interrupted at event {event}"
        background.end()
        if not was_interrupted:
            break
        event += 1
    assert event


def test_what_rests_begins_when_somebody_waits_for_it_or_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    rests, begun = threading.Event(), threading.Event()
    background = Background(begun.set, "test")
    wait = background._changed.wait

    def waits(seconds: float | None = None) -> bool:
        if seconds is not None and seconds > 1000:
            rests.set()
        return wait(seconds)

    monkeypatch.setattr(background._changed, "wait", waits)
    background.rest(3600)
    background.wake()
    assert rests.wait(300)
    background.wake()  # which is no reason to begin
    assert not begun.is_set()
    background.finish()
    assert begun.is_set()
    background.end()

    begun.clear()
    other = Background(begun.set, "test")
    other.rest(0.01)
    other.wake()
    assert begun.wait(300)
    other.end()


def test_what_rests_is_not_put_off_again_by_a_later_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests, goes_on = [0.0], threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(background_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    background = Background(goes_on.set, "test")
    wait = background._changed.wait

    def waits(seconds: float | None = None) -> bool:
        if seconds is not None and seconds > 1000:
            rests.release()
            if len(now) > 1:
                goes_on.set()  # it rests again
        return wait(seconds)

    monkeypatch.setattr(background._changed, "wait", waits)
    background.rest(3600)
    background.wake()
    assert rests.acquire(timeout=300)
    with background._guard:
        now[:] = [3600.0, 0.0]
        background.rest(3600)
        background.wake()
    assert goes_on.wait(300)
    assert not rests.acquire(blocking=False)
    background.end()


def test_what_rests_is_done_when_all_ends() -> None:
    done: list[int] = []
    background = Background(lambda: done.append(1), "test")
    background.rest(3600)
    background.wake()
    background.end()
    assert done


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system have no thread left."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_who_asks_where_no_thread_can_be_started_is_not_told_and_who_waits_does_the_work(no_threads: None) -> None:
    done = []
    background = Background(lambda: done.append(threading.current_thread()), "test")
    background.wake()
    assert done == []
    background.finish()
    background.finish()
    assert done == [threading.current_thread()]
    background.wake()
    background.end()
    assert len(done) == 2


def test_a_later_request_starts_the_thread_that_an_earlier_one_did_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    background = Background(lambda: done.append(threading.current_thread()), "test")

    def refuse(thread: threading.Thread) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(background_module.SureThread, "start", refuse)
        background.wake()
    background.wake()
    background.finish()
    assert len(done) == 1 and done[0] is not threading.current_thread()
    background.end()


def test_a_thread_that_begins_after_it_was_given_up_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done, late = [], []

    def refuse(thread: threading.Thread) -> None:
        late.append(thread)
        raise RuntimeError("can't start new thread: it did not begin")

    background = Background(lambda: done.append(1), "test")
    with monkeypatch.context() as patch:
        patch.setattr(background_module.SureThread, "start", refuse)
        background.wake()
    late[0].start()
    late[0].join()
    assert done == []
    background.end()
    assert done == [1]


def test_what_a_test_leaves_in_the_background_of_a_store_has_ended_before_the_next_one() -> None:
    threads: list[threading.Thread] = []
    background = Background(lambda: threads.append(threading.current_thread()), "onionskin pending work")
    background.wake()
    background.finish()  # its thread lingers
    wait_for_background()
    assert not threads[0].is_alive()
