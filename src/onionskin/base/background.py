"""One thread for the background work of a store, for which no caller waits.

What must hold: `finish` returns only when all work that was asked for before is done, and does not wait for what others
ask for meanwhile: where many threads use a store, there is always something. An exception does not end the
waiting of any caller. A thread stays for one more second to take more work, because starting a thread costs more than
most of this work.
"""

import threading
from collections.abc import Callable

from onionskin.base.signals import DeferredInterrupt

LINGER_SECONDS = 1.0
INTERRUPT_SECONDS = 0.1  # for which an interrupt waits at most for its turn


class Background:
    """Runs `work` in a thread of its own when it is asked to. All methods may be called by any thread.

    Parameters
    ----------
    work : callable
        If it is asked for twice while it runs, it runs once more. It should raise nothing. An exception ends the
        thread, and the next request starts another.
    name : str
        The name of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work, self._name = work, name
        # Each block enters the lock itself. The condition would do so in Python, where an interrupt that comes as the block
        # ends is raised before the lock is given up, and then nobody ever has it again.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._asked = self._begun = self._done = 0  # requests: all of them, those that work was begun for, and done for
        self._ending = False

    def wake(self) -> None:
        """Ask for the work to be done soon."""
        with DeferredInterrupt(), self._lock:
            self._asked += 1
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    self._thread.start()
                except BaseException:  # there is no memory for it, for example
                    self._thread = None
                    raise
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until what was asked for is done."""
        asked = None
        while True:
            with DeferredInterrupt(), self._lock:  # the condition itself, which is Python, may be interrupted nowhere
                asked = self._asked if asked is None else asked
                if self._thread in (None, threading.current_thread()) or self._done >= asked:
                    return
                self._changed.wait(INTERRUPT_SECONDS)

    def end(self) -> None:
        """Finish, and let the thread go. Later requests are ignored."""
        with self._lock:
            self._ending = True
            self._changed.notify_all()
            thread = self._thread
        if thread and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        begun = 0
        try:
            while begun := self._next(begun):
                self._work()
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._done, self._thread = max(self._done, begun), None
                    self._changed.notify_all()

    def _next(self, done: int) -> int:
        """Wait for a request: how many there were then; 0 if none came for a while, or none will come.

        The work is done for the first `done` of them.
        """
        with self._lock:
            self._done = max(self._done, done)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._asked > self._begun or self._ending, LINGER_SECONDS)
            if self._asked > self._begun:
                self._begun = self._asked
                return self._begun
            self._thread = None  # under the lock: a later request starts another thread
            return 0
