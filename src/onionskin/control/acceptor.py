"""One thread accepts the connections to all control sockets of this process: a thread for each would be a third of the time
in which a server opens a fork.

What must hold: nothing is called for a socket once `remove` has returned. What is called does not wait for the other end.
The child of a fork has an epoll and a thread of its own: what it adds or removes in that of the parent would change that.
"""

import os
import select
import socket
import threading
from collections.abc import Callable

from onionskin.base import forking
from onionskin.base.threads import SureThread

AGAIN_SECONDS = 0.2


class Acceptor:
    """Calls a function for each socket to which somebody connects. Any thread may call the methods, but not the function.

    The thread runs as long as there is a socket.
    """

    def __init__(self) -> None:
        self._stand()
        forking.register(self)

    def _stand(self) -> None:
        self._guard = threading.Lock()  # held while a function is called
        self._called: dict[int, Callable[[], bool]] = {}
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._wake = -1

    def after_fork(self) -> None:
        """In the child of a fork: leave all sockets to the parent, whose thread is not here. Those added later are heard."""
        epoll, wake = self._epoll, self._wake
        has_thread = self._thread is not None
        self._stand()
        if has_thread and epoll is not None:  # else the thread has closed them
            epoll.close()
            os.close(wake)

    def add(self, listening: socket.socket, accept: Callable[[], bool]) -> None:
        """Call `accept` when there is a connection to take. If it returns false, it is called again a little later.

        Raises
        ------
        RuntimeError
            The process may start no more threads.
        """
        listening.setblocking(False)  # the other end may have gone before it is accepted
        with self._guard:
            if self._thread is None:
                self._begin()
            assert self._epoll
            self._epoll.register(
                listening.fileno(), select.EPOLLIN
            )  # this may fail, and then there is nothing to remove
            self._called[listening.fileno()] = accept

    def remove(self, listening: socket.socket) -> None:
        """Call nothing for a socket any more. It is not closed before. Further calls do nothing."""
        with self._guard:
            if self._called.pop(listening.fileno(), None) is None:
                return
            assert self._epoll
            self._epoll.unregister(listening.fileno())
            ending = None if self._called else self._thread
            if ending:
                self._thread = None
                os.eventfd_write(self._wake, 1)
        if ending:
            ending.join()

    def _begin(self) -> None:
        """Start the thread, which gets an epoll of its own: one that ends may still be looking at the former one."""
        epoll, wake = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC)
        epoll.register(wake, select.EPOLLIN)
        is_given_up = threading.Event()
        thread = SureThread(target=self._run, args=(epoll, wake, is_given_up), name="onionskin control", daemon=True)
        try:
            thread.start()
        except BaseException:
            is_given_up.set()
            epoll.close()
            os.close(wake)
            raise
        self._thread, self._epoll, self._wake = thread, epoll, wake

    def _run(self, epoll: select.epoll, wake: int, is_given_up: threading.Event) -> None:
        if is_given_up.is_set():  # it begins so late that its descriptors may be others by now
            return
        again = threading.Event()
        while True:
            for descriptor, _ in epoll.poll():
                if descriptor == wake:
                    epoll.close()
                    os.close(wake)
                    return
                with self._guard:
                    accept = self._called.get(descriptor)
                    is_taken = accept is None or accept()
                if not is_taken:
                    again.wait(AGAIN_SECONDS)  # no descriptors or no memory is left; so this loop does not spin


of_process = Acceptor()
