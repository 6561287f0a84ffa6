"""One thread accepts for all control sockets: it hears each, none after its removal, and ends with the last of them."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from onionskin.base.sockets import UnixListener
from onionskin.control.acceptor import Acceptor


class Listening:
    def __init__(self, acceptor: Acceptor, path: Path) -> None:
        self.acceptor = acceptor
        self.path = path
        self.listener = UnixListener(path)
        self.accepted = threading.Semaphore(0)
        try:
            acceptor.add(self.listener.socket, self._accept)
        except BaseException:
            self.listener.close()
            raise

    def _accept(self) -> bool:
        connection, _ = self.listener.socket.accept()
        connection.close()
        self.accepted.release()
        return True

    def connect(self) -> None:
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(str(self.path))

    def close(self) -> None:
        self.acceptor.remove(self.listener.socket)
        self.listener.close()


def hearing() -> set[threading.Thread]:
    """Return the threads that hear sockets. Those that tests before this one have left may end at any moment."""
    return {thread for thread in threading.enumerate() if thread.name == "onionskin control"}


def test_one_thread_hears_all_sockets_and_ends_with_the_last(tmp_path: Path) -> None:
    others = hearing()
    acceptor = Acceptor()
    for _ in range(2):  # a thread that ended is followed by another one
        sockets = [Listening(acceptor, tmp_path / f"{number}.control") for number in range(5)]
        assert len(hearing() - others) == 1
        for one in sockets:
            one.connect()
            assert one.accepted.acquire(timeout=300)
        for one in sockets[:-1]:
            one.close()
        sockets[-1].connect()
        assert sockets[-1].accepted.acquire(timeout=300)
        sockets[-1].close()
        assert not hearing() - others


def test_a_removed_socket_is_not_heard(tmp_path: Path) -> None:
    acceptor = Acceptor()
    gone, stays = (Listening(acceptor, tmp_path / name) for name in ("gone", "stays"))
    acceptor.remove(gone.listener.socket)
    acceptor.remove(gone.listener.socket)
    gone.connect()
    stays.connect()
    assert stays.accepted.acquire(timeout=300)
    assert not gone.accepted.acquire(blocking=False)
    gone.listener.close()
    stays.close()


def test_a_socket_is_not_taken_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    acceptor = Acceptor()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            Listening(acceptor, tmp_path / "refused")
    one = Listening(acceptor, tmp_path / "taken")
    one.connect()
    assert one.accepted.acquire(timeout=300)
    one.close()


def in_child(work: Callable[[], None]) -> None:
    """Do work in the child of a fork, which is to end well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_child_of_a_fork_hears_its_own_sockets_and_takes_none_from_its_parent(tmp_path: Path) -> None:
    acceptor = Acceptor()
    ours = Listening(acceptor, tmp_path / "ours")

    def work() -> None:
        own = Listening(acceptor, tmp_path / "own")
        own.connect()
        assert own.accepted.acquire(timeout=300)
        own.close()
        ours.close()  # as at the end of a process that knows nothing of the fork

    in_child(work)
    ours.connect()
    assert ours.accepted.acquire(timeout=300)
    ours.close()


class Unwatchable(socket.socket):
    """Its descriptor cannot be watched: stands for a process that has as many watched ones as its user may have."""

    def fileno(self) -> int:
        return self.file.fileno()

    file: IO[bytes]


def test_a_socket_that_cannot_be_watched_is_refused_and_may_be_removed(tmp_path: Path) -> None:
    acceptor = Acceptor()
    stays = Listening(acceptor, tmp_path / "stays")
    with (tmp_path / "file").open("wb") as file, Unwatchable(socket.AF_UNIX) as refused:
        refused.file = file
        with pytest.raises(PermissionError):
            acceptor.add(refused, lambda: True)
        acceptor.remove(refused)
    stays.connect()
    assert stays.accepted.acquire(timeout=300)
    stays.close()
