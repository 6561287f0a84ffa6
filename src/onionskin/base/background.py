"""One thread for the background work of a store, for which no caller waits.

What must hold: `finish` returns only when all work that was asked for before is done, and does not wait for what others
ask for meanwhile: where many threads use a store, there is always something. An exception does not end the
waiting of any caller. A thread stays for one more second to take more work, because starting a thread costs more than
most of this work.

A handler of a signal may raise in a caller (Ctrl-C, an alarm) at any point. Then no lock stays taken, and none is let go that
another thread has. A `threading.Condition` does not promise that: it takes and gives its lock in Python, where a handler may
run between. So callers take the plain lock, and each waits for a lock of its own.

Where the system gives no thread (a limit of a container, no memory), nobody hears of that who only asked: what he did is
done already. Each later request tries to start one again, and who waits for the work does it himself.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from onionskin.base.signals import DeferredInterrupt
from onionskin.base.threads import SureThread

LINGER_SECONDS = 1.0


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
        self._guard = threading.RLock()  # a finalizer that runs under it may ask for work
        self._changed = threading.Condition(self._guard)  # only the thread waits for it, in which no handler runs
        self._waiting: list[tuple[int, threading.Lock]] = []  # who waits until so many requests are done
        self._thread: threading.Thread | None = None
        self._rests_until = 0.0  # nothing is begun before that for which nobody waits
        self._asked = self._begun = self._done = 0  # requests: all of them, those that work was begun for, and done for
        self._ending = False

    def wake(self) -> None:
        """Ask for the work to be done soon."""
        with DeferredInterrupt(), self._guard:
            self._asked += 1
            if self._thread is None and not self._ending:
                with suppress(RuntimeError, MemoryError):  # no thread can be started now
                    thread = SureThread(target=self._run, name=self._name, daemon=True)
                    thread.start()  # it waits for the lock: an interrupt in here leaves no unknown thread
                    self._thread = thread
            self._changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Begin nothing for so long, unless somebody waits for it: processors and disk are wanted for something else.

        What rests already is not put off again: of a guest that goes back again and again, what it wrote would stay for ever.
        """
        with DeferredInterrupt(), self._guard:
            self._rests_until = max(self._rests_until, time.monotonic() + seconds)

    def finish(self) -> None:
        """Wait until what was asked for is done."""
        done = threading.Lock()
        with DeferredInterrupt(), self._guard:
            has_thread, asked = self._thread is not None, self._asked
            if self._thread is threading.current_thread() or self._done >= asked or (self._ending and not has_thread):
                return
            if has_thread:
                done.acquire()
                self._waiting.append((asked, done))
                self._changed.notify_all()  # it may rest
        if has_thread:
            done.acquire()  # without the guard; an interrupt here leaves an entry, which the thread removes
        else:
            self._do_here(asked)

    def _do_here(self, asked: int) -> None:
        """Do the work for the first `asked` requests in this thread: none could be started for it."""
        self._work()
        with DeferredInterrupt(), self._guard:
            self._note_done(asked)

    def end(self) -> None:
        """Finish, and let the thread go. Later requests are ignored."""
        with self._guard:
            self._ending = True
            self._changed.notify_all()
            thread, asked, is_left = self._thread, self._asked, self._done < self._asked
        if thread is None and is_left:
            self._do_here(asked)
        elif thread and thread is not threading.current_thread():
            try:
                thread.join()
            except BaseException:  # an interrupt: what the thread uses is closed behind this
                thread.join()
                raise

    def _run(self) -> None:
        begun = 0
        with self._guard:  # whoever started it has noted it by now
            if self._thread is not threading.current_thread():
                return  # it began so late that it was given up
        try:
            while begun := self._next(begun):
                self._work()
        finally:
            with self._guard:
                if self._thread is threading.current_thread():
                    self._thread = None
                    self._note_done(self._asked)  # nobody would do the rest

    def _next(self, done: int) -> int:
        """Wait for a request: how many there were then; 0 if none came for a while, or none will come.

        The work is done for the first `done` of them.
        """
        with self._guard:
            self._note_done(done)
            self._changed.wait_for(lambda: self._asked > self._begun or self._ending, LINGER_SECONDS)
            if self._asked > self._begun:
                until = self._rests_until  # as it is now
                while not (self._waiting or self._ending) and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                self._begun = self._asked
                return self._begun
            self._thread = None  # under the lock: a later request starts another thread
            return 0

    def _note_done(self, done: int) -> None:
        """Let go on who waits for these requests. With the guard."""
        self._done = max(self._done, done)
        waiting, self._waiting = self._waiting, []
        for asked, waiter in waiting:
            if asked <= self._done:
                waiter.release()
            else:
                self._waiting.append((asked, waiter))
