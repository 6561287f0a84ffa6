"""Calls that run at the same time, because each waits for a disk.

The threads are plain ones, which live as long as the block: an executor of the standard library refuses work as soon as the
main thread has ended, and a thread that outlives that one may still take snapshots.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from onionskin.base.held import held
from onionskin.base.signals import DeferredInterrupt
from onionskin.base.threads import SureThread

Call = Callable[[], object]

THREADS_MAX = 16  # that wait for disks at the same time


class SideBySide:
    """Runs several calls at a time: one in the thread that asks for them, the others in threads beside it.

    Parameters
    ----------
    count : int
        How many calls there are to be at a time. At most THREADS_MAX of them run at once.
    """

    def __init__(self, count: int) -> None:
        self._beside = min(count, THREADS_MAX) - 1
        self._threads: list[threading.Thread] = []
        self._waiting: SimpleQueue[tuple[int, Call] | None] = SimpleQueue()
        self._ended: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()

    def run(self, calls: Sequence[Call]) -> None:
        """Run calls, and return when all have ended. Raise the error of the first in order that failed."""
        for number, call in enumerate(calls):
            self._waiting.put((number, call))
        self.start(len(calls) - 1)
        with suppress(Empty):
            while (taken := self._waiting.get_nowait()) is not None:
                self._do(*taken)
        errors = dict(self._ended.get() for _ in calls)
        for number in sorted(errors):
            if error := errors[number]:
                raise error

    def start(self, count: int) -> None:
        """Start so many threads, if they are not there yet. It may be done before there are calls."""
        with suppress(RuntimeError):  # no thread can be started: the one that asks for the calls runs them
            while len(self._threads) < min(self._beside, count):
                thread = SureThread(target=self._work, name="onionskin side by side")
                with DeferredInterrupt():  # one that nobody knows would wait for calls without end
                    self._threads.append(thread)
                    try:
                        thread.start()
                    except BaseException:
                        self._threads.remove(thread)
                        raise

    def _work(self) -> None:
        if threading.current_thread() not in self._threads:
            return  # it begins so late that it was given up
        while (taken := self._waiting.get()) is not None:
            self._do(*taken)

    def _do(self, number: int, call: Call) -> None:
        try:
            call()
        except BaseException as error:
            self._ended.put((number, error))
        else:
            self._ended.put((number, None))

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()


@held
def side_by_side(count: int) -> Iterator[SideBySide]:
    """Give what runs that many calls at a time, until the block ends."""
    running = SideBySide(count)
    try:
        yield running
    finally:
        running.close()
