"""Threads that are interrupted while they are started or waited for."""

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from support.strikes import Strikes

import onionskin
from onionskin.base import threads
from onionskin.base.side_by_side import SideBySide
from onionskin.base.threads import Thread
from onionskin.operations.copy import run_job


class Interrupts:
    """Interrupts the main thread until it hears of it: wherever it waits then."""

    def __init__(self) -> None:
        self.heard = threading.Event()

    def handle(self, *_: object) -> None:
        if not self.heard.is_set():
            self.heard.set()
            raise KeyboardInterrupt

    def send(self) -> None:
        while not self.heard.wait(0.02):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    found = Interrupts()
    before = signal.signal(signal.SIGUSR1, found.handle)
    yield found
    signal.signal(signal.SIGUSR1, before)


def test_a_thread_is_waited_for_behind_an_interrupted_wait(interrupts: Interrupts) -> None:
    may_end, ended = threading.Event(), []

    def work() -> None:
        interrupts.send()
        may_end.wait()
        ended.append(True)

    thread = Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        thread.join()
    thread.join(0.01)
    assert not thread.has_ended
    threading.Timer(0.2, may_end.set).start()
    thread.join()
    assert ended == [True] and thread.has_ended


def test_a_thread_that_ended_before_it_did_anything_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    thread = Thread(target=print)
    monkeypatch.setattr(thread, "run", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread.start()
    thread.join()


class Job:
    """A copy that is interrupted, and ends some time after it was told to."""

    bytes_done = 0
    descriptors = ((), 0)

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts, self._is_cancelled = interrupts, threading.Event()
        self.has_ended = False

    def run(self) -> None:
        self._interrupts.send()
        self._is_cancelled.wait()
        threading.Event().wait(0.2)  # it is within a call of the kernel
        self.has_ended = True

    def cancel(self) -> None:
        self._is_cancelled.set()


def test_an_interrupted_copy_has_ended_before_its_files_are_closed(interrupts: Interrupts) -> None:
    job = Job(interrupts)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, None, 0, 0)  # type: ignore[arg-type]
    assert job.has_ended


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Have no interrupt hit what a collection of garbage calls: nobody would get it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def struck_starts(start: Callable[[], object]) -> list[BaseException | None]:
    """Interrupt a start at each of its calls, and return what each raised."""
    strikes = Strikes()
    strikes.begin(0)
    start()
    return [strikes.interrupted(at, start) for at in range(1, strikes.end() + 1)]


def test_an_interrupt_comes_before_or_behind_the_start_of_a_thread(no_collection: None) -> None:
    threads: list[Thread] = []
    go = threading.Event()

    def start() -> None:
        threads.append(Thread(target=go.wait, daemon=True))
        threads[-1].start()

    raised = struck_starts(start)
    assert raised and any(raised)
    go.set()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
            assert thread.has_ended


def test_an_interrupt_leaves_no_thread_that_waits_for_calls_without_end(no_collection: None) -> None:
    running: list[SideBySide] = []

    def start() -> None:
        running.append(SideBySide(3))
        running[-1].start(2)

    assert any(struck_starts(start))
    for one in running:
        one.close()
    working = [getattr(getattr(thread, "_target", None), "__self__", None) for thread in threading.enumerate()]
    assert [one for one in working if one in running] == []


def test_calls_side_by_side_are_made_where_threads_die_before_they_say_that_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without memory for it, a thread ends before it does anything, and whoever waits for its first word waits for ever."""
    monkeypatch.setattr(threads, "START_SECONDS", 0.0)
    late: SimpleQueue[threading.Thread] = SimpleQueue()
    monkeypatch.setattr(threads.SureThread, "_bootstrap", lambda self: late.put(self))
    made: list[int] = []
    running = SideBySide(3)
    running.run([lambda number=number: made.append(number) for number in range(3)])
    assert made == [0, 1, 2]
    late.get(timeout=300).run()  # it begins all the same, when it was given up
    running.close()


def test_all_threads_of_onionskin_are_of_its_own_kind() -> None:
    package = Path(onionskin.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "threading.Thread(" in path.read_text()] == []
